"""Tensors as the pickle of a state_dict describes them, and the arrays that they are.

While the pickle is interpreted nothing is made but descriptions. Their geometry is checked against
their storage before an array is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from flaxcnn.errors import WeightsError
from flaxcnn.pth.unpickle import Constructor, Global, ordered_dict, quoted

_MOST_DIMENSIONS = 8  # a network's have 5 at most; bounds the work of a REDUCE, 5 bytes long
_INT64 = range(2**63)

# What torch calls the storages of the types that NumPy has, and bfloat16.
DTYPES = {
    f"{name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Double": "<f8",
        "Float": "<f4",
        "Half": "<f2",
        "BFloat16": ml_dtypes.bfloat16,
        "Long": "<i8",
        "Int": "<i4",
        "Short": "<i2",
        "Char": "i1",
        "Byte": "u1",
        "Bool": "?",
        "ComplexFloat": "<c8",
        "ComplexDouble": "<c16",
    }.items()
}


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """`length` elements from the element `start` on of the `numel` that are in the file."""

    key: str
    dtype: np.dtype
    numel: int
    start: int
    length: int

    @property
    def nbytes(self) -> int:
        """The bytes in the file, of which a view may use a part."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self, data: memoryview, position: int) -> np.ndarray:
        """The view itself, read-only; the storage's bytes start at data[position].

        Raises:
            WeightsError: if it reaches out of its storage, or has more elements.
        """
        itemsize = self.storage.dtype.itemsize
        numel = math.prod(self.size)
        if numel == 0:
            if math.prod(max(n, 1) for n in self.size) * itemsize not in _INT64:
                raise WeightsError("its sizes are beyond 64 bits")
            empty = np.empty(self.size, self.storage.dtype)
            empty.flags.writeable = False
            return empty
        # The stride along a dimension of one element leads nowhere, and may be any number.
        steps = [s if n > 1 else 0 for n, s in zip(self.size, self.stride, strict=True)]
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, steps, strict=True))
        if last >= self.storage.length:
            raise WeightsError(
                f"it reaches element {quoted(last)} of a storage of {self.storage.length}"
            )
        if numel > self.storage.length:
            raise WeightsError(
                f"it has {quoted(numel)} elements of a storage of {self.storage.length}"
            )
        return np.ndarray(
            self.size,
            self.storage.dtype,
            data,
            position + (self.storage.start + self.offset) * itemsize,
            [step * itemsize for step in steps],
        )


class Parameter:
    """A parameter as torch before 0.4 pickled it."""

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor

    def set_state(self, state: object) -> None:
        """Torch 0.2 pickled (requires_grad, volatile, hooks), 0.1 five with the tensor first."""
        if not isinstance(state, tuple) or len(state) not in (3, 5):
            raise WeightsError("damaged pickle: a Parameter has an unknown state")
        if len(state) == 5:
            self.tensor = _tensor(state[0])


