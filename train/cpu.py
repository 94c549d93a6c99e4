"""A process that computes on the CPU: its memory and XLA's flags, set so that it is fast.

To be called by programs, not by a library, and before JAX starts.
"""

import ctypes
import importlib.util
import mmap
import os
import platform
import sys
from importlib import metadata

from flaxcnn.convolution import PLAIN

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_FLAGS = {
    # XLA's other CPU library for convolutions loses to Eigen: of a training step of resnet18 at 32
    # pixels, batch 128, it took 12 %, of resnet50 at 224 pixels, batch 8, 15 %.
    "--xla_cpu_experimental_ynn_fusion_type": "-individual_convolution",
    # Without it every parameter that is updated in place is copied first, in each step: of alexnet,
    # batch 8, 228 MB and 7 to 19 % of the time, of googlenet 7 to 11 %.
    "--xla_cpu_copy_insertion_use_region_analysis": "true",
    # Where the processor has AVX-512: of efficientnet_b0, batch 8, 6 %, of most others nothing.
    "--xla_cpu_prefer_vector_width": "512",
}
# Versions of jaxlib: in another, an unknown flag ends the process.
KNOWN_TO = ("0.10.2", "0.11.0", "0.11.1", "0.11.2", "0.12.0", "0.12.0.1")


def prepare() -> None:
    """Does all that this module can, if JAX can run on nothing but a CPU.

    Nothing with `FLAXCNN_PLAIN_CONVOLUTION=1`, which stands for JAX as everybody has it.
    """
    if PLAIN or _accelerator_installed():
        return
    keep_freed_memory()
    choose_flags()
    # XLA calls oneDNN through Python: beside a thread that computes in Python each convolution
    # would wait for the interpreter, up to 5 ms.
    sys.setswitchinterval(1e-4)


def choose_flags() -> bool:
    """Adds to `XLA_FLAGS`; says whether it did. A flag that is there already stays as it is."""
    given = os.environ.get("XLA_FLAGS", "")
    missing = [f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in given]
    in_a_file = given.strip() != "" and not given.strip().startswith("-")  # which it names
    if metadata.version("jaxlib") not in KNOWN_TO or in_a_file or not missing:
        return False
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
    return True


def keep_freed_memory() -> bool:
    """Has freed memory stay with the process, ready for the next step; says whether it did.

    Glibc gives large blocks back to the kernel, which clears every page when it hands them out
    again: of a step of VGG-16 at 32 pixels, batch 32, on 2 cores that was 0.45 s of 1.3 s. The
    price is that memory stays at its peak and becomes fragmented: there 4.0 GB instead of 3.0 after
    a dozen steps, and 6 to 7 GB in a whole run.

    Huge pages, where the kernel has them for the asking, take another 1 to 10 % off a step.

    To be called before JAX starts its threads: they then share one arena, the only one that can
    grow without mmap.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}  # -1: never trim
    taken = [mallopt(setting, value) for setting, value in settings.items()]
    kept = all(result == 1 for result in taken)
    if kept:
        _ask_for_huge_pages()
    return kept


def _ask_for_huge_pages() -> None:
    """Lets the arena grow, asks for huge pages there, and gives it all back to the arena.

    Nothing is touched, so nothing is taken yet. Memory beyond has small pages.
    """
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 * 3
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    block = libc.malloc(ctypes.c_size_t(size))
    if not block:  # the kernel may not promise so much
        return
    start = -(block // -mmap.PAGESIZE) * mmap.PAGESIZE
    length = (block + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(block))


def _accelerator_installed() -> bool:
    """Whether JAX has a plugin to look for a device with; asking JAX itself would start it."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    plugins = metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
