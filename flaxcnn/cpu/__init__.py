"""What computes on a CPU in XLA's place: oneDNN, and the primitives by which JAX calls it.

`convolution`, `normalisation`, `pooling` and `inference` choose when. `written` is of memory alone.
"""
