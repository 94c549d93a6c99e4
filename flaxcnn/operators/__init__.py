"""What networks compute with: functions of arrays, in plain JAX and as primitives of our own.

`convolution` and `pooling`, beside this folder, and `blocks` choose among them; `cpu` computes some
of them by oneDNN.
"""
