"""Compiling little, for programs of one device that run a few times and are compared or must learn.

Compiling would take most of their tests. Not for programs of several devices: with these options
jaxlib 0.10.2 computed other parameters for eight devices on one core, and for them only.
"""

import jax

# For `jax.jit(compiler_options=)`: no optimisation of machine code, and loops written by the older
# emitter. A step of EfficientNet-B0 is compiled in a fifth of the time.
OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 11):  # whose jaxlib has no older emitter any more
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
