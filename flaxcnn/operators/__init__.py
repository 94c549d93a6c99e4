"""What networks compute with: functions of arrays, in plain JAX and as primitives of our own.

`convolution`, `normalisation`, `pooling` and `matrix_product`, beside this folder, choose among
them; `cpu` computes some of them by oneDNN.
"""
