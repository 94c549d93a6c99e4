"""What a C compiler made of `repeats.c` and `winograd.c` when flaxcnn was installed, if one did.

The first makes XLA's calls of oneDNN that Python has prepared; without it Python makes each, which
takes 0.05 to 0.1 ms of a call, and the GIL. The second computes what `winograd` says; without it
oneDNN does.
"""

import ctypes
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import Any

SOURCES = [Path(__file__).with_name(name) for name in ("repeats.c", "winograd.c")]
COMPILED = Path(__file__).with_name("libcompiled.so")

POINTER = ctypes.c_void_p


@cache
def library() -> ctypes.CDLL | None:
    """None where there is nothing, or what there is was made of another version of its sources."""
    try:
        found = ctypes.CDLL(str(COMPILED))
        checksum = ctypes.c_uint32.in_dll(found, "sources_checksum").value
    except (OSError, ValueError):  # no compiler, or a file that was made elsewhere
        return None
    if checksum != zlib.crc32(b"".join(source.read_bytes() for source in SOURCES)):
        names = " and ".join(source.name for source in SOURCES)
        warnings.warn(f"{COMPILED} is not of {names}: install flaxcnn again", stacklevel=2)
        return None
    found.use_library.argtypes = (POINTER,) * 4
    found.use_openmp.argtypes = (POINTER,) * 4
    found.handler_for.argtypes = (ctypes.c_int64, POINTER)
    found.handler_for.restype = POINTER
    found.repeat.argtypes = (ctypes.c_int64, POINTER, POINTER)
    found.run_plan.argtypes = (POINTER, POINTER)
    return found


def use(place: Any, execute: Any, openmp: Any) -> None:
    """Says which functions are oneDNN's, and of which library its OpenMP's are."""
    found = library()
    if found is not None:
        threads = (openmp.omp_get_max_threads, openmp.omp_set_num_threads)
        found.use_library(*map(_address, (place, execute, *threads)))
        within = (openmp.omp_get_thread_num, openmp.omp_get_num_threads)
        found.use_openmp(*map(_address, (openmp.GOMP_parallel, openmp.GOMP_barrier, *within)))


def _address(function: Any) -> ctypes.c_void_p:
    return ctypes.cast(function, POINTER)
