"""XLA's calls to Python: the few structures of its foreign-function interface that they need.

From version 0 of `xla/ffi/api/c_api.h` (in the folder that `jax.ffi.include_dir()` names); its
structures only grow, at their ends.

A convolution takes the caches for itself, so that of the call after it all that Python touches
comes from memory: with an object made of each structure a call takes 0.1 ms, and a step has
hundreds. So a call reads words, and what follows from the shapes of its arrays is made once.
"""

import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxcnn.cpu import repeats
from flaxcnn.cpu.plans import Plan

_METADATA = 1  # XLA_FFI_Extension_Metadata
_INTERNAL = 13  # XLA_FFI_Error_Code_INTERNAL
# XLA_FFI_DataType
_TYPES = {6: np.dtype(np.uint8), 11: np.dtype(np.float32), 16: np.dtype(jnp.bfloat16)}


class Array(NamedTuple):
    """An argument or a result but for its memory; in row-major order."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def check(self, shape: tuple[int, ...], dtype: Any) -> None:
        """Of a program from a file, say, made where the library keeps something otherwise.

        Raises:
            ValueError: it is another array; the library would go behind its end.
        """
        if self.shape != shape or self.dtype != dtype:
            found = f"an array {self.shape} of {self.dtype}, not {shape} of {np.dtype(dtype)}"
            raise ValueError(f"{found}; compile the program here")

    def at(self, address: int) -> np.ndarray:
        """XLA's own memory."""
        size = math.prod(self.shape) * self.dtype.itemsize
        memory: Any = (ctypes.c_char * size).from_address(address)
        return np.ndarray(self.shape, self.dtype, memory)


# Computes; called with the addresses of the arguments, and then of the results.
Run = Callable[[Sequence[int]], None]
# Makes that for arguments and results, and the integers of the attribute.
Prepare = Callable[[Sequence[Array], Sequence[Array], Sequence[int]], Run]

_MOST = 4096  # calls that a handler keeps; the deepest network has 500 in a step
_thread = threading.local()  # of those that XLA calls from
_handlers: list[Any] = []  # XLA keeps their addresses


def register(name: str, prepare: Prepare) -> None:
    """Has XLA call what `prepare` makes for `jax.ffi.ffi_call(name, ...)` on a CPU, on any thread.

    The calls have one attribute, an array of int64. With another one, or arrays of other shapes or
    types, `prepare` is called anew. What is raised becomes the error of the program that called it.
    """
    known: dict[tuple[Any, ...], Run] = {}

    def handle(frame: int) -> int | None:
        if _memory[frame // _WORD + _EXTENSION_AT] and _is_question(_frame(frame).extension):
            return None
        try:
            _keep_thread()
            key, addresses = _read(frame // _WORD)
            run = known.get(key)
            if run is None:
                if len(known) >= _MOST:  # more where several threads prepare
                    known.clear()
                run = known[key] = prepare(*_described(key))
            run(addresses)
            if isinstance(run, Plan):  # which compiled code can follow, as it cannot follow Python
                repeats.repeat(target, frame, run)
        except BaseException as error:  # KeyboardInterrupt too: no answer would be a success
            return _error(_frame(frame), f"{name}: {type(error).__name__}: {error}")
        return None

    target, by_python = len(_handlers), _HANDLER(handle)
    handler = repeats.handler_for(target, by_python)
    _handlers.append((by_python, handler))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")


def _keep_thread() -> None:
    """Has Python know this thread of XLA's from now on.

    It would make, and drop, what it keeps for a thread in each call: of a prediction of
    efficientnet_b0, batch 1, that was 7 %.
    """
    if not hasattr(_thread, "kept"):
        _thread.kept = True
        ctypes.pythonapi.PyGILState_Ensure()


def _is_question(extension: int) -> bool:
    """Whether XLA only asks, as it does at registration, of which version a handler is."""
    question = ctypes.cast(extension, ctypes.POINTER(_Metadata)).contents
    if question.kind != _METADATA:
        return False
    version = question.answer.contents.version
    version.major, version.minor = 0, 1
    return True


def _described(key: tuple[Any, ...]) -> tuple[list[Array], list[Array], tuple[int, ...]]:
    """Arguments, results and numbers, of what `_read` has of them."""
    count, numbers, *pairs = key
    arrays = []
    for dtype, sizes in zip(pairs[::2], pairs[1::2], strict=True):
        if dtype not in _TYPES:
            raise ValueError(f"XLA's type {dtype}, not uint8, float32 and bfloat16 here")
        arrays.append(Array(_integers(sizes), _TYPES[dtype]))
    return arrays[:count], arrays[count:], _integers(numbers)


def _integers(words: bytes) -> tuple[int, ...]:
    return tuple(memoryview(words).cast("q"))


def _error(frame: Any, message: str) -> int | None:
    text = _ErrorText(ctypes.sizeof(_ErrorText), None, message.encode(), _INTERNAL)
    pointer: int | None = frame.api.contents.create_error(ctypes.byref(text))
    return pointer


# -------------------------------------------------------------------------------- the structures
# What they begin with.
_SIZE, _EXTENSION = ("struct_size", ctypes.c_size_t), ("extension", ctypes.c_void_p)


class _Version(ctypes.Structure):
    _fields_ = (_SIZE, _EXTENSION, ("major", ctypes.c_int), ("minor", ctypes.c_int))


class _Answer(ctypes.Structure):
    _fields_ = (_SIZE, ("version", _Version))


class _Metadata(ctypes.Structure):
    _fields_ = (
        _SIZE,
        ("kind", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("answer", ctypes.POINTER(_Answer)),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        _SIZE,
        _EXTENSION,
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dimensions", ctypes.POINTER(ctypes.c_int64)),
    )


class _Array(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int),
        ("size", ctypes.c_size_t),
        ("data", ctypes.POINTER(ctypes.c_int64)),
    )


class _Items(ctypes.Structure):  # XLA_FFI_Args, XLA_FFI_Rets
    _fields_ = (
        _SIZE,
        _EXTENSION,
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("items", ctypes.POINTER(ctypes.c_void_p)),
    )


class _NamedItems(ctypes.Structure):  # XLA_FFI_Attrs
    _fields_ = (
        _SIZE,
        _EXTENSION,
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
        ("items", ctypes.POINTER(ctypes.c_void_p)),
    )


class _ErrorText(ctypes.Structure):
    _fields_ = (_SIZE, _EXTENSION, ("message", ctypes.c_char_p), ("code", ctypes.c_int))


class _Api(ctypes.Structure):
    _fields_ = (
        _SIZE,
        _EXTENSION,
        ("version", _Version),
        ("internal", ctypes.c_void_p),
        ("create_error", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorText))),
    )


