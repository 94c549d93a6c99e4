"""XLA's calls to Python: the few structures of its foreign-function interface that they need.

From version 0 of `xla/ffi/api/c_api.h` (in the folder that `jax.ffi.include_dir()` names); its
structures only grow, at their ends.
"""

import ctypes
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_METADATA = 1  # XLA_FFI_Extension_Metadata
_INTERNAL = 13  # XLA_FFI_Error_Code_INTERNAL
# XLA_FFI_DataType
_TYPES = {6: np.dtype(np.uint8), 11: np.dtype(np.float32), 16: np.dtype(jnp.bfloat16)}


class Buffer(NamedTuple):
    """An array of XLA's, in row-major order."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype | None  # None for what no handler takes

    def check(self, shape: tuple[int, ...], dtype: Any) -> None:
        """Of a program from a file, say, made where the library keeps something otherwise.

        Raises:
            ValueError: it is another array; the library would go behind its end.
        """
        if self.shape != shape or self.dtype != dtype:
            wanted = dtype if dtype is None else np.dtype(dtype)
            found = f"an array {self.shape} of {self.dtype}"
            raise ValueError(f"{found}, not {shape} of {wanted}; compile the program here")

    def as_array(self) -> np.ndarray:
        """XLA's own memory.

        Raises:
            ValueError: it is of another type.
        """
        if self.dtype is None:
            raise ValueError(f"an array {self.shape} of a type that is not known here")
        size = math.prod(self.shape) * self.dtype.itemsize
        memory = memoryview((ctypes.c_char * size).from_address(self.address))
        return np.frombuffer(memory, self.dtype).reshape(self.shape)


# Called with the arguments, the results, and the integers of the attribute.
Function = Callable[[list[Buffer], list[Buffer], tuple[int, ...]], None]

_thread = threading.local()  # of those that XLA calls from
_handlers: list[Any] = []  # XLA keeps their addresses


def register(name: str, function: Function) -> None:
    """Has XLA call `function` for `jax.ffi.ffi_call(name, ...)` on a CPU, from any thread.

    The calls have one attribute, an array of int64. What `function` raises becomes
    the error of the program that called it.
    """

    def handle(pointer: Any) -> int | None:
        frame = pointer.contents
        if frame.extension and _is_question(frame.extension):
            return None
        try:
            _keep_thread()
            arguments, results = _buffers(frame.arguments), _buffers(frame.results)
            attribute = _Array.from_address(frame.attributes.items[0])
            numbers = tuple(attribute.data[: attribute.size])
            function(arguments, results, numbers)
        except BaseException as error:  # KeyboardInterrupt too: no answer would be a success
            return _error(frame, f"{name}: {type(error).__name__}: {error}")
        return None

    handler = _HANDLER(handle)
    _handlers.append(handler)
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


def _buffers(items: Any) -> list[Buffer]:
    raw = [_Buffer.from_address(items.items[i]) for i in range(items.size)]
    return [
        Buffer(buffer.data, tuple(buffer.dimensions[: buffer.rank]), _TYPES.get(buffer.dtype))
        for buffer in raw
    ]


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


_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Frame))
