"""What computes on a CPU in XLA's place: oneDNN, and the primitives by which JAX calls it.

`convolution`, `normalisation`, `pooling` and `inference` choose when. XLA calls `xla_handlers`, by
which what oneDNN does in a call is prepared, as one of `plans`, and `repeats`, which follows those
without Python. `winograd` has convolutions that are faster than the library's, and `compiled` is
what is written in C. `written` is of memory alone.
"""
