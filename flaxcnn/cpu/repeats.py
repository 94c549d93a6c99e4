"""XLA's calls that Python has prepared, made again by what is compiled of `repeats.c`."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flaxcnn.cpu import compiled

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


def handler_for(target: int, by_python: Any) -> Any:
    """What XLA is to call for the target of this number: `by_python`, where nothing else is."""
    library = compiled.library()
    address = library and library.handler_for(target, ctypes.cast(by_python, compiled.POINTER))
    return type(by_python)(address) if address else by_python


def repeat(target: int, frame: int, plan: Any) -> None:
    """Has calls like that of XLA's `frame` made as `plan` says, without Python."""
    library = compiled.library()
    if library is None or not _used:
        return
    # For good, as a call may be under way even while the interpreter ends.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(plan))
    if not library.repeat(target, frame, plan.words):
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(plan))


def run(words: Any, addresses: Sequence[int]) -> int | None:
    """Makes the calls of a plan; oneDNN's answer, or None where Python has to make them."""
    library = compiled.library()
    if library is None or not _used:
        return None
    answer: int = library.run_plan(words, (compiled.POINTER * len(addresses))(*addresses))
    return answer
