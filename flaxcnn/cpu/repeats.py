"""What a C compiler made of `repeats.c` when the package was installed, if there was one.

It makes XLA's calls of oneDNN that Python has prepared; without it Python makes each, which takes
0.05 to 0.1 ms of a call, and the GIL.
"""

import ctypes
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("repeats.c")
COMPILED = SOURCE.with_name("librepeats.so")

_POINTER = ctypes.c_void_p
_used = True


@contextmanager
def switched_off() -> Iterator[None]:
    """Within, Python makes the calls that have not been handed over, and hands over none.

    While nothing else is computed: Python's calls and those of compiled code do not wait for each
    other then. To measure, and to compare.
    """
    global _used
    _used = False
    try:
        yield
    finally:
        _used = True


@cache
def compiled() -> ctypes.CDLL | None:
    """None where there is nothing, or what there is was made of another version of its source."""
    try:
        found = ctypes.CDLL(str(COMPILED))
        checksum = ctypes.c_uint32.in_dll(found, "source_checksum").value
    except (OSError, ValueError):  # no compiler, or a file that was made elsewhere
        return None
    if checksum != zlib.crc32(SOURCE.read_bytes()):
        warnings.warn(f"{COMPILED} is not of {SOURCE.name}: install flaxcnn again", stacklevel=2)
        return None
    found.use_library.argtypes = (_POINTER,) * 4
    found.handler_for.argtypes = (ctypes.c_int64, _POINTER)
    found.handler_for.restype = _POINTER
    found.repeat.argtypes = (ctypes.c_int64, _POINTER, _POINTER)
    found.run_plan.argtypes = (_POINTER, _POINTER)
    return found


def use(*functions: Any) -> None:
    """Says which functions are oneDNN's: set_data_handle, execute, get_threads, set_threads."""
    if (library := compiled()) is not None:
        library.use_library(*(ctypes.cast(function, _POINTER) for function in functions))


def handler_for(target: int, by_python: Any) -> Any:
    """What XLA is to call for the target of this number: `by_python`, where nothing else is."""
    library = compiled()
    address = library and library.handler_for(target, ctypes.cast(by_python, _POINTER))
    return type(by_python)(address) if address else by_python


def repeat(target: int, frame: int, plan: Any) -> None:
    """Has calls like that of XLA's `frame` made as `plan` says, without Python."""
    library = compiled()
    if library is None or not _used:
        return
    # For good, as a call may be under way even while the interpreter ends.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(plan))
    if not library.repeat(target, frame, plan.words):
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(plan))


def run(words: Any, addresses: Sequence[int]) -> int | None:
    """Makes the calls of a plan; oneDNN's answer, or None where Python has to make them."""
    library = compiled()
    if library is None or not _used:
        return None
    answer: int = library.run_plan(words, (_POINTER * len(addresses))(*addresses))
    return answer
