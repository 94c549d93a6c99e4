"""Convolutions by oneDNN, the library that torch computes them with on a CPU.

Its C interface (version 3, `oneapi/dnnl/dnnl.h`) through ctypes, on arrays in the order of JAX: a
convolution's images [N, H, W, C] and kernel [h, w, C / groups, O]. Products and sums are float32.

A primitive (machine code for one case) is made at its first call and kept. The library works with
threads of its own for each thread that calls it, as many as the process may use cores or
`OMP_NUM_THREADS` says, so that one call at a time is run.
"""

import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from flaxcnn.bilinear import Kind, Shape, Shapes

PACKAGE = "onednn-cpu-gomp"


class Geometry(NamedTuple):
    """A convolution but for the shapes of its arrays."""

    strides: tuple[int, int]
    dilation: tuple[int, int]
    low: tuple[int, int]  # rows and columns of zeros before the image
    high: tuple[int, int]  # and after it
    groups: int

    def as_numbers(self) -> tuple[int, ...]:
        return (*self.strides, *self.dilation, *self.low, *self.high, self.groups)

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> "Geometry":
        pairs = [(numbers[i], numbers[i + 1]) for i in range(0, 8, 2)]
        return cls(pairs[0], pairs[1], pairs[2], pairs[3], numbers[8])


def available() -> bool:
    """Whether the library is there and is one that this module can call."""
    return _library() is not None


def version() -> str:
    """Of the library, "" where there is none."""
    library = _library()
    return library.version if library else ""


def convolve(kind: Kind, geometry: Geometry, shapes: Shapes, addresses: Sequence[int]) -> None:
    """Computes `kind` in place; shapes and addresses are of images, kernel and outputs.

    Raises:
        RuntimeError: the library cannot do this.
    """
    with _lock:
        _primitive(kind, geometry, shapes).run(addresses)


# -------------------------------------------------------------------------------- the library
_ANY, _FLOAT32, _CPU, _DIRECT, _TRAINING, _OF_USER = 1, 3, 1, 1, 64, 1
_OPENMP = 2  # dnnl_runtime_omp
_SOURCE, _TARGET, _SCRATCHPAD = 1, 17, 80  # DNNL_ARG_...
_QUERY_WEIGHTS, _QUERY_WEIGHTS_GRADIENT, _QUERY_SCRATCHPAD = 131, 132, 136
# DNNL_ARG_... of images, kernel and outputs.
_ARGUMENTS = {
    Kind.FORWARD: (1, 33, 17),
    Kind.FIRST_GRADIENT: (129, 33, 145),
    Kind.SECOND_GRADIENT: (1, 161, 145),
}

_lock = threading.Lock()


class _Version(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
        ("patch", ctypes.c_int),
        ("hash", ctypes.c_char_p),
        ("cpu_runtime", ctypes.c_uint),
        ("gpu_runtime", ctypes.c_uint),
    )


class _Argument(ctypes.Structure):
    _fields_ = (("index", ctypes.c_int), ("memory", ctypes.c_void_p))


