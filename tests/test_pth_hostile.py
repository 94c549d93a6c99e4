"""Files that mean harm, or are damaged, end in one WeightsError: nothing runs, nothing explodes."""

import json
import pickletools
import random
import resource
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pth_files as files
import pytest
from pth_files import (
    Part,
    call,
    integer,
    integers,
    listed,
    mapping,
    name,
    pickled,
    sequence,
    storage,
    tensor,
    text,
)

from flaxcnn.errors import WeightsError
from flaxcnn.pth import read_buffer

CANARY = "flaxcnn-canary"  # what an attack would create, were it executed
COMMAND = f"touch {CANARY}"
BYTES = np.arange(3, dtype="float32").tobytes()
FLOATS = storage("FloatStorage", "0", 3)
TENSOR = tensor(FLOATS, (3,), (1,))


def in_zip(content: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    return files.zip_file(files.zip_parts(pickled(content), storages or {"0": BYTES}))


def in_legacy(content: bytes, storages: dict[str, tuple[int, bytes]] | None = None) -> bytes:
    return files.legacy_file(pickled(content), storages or {"0": (3, BYTES)})


def in_tar(content: bytes) -> bytes:
    """Tensor 5 in storage 1."""
    return files.tar_file(tar_members(content))


def tar_members(content: bytes = b"") -> dict[str, bytes]:
    return files.tar_members(
        pickled(content or mapping({"w": text("5") + b"Q"})),
        [files.tar_tensor(5, 1, "FloatTensor", (3,), (1,))],
        [files.tar_storage(1, "FloatStorage", 3, BYTES)],
    )


def entry(value: bytes) -> bytes:
    """A zip file with one more entry than a sound one."""
    return in_zip(mapping({"w": TENSOR, "x": value}))


def view(*arguments: bytes) -> bytes:
    """A call of what rebuilds tensors."""
    return in_zip(mapping({"w": call(name("torch._utils", "_rebuild_tensor_v2"), *arguments)}))


def geometry(size: bytes, stride: bytes, offset: bytes = integer(0)) -> bytes:
    return view(FLOATS, offset, size, stride, b"\x89", b"}")


def parts(**changes: dict[str, object]) -> list[Part]:
    """Of a sound zip file; `data_0={"crc": 5}` changes the record data/0."""
    found = files.zip_parts(pickled(mapping({"w": TENSOR})), {"0": BYTES})
    for part in found:
        key = part.name.split("/", 1)[1].replace("/", "_").replace(".", "_")
        for field, value in changes.get(key, {}).items():
            setattr(part, field, value)
    return found


def directory_with(position: int, packed: bytes) -> bytes:
    """A sound zip file with bytes of the record at its end overwritten."""
    content = bytearray(files.zip_file(parts()))
    end = len(content) - 22
    content[end + position : end + position + len(packed)] = packed
    return bytes(content)


def tar_with(kind: bytes, **fields: object) -> bytes:
    """A tar file whose "pickle" is no file."""
    members = tar_members()
    del members["pickle"]
    info = tarfile.TarInfo("pickle")
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return files.tar_file(members, [(info, b"")])


def tar_header(position: int, packed: bytes) -> bytes:
    """A tar file with part of its first header overwritten, its checksum made good."""
    content = bytearray(in_tar(b""))
    start = content.index(b"sys_info")
    content[start + position : start + position + len(packed)] = packed
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    return bytes(content)


RUN = call(name("posix", "system"), text(COMMAND))
LAUGHS = b")" + b"q\0h\0\x86" * 100  # each a tuple of the one before, twice
DEEP = b")" + b"\x85" * 200_000
PAIRS = listed(*[listed(text(str(i)), b"N") for i in range(20_000)])
COLLIDING = b"".join(integer(i * (2**61 - 1)) + b"N" for i in range(60_000))
SHORT_GLOBAL = b"\x8c\x05posix\x8c\x06system\x93"
NOT_PART = "is not part of a state_dict"
ATTACKS: dict[str, tuple[bytes, str]] = {
    # ------------------------------------------------------------------------ code to be executed
    "system": (in_zip(RUN), f"refused: posix.system {NOT_PART}"),
    "system, legacy": (in_legacy(RUN), f"refused: posix.system {NOT_PART}"),
    "system, tar": (in_tar(RUN), f"refused: posix.system {NOT_PART}"),
    "system before the magic": (pickled(RUN), f"refused: posix.system {NOT_PART}"),
    "system as the protocol": (pickled(integer(files.MAGIC)) + pickled(RUN), "posix.system"),
    "system among the keys": (
        in_legacy(b"}").replace(pickled(listed(text("0"))), pickled(RUN)),
        "posix.system",
    ),
    "system in storages": (
        files.tar_file(tar_members() | {"storages": pickled(integer(1)) + pickled(RUN)}),
        "posix.system",
    ),
    "system in tensors": (
        files.tar_file(tar_members() | {"tensors": pickled(integer(1)) + pickled(RUN)}),
        "posix.system",
    ),
    "system in sys_info": (files.tar_file(tar_members() | {"sys_info": pickled(RUN)}), "posix"),
    "stack global": (in_zip(SHORT_GLOBAL + text(COMMAND) + b"\x85R"), "refused: posix.system"),
    "as an entry": (entry(RUN), "refused: posix.system"),
    "as a tensor's hooks": (
        view(FLOATS, integer(0), integers((3,)), integers((1,)), b"\x89", RUN),
        "refused: posix.system",
    ),
    "as _metadata": (in_zip(files.ordered({}) + mapping({"_metadata": RUN}) + b"b"), "posix"),
    "eval": (in_zip(call(name("builtins", "eval"), text("1"))), "refused: builtins.eval"),
    "eval of Python 2": (in_zip(name("__builtin__", "eval")), "refused: __builtin__.eval"),
    "getattr": (in_zip(name("builtins", "getattr")), "refused: builtins.getattr"),
    "partial": (in_zip(name("functools", "partial")), "refused: functools.partial"),
    "a pickle in a pickle": (
        in_zip(call(name("torch.storage", "_load_from_bytes"), text("x"))),
        "refused: torch.storage._load_from_bytes",
    ),
    "hub": (in_zip(name("torch.hub", "load")), "refused: torch.hub.load"),
    "runstring": (
        in_zip(name("numpy.testing._private.utils", "runstring")),
        "refused: numpy.testing._private.utils.runstring",
    ),
    "an attribute of what is allowed": (
        in_zip(text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93"),
        "refused: torch._utils._rebuild_tensor_v2.__globals__",
    ),
    "a method of what is allowed": (
        in_zip(text("collections") + text("OrderedDict.fromkeys") + b"\x93"),
        "refused: collections.OrderedDict.fromkeys",
    ),
    "a name with a line break": (
        in_zip(text("torch\n") + text("x\x1b[31m") + b"\x93"),
        r"refused: 'torch\n.x\x1b[31m' is",
    ),
    "a long name": (in_zip(text("m" * 10**6) + text("x") + b"\x93"), "refused: 'mmmm"),
    "inst": (in_zip(b"(" + text(COMMAND) + b"iposix\nsystem\n"), "refused: pickle opcode INST"),
    "obj": (in_zip(b"(" + name("torch", "Size") + b"o"), "refused: pickle opcode OBJ"),
    "newobj_ex": (in_zip(name("torch", "Size") + b")}\x92"), "pickle opcode NEWOBJ_EX"),
    "newobj": (in_zip(name("subprocess", "Popen") + b")\x81"), "refused: subprocess.Popen"),
    "extension registry": (in_zip(b"\x82\x01"), "refused: pickle opcode EXT1"),
    "unknown opcode": (in_zip(b"\xff"), "refused: pickle opcode 0xff"),
    "attributes of a global": (
        in_zip(name("torch", "Size") + mapping({"x": b"N"}) + b"b"),
        "refused: attributes are set on torch.Size",
    ),
    "attributes of a tensor": (
        in_zip(TENSOR + mapping({"storage": b"N"}) + b"b"),
        "refused: attributes are set on <Tensor>",
    ),
    "attributes of a dict": (in_zip(b"}}b"), "refused: attributes are set on <dict>"),
    "attributes of an OrderedDict": (
        in_zip(files.ORDERED + text("state") + b"b"),
        "the attributes of an OrderedDict are no dict",
    ),
    "a global of numbers": (in_zip(b"K\1K\2\x93"), "the name of a global is not a string"),
    "call of a storage's type": (
        in_zip(call(name("torch", "FloatStorage"), integer(2**40))),
        "refused: a call of torch.FloatStorage",
    ),
    "call of a string": (in_zip(text("eval") + b")R"), "refused: a call of 'eval'"),
    "call without a tuple": (in_zip(name("torch", "Size") + b"NR"), "called without a tuple"),
    "a module": (
        in_legacy(sequence(text("module"), name("a", "B"), b"N", b"N") + b"Q"),
        "refused: a.B is not",
    ),
    "a persistent id that is no storage": (in_zip(text("x") + b"Q"), "persistent id 'x' is not"),
    # ------------------------------------------------------------------------------ sizes, stack
    "a memo of 4 billion": (in_zip(b"Nr\xff\xff\xff\xff0"), "refused: pickle opcode POP"),
    "a string of 4 GB": (in_zip(b"X\xff\xff\xff\xffabc"), "goes on behind the end"),
    "a string of 2**64": (in_zip(b"\x8d" + b"\xff" * 8), "goes on behind the end"),
    "a byte string of 4 GB": (in_zip(b"T\xff\xff\xff\xff"), "goes on behind the end"),
    "a long int": (in_zip(b"\x8b\xff\xff\xff\x7f"), "refused: pickle opcode LONG4"),
    "a long decimal": (in_zip(b"I" + b"9" * 100 + b"\n"), "is not a number"),
    "a decimal that does not end": (in_zip(b"I" + b"9" * 10**6), "a name without an end"),
    "a large bytearray": (in_zip(b"\x96" + b"\xff" * 8), "refused: pickle opcode BYTEARRAY8"),
    "not UTF-8": (in_zip(b"X\1\0\0\0\xff"), "a string is not UTF-8"),
    "a surrogate": (in_zip(mapping({"\ud800": TENSOR})), "a string is not UTF-8"),
    "protocol 0": (
        files.zip_file(files.zip_parts(pickled(b"}", 0), {})),
        "refused: pickle protocol 0",
    ),
    "an empty stack": (in_zip(b"\x85"), "its stack is empty"),
    "nothing to memorise": (in_zip(b"q\0"), "its stack is empty"),
    "no mark": (in_zip(b"t"), "a MARK is missing"),
    "an open mark": (in_zip(b"}(("), "does not leave one object"),
    "two objects": (in_zip(b"}}"), "does not leave one object"),
    "an unknown memo": (in_zip(b"h\7"), "its memo has no entry 7"),
    "items of a list": (in_zip(b"](NNu"), "<list> is not a dict to set items of"),
    "an odd count of items": (in_zip(b"}(Nu"), "is not a dict to set items of"),
    "append to a dict": (in_zip(b"}Na"), "<dict> is not a list"),
    "a pickle without an end": (
        files.zip_file(files.zip_parts(b"\x80\2}", {})),
        "goes on behind the end",
    ),
    "marks without end": (in_zip(b"(" * 4_300_000), "refused: a pickle of more than 4194304"),
    "many tensors of one tuple": (
        in_zip(
            FLOATS
            + b"q\0"
            + integers([1] * 8)
            + b"q\1"
            + name("torch._utils", "_rebuild_tensor")
            + b"q\2"
            + sequence(b"h\0K\0h\1h\1")
            + b"q\3"
            + b"h\2h\3R" * 200_000
        ),
        "does not leave one object",
    ),
    # ------------------------------------------------------------------------------- containers
    "deep key": (in_zip(b"}" + DEEP + b"Ns"), "the key <tuple>, not a string"),
    "deep entry": (entry(DEEP), "'x' is <tuple>, not a named tensor"),
    "deep object": (in_zip(b"]" * 200_000 + b"a" * 199_999), "no state_dict but <list>"),
    "deep persistent id": (in_zip(DEEP + b"Q"), "persistent id <tuple> is not a storage"),
    "deep size": (geometry(b"(" + DEEP + b"t", integers((1,))), "<tuple> as a size"),
    "deep arguments": (in_zip(name("torch", "Size") + DEEP + b"R"), "no state_dict but <tuple>"),
    "deep dicts": (in_zip((b"}" + text("model")) * 100_000 + b"}" + b"s" * 100_000), "'model' is"),
    "laughs": (entry(LAUGHS), "'x' is <tuple>, not a named tensor"),
    "laughs as a key": (in_zip(b"}" + LAUGHS + b"Ns"), "the key <tuple>, not a string"),
    "laughs as an id": (in_zip(LAUGHS + b"Q"), "persistent id <tuple> is not a storage"),
    "laughs as a size": (geometry(LAUGHS, LAUGHS), "<tuple> as a size, stride"),
    "a dict in itself": (in_zip(b"}q\0" + text("model") + b"h\0s"), "'model' is <dict>"),
    "a list in itself": (in_zip(b"]q\0h\0a"), "<list>"),
    "a list of pairs in itself": (
        in_zip(name("collections", "OrderedDict") + b"]q\0h\0a\x85R"),
        "a list of pairs",
    ),
    "an OrderedDict of a string": (
        in_zip(call(name("collections", "OrderedDict"), text("ab"))),
        "is made of a list of pairs",
    ),
    "a list that is copied often": (
        in_zip(
            PAIRS + b"q\0" + name("collections", "OrderedDict") + b"q\1" + b"h\1h\0\x85R" * 9999
        ),
        "does not leave one object",
    ),
    "keys with equal hashes": (in_zip(b"}(" + COLLIDING + b"u"), "not a string or a small int"),
    "a float as a key": (in_zip(b"}G" + bytes(8) + b"Ns"), "the key 0.0, not a string"),
    "a long key": (in_zip(mapping({"k" * 10**6: b"N"})), "holds no state_dict: 'kkkk"),
    "a large number": (entry(b"\x8a\xff" + b"\x7f" * 255), "'x' is <int>, not a named"),
    # --------------------------------------------------------------------------------- geometry
    "stride 0": (geometry(integers((2**40,)), integers((0,))), "has 1099511627776 elements of a"),
    "a size of 2**63": (
        geometry(integers((2**63,)), integers((0,))),
        "9223372036854775808 as a size, stride",
    ),
    "a product beyond 64 bits": (
        geometry(integers([2**62] * 8), integers([0] * 8)),
        "has <int> elements",
    ),
    "empty and large": (geometry(integers((0, 2**62)), integers((1, 1))), "beyond 64 bits"),
    "negative size": (geometry(integers((-1,)), integers((1,))), "-1 as a size, stride or offset"),
    "negative size in 32 bits": (
        geometry(sequence(b"J" + b"\xff" * 4), integers((1,))),
        "-1 as a size, stride or offset",
    ),
    "negative stride": (geometry(integers((2,)), integers((-1,))), "-1 as a size, stride"),
    "negative offset": (
        geometry(integers((3,)), integers((1,)), integer(-1)),
        "-1 as a size, stride or offset",
    ),
    "a bool as a size": (geometry(sequence(b"\x88"), integers((1,))), "True as a size"),
    "a float as a size": (geometry(sequence(b"G" + bytes(8)), integers((1,))), "0.0 as a size"),
    "a list as a size": (geometry(listed(integer(3)), integers((1,))), "are not tuples"),
    "too few strides": (geometry(integers((1, 1)), integers((1,))), "2 sizes and 1 strides"),
    "9 dimensions": (geometry(integers([1] * 9), integers([1] * 9)), "a tensor of 9 sizes"),
    "one too far": (
        geometry(integers((3,)), integers((1,)), integer(1)),
        "tensor 'w': it reaches element 3 of a storage of 3",
    ),
    "strides too long": (geometry(integers((2,)), integers((3,))), "it reaches element 3 of a"),
    "an offset far away": (geometry(b")", b")", integer(2**62)), "reaches element 46116860184273"),
    "no storage": (view(b"N", integer(0), b")", b")", b"\x89", b"}"), "a tensor in None"),
    "too few arguments": (view(FLOATS, integer(0)), "a call with 2 arguments"),
    "conjugated": (
        in_zip(mapping({"w": tensor(FLOATS, (3,), (1,), 0, mapping({"conj": b"\x88"}))})),
        "refused: a lazily conjugated",
    ),
    "a parameter of a string": (
        in_zip(call(name("torch._utils", "_rebuild_parameter"), text("x"), b"NN")),
        "a parameter that is 'x'",
    ),
    "a parameter without a tensor": (
        entry(name("torch.nn.parameter", "Parameter") + b")\x81"),
        "'x' is <Parameter>, not a named tensor",
    ),
    "a parameter's state": (
        entry(name("torch.nn.parameter", "Parameter") + b")\x81" + text("state") + b"b"),
        "a Parameter has an unknown state",
    ),
    # --------------------------------------------------------------------------------- storages
    "a storage of exabytes": (
        in_zip(mapping({"w": tensor(storage("FloatStorage", "0", 2**60), (3,), (1,))})),
        "storage '0' has 12 bytes where 4611686018427387904 are promised",
    ),
    "a storage with too few bytes": (
        in_zip(mapping({"w": TENSOR}), {"0": BYTES[:-1]}),
        "storage '0' has 11 bytes where 12 are promised",
    ),
    "a storage with too many bytes": (
        in_zip(mapping({"w": TENSOR}), {"0": BYTES + bytes(4)}),
        "storage '0' has 16 bytes where 12 are promised",
    ),
    "a storage that is not there": (
        in_zip(mapping({"w": tensor(storage("FloatStorage", "7", 3), (3,), (1,))})),
        "tensor 'w': storage '7' is not in the file",
    ),
    "a path as a key": (
        in_zip(mapping({"w": tensor(storage("FloatStorage", "../../etc/passwd", 3), (3,), (1,))})),
        "storage '../../etc/passwd' is not in the file",
    ),
    "two types of one storage": (
        in_zip(mapping({"w": TENSOR, "x": tensor(storage("IntStorage", "0", 3), (3,), (1,))})),
        "storage '0' is described twice",
    ),
    "a negative storage": (in_zip(storage("FloatStorage", "0", -3)), "-3 as a size"),
    "a tensor as the type": (
        in_zip(sequence(text("storage"), TENSOR, text("0"), text("cpu"), integer(3)) + b"Q"),
        "<Tensor> as the type of a storage",
    ),
    "Size as the type": (
        in_zip(
            sequence(text("storage"), name("torch", "Size"), text("0"), b"N", integer(3)) + b"Q"
        ),
        "torch.Size as the type of a storage",
    ),
    "a tuple as the key": (
        in_zip(sequence(text("storage"), name("torch", "IntStorage"), DEEP, b"N", b"N") + b"Q"),
        "<tuple> as the key of a storage",
    ),
    "quantised": (in_zip(storage("QUInt8Storage", "0", 3)), "refused: torch.QUInt8Storage"),
    "a view out of its storage": (
        in_legacy(storage("FloatStorage", "0", 3, sequence(text("1"), integer(1), integer(3)))),
        "a view reaches out of storage '0'",
    ),
    "a view of 2 parts": (
        in_legacy(storage("FloatStorage", "0", 3, integers((1, 2)))),
        "a view of a storage has three parts",
    ),
    # ------------------------------------------------------------------------------------ legacy
    "a storage longer than the file": (
        in_legacy(
            mapping({"w": tensor(storage("FloatStorage", "0", 2**60), (3,), (1,))}),
            {"0": (2**60, BYTES)},
        ),
        "cut short: storage '0' goes on behind the end",
    ),
    "counts that disagree": (
        in_legacy(mapping({"w": TENSOR}), {"0": (2, BYTES)}),
        "storage '0' has 2 elements where 3 are promised",
    ),
    "a negative count": (in_legacy(mapping({"w": TENSOR}), {"0": (-3, BYTES)}), "has -3 elements"),
    "a storage without a tensor": (
        in_legacy(mapping({"w": TENSOR}), {"0": (3, BYTES), "1": (3, BYTES)}),
        "'1' in the list of storages",
    ),
    "a tensor without a storage": (
        in_legacy(mapping({"w": TENSOR, "x": tensor(storage("IntStorage", "1", 1), (1,), (1,))})),
        "tensor 'x': storage '1' is not in the file",
    ),
    "one key twice": (
        in_legacy(mapping({"w": TENSOR})).replace(
            pickled(listed(text("0"))), pickled(listed(text("0"), text("0")))
        ),
        "'0' in the list of storages",
    ),
    "a deep key of a storage": (
        in_legacy(mapping({"w": TENSOR})).replace(
            pickled(listed(text("0"))), pickled(listed(DEEP))
        ),
        "<tuple> in the list of storages",
    ),
    "no list of keys": (
        in_legacy(b"}").replace(pickled(listed(text("0"))), pickled(b"}")),
        "the keys of the storages are not a list",
    ),
    # --------------------------------------------------------------------------------------- zip
    "a bomb": (
        files.zip_file(
            parts(
                data_0={"method": 8, "content": zlib.compress(bytes(2**24), 9), "unpacked": 2**24}
            )
        ),
        "refused: record 'archive/data/0' is compressed or encrypted",
    ),
    "compressed": (
        files.zip_file(parts(data_0={"method": 8})),
        "refused: record 'archive/data/0' is compressed or encrypted",
    ),
    "encrypted": (
        files.zip_file(parts(data_pkl={"flags": 1})),
        "refused: record 'archive/data.pkl' is compressed or encrypted",
    ),
    "two of one name": (
        files.zip_file([*parts(), Part("archive/data/0", BYTES)]),
        "refused: two records are called 'archive/data/0'",
    ),
    "two pickles": (
        files.zip_file([*parts(), Part("other/data.pkl", b"")]),
        "a zip file without one data.pkl",
    ),
    "overlapping": (
        files.zip_file([*parts(), Part("archive/data/1", BYTES, size=99)]),
        "records of the zip file overlap",
    ),
    "one record for two names": (
        files.zip_file([*parts(), Part("archive/data.pkl", b"", offset=0, local_name="x")]),
        "records of the zip file overlap",
    ),
    "a record of 4 GB": (
        files.zip_file(parts(data_0={"size": 2**32 - 2})),
        "records of the zip file overlap",
    ),
    "another local name": (
        files.zip_file(parts(data_0={"local_name": "archive/data/1"})),
        "is not the one that the directory says",
    ),
    "an offset behind the end": (
        files.zip_file(parts(data_0={"offset": 2**31})),
        "is not where the directory says",
    ),
    "an offset into the middle": (
        files.zip_file(parts(data_0={"offset": 9})),
        "is not where the directory says",
    ),
    "many records promised": (directory_with(8, b"\xff\x7f\xff\x7f"), "records it promises"),
    "few records promised": (directory_with(8, b"\1\0\1\0"), "has not the 1 records it promises"),
    "a directory elsewhere": (directory_with(16, b"\0\0\0\0"), "directory is not in its place"),
    "a directory of 4 GB": (directory_with(12, b"\xff" * 4), "directory is not in its place"),
    "records elsewhere": (directory_with(8, b"\1\0"), "a zip file in several parts"),
    "several disks": (directory_with(4, b"\1\0"), "a zip file in several parts"),
    "bytes behind": (files.zip_file(parts()) + b"x", "the end of the zip directory is not at"),
    "bytes before": (b"PK\3\4" + files.zip_file(parts()), "directory is not in its place"),
    "64 bits elsewhere": (
        files.zip_file(parts(), wide=True).replace(b"PK\6\6", b"PK\6\5"),
        "64-bit end of the zip directory is not in its place",
    ),
    "64 bits that lack": (
        files.zip_file(parts(), wide=True).replace(b"\1\0\x18\0", b"\2\0\x18\0"),
        "a zip record lacks its 64-bit sizes",
    ),
    "64 bits that are too few": (
        files.zip_file(parts(), wide=True).replace(b"\1\0\x18\0", b"\1\0\x08\0"),
        "a zip record lacks its 64-bit sizes",
    ),
    "64 bits in two minds": (
        files.zip_file(parts(), wide=True)[:-12]
        + b"\1\0"
        + files.zip_file(parts(), wide=True)[-10:],
        "two ends that disagree",
    ),
    "a million records": (
        files.zip_file(parts(), wide=True).replace(
            struct.pack("<2Q", 4, 4), struct.pack("<2Q", 10**6, 10**6)
        ),
        "refused: 1000000 records in a zip file",
    ),
    # --------------------------------------------------------------------------------------- tar
    "symlink": (tar_with(tarfile.SYMTYPE, linkname="/etc/passwd"), "'pickle' in the tar file is a"),
    "hard link": (tar_with(tarfile.LNKTYPE, linkname="storages"), "'pickle' in the tar file is a"),
    "sparse": (tar_with(tarfile.GNUTYPE_SPARSE), "'pickle' in the tar file is a link or no file"),
    "device": (tar_with(tarfile.CHRTYPE), "'pickle' in the tar file is a link or no file"),
    "directory": (tar_with(tarfile.DIRTYPE), "'pickle/' in the tar file is a link or no file"),
    "a path": (
        files.tar_file({f"../{key}": content for key, content in tar_members().items()}),
        "a tar file without pickle",
    ),
    "pickle twice": (
        files.tar_file(tar_members(), [(tarfile.TarInfo("pickle"), b"")]),
        "two records are called 'pickle'",
    ),
    "a member of 8 GB": (tar_header(124, b"77777777777\0"), "'sys_info' goes on behind the end"),
    "a binary size": (tar_header(124, b"\x80" + b"\xff" * 11), "is not octal"),
    "a negative size": (tar_header(124, b"-0000000001\0"), "is not octal"),
    "a header's checksum": (
        in_tar(b"").replace(b"sys_info", b"sys_inf0"),
        "the checksum of a tar header is wrong",
    ),
    "storages without end": (
        files.tar_file(tar_members() | {"storages": pickled(integer(2**62))}),
        "refused: 4611686018427387904 storages or tensors",
    ),
    "storages that lack": (
        files.tar_file(tar_members() | {"storages": pickled(integer(9))}),
        "goes on behind the end",
    ),
    "negative storages": (
        files.tar_file(tar_members() | {"storages": pickled(integer(-1))}),
        "-1 as a size",
    ),
    "a negative length": (
        files.tar_file(
            tar_members()
            | {
                "storages": pickled(integer(1))
                + files.tar_storage(1, "FloatStorage", -(2**40), BYTES)
            }
        ),
        "-1099511627776 as a size",
    ),
    "a length of exabytes": (
        files.tar_file(
            tar_members()
            | {"storages": pickled(integer(1)) + files.tar_storage(1, "FloatStorage", 2**60, BYTES)}
        ),
        "storage '1' goes on behind the end",
    ),
    "2 billion dimensions": (
        files.tar_file(
            tar_members()
            | {
                "tensors": pickled(integer(1))
                + pickled(sequence(integer(5), integer(1), name("torch", "FloatTensor")))
                + b"\xff" * 8
            }
        ),
        "the tensors go on behind the end",
    ),
    "a tensor out of its storage": (
        files.tar_file(
            tar_members()
            | {
                "tensors": pickled(integer(1))
                + files.tar_tensor(5, 1, "FloatTensor", (3,), (2**61,))
            }
        ),
        "reaches element 4611686018427387904 of a storage of 3",
    ),
    "a tensor in no storage": (
        files.tar_file(
            tar_members()
            | {"tensors": pickled(integer(1)) + files.tar_tensor(5, 2, "FloatTensor", (3,), (1,))}
        ),
        "a tensor in None",
    ),
    "a view of nothing": (
        files.tar_file(files.tar_members(pickled(b"}"), [], [], listed(integers((8, 1, 0, 0))))),
        "a view of 1, which is no storage",
    ),
    "a view out of a storage": (
        files.tar_file(
            files.tar_members(
                pickled(b"}"),
                [],
                [files.tar_storage(1, "FloatStorage", 3, BYTES)],
                listed(integers((8, 1, 2, 2))),
            )
        ),
        "a view reaches out of storage '1'",
    ),
    "one tensor twice": (
        files.tar_file(
            files.tar_members(
                pickled(b"}"),
                [files.tar_tensor(5, 1, "FloatTensor", (3,), (1,))] * 2,
                [files.tar_storage(1, "FloatStorage", 3, BYTES)],
            )
        ),
        "'5' is described twice",
    ),
    "one storage twice": (
        files.tar_file(
            files.tar_members(
                pickled(b"}"), [], [files.tar_storage(1, "FloatStorage", 3, BYTES)] * 2
            )
        ),
        "'1' is described twice",
    ),
    "an unknown tensor": (in_tar(text("6") + b"Q"), "persistent id '6' is not a tensor"),
    "a tuple as an id": (in_tar(LAUGHS + b"Q"), "persistent id <tuple> is not a tensor"),
}

# Reads each file named on its command line; prints what came of it, and how long it took.
CHILD = """
import json, resource, signal, sys, time
from flaxcnn.pth import read_pth
if sys.platform == "linux":  # others do not say what is used
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]),) * 2)
def too_long(*_):
    raise TimeoutError
signal.signal(signal.SIGPROF, too_long)
for path in sys.argv[2:]:
    signal.setitimer(signal.ITIMER_PROF, 60)
    start = time.process_time()
    try:
        outcome = "read", str(list(read_pth(path)))
    except BaseException as error:
        outcome = type(error).__name__, str(error)
    print(json.dumps([*outcome, time.process_time() - start]), flush=True)
"""
MEMORY_BYTES = 600 * 2**20  # the longest pickle that is interpreted, at its worst
SECONDS = 20  # of the processor; the slowest takes 2 on a quiet machine


def test_attacks(tmp_path: Path) -> None:
    """All in one process of limited memory, which must survive them."""
    paths = [tmp_path / f"{index}.pth" for index in range(len(ATTACKS))]
    for path, (content, _) in zip(paths, ATTACKS.values(), strict=True):
        path.write_bytes(content)
    command = [sys.executable, "-c", CHILD, str(MEMORY_BYTES), *map(str, paths)]
    child = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert not (tmp_path / CANARY).exists()

    faults = {}
    lines = child.stdout.splitlines() + ["{}"] * len(ATTACKS)
    for (attack, (_, expected)), path, line in zip(ATTACKS.items(), paths, lines, strict=False):
        outcome = json.loads(line)
        kind, message, seconds = outcome or ("died", child.stderr[-500:], 0)
        reason = message.removeprefix(f"{path}: ")
        sound = kind == "WeightsError" and reason != message and expected in reason
        if not sound or len(reason) > 250 or seconds > SECONDS:
            faults[attack] = outcome
    assert not faults


def test_the_canary_sings(tmp_path: Path) -> None:
    """The attack is one: pickle itself executes it."""
    code = "import pickle, sys; pickle.load(sys.stdin.buffer)"
    command = [sys.executable, "-c", code]
    subprocess.run(command, input=pickled(RUN), cwd=tmp_path, check=True)
    assert (tmp_path / CANARY).exists()


# ------------------------------------------------------------------------------- odd but harmless
@pytest.mark.parametrize(
    "content",
    [
        files.zip_file([*parts(), Part("../../evil", b"x"), Part("/etc/passwd", b"y")]),
        in_zip(b"\x95" + b"\xff" * 8 + mapping({"w": TENSOR})),  # FRAME is no more than a hint
        in_zip(mapping({"w": TENSOR}) + b"r\xff\xff\xff\xff"),
        in_zip(mapping({"model": mapping({"w": TENSOR}), "x": DEEP, "y": LAUGHS})),
        in_zip(b"}q\0(" + text("model") + mapping({"w": TENSOR}) + text("self") + b"h\0u"),
        in_zip(mapping({"_orig_mod.module.w": TENSOR})),
        in_zip(mapping({"w": tensor(FLOATS, (1, 3), (2**63 - 1, 1))})),
        in_legacy(mapping({"w": TENSOR})) + b"what follows in the stream",
    ],
    ids=["paths", "frame", "memo", "other entries", "in itself", "prefixes", "stride", "behind"],
)
def test_what_is_harmless_is_read(content: bytes) -> None:
    assert read_buffer(content)["w"].tobytes() == BYTES


# ---------------------------------------------------------------------------------------- fuzzing
OPCODES = b".(0Nq}]u)tRbQXKJMc\x80\x81\x85\x86\x87\x88\x89\x8a\x8c\x93\x94\x95hjrsaeGTUI\x8d"
NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)
WIDE_NUMBERS = (*NUMBERS, 2**32, 2**48, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


ODD_OPERATIONS = [
    *(integer(number) for number in (*WIDE_NUMBERS, -1)),
    *(bytes([code]) for code in b"N()]}tRbQsuae\x81\x85\x86\x88\x93"),
    *(b"q\0", b"q\1", b"h\0", b"h\1", text("0"), text("1"), text("w"), name("torch", "Size")),
]
LAST = {"legacy": [b"N"]}  # of a storage's description: it is no view of another


def small_pickle(kind: str) -> bytes:
    floats = storage("FloatStorage", "0", 6, *LAST.get(kind, []))
    longs = storage("LongStorage", "1", 1, *LAST.get(kind, []))
    parameter = name("torch._utils", "_rebuild_parameter")
    return pickled(
        files.ordered(
            {
                "a": tensor(floats, (2, 2), (3, 1), 1),
                "b": tensor(longs, (), ()),
                "c": call(parameter, tensor(floats, (3,), (2,)), b"NN"),
            }
        )
    )


def small_file(kind: str, pickle: bytes) -> bytes:
    """A file with a few tensors, so that most of its bytes mean something."""
    contents = {"0": bytes(range(24)), "1": bytes(8)}
    if kind == "tar":
        return files.tar_file(tar_members() | {"pickle": pickle})
    if kind == "legacy":
        return files.legacy_file(pickle, {"0": (6, contents["0"]), "1": (1, contents["1"])})
    found = files.zip_parts(pickle, contents)
    for part in found:
        part.crc = 0 if kind == "zip without checksums" else None
    return files.zip_file(found)


def small_sample(kind: str) -> bytes:
    return small_file(kind, tar_members()["pickle"] if kind == "tar" else small_pickle(kind))


def faulty_inside(kind: str, chance: random.Random) -> bytes:
    """A container that is sound, in which a pickle is not: operations changed as a whole."""
    if kind != "tar":
        return small_file(kind, shuffled(small_pickle(kind), chance))
    members = tar_members()
    member = chance.choice(("pickle", "tensors", "storages"))
    pickle, rest = members[member], b""
    if member != "pickle":  # the last pickle of it stays as it is, and what follows
        at = pickle.rindex(b"\x80\2", 0, -6)
        pickle, rest = pickle[:at], pickle[at:]
        rest = mutated(rest, list(range(len(rest))), chance) if chance.random() < 0.8 else rest
    else:
        pickle = shuffled(pickle, chance)
    return files.tar_file(members | {member: pickle + rest})


def shuffled(pickle: bytes, chance: random.Random) -> bytes:
    """The pickle with one to four operations changed for others, put in, left out or moved."""
    ends = [position for _, _, position in pickletools.genops(pickle)][1:]
    operations = [pickle[a:b] for a, b in pairwise([0, *ends, len(pickle)])]
    for _ in range(chance.choice((1, 1, 2, 3, 4))):
        at = chance.randrange(1, len(operations))
        match chance.randrange(5):
            case 0:
                operations[at] = chance.choice(ODD_OPERATIONS)
            case 1:
                operations[at] = chance.choice(operations)
            case 2:
                operations.insert(at, chance.choice(ODD_OPERATIONS))
            case 3:
                operations.insert(at, operations.pop(chance.randrange(1, len(operations))))
            case 4 if len(operations) > 2:
                del operations[at]
    return b"".join(operations)


def mutated(sample: bytes, used: list[int], chance: random.Random) -> bytes:
    """The sample with one to four faults, where it has bytes other than 0 (or just before)."""
    content = bytearray(sample)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
        at = min(chance.choice(used), max(len(content) - 1, 0))
        match chance.randrange(8):
            case 0:
                content[at : at + 1] = bytes([content[at] ^ 1 << chance.randrange(8)])
            case 1:
                content[at : at + 1] = bytes([chance.randrange(256)])
            case 2:
                content[at : at + 1] = bytes([chance.choice(OPCODES)])
            case 3:
                code, numbers = chance.choice(
                    (
                        ("<H", NUMBERS[:10]),
                        ("<I", NUMBERS),
                        ("<Q", WIDE_NUMBERS),
                        (">Q", WIDE_NUMBERS),
                    )
                )
                packed = struct.pack(code, chance.choice(numbers))
                content[at : at + len(packed)] = packed
            case 4:
                del content[at:]
            case 5:
                del content[at : at + chance.randrange(1, 40)]
            case 6:  # a splice: bytes of elsewhere put in, or put over
                start = chance.choice(used)
                piece = sample[start : start + chance.randrange(1, 60)]
                content[at : at + chance.choice((0, len(piece)))] = piece
            case 7:
                content[at:at] = bytes([chance.choice(OPCODES)]) * chance.choice((1, 1, 2, 100))
        if not content:
            break
    return bytes(content)


@contextmanager
def limited_memory(more_bytes: int) -> Iterator[None]:
    """Within it an allocation that takes the process further than this is a MemoryError."""
    if sys.platform != "linux":  # others do not say what is used
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(kind: str, count: int, seed: int) -> tuple[int, int]:
    """(how many mutated files were read, how many refused); any other outcome is raised."""
    sample, chance = small_sample(kind), random.Random(f"{kind} {seed}")
    used = [i for i in range(len(sample)) if any(sample[i : i + 2])]
    read = refused = longest = 0
    with limited_memory(2**28):
        for _ in range(count):
            if chance.random() < 0.5:
                content = mutated(sample, used, chance)
            else:
                content = faulty_inside(kind, chance)
            start = time.process_time()
            try:
                arrays = read_buffer(content)
            except WeightsError as error:
                refused += 1
                longest = max(longest, len(str(error)))
            else:
                read += 1
                for array in arrays.values():
                    assert array.nbytes <= len(content)
                    assert len(array.tobytes()) == array.nbytes  # each byte of it is there
            assert time.process_time() - start < 5
    assert longest < 300
    return read, refused


KINDS = ("zip", "zip without checksums", "legacy", "tar")


@pytest.mark.parametrize("kind", KINDS)
def test_the_samples_are_sound(kind: str) -> None:
    assert len(read_buffer(small_sample(kind))) == (1 if kind == "tar" else 3)


@pytest.mark.parametrize("kind", KINDS)
def test_fuzz(kind: str) -> None:
    assert_both(*fuzz(kind, 2_000, seed=0), count=2_000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fuzz_for_long(kind: str) -> None:
    assert_both(*fuzz(kind, 100_000, seed=1), count=100_000)


def assert_both(read: int, refused: int, count: int) -> None:
    """Some files live through their faults; most do not."""
    assert read + refused == count
    assert read > count / 100
    assert refused > count / 2
