"""Work on large arrays by all cores: numpy and XLA let go of the GIL while they do it."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


_WORTH_IT = 2**24  # bytes; below, to start threads takes longer than the work


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], nbytes: int
) -> list[Result]:
    """`function` of each item, in order, of so many bytes in all; raises as the first does."""
    if nbytes < _WORTH_IT:
        return [function(item) for item in items]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, items))
