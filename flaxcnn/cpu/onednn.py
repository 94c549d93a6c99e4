"""oneDNN, the library that torch computes convolutions with on a CPU: its C interface by ctypes.

Version 3, `oneapi/dnnl/dnnl.h`: finding it, what it makes and calling it, as `plans` does.
`onednn_convolution`, `onednn_product`, `onednn_norm`, `onednn_pool` and `onednn_layers` say what it
computes, in float32, and in bfloat16 what a processor has instructions for.

The library works with threads of its own for each thread that calls it, as many as the process may
use cores or `OMP_NUM_THREADS` says, so that one call at a time is run, by Python under `lock`, by
`repeats` under a lock of its own.
"""

import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from flaxcnn.cpu import compiled

PACKAGE = "onednn-cpu-gomp"

Shape = tuple[int, ...]

lock = threading.Lock()


def available() -> bool:
    """Whether the library is there and is one that this module can call."""
    return library() is not None


def computes(dtype: Any) -> bool:
    """Whether it does so in this type, by instructions that this processor has for it."""
    found = library() if available() else None
    return found is not None and np.dtype(dtype).name in found.types


def at_most_avx2() -> bool:
    """Whether the library is there and has this processor's AVX2, and no AVX-512."""
    found = library()
    return found is not None and found.at_most_avx2


def version() -> str:
    """Of the library, "" where there is none."""
    found = library()
    return found.version if found else ""


# -------------------------------------------------------------------------------- the library
_ANY, _CPU, _OF_USER = 1, 1, 1
_OPENMP = 2  # dnnl_runtime_omp
# Of a processor's instructions (dnnl_cpu_isa_...); those that have more have the bits.
_AVX2, _AVX512, _AVX512_BF16 = 0x7, 0x27, 0xE7
_IMPLEMENTATION = 8  # dnnl_query_impl_info_str


class Type(IntEnum):
    """Of the elements of an array (dnnl_data_type_t)."""

    BFLOAT16 = 2
    FLOAT32 = 3

    @classmethod
    def of(cls, dtype: Any) -> "Type":
        """Raises ValueError for another type."""
        name = "another type" if dtype is None else np.dtype(dtype).name
        if name.upper() not in cls.__members__:
            raise ValueError(f"oneDNN computes float32 and bfloat16 here, not {name}")
        return cls[name.upper()]


class Argument(IntEnum):
    """What a primitive is called with (DNNL_ARG_...)."""

    SOURCE = 1
    TARGET = 17
    WEIGHTS = 33
    BIAS = 41
    MEAN = 49
    VARIANCE = 50
    SCALE = 51
    SHIFT = 52
    WORKSPACE = 64
    SCRATCHPAD = 80
    SOURCE_GRADIENT = 129
    TARGET_GRADIENT = 145
    WEIGHTS_GRADIENT = 161
    SCALE_GRADIENT = 255
    SHIFT_GRADIENT = 256


class Query(IntEnum):
    """Whose layout a primitive's description is asked for."""

    WEIGHTS = 131
    WEIGHTS_GRADIENT = 132
    WORKSPACE = 135
    SCRATCHPAD = 136


class _Version(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
        ("patch", ctypes.c_int),
        ("hash", ctypes.c_char_p),
        ("cpu_runtime", ctypes.c_uint),
        ("gpu_runtime", ctypes.c_uint),
    )


class ArgumentAndMemory(ctypes.Structure):
    """What a primitive is given (dnnl_exec_arg_t)."""

    _fields_ = (("index", ctypes.c_int), ("memory", ctypes.c_void_p))


class Library:
    """The loaded library: what takes long releases the GIL, what is done at once keeps it."""

    def __init__(self, path: Path) -> None:
        with _threads_that_wait_briefly():
            self._slow = ctypes.CDLL(str(path))
        self._quick = ctypes.PyDLL(str(path))
        self._quick.dnnl_version.restype = ctypes.POINTER(_Version)
        self._quick.dnnl_primitive_desc_query_md.restype = ctypes.c_void_p
        self._quick.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        self.threads = self._quick.omp_get_max_threads
        self._set_threads = self._quick.omp_set_num_threads
        version = self._quick.dnnl_version().contents
        self.version = f"{version.major}.{version.minor}.{version.patch}"
        self.fitting = version.major == 3 and version.cpu_runtime == _OPENMP
        self.fitting = self.fitting and self._has_all_its_threads()
        self.types = {"float32"}
        self.at_most_avx2 = self._has(_AVX2) and not self._has(_AVX512)
        if self.fitting:
            if self._has(_AVX512_BF16):
                self.types.add("bfloat16")
            self.engine = self.create("engine_create", _CPU, ctypes.c_size_t(0))
            self.stream = self.create("stream_create", self.engine, 1)
            # Called hundreds of times in a step, so as they are: they answer what `check` is for.
            pointer = ctypes.c_void_p
            self.place = self._quick.dnnl_memory_set_data_handle
            self.place.argtypes = (pointer, pointer)
            self.execute = self._slow.dnnl_primitive_execute
            # Without giving the GIL away, which to get back may take longer than this.
            self.execute_quickly = self._quick.dnnl_primitive_execute
            for execute in (self.execute, self.execute_quickly):
                execute.argtypes = (pointer, pointer, ctypes.c_int, pointer)
            compiled.use(self.place, self.execute, self._quick)

    def _has(self, instructions: int) -> bool:
        return int(self._quick.dnnl_get_effective_cpu_isa()) & instructions == instructions

    def _has_all_its_threads(self) -> bool:
        """Whether OpenMP has as many as it says: with fewer, sums lack parts or never end."""
        several = self.threads()
        openmp = self._quick
        limited = openmp.omp_get_thread_limit() < several or openmp.omp_get_max_active_levels() < 1
        return several == 1 or not (limited or openmp.omp_get_dynamic())

    def create(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        """What a `dnnl_..._create` makes, until it is destroyed."""
        made = ctypes.c_void_p()
        self.do(function, ctypes.byref(made), *arguments)
        return made

    def do(self, function: str, *arguments: Any) -> None:
        check(function, getattr(self._quick, f"dnnl_{function}")(*arguments))

    @contextmanager
    def one_thread(self, wanted: bool) -> Iterator[None]:
        """If wanted, what is made within, or executed, is by the calling thread alone.

        A primitive is executed as it was made: it divides its work when it is made.
        """
        if not wanted:
            yield
            return
        several = self.threads()
        self._set_threads(1)
        try:
            yield
        finally:
            self._set_threads(several)

    def chosen_layout(self, description: ctypes.c_void_p, query: Query) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._quick.dnnl_primitive_desc_query_md(description, query, 0))

    def implementation(self, description: ctypes.c_void_p) -> str:
        """The name of the one that a primitive's description is of."""
        name = ctypes.c_char_p()
        where = (description, _IMPLEMENTATION, 0, ctypes.byref(name))
        self.do("primitive_desc_query", *where)
        return (name.value or b"").decode()

    def next_implementation(self, description: ctypes.c_void_p) -> bool:
        """Makes the description one of the next; False, and nothing, if it is of the last."""
        return bool(self._quick.dnnl_primitive_desc_next_impl(description) == 0)

    def equal(self, a: ctypes.c_void_p, b: ctypes.c_void_p) -> bool:
        return bool(self._quick.dnnl_memory_desc_equal(a, b))

    def size(self, layout: ctypes.c_void_p) -> int:
        return int(self._quick.dnnl_memory_desc_get_size(layout))