class _Library:
    """The loaded library: what takes long releases the GIL, what is done at once keeps it."""

    def __init__(self, path: Path) -> None:
        with _sleeping_threads():
            self._slow = ctypes.CDLL(str(path))
        self._quick = ctypes.PyDLL(str(path))
        self._quick.dnnl_version.restype = ctypes.POINTER(_Version)
        self._quick.dnnl_primitive_desc_query_md.restype = ctypes.c_void_p
        self._quick.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        version = self._quick.dnnl_version().contents
        self.version = f"{version.major}.{version.minor}.{version.patch}"
        self.fitting = version.major == 3 and version.cpu_runtime == _OPENMP
        if self.fitting:
            self.engine = self.create("engine_create", _CPU, ctypes.c_size_t(0))
            self.stream = self.create("stream_create", self.engine, 1)

    def create(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        """What a `dnnl_..._create` makes, until it is destroyed."""
        made = ctypes.c_void_p()
        self.do(function, ctypes.byref(made), *arguments)
        return made

    def do(self, function: str, *arguments: Any) -> None:
        _check(function, getattr(self._quick, f"dnnl_{function}")(*arguments))

    def reorder(self, primitive: ctypes.c_void_p, arguments: Any) -> None:
        """Without giving the GIL away, which to get back may take longer than this."""
        self.do("primitive_execute", primitive, self.stream, len(arguments), arguments)
        self.do("stream_wait", self.stream)

    def execute(self, primitive: ctypes.c_void_p, arguments: Any) -> None:
        status = self._slow.dnnl_primitive_execute(
            primitive, self.stream, len(arguments), arguments
        )
        _check("primitive_execute", status)
        self.do("stream_wait", self.stream)

    def chosen_layout(self, description: ctypes.c_void_p, query: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._quick.dnnl_primitive_desc_query_md(description, query, 0))

    def equal(self, a: ctypes.c_void_p, b: ctypes.c_void_p) -> bool:
        return bool(self._quick.dnnl_memory_desc_equal(a, b))

    def size(self, layout: ctypes.c_void_p) -> int:
        return int(self._quick.dnnl_memory_desc_get_size(layout))

    def place(self, memory: ctypes.c_void_p, address: int) -> None:
        self.do("memory_set_data_handle", memory, ctypes.c_void_p(address))


@cache
def _library() -> _Library | None:
    path = _path()
    if path is None:
        return None
    try:
        library = _Library(path)
    # libgomp, which systems without a compiler may lack; or a library that is not as it should be.
    except (OSError, AttributeError, RuntimeError):
        return None
    return library if library.fitting else None


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


@contextmanager
def _sleeping_threads() -> Iterator[None]:
    """The library's threads sleep between calls: waiting in loops they would take XLA's cores.

    OpenMP reads the variable when it is loaded.
    """
    name = "OMP_WAIT_POLICY"
    if name in os.environ:
        yield
        return
    os.environ[name] = "passive"
    try:
        yield
    finally:
        del os.environ[name]


def _check(function: str, status: int) -> None:
    if status:
        raise RuntimeError(f"oneDNN: dnnl_{function} answered {status}")


def _integers(values: Shape) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


# ------------------------------------------------------------------------------ its primitives
class _Made:
    """What the library made for one primitive, destroyed with it."""

    def __init__(self, library: _Library) -> None:
        self.library = library
        self._all: list[tuple[str, ctypes.c_void_p]] = []
        weakref.finalize(self, _destroy, library, self._all).atexit = False

    def __call__(self, kind: str, function: str, *arguments: Any) -> ctypes.c_void_p:
        made = self.library.create(function, *arguments)
        self._all.append((kind, made))
        return made

    def layout(self, shape: Shape, strides: Shape) -> ctypes.c_void_p:
        sizes = (len(shape), _integers(shape), _FLOAT32, _integers(strides))
        return self("memory_desc", "memory_desc_create_with_strides", *sizes)

    def any_layout(self, shape: Shape) -> ctypes.c_void_p:
        """One of the library's choice."""
        sizes = (len(shape), _integers(shape), _FLOAT32, _ANY)
        return self("memory_desc", "memory_desc_create_with_tag", *sizes)

    def memory(self, layout: ctypes.c_void_p) -> ctypes.c_void_p:
        """Nowhere as yet: `_Library.place` says where."""
        return self("memory", "memory_create", layout, self.library.engine, ctypes.c_void_p(0))

    def primitive(self, description: ctypes.c_void_p) -> ctypes.c_void_p:
        return self("primitive", "primitive_create", description)


def _destroy(library: _Library, everything: list[tuple[str, ctypes.c_void_p]]) -> None:
    for kind, made in reversed(everything):
        library.do(f"{kind}_destroy", made)


class _Primitive:
    """One convolution, and the kernel's way to the layout that the library wants and back."""

    def __init__(self, library: _Library, kind: Kind, geometry: Geometry, shapes: Shapes) -> None:
        images, kernel, outputs = shapes
        made = _Made(library)
        ours = made.layout(*_kernel_layout(kernel, geometry.groups))
        layouts = (
            made.layout(*_image_layout(images)),
            made.any_layout(_kernel_layout(kernel, geometry.groups)[0]),
            made.layout(*_image_layout(outputs)),
        )
        description = _describe(made, kind, geometry, layouts)
        query = _QUERY_WEIGHTS_GRADIENT if kind is Kind.SECOND_GRADIENT else _QUERY_WEIGHTS
        wanted = library.chosen_layout(description, query)
        scratchpad = library.chosen_layout(description, _QUERY_SCRATCHPAD)

        self._library, self._made = library, made
        self._primitive = made.primitive(description)
        self._images, self._outputs = made.memory(layouts[0]), made.memory(layouts[2])
        self._wanted, self._ours = made.memory(wanted), made.memory(ours)
        self._scratchpad = made.memory(scratchpad)
        self._scratchpad_size = library.size(scratchpad)
        memories = (self._images, self._wanted, self._outputs)
        self._arguments = _arguments(
            *zip(_ARGUMENTS[kind], memories, strict=True), (_SCRATCHPAD, self._scratchpad)
        )
        self._before = self._after = None
        self._wanted_size = 0
        if library.equal(wanted, ours):
            return
        self._wanted_size = library.size(wanted)
        if kind is Kind.SECOND_GRADIENT:
            self._after = _reorder(made, wanted, ours)
            self._after_arguments = _arguments((_SOURCE, self._wanted), (_TARGET, self._ours))
        else:
            self._before = _reorder(made, ours, wanted)
            self._before_arguments = _arguments((_SOURCE, self._ours), (_TARGET, self._wanted))

    def run(self, addresses: Sequence[int]) -> None:
        library = self._library
        images, kernel, outputs = addresses
        working = _workspace(self._scratchpad_size + _PAGE + self._wanted_size)
        library.place(self._images, images)
        library.place(self._outputs, outputs)
        library.place(self._scratchpad, working)
        library.place(self._ours, kernel)
        between = _rounded(working + self._scratchpad_size)
        library.place(self._wanted, between if self._wanted_size else kernel)
        if self._before is not None:
            library.reorder(self._before, self._before_arguments)
        library.execute(self._primitive, self._arguments)
        if self._after is not None:
            library.reorder(self._after, self._after_arguments)


@lru_cache(maxsize=2048)  # of the deepest network a training step needs 500
def _primitive(kind: Kind, geometry: Geometry, shapes: Shapes) -> _Primitive:
    library = _library()
    if library is None:
        raise RuntimeError(f"oneDNN is not installed (the package {PACKAGE})")
    return _Primitive(library, kind, geometry, shapes)


def _describe(
    made: _Made,
    kind: Kind,
    geometry: Geometry,
    layouts: tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p],
) -> ctypes.c_void_p:
    images, kernel, outputs = layouts
    arrays: list[ctypes.c_void_p | None]
    # Here a dilation of 0 is none.
    steps = (geometry.strides, tuple(d - 1 for d in geometry.dilation), geometry.low, geometry.high)
    steps_given = [_integers(step) for step in steps]
    attributes = made("primitive_attr", "primitive_attr_create")
    made.library.do("primitive_attr_set_scratchpad_mode", attributes, _OF_USER)
    engine, no_bias = made.library.engine, None
    forward = made(
        "primitive_desc",
        "convolution_forward_primitive_desc_create",
        *(engine, _TRAINING, _DIRECT, images, kernel, no_bias, outputs, *steps_given, attributes),
    )
    if kind is Kind.FORWARD:
        return forward
    if kind is Kind.FIRST_GRADIENT:
        name, arrays = "data", [images, kernel, outputs]
    else:
        name, arrays = "weights", [images, kernel, no_bias, outputs]
    return made(
        "primitive_desc",
        f"convolution_backward_{name}_primitive_desc_create",
        *(engine, _DIRECT, *arrays, *steps_given, forward, attributes),
    )