class _Frame(ctypes.Structure):  # XLA_FFI_CallFrame
    _fields_ = (
        _SIZE,
        _EXTENSION,
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("arguments", _Items),
        ("results", _Items),
        ("attributes", _NamedItems),
    )


_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


def _frame(address: int) -> Any:
    return _Frame.from_address(address)


# ------------------------------------------------------------------------ a call, word by word
_WORD = 8  # bytes, of which all addresses here are multiples
# All of the process's memory.
_memory = (ctypes.c_int64 * (1 << 59)).from_address(0)
_bytes = (ctypes.c_char * (1 << 62)).from_address(0)
_HALF = (1 << 32) - 1  # of a word: an integer of C's, behind which nothing is said


def _at(structure: Any, field: str) -> int:
    return int(getattr(structure, field).offset) // _WORD


_EXTENSION_AT = _at(_Frame, "extension")
_ARGUMENTS_AT = _at(_Frame, "arguments") + _at(_Items, "size")  # size, types, items
_RESULTS_AT = _at(_Frame, "results") + _at(_Items, "size")
_ATTRIBUTES_AT = _at(_Frame, "attributes") + _at(_NamedItems, "items")
_TYPE_AT = _at(_Buffer, "dtype")  # dtype, data, rank, dimensions
_SIZE_AT = _at(_Array, "size")  # size, data


def _read(frame: int) -> tuple[tuple[Any, ...], list[int]]:
    """What tells calls apart, and the addresses of arguments and results."""
    memory, word = _memory, _WORD
    count, _, items = memory[frame + _ARGUMENTS_AT : frame + _ARGUMENTS_AT + 3]
    pointers = memory[items // word : items // word + count]
    results, _, items = memory[frame + _RESULTS_AT : frame + _RESULTS_AT + 3]
    pointers += memory[items // word : items // word + results]
    attribute = memory[memory[frame + _ATTRIBUTES_AT] // word] // word + _SIZE_AT
    size, numbers = memory[attribute : attribute + 2]
    key = [count, _bytes[numbers : numbers + size * word]]
    addresses = []
    for pointer in pointers:
        buffer = pointer // word + _TYPE_AT
        dtype, address, rank, sizes = memory[buffer : buffer + 4]
        key += (dtype & _HALF, _bytes[sizes : sizes + rank * word])
        addresses.append(address)
    return tuple(key), addresses
