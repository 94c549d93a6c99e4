"""An interpreter of the part of the pickle language that state_dicts are written in.

It executes nothing and imports nothing. A global is an inert token, and one that the caller does
not list is refused by its full name; what a REDUCE gives is decided by the caller's own function.
Time and memory are in proportion to the bytes that are read: no number in a pickle makes it
allocate, and no container is ever walked in depth.
"""

import pickle  # only the names of the opcodes
import pickletools  # likewise
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flaxcnn.errors import WeightsError

Constructor = Callable[[tuple[object, ...]], object]

_LONGEST_GLOBAL = 200  # bytes of a module's or class's name
_LONGEST_PICKLE = 2**22  # bytes: 20 times a large network's; each may cost 100 bytes of memory
_LONGEST_QUOTE = 60  # characters of the file in a message
_OPCODE_NAMES = {opcode.code: opcode.name for opcode in pickletools.opcodes}
_KEY_LIMIT = 2**61 - 1  # below it the hashes of ints differ; beyond it a file could make all equal


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A name like 'torch.FloatStorage', which stands for nothing but itself."""

    name: str


@runtime_checkable
class HasState(Protocol):
    """What a BUILD may be applied to."""

    def set_state(self, state: object) -> None:
        """Takes the attributes that were pickled beside the object."""


class OrderedMapping(dict[object, object]):
    """What `collections.OrderedDict` makes."""

    def set_state(self, state: object) -> None:
        """Leaves the attributes (a state_dict's `_metadata`) out: nothing here needs them."""
        if not isinstance(state, dict):
            raise WeightsError("damaged pickle: the attributes of an OrderedDict are no dict")


def ordered_dict(arguments: tuple[object, ...]) -> OrderedMapping:
    """OrderedDict() of Python 3, OrderedDict([[key, value], ...]) of Python 2."""
    mapping = OrderedMapping()
    if arguments:
        (pairs,) = arguments if len(arguments) == 1 else (None,)
        if not isinstance(pairs, list):
            raise WeightsError("damaged pickle: an OrderedDict is made of a list of pairs")
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise WeightsError("damaged pickle: an OrderedDict is made of a list of pairs")
            mapping[checked_key(pair[0])] = pair[1]
        pairs.clear()  # so that many that share one long list do not each cost its length
    return mapping


def checked_key(key: object) -> str | int:
    """The key of a dict, if it is one that can be hashed in safety and in constant time.

    Raises:
        WeightsError: for other types (a tuple may be nested deeper than the C stack) and large
            ints (a file could choose them with equal hashes).
    """
    if type(key) is str or (type(key) is int and abs(key) < _KEY_LIMIT):
        return key
    raise WeightsError(f"refused: a dict has the key {quoted(key)}, not a string or a small int")


def quoted(value: object) -> str:
    """Something of a file for a message: short whatever it is, and never walked in depth."""
    if isinstance(value, str):
        shown = repr(value[:_LONGEST_QUOTE])
        cut = max(len(value), len(shown)) > _LONGEST_QUOTE + 2  # the quotes
        return f"{shown[:_LONGEST_QUOTE]}..." if cut else shown
    if isinstance(value, Global):
        return value.name
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int) and value.bit_length() <= 64:
        return repr(value)
    return f"<{type(value).__name__}>"


def refuse_persistent_id(pid: object) -> object:
    """For pickles that have none."""
    raise WeightsError(f"refused: persistent id {quoted(pid)} where none belongs")


def unpickle(
    data: memoryview,
    position: int = 0,
    allowed: Mapping[str, Constructor | None] | None = None,
    persistent_load: Callable[[object], object] = refuse_persistent_id,
) -> tuple[object, int]:
    """The object whose pickle starts at `position`, and the position behind it.

    It is made of str, int, float, bool, None, tuple, list, dict, `Global`, and of what the
    arguments make:

    Args:
        allowed: global names -> what calling it with a tuple of arguments gives; None if it is
            not to be called.
        persistent_load: what stands for a persistent id.

    Raises:
        WeightsError: if the pickle is damaged, cut short, or needs what is not allowed.
    """
    machine = _Machine(data, position, allowed or {}, persistent_load)
    return machine.run(), machine.position