@cache
def library() -> Library | None:
    """The one that is installed, if it can be used here."""
    path = _path()
    if path is None:
        return None
    try:
        found = Library(path)
    # libgomp, which systems without a compiler may lack; or a library that is not as it should be.
    except (OSError, AttributeError, RuntimeError):
        return None
    return found if found.fitting else None


def _path() -> Path | None:
    """Of the library in the environment, where `PACKAGE` puts it."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    if sys.platform != "linux":
        return None
    found = [Path(str(file.locate())) for file in files if file.name == "libdnnl.so.3"]
    return found[0].resolve() if found else None


# GCC's OpenMP reads them when it is loaded.
_WAITING = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "1000"}


@contextmanager
def _threads_that_wait_briefly() -> Iterator[None]:
    """The library's threads wait in a loop for the next of their work, and soon sleep.

    To wake them takes up to 0.1 ms, at the beginning and at the end of each call; if they waited
    for long they would take XLA's cores. Without `active` the loop has a tenth of the rounds where
    there are more threads than cores, as where several of XLA's call.
    """
    if os.environ.keys() & _WAITING.keys():  # the user's own choice
        yield
        return
    os.environ.update(_WAITING)
    try:
        yield
    finally:
        for name in _WAITING:
            del os.environ[name]


def check(function: str, status: int) -> None:
    """Raises RuntimeError if that is what the library answers where it fails."""
    if status:
        raise RuntimeError(f"oneDNN: dnnl_{function} answered {status}")


# ------------------------------------------------------------------------------- what it makes
class Made:
    """What the library made for one primitive, destroyed with it.

    Raises:
        RuntimeError: the library is not installed.
    """

    def __init__(self) -> None:
        found = library()
        if found is None:
            raise RuntimeError(f"oneDNN is not installed (the package {PACKAGE})")
        self.library = found
        self._all: list[tuple[str, ctypes.c_void_p]] = []
        weakref.finalize(self, _destroy, found, self._all).atexit = False

    def __call__(self, kind: str, function: str, *arguments: Any) -> ctypes.c_void_p:
        made = self.library.create(function, *arguments)
        self._all.append((kind, made))
        return made

    def layout(self, shape: Shape, strides: Shape, of: Type = Type.FLOAT32) -> ctypes.c_void_p:
        sizes = (len(shape), integers(shape), self._checked(of), integers(strides))
        return self("memory_desc", "memory_desc_create_with_strides", *sizes)

    def any_layout(self, shape: Shape, of: Type = Type.FLOAT32) -> ctypes.c_void_p:
        """One of the library's choice."""
        sizes = (len(shape), integers(shape), self._checked(of), _ANY)
        return self("memory_desc", "memory_desc_create_with_tag", *sizes)

    def _checked(self, of: Type) -> Type:
        """Of a program that was made on another processor, say, it may be one that is slow here.

        Raises:
            ValueError: this processor has no instructions for the type.
        """
        name = of.name.lower()
        if name not in self.library.types:
            lacks = f"this processor has no instructions for {name}"
            raise ValueError(f"{lacks}; compile the program here")
        return of

    def memory(self, layout: ctypes.c_void_p) -> ctypes.c_void_p:
        """Nowhere as yet: `Library.place` says where."""
        return self("memory", "memory_create", layout, self.library.engine, ctypes.c_void_p(0))

    def attributes(self) -> ctypes.c_void_p:
        """Of a primitive that works in memory it is given."""
        made = self("primitive_attr", "primitive_attr_create")
        self.library.do("primitive_attr_set_scratchpad_mode", made, _OF_USER)
        return made

    def primitive(self, description: ctypes.c_void_p) -> ctypes.c_void_p:
        return self("primitive", "primitive_create", description)


def _destroy(library: Library, everything: list[tuple[str, ctypes.c_void_p]]) -> None:
    for kind, made in reversed(everything):
        library.do(f"{kind}_destroy", made)


def integers(values: Shape) -> Any:
    """As the library takes several."""
    return (ctypes.c_int64 * len(values))(*values)