def _reorder(made: _Made, source: ctypes.c_void_p, target: ctypes.c_void_p) -> ctypes.c_void_p:
    engine = made.library.engine
    description = made(
        "primitive_desc", "reorder_primitive_desc_create", source, engine, target, engine, None
    )
    return made.primitive(description)


def _image_layout(shape: Shape) -> tuple[Shape, Shape]:
    """Shape as N, C, H, W with the strides of N, H, W, C, in elements."""
    batch, height, width, channels = shape
    strides = (height * width * channels, 1, width * channels, channels)
    return (batch, channels, height, width), strides


def _kernel_layout(shape: Shape, groups: int) -> tuple[Shape, Shape]:
    """Shape as [groups,] O, C, h, w with the strides of h, w, C, O, in elements."""
    height, width, channels, outputs = shape
    strides = (1, outputs, width * channels * outputs, channels * outputs)
    if groups == 1:
        return (outputs, channels, height, width), strides
    within = outputs // groups
    return (groups, within, channels, height, width), (within, *strides)


def _arguments(*pairs: tuple[int, ctypes.c_void_p]) -> Any:
    return (_Argument * len(pairs))(*(_Argument(index, memory) for index, memory in pairs))


# ----------------------------------------------------------------------- memory for all of them
_PAGE = 4096
_working: Any = (ctypes.c_char * 0)()


def _workspace(size: int) -> int:
    """The address of so many bytes, of a page's beginning; the same for all, under the lock."""
    global _working
    if ctypes.sizeof(_working) < size + _PAGE:
        _working = (ctypes.c_char * (size + _PAGE))()
    return _rounded(ctypes.addressof(_working))


def _rounded(address: int) -> int:
    return -(address // -_PAGE) * _PAGE