class Storages:
    """The storages that the persistent ids of a zip or legacy pickle name, by their keys."""

    def __init__(self) -> None:
        self.by_key: dict[str, Storage] = {}

    def load(self, pid: object) -> Storage:
        """('storage', type, key, location, number of elements[, view of it]) -> the storage."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise WeightsError(f"refused: persistent id {quoted(pid)} is not a storage")
        _, kind, key, _, numel = pid[:5]  # where it was (cpu, cuda:0) does not matter
        if not isinstance(key, str):
            raise WeightsError(f"damaged pickle: {quoted(key)} as the key of a storage")
        root = Storage(key, storage_dtype(kind), checked_int(numel), 0, checked_int(numel))
        known = self.by_key.setdefault(key, root)
        if (known.dtype, known.numel) != (root.dtype, root.numel):
            raise WeightsError(f"damaged pickle: storage {quoted(key)} is described twice")
        return root if len(pid) == 5 or pid[5] is None else _view_of(root, pid[5])


def _view_of(root: Storage, view: object) -> Storage:
    """What torch before 0.4 wrote of a storage in a storage: (key, offset, size)."""
    if not isinstance(view, tuple) or len(view) != 3:
        raise WeightsError("damaged pickle: a view of a storage has three parts")
    return sub_storage(root, view[1], view[2])


def sub_storage(root: Storage, offset: object, size: object) -> Storage:
    """`size` elements of a storage, from the element `offset` on.

    Raises:
        WeightsError: if it has not as many.
    """
    start, length = checked_int(offset), checked_int(size)
    if start + length > root.numel:
        raise WeightsError(f"a view reaches out of storage {quoted(root.key)}")
    return Storage(root.key, root.dtype, root.numel, start, length)


def storage_dtype(kind: object) -> np.dtype:
    """The type of the elements in, say, torch.FloatStorage."""
    name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else ""
    if name not in DTYPES:
        raise WeightsError(f"damaged pickle: {quoted(kind)} as the type of a storage")
    return DTYPES[name]


def checked_int(value: object) -> int:
    """A size, stride or offset: an int from 0 to 2**63 - 1."""
    if type(value) is not int or value not in _INT64:
        raise WeightsError(f"damaged: {quoted(value)} as a size, stride or offset")
    return value


def checked_tensor(storage: object, offset: object, size: object, stride: object) -> Tensor:
    """The tensor, if its parts are of the right types."""
    if not isinstance(storage, Storage):
        raise WeightsError(f"damaged pickle: a tensor in {quoted(storage)}")
    if not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise WeightsError("damaged pickle: the size and stride of a tensor are not tuples")
    if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
        raise WeightsError(f"damaged: a tensor of {len(size)} sizes and {len(stride)} strides")
    for number in (offset, *size, *stride):
        checked_int(number)
    return Tensor(storage, checked_int(offset), size, stride)


# ------------------------------------------------------------------------- what a pickle may call
def _arguments(counts: tuple[int, ...], make: Callable[..., object]) -> Constructor:
    """`make`, if it is called with one of these counts of arguments."""

    def call(arguments: tuple[object, ...]) -> object:
        if len(arguments) not in counts:
            raise WeightsError(f"damaged pickle: a call with {len(arguments)} arguments")
        return make(*arguments)

    return call


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise WeightsError(f"damaged pickle: a parameter that is {quoted(value)}")
    return value


def _rebuild_v2(
    storage: object, offset: object, size: object, stride: object, *rest: object
) -> Tensor:
    if len(rest) == 3 and rest[2]:  # bits that say: conjugate it, or change its sign, when read
        raise WeightsError("refused: a lazily conjugated or negated tensor; resolve it, then save")
    return checked_tensor(storage, offset, size, stride)


def _size(value: object) -> tuple[object, ...]:
    if not isinstance(value, tuple):
        raise WeightsError("damaged pickle: a torch.Size that is not of a tuple")
    return value


def _counter(value: object) -> dict[object, object]:
    if not isinstance(value, dict):
        raise WeightsError("damaged pickle: a Counter that is not of a dict")
    return value


_parameter = _arguments((0, 1, 2), lambda data=None, *_: Parameter(data and _tensor(data)))

ALLOWED: dict[str, Constructor | None] = {
    "collections.OrderedDict": ordered_dict,
    "collections.Counter": _arguments((1,), _counter),  # milestones, in a scheduler's state
    "torch.Size": _arguments((1,), _size),
    "torch._utils._rebuild_tensor": _arguments((4,), checked_tensor),
    "torch._utils._rebuild_tensor_v2": _arguments((6, 7), _rebuild_v2),
    "torch._utils._rebuild_parameter": _arguments((3,), lambda data, *_: _tensor(data)),
    "torch.nn.parameter.Parameter": _parameter,
    "torch.autograd.variable.Variable": _parameter,
    **{
        f"{module}.{name}": None
        for module in ("torch", "torch.cuda", "torch.storage")
        for name in DTYPES
    },
}
