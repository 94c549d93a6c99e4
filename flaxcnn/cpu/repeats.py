"""What a C compiler made of `repeats.c` when the package was installed, if there was one.

It makes XLA's calls of oneDNN that Python has prepared; without it Python makes each, which takes
0.05 to 0.1 ms of a call, and the GIL.
"""

import ctypes
import warnings
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("repeats.c")
COMPILED = SOURCE.with_name("librepeats.so")

_POINTER = ctypes.c_void_p
_switched_off = False


def switch_off(off: bool = True) -> None:
    """Has Python make the calls that are not known by now: to measure, or to compare."""
    global _switched_off
    _switched_off = off


def library() -> ctypes.CDLL | None:
    """What was compiled; None where there is nothing, or it is of another version of its source."""
    return None if _switched_off else _library()


@cache
def _library() -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL(str(COMPILED))
    except OSError:  # no compiler, or a file that was made elsewhere
        return None
    if ctypes.c_uint32.in_dll(found, "source_checksum").value != zlib.crc32(SOURCE.read_bytes()):
        warnings.warn(f"{COMPILED} is not of {SOURCE.name}: install flaxcnn again", stacklevel=2)
        return None
    found.use_library.argtypes = (_POINTER,) * 5
    found.handler_for.argtypes = (ctypes.c_int64, _POINTER)
    found.handler_for.restype = _POINTER
    found.repeat.argtypes = (ctypes.c_int64, _POINTER, _POINTER)
    found.run_plan.argtypes = (_POINTER, _POINTER)
    return found


def use(place: Any, execute: Any, threads: Any, set_threads: Any, stream: Any) -> None:
    """Says which functions of oneDNN's are called, and its stream."""
    if (compiled := _library()) is not None:
        functions = (place, execute, threads, set_threads)
        compiled.use_library(*(ctypes.cast(f, _POINTER) for f in functions), stream)


def handler_for(target: int, by_python: Any) -> Any:
    """What XLA is to call for the target of this number: `by_python`, where nothing else is."""
    compiled = _library()
    address = compiled and compiled.handler_for(target, ctypes.cast(by_python, _POINTER))
    return type(by_python)(address) if address else by_python


_kept: list[Any] = []  # plans that are in use from now on, whatever Python forgets


def repeat(target: int, frame: int, plan: Any) -> None:
    """Has calls like that of XLA's `frame` made as `plan` says, without Python."""
    compiled = library()
    if compiled is not None and compiled.repeat(target, frame, plan.words):
        _kept.append(plan)


def run(words: Any, addresses: Sequence[int]) -> int | None:
    """Makes the calls of a plan; oneDNN's answer, or None where nothing was compiled."""
    compiled = library()
    if compiled is None:
        return None
    answer: int = compiled.run_plan(words, (ctypes.c_void_p * len(addresses))(*addresses))
    return answer
