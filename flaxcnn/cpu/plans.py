"""What is done in one of XLA's calls: primitives of oneDNN, or functions of our own, in order.

A plan is written in integers too, by which `repeats` makes the same calls without Python.
"""

import ctypes
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from flaxcnn.cpu import compiled, onednn, repeats
from flaxcnn.cpu.onednn import Argument, ArgumentAndMemory, Made, Query

Addresses = Sequence[int]  # of the arrays of XLA's call: its arguments, then its results
# An array's number, or ~ how many bytes behind the beginning of the memory for work.
Place = int
PAGE = 4096  # bytes; the memory for work begins with one
# As `repeats.c` has them: by whom a call is computed, if not by the library, and its most arrays.
_OURS, _MOST_OF_OURS = 2, 8
Parts = Sequence[tuple[Argument, ctypes.c_void_p]]  # with the layout of each


# ------------------------------------------------------------------------------------------ calls
class Computation:
    """One primitive, and what it is given."""

    def __init__(
        self,
        made: Made,
        description: ctypes.c_void_p,
        parts: Parts,
        alone: bool = False,
    ) -> None:
        """By the calling thread `alone`, if it was described so (`Library.one_thread`)."""
        scratchpad = made.library.chosen_layout(description, Query.SCRATCHPAD)
        self.working = made.library.size(scratchpad)  # bytes
        if self.working:
            parts = [*parts, (Argument.SCRATCHPAD, scratchpad)]
        memories = [made.memory(layout) for _, layout in parts]
        pairs = [
            ArgumentAndMemory(argument, memory)
            for (argument, _), memory in zip(parts, memories, strict=True)
        ]
        self._pairs = (ArgumentAndMemory * len(parts))(*pairs)
        self._memories = [memory.value for memory in memories]
        self._alone = alone
        self.stream = made.library.stream.value
        primitive, where = made.primitive(description).value, ctypes.addressof(self._pairs)
        self._arguments = (primitive, self.stream, len(parts), where)
        self._library = made.library
        self._execute = made.library.execute
        self._made = made  # which is destroyed with this

    def words(self, places: Sequence[Place]) -> list[int | None]:
        primitive, _, count, where = self._arguments
        return [primitive, self._alone, count, where, *self._all(places)]

    def run(self, places: Sequence[Place], addresses: Addresses, working: int) -> None:
        """Under `lock`. On a CPU the library is done when it answers."""
        set_place = self._library.place
        for memory, place in zip(self._memories, self._all(places), strict=True):
            address = addresses[place] if place >= 0 else working + ~place
            onednn.check("memory_set_data_handle", set_place(memory, address))
        if not self._alone:
            onednn.check("primitive_execute", self._execute(*self._arguments))
            return
        with self._library.one_thread(True):
            onednn.check("primitive_execute", self._execute(*self._arguments))

    def _all(self, places: Sequence[Place]) -> Sequence[Place]:
        """The scratchpad is where the memory for work begins."""
        return (*places, ~0) if self.working else places


class Reorder(Computation):
    """What copies from one layout to another."""

    # Bytes up to which a second thread is not worth the 0.1 ms that it takes to wake up, or more
    # where XLA has work for it.
    _SMALL = 4 << 20

    def __init__(self, made: Made, source: ctypes.c_void_p, target: ctypes.c_void_p) -> None:
        engine, alone = made.library.engine, made.library.size(target) <= self._SMALL
        between = (source, engine, target, engine, None)
        with made.library.one_thread(alone):
            description = made("primitive_desc", "reorder_primitive_desc_create", *between)
            parts = ((Argument.SOURCE, source), (Argument.TARGET, target))
            super().__init__(made, description, parts, alone)
        self._execute = made.library.execute_quickly


class Function:
    """One of our own, compiled: as `Computation`, of arrays in the order of its C source."""

    def __init__(self, name: str, numbers: Sequence[int], working: int = 0) -> None:
        """With what it is given besides arrays; `working` is bytes of memory, its last array.

        Raises:
            RuntimeError: it is not there.
        """
        library, of_calls = compiled.library(), onednn.library()
        if library is None or of_calls is None:
            raise RuntimeError("flaxcnn was installed without a C compiler, or without oneDNN")
        self.name, self.working = name, working
        self.stream = of_calls.stream.value
        self._numbers = (ctypes.c_int64 * len(numbers))(*numbers)
        self._function = getattr(library, name)

    def words(self, places: Sequence[Place]) -> list[int | None]:
        assert len(places) < _MOST_OF_OURS
        function = ctypes.cast(self._function, ctypes.c_void_p).value
        places = self._all(places)
        return [function, _OURS, len(places), ctypes.addressof(self._numbers), *places]

    def run(self, places: Sequence[Place], addresses: Addresses, working: int) -> None:
        """Under `lock`."""
        places = self._all(places)
        arrays = [addresses[place] if place >= 0 else working + ~place for place in places]
        self._function(self._numbers, (ctypes.c_void_p * len(arrays))(*arrays))

    def _all(self, places: Sequence[Place]) -> Sequence[Place]:
        return (*places, ~0) if self.working else places


