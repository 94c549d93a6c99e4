"""The three containers that torch.save has written, each read into its object and its storages.

* zip (torch 1.6 and later): data.pkl, and a record for each storage;
* legacy (0.1.10 to 1.5): a magic number, a protocol version, facts about the machine, the object
  and the keys of its storages, all pickled; then the storages, each behind its length;
* tar (before that): members with the storages, with the tensors in them, and with the object.

Each function gives the object that was pickled, and what tells where the bytes of a storage start.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

from flaxcnn.errors import WeightsError
from flaxcnn.pth.records import Record, tar_records, zip_records
from flaxcnn.pth.tensors import (
    ALLOWED,
    DTYPES,
    Storage,
    Storages,
    Tensor,
    checked_int,
    checked_tensor,
    storage_dtype,
    sub_storage,
)
from flaxcnn.pth.unpickle import quoted, unpickle

# Where the bytes of a storage start in the file; raises WeightsError if they are not there.
Locate = Callable[[Storage], int]

_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MOST_RECORDS = 2**17  # 80 times those of the largest network here
_TENSOR_TYPES = {
    f"{module}.{name.removesuffix('Storage')}Tensor": None
    for module in ("torch", "torch.cuda")
    for name in DTYPES
}


def read_zip(data: memoryview) -> tuple[object, Locate]:
    """data.pkl has the object, data/KEY the storages; sizes and checksums are those of records."""
    records = zip_records(data)
    roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise WeightsError("is not a file of torch.save: a zip file without one data.pkl")
    (root,) = roots
    if f"{root}constants.pkl" in records:
        raise WeightsError("is a TorchScript archive: save model.state_dict() instead")
    if f"{root}byteorder" in records:
        _check_little_endian(bytes(_checked(data, records[f"{root}byteorder"])) == b"little")
    storages = Storages()
    pickled, _ = unpickle(_checked(data, records[f"{root}data.pkl"]), 0, ALLOWED, storages.load)
    starts: dict[str, int] = {}

    def locate(storage: Storage) -> int:
        if storage.key in starts:
            return starts[storage.key]
        record = records.get(f"{root}data/{storage.key}")
        if record is None:
            raise WeightsError(f"storage {quoted(storage.key)} is not in the file")
        record.check(data)
        if record.size != storage.nbytes:
            raise WeightsError(
                f"storage {quoted(storage.key)} has {record.size} bytes "
                f"where {quoted(storage.nbytes)} are promised"
            )
        return starts.setdefault(storage.key, record.start)

    return pickled, locate


def _checked(data: memoryview, record: Record) -> memoryview:
    record.check(data)
    return data[record.start : record.start + record.size]


def read_legacy(data: memoryview) -> tuple[object, Locate]:
    """Five pickles, then for each key in the last of them a count of elements and the elements."""
    magic, position = unpickle(data)
    if magic != _MAGIC:
        raise WeightsError("is not a file of torch.save: a pickle without its magic number")
    protocol, position = unpickle(data, position)
    if protocol != _LEGACY_PROTOCOL:
        raise WeightsError(f"has protocol {quoted(protocol)}; known is {_LEGACY_PROTOCOL}")
    machine, position = unpickle(data, position)
    _check_little_endian(isinstance(machine, dict) and machine.get("little_endian") is True)
    storages = Storages()
    pickled, position = unpickle(data, position, ALLOWED, storages.load)
    keys, position = unpickle(data, position)
    if not isinstance(keys, list):
        raise WeightsError("damaged: the keys of the storages are not a list")

    starts: dict[str, int] = {}
    for key in keys:
        storage = storages.by_key.get(key) if isinstance(key, str) else None
        if storage is None or key in starts:
            raise WeightsError(f"damaged: {quoted(key)} in the list of storages")
        starts[key], position = _skip_storage(data, position, storage)

    def locate(storage: Storage) -> int:
        if storage.key not in starts:
            raise WeightsError(f"storage {quoted(storage.key)} is not in the file")
        return starts[storage.key]

    return pickled, locate


def _skip_storage(data: memoryview, position: int, storage: Storage) -> tuple[int, int]:
    """Where the bytes of a storage start, behind their count of elements, and where they end."""
    numel, start = _int64(data, position)
    if numel != storage.numel:
        raise WeightsError(
            f"damaged: storage {quoted(storage.key)} has {numel} elements "
            f"where {storage.numel} are promised"
        )
    if start + storage.nbytes > len(data):
        raise WeightsError(f"cut short: storage {quoted(storage.key)} goes on behind the end")
    return start, start + storage.nbytes


def read_tar(data: memoryview) -> tuple[object, Locate]:
    """The member "pickle" has the object, in which a tensor is a key into the member "tensors"."""
    records = tar_records(data)
    if missing := {"pickle", "tensors", "storages", "sys_info"} - records.keys():
        raise WeightsError(f"is not a file of torch.save: a tar file without {min(missing)}")
    members = {name: _checked(data, record) for name, record in records.items()}
    machine, _ = unpickle(members["sys_info"])
    _check_little_endian(isinstance(machine, dict) and machine.get("little_endian") is True)
    storages, starts = _tar_storages(members["storages"])
    tensors = _tar_tensors(members["tensors"], storages)

    def load(pid: object) -> Tensor:
        found = tensors.get(pid) if isinstance(pid, str) else None
        if found is None:
            raise WeightsError(f"refused: persistent id {quoted(pid)} is not a tensor")
        return found

    pickled, _ = unpickle(members["pickle"], 0, ALLOWED, load)
    first = records["storages"].start
    return pickled, lambda storage: first + starts[storage.key]


def _tar_storages(data: memoryview) -> tuple[dict[str, Storage], dict[str, int]]:
    """The member "storages": their count, then (key, location, type), length and bytes of each,
    then a list of (key, key of the storage that it is a view of, offset, size)."""
    storages: dict[str, Storage] = {}
    starts: dict[str, int] = {}
    count, position = unpickle(data)
    for _ in range(_count(count)):  # ends with the data at the latest
        described, position = unpickle(data, position, ALLOWED)
        key, _, kind = _parts(described, 3)
        numel, _ = _int64(data, position)
        storage = Storage(_tar_key(key), storage_dtype(kind), checked_int(numel), 0, numel)
        _add(storages, storage.key, storage)
        starts[storage.key], position = _skip_storage(data, position, storage)
    views, _ = unpickle(data, position)
    if not isinstance(views, list):
        raise WeightsError("damaged: the views of storages are not a list")
    for view in views:
        key, root, offset, size = _parts(view, 4)
        if _tar_key(root) not in starts:
            raise WeightsError(f"damaged: a view of {quoted(root)}, which is no storage")
        _add(storages, _tar_key(key), sub_storage(storages[_tar_key(root)], offset, size))
    return storages, starts


def _tar_tensors(data: memoryview, storages: Mapping[str, Storage]) -> dict[str, Tensor]:
    """The member "tensors": their count, then (key, key of the storage, type) and geometry."""
    tensors: dict[str, Tensor] = {}
    count, position = unpickle(data)
    for _ in range(_count(count)):  # ends with the data at the latest
        described, position = unpickle(data, position, _TENSOR_TYPES)
        key, storage, _ = _parts(described, 3)
        ndim, position = _int64(data, position)
        ndim &= 2**32 - 1  # the upper half was never defined
        if position + (2 * ndim + 1) * 8 > len(data):
            raise WeightsError("cut short or damaged: the tensors go on behind the end")
        numbers = struct.unpack_from(f"<{2 * ndim + 1}q", data, position)
        position += 8 * len(numbers)
        size, stride, offset = numbers[:ndim], numbers[ndim:-1], numbers[-1]
        tensor = checked_tensor(storages.get(_tar_key(storage)), offset, size, stride)
        _add(tensors, _tar_key(key), tensor)
    return tensors


def _count(value: object) -> int:
    if checked_int(value) > _MOST_RECORDS:
        raise WeightsError(f"refused: {value} storages or tensors")
    return checked_int(value)


def _tar_key(key: object) -> str:
    """The address that a storage or tensor had; persistent ids are strings of it."""
    return str(checked_int(key))


def _parts(value: object, count: int) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) != count:
        raise WeightsError(f"damaged: {quoted(value)} where a tuple of {count} belongs")
    return value


def _add(known: dict[str, Any], key: str, value: object) -> None:
    if known.setdefault(key, value) is not value:
        raise WeightsError(f"damaged: {quoted(key)} is described twice")


def _int64(data: memoryview, position: int) -> tuple[int, int]:
    """The number at `position`, and the position behind it."""
    if position + 8 > len(data):
        raise WeightsError("cut short: a number is missing at its end")
    return struct.unpack_from("<q", data, position)[0], position + 8


def _check_little_endian(little: bool) -> None:
    if not little:
        raise WeightsError("was written on a big-endian machine: load and save it on another")
