"""Files as torch.save writes them, put together from the formats, opcode by opcode.

Nothing here knows flaxcnn: neither its reader nor its writer. Each part can be wrong on purpose.
"""

import io
import itertools
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
FORMATS = ("zip", "legacy", "tar")


# ------------------------------------------------------------------------------------------ pickles
def pickled(content: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + content + b"."


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def sequence(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def integers(values: Sequence[int]) -> bytes:
    return sequence(*map(integer, values))


def listed(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def name(module: str, attribute: str) -> bytes:
    """A global."""
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + sequence(*arguments) + b"R"


def mapping(entries: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


ORDERED = name("collections", "OrderedDict") + b")R"


def ordered(entries: Mapping[str, bytes]) -> bytes:
    return ORDERED + mapping(entries)[1:]


def storage(kind: str, key: str, numel: int, *view: bytes) -> bytes:
    parts = [text("storage"), name("torch", kind), text(key), text("cpu"), integer(numel), *view]
    return sequence(*parts) + b"Q"


def tensor(
    storage: bytes, size: Sequence[int], stride: Sequence[int], offset: int = 0, *more: bytes
) -> bytes:
    parts = [storage, integer(offset), integers(size), integers(stride), b"\x89", ORDERED, *more]
    return call(name("torch._utils", "_rebuild_tensor_v2"), *parts)


# --------------------------------------------------------------------------------------- zip files
@dataclass
class Part:
    """A record of a zip file; what is None is filled in as it belongs."""

    name: str
    content: bytes
    crc: int | None = None
    method: int = 0
    flags: int = 0
    size: int | None = None
    unpacked: int | None = None
    offset: int | None = None
    local_name: str | None = None


def zip_file(parts: Sequence[Part], *, wide: bool = False, comment: bytes = b"") -> bytes:
    """`wide`: all sizes and offsets in the 64-bit fields, as beyond 4 GB."""
    file, directory = b"", b""
    for part in parts:
        crc = zlib.crc32(part.content) if part.crc is None else part.crc
        size = len(part.content) if part.size is None else part.size
        unpacked = size if part.unpacked is None else part.unpacked
        offset = len(file) if part.offset is None else part.offset
        encoded = part.name.encode()
        local = (part.name if part.local_name is None else part.local_name).encode()
        common = struct.pack("<4H", part.flags, part.method, 0, 33) + struct.pack("<I", crc)
        padding = struct.pack("<HH", 0x4246, 3) + b"ZZZ"
        file += b"PK\3\4" + struct.pack("<H", 45) + common + struct.pack("<II", size, unpacked)
        file += struct.pack("<HH", len(local), len(padding)) + local + padding + part.content
        full = 2**32 - 1
        extra = struct.pack("<HHQQQ", 1, 24, size, size, offset) if wide else b""
        directory += b"PK\1\2" + struct.pack("<HH", 45, 45) + common
        directory += struct.pack("<II", *((full, full) if wide else (size, unpacked)))
        directory += struct.pack("<5HI", len(encoded), len(extra), 0, 0, 0, 0)
        directory += struct.pack("<I", full if wide else offset) + encoded + extra
    counts = [len(parts)] * 2
    extent = [len(directory), len(file)]
    end = b""
    if wide:
        end = b"PK\6\6" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, *counts, *extent)
        end += b"PK\6\7" + struct.pack("<IQI", 0, len(file) + len(directory), 1)
        counts, extent = [2**16 - 1] * 2, [2**32 - 1] * 2
    end += b"PK\5\6" + struct.pack("<4H2IH", 0, 0, *counts, *extent, len(comment)) + comment
    return file + directory + end


def zip_parts(pickle: bytes, storages: Mapping[str, bytes]) -> list[Part]:
    return [
        Part("archive/data.pkl", pickle),
        Part("archive/byteorder", b"little"),
        *(Part(f"archive/data/{key}", content) for key, content in storages.items()),
        Part("archive/version", b"3\n"),
    ]


# ------------------------------------------------------------------------------------ legacy files
def machine(little_endian: bytes = b"\x88") -> bytes:
    return pickled(mapping({"protocol_version": integer(1001), "little_endian": little_endian}))


def legacy_file(pickle: bytes, storages: Mapping[str, tuple[int, bytes]]) -> bytes:
    """`storages`: key -> count of elements, bytes."""
    return b"".join(
        [
            pickled(integer(MAGIC)),
            pickled(integer(1001)),
            machine(),
            pickle,
            pickled(listed(*map(text, storages))),
            *(struct.pack("<q", numel) + content for numel, content in storages.values()),
        ]
    )


# --------------------------------------------------------------------------------------- tar files
def tar_storage(key: int, kind: str, numel: int, content: bytes) -> bytes:
    described = sequence(integer(key), text("cpu"), name("torch", kind))
    return pickled(described) + struct.pack("<q", numel) + content


def tar_tensor(
    key: int, storage: int, kind: str, size: Sequence[int], stride: Sequence[int], offset: int = 0
) -> bytes:
    described = sequence(integer(key), integer(storage), name("torch", kind))
    geometry = struct.pack(f"<{len(size) + len(stride) + 1}q", *size, *stride, offset)
    return pickled(described) + struct.pack("<ii", len(size), 0) + geometry


def tar_members(
    pickle: bytes, tensors: Sequence[bytes], storages: Sequence[bytes], views: bytes = b"]"
) -> dict[str, bytes]:
    return {
        "sys_info": machine(),
        "pickle": pickle,
        "tensors": pickled(integer(len(tensors))) + b"".join(tensors),
        "storages": pickled(integer(len(storages))) + b"".join(storages) + pickled(views),
    }


def tar_file(
    members: Mapping[str, bytes], special: Sequence[tuple[tarfile.TarInfo, bytes]] = ()
) -> bytes:
    """As torch 0.1: pax, each member with its time to the fraction of a second."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size, info.mtime = len(content), 1.5
            tar.addfile(info, io.BytesIO(content))
        for info, content in special:
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


# -------------------------------------------------------------------------------- one of each kind
@dataclass
class View:
    """A tensor in a storage."""

    storage: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0


STORAGES: dict[str, tuple[str, np.ndarray]] = {
    "0": ("FloatStorage", np.linspace(-3, 3, 24, dtype="float32")),
    "1": ("LongStorage", np.array([2**40 + 7])),
    "2": ("HalfStorage", np.linspace(0, 1, 6, dtype="float16")),
    "3": ("BFloat16Storage", np.linspace(-1, 1, 5).astype(ml_dtypes.bfloat16)),
    "4": ("BoolStorage", np.array([True, False, True])),
    "5": ("DoubleStorage", np.empty(0)),
    "6": ("ComplexFloatStorage", np.array([1 + 2j, 3 - 4j], "complex64")),
    "7": ("CharStorage", np.array([-128, 127], "int8")),
}
VIEWS = {
    "plain": View("0", (2, 3, 4), (12, 4, 1)),
    "transposed": View("0", (4, 3, 2), (1, 4, 12)),
    "sliced": View("0", (2, 2), (12, 2), 5),
    "tail": View("0", (3,), (1,), 21),
    "one wide": View("0", (1, 2), (999, 1), 22),
    "counter": View("1", (), ()),
    "half": View("2", (3, 2), (2, 1)),
    "bfloat": View("3", (4,), (1,), 1),
    "bool": View("4", (3,), (1,)),
    "empty": View("5", (0, 3), (3, 1)),
    "complex": View("6", (2,), (1,)),
    "bytes": View("7", (2,), (1,)),
}


def views(kind: str) -> dict[str, View]:
    """What a sample of this format has: torch 0.1 knew fewer types."""
    unknown = {"bfloat", "bool", "complex"} if kind == "tar" else set()
    return {key: view for key, view in VIEWS.items() if key not in unknown}


def expected(kind: str) -> dict[str, np.ndarray]:
    """The tensors in a sample of this format, element by element."""
    arrays = {}
    for key, view in views(kind).items():
        elements = STORAGES[view.storage][1]
        array = np.empty(view.size, elements.dtype)
        for index in itertools.product(*map(range, view.size)):
            steps = sum(i * stride for i, stride in zip(index, view.stride, strict=True))
            array[index] = elements[view.offset + steps]
        arrays[key] = array
    return arrays


def sample(kind: str) -> bytes:
    """A file of this format with the tensors of `expected`."""
    if kind == "tar":
        return tar_file(sample_members())
    last = [b"N"] if kind == "legacy" else []  # it is no view of another storage
    entries = {
        key: tensor(
            storage(STORAGES[view.storage][0], view.storage, STORAGES[view.storage][1].size, *last),
            view.size,
            view.stride,
            view.offset,
        )
        for key, view in VIEWS.items()
    }
    pickle = pickled(ordered(entries) + mapping({"_metadata": ordered({})}) + b"b")
    if kind == "zip":
        contents = {key: array.tobytes() for key, (_, array) in STORAGES.items()}
        return zip_file(zip_parts(pickle, contents))
    return legacy_file(
        pickle, {key: (array.size, array.tobytes()) for key, (_, array) in STORAGES.items()}
    )


def sample_members() -> dict[str, bytes]:
    """The members of the tar file."""
    found = views("tar")
    first = 94_000_000_000_000  # keys were addresses
    return tar_members(
        pickled(
            ordered({key: text(str(first + n)) + b"Q" for n, key in enumerate(found)})
            + mapping({"_metadata": ordered({})})
            + b"b"
        ),
        [
            tar_tensor(
                first + n,
                int(view.storage),
                STORAGES[view.storage][0].replace("Storage", "Tensor"),
                view.size,
                view.stride,
                view.offset,
            )
            for n, view in enumerate(found.values())
        ],
        [
            tar_storage(int(key), kind, array.size, array.tobytes())
            for key, (kind, array) in STORAGES.items()
        ],
    )


# ------------------------------------------------------------------------------------- comparisons
def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Names, order, types, shapes and every bit."""
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert type(found[key]) is np.ndarray
        assert found[key].dtype == value.dtype, key
        assert found[key].shape == value.shape, key
        assert found[key].tobytes() == value.tobytes(), key


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor of torch."""
    tensor = tensor.detach().contiguous()
    if str(tensor.dtype) != "torch.bfloat16":
        return tensor.numpy()
    return tensor.float().numpy().astype(ml_dtypes.bfloat16)