class Call(NamedTuple):
    """A computation, and where its parts are."""

    computation: Computation | Function
    places: Sequence[Place]

    def of(self, arrays: Sequence[int]) -> "Call":
        """The same of other arrays of a longer call: the first is the one at `arrays[0]`."""
        places = [arrays[place] if place >= 0 else place for place in self.places]
        return self._replace(places=places)


def in_order(made: Made, description: ctypes.c_void_p, parts: Parts) -> Call:
    """A call whose arrays are the parts, in their order."""
    return Call(Computation(made, description, parts), range(len(parts)))


# ----------------------------------------------------------------------------------------- checks
class Condition(IntEnum):
    """What may have to be so."""

    SAME = 0  # two arrays are in one place
    USUAL_FLOAT32 = 1  # an array has no NaN, and all of it is above the least number
    USUAL_BFLOAT16 = 2
    FINITE = 3  # the sum of the products of two arrays of float32 is


class Check(NamedTuple):
    """A condition of two arrays. By the integers `repeats` finds it out, by `holds` Python does."""

    condition: Condition
    first: int  # which array
    second: int
    elements: int  # of each
    holds: Callable[[Addresses], bool]


# ------------------------------------------------------------------------------------------ plans
def _nothing_else(_: Addresses) -> None:
    raise RuntimeError("a condition does not hold, and the plan does not say what is done then")


class Plan:
    """Calls with checks before and after them, and what is done where one does not hold.

    `otherwise` comes instead of the calls where one of `before` does not, after them where it is
    one of `after`. `working` is bytes, of which the calls' own may be a part.

    Raises, when called:
        RuntimeError: the library refuses.
        ValueError: there are more arrays, or fewer, than the calls have places for.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        working: int = 0,
        before: Sequence[Check] = (),
        after: Sequence[Check] = (),
        otherwise: Callable[[Addresses], None] = _nothing_else,
    ) -> None:
        self.calls = calls
        self.working = max([working, *(call.computation.working for call in calls)])
        self._arrays = 1 + max((place for call in calls for place in call.places), default=-1)
        self._before, self._after, self._otherwise = before, after, otherwise
        stream = calls[0].computation.stream if calls else 0
        words: list[Any] = [stream, self.working, len(before), len(calls), len(after)]
        words += [word for check in before for word in check[:4]]
        words += [word for call in calls for word in call.computation.words(call.places)]
        words += [word for check in after for word in check[:4]]
        self.words = (ctypes.c_int64 * len(words))(*words)

    def __call__(self, addresses: Addresses) -> None:
        if self.calls and len(addresses) != self._arrays:
            found = f"{len(addresses)} arrays, not {self._arrays}"
            raise ValueError(f"{found}; compile the program here")
        if self._hold(self._before, addresses):
            self.make_calls(addresses)
            self._hold(self._after, addresses)

    def _hold(self, checks: Sequence[Check], addresses: Addresses) -> bool:
        hold = all(check.holds(addresses) for check in checks)
        if not hold:
            self._otherwise(addresses)
        return hold

    def make_calls(self, addresses: Addresses) -> None:
        """Without the checks."""
        if not self.calls:  # which need not wait for others
            return
        answer = repeats.run(self.words, addresses)
        if answer is not None:
            onednn.check("primitive_execute", answer)
            return
        with onednn.lock:
            working = _workspace(self.working)
            for computation, places in self.calls:
                computation.run(places, addresses, working)


_working: tuple[Any, int, int] = (None, 0, 0)  # its first page's beginning, and bytes from there


def _workspace(size: int) -> int:
    """The address of so many bytes; the same for all, under `lock`."""
    global _working
    _, at, there = _working
    if there < size:
        memory = (ctypes.c_char * (size + PAGE))()
        at = rounded(ctypes.addressof(memory))
        _working = memory, at, size
    return at


def rounded(size: int) -> int:
    """Up to where the next page begins."""
    return -(size // -PAGE) * PAGE