class _Machine:
    def __init__(
        self,
        data: memoryview,
        position: int,
        allowed: Mapping[str, Constructor | None],
        persistent_load: Callable[[object], object],
    ) -> None:
        self.data = data
        self.position = position
        self.limit = position + _LONGEST_PICKLE
        self.allowed = allowed
        self.persistent_load = persistent_load
        self.stack: list[object] = []
        self.below: list[list[object]] = []  # the stacks under each open MARK
        self.memo: dict[int, object] = {}  # a dict: an index of 4 billion allocates nothing

    def run(self) -> object:
        while (opcode := self.take(1)[0]) != pickle.STOP[0]:
            if opcode not in _STEPS:
                name = _OPCODE_NAMES.get(chr(opcode), f"{opcode:#x}")
                raise WeightsError(f"refused: pickle opcode {name} is not part of a state_dict")
            _STEPS[opcode](self)
        if len(self.stack) != 1 or self.below:
            raise WeightsError("damaged pickle: it does not leave one object")
        return self.stack[0]

    # ------------------------------------------------------------------------------------ bytes
    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise WeightsError("cut short or damaged: a pickle goes on behind the end")
        if end > self.limit:
            raise WeightsError(
                f"refused: a pickle of more than {_LONGEST_PICKLE} bytes; "
                "save model.state_dict() alone"
            )
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        start = bytes(self.data[self.position : self.position + _LONGEST_GLOBAL + 1])
        text, newline, _ = start.partition(b"\n")
        if not newline:
            raise WeightsError("damaged pickle: a name without an end")
        self.position += len(text) + 1
        return text.decode("latin1")

    # ------------------------------------------------------------------------------------ stack
    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if not self.stack:
            raise WeightsError("damaged pickle: its stack is empty")
        return self.stack.pop()

    def top(self) -> object:
        if not self.stack:
            raise WeightsError("damaged pickle: its stack is empty")
        return self.stack[-1]

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[object]:
        if not self.below:
            raise WeightsError("damaged pickle: a MARK is missing")
        values, self.stack = self.stack, self.below.pop()
        return values

    # ----------------------------------------------------------------------------------- values
    def protocol(self) -> None:
        if (version := self.number(1)) not in range(2, 6):
            raise WeightsError(f"refused: pickle protocol {version}; torch writes 2 to 5")

    def text(self, size: int, encoding: str) -> None:
        try:
            self.push(str(self.take(self.number(size)), encoding))
        except UnicodeDecodeError:
            raise WeightsError("damaged pickle: a string is not UTF-8") from None

    def decimal(self) -> None:  # how Python 2 wrote an int of more than 32 bits
        text = self.line()
        if not re.fullmatch(r"-?[0-9]{1,20}", text):
            raise WeightsError(f"damaged pickle: {quoted(text)} is not a number")
        self.push(int(text))

    def signed(self, size: int) -> None:
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def binary_float(self) -> None:
        self.push(struct.unpack(">d", self.take(8))[0])

    # ------------------------------------------------------------------------------- containers
    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def extend(self, values: list[object]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise WeightsError(f"damaged pickle: {quoted(target)} is not a list")
        target += values

    def update(self, values: list[object]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(values) % 2:
            raise WeightsError(f"damaged pickle: {quoted(target)} is not a dict to set items of")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[checked_key(key)] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.update([key, value])

    # ------------------------------------------------------------------------------------- memo
    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise WeightsError(f"damaged pickle: its memo has no entry {index}")
        self.push(self.memo[index])

    # -------------------------------------------------------------------------- globals, objects
    def find(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise WeightsError("damaged pickle: the name of a global is not a string")
        full = f"{module[:_LONGEST_GLOBAL]}.{name[:_LONGEST_GLOBAL]}"
        if full not in self.allowed:
            shown = full if full.isprintable() and len(full) <= 100 else quoted(full)
            raise WeightsError(
                f"refused: {shown} is not part of a state_dict; save model.state_dict() alone"
            )
        self.push(Global(full))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.find(module, name)

    def reduce(self) -> None:
        arguments, called = self.pop(), self.pop()
        constructor = self.allowed[called.name] if isinstance(called, Global) else None
        if constructor is None:
            raise WeightsError(f"refused: a call of {quoted(called)}")
        if not isinstance(arguments, tuple):
            raise WeightsError(f"damaged pickle: {quoted(called)} is called without a tuple")
        self.push(constructor(arguments))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, HasState):
            raise WeightsError(f"refused: attributes are set on {quoted(target)}")
        target.set_state(state)


_Step = Callable[[_Machine], None]
_STEPS: dict[int, _Step] = {
    code[0]: step
    for code, step in (
        (pickle.PROTO, _Machine.protocol),
        (pickle.FRAME, lambda m: m.take(8)),  # a hint to readers of streams
        (pickle.NONE, lambda m: m.push(None)),
        (pickle.NEWTRUE, lambda m: m.push(True)),
        (pickle.NEWFALSE, lambda m: m.push(False)),
        (pickle.BININT, lambda m: m.signed(4)),
        (pickle.BININT1, lambda m: m.push(m.number(1))),
        (pickle.BININT2, lambda m: m.push(m.number(2))),
        (pickle.LONG1, lambda m: m.signed(m.number(1))),  # LONG4 is for 256 bytes and more
        (pickle.INT, _Machine.decimal),
        (pickle.BINFLOAT, _Machine.binary_float),
        (pickle.SHORT_BINUNICODE, lambda m: m.text(1, "utf-8")),
        (pickle.BINUNICODE, lambda m: m.text(4, "utf-8")),
        (pickle.BINUNICODE8, lambda m: m.text(8, "utf-8")),
        (pickle.SHORT_BINSTRING, lambda m: m.text(1, "latin1")),  # Python 2's
        (pickle.BINSTRING, lambda m: m.text(4, "latin1")),
        (pickle.EMPTY_TUPLE, lambda m: m.push(())),
        (pickle.TUPLE1, lambda m: m.tuple_of(1)),
        (pickle.TUPLE2, lambda m: m.tuple_of(2)),
        (pickle.TUPLE3, lambda m: m.tuple_of(3)),
        (pickle.MARK, _Machine.mark),
        (pickle.TUPLE, lambda m: m.push(tuple(m.pop_mark()))),
        (pickle.EMPTY_LIST, lambda m: m.push([])),
        (pickle.APPEND, lambda m: m.extend([m.pop()])),
        (pickle.APPENDS, lambda m: m.extend(m.pop_mark())),
        (pickle.EMPTY_DICT, lambda m: m.push({})),
        (pickle.SETITEM, _Machine.set_item),
        (pickle.SETITEMS, lambda m: m.update(m.pop_mark())),
        (pickle.BINPUT, lambda m: m.put(m.number(1))),
        (pickle.LONG_BINPUT, lambda m: m.put(m.number(4))),
        (pickle.MEMOIZE, lambda m: m.put(len(m.memo))),
        (pickle.BINGET, lambda m: m.get(m.number(1))),
        (pickle.LONG_BINGET, lambda m: m.get(m.number(4))),
        (pickle.GLOBAL, lambda m: m.find(m.line(), m.line())),
        (pickle.STACK_GLOBAL, _Machine.stack_global),
        (pickle.REDUCE, _Machine.reduce),
        (pickle.NEWOBJ, _Machine.reduce),
        (pickle.BUILD, _Machine.build),
        (pickle.BINPERSID, lambda m: m.push(m.persistent_load(m.pop()))),
    )
}
