"""What torch.save has written in its three formats is read as it was, without torch."""

import importlib
import io
import os
import struct
import tracemalloc
import zipfile
import zlib
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pth_files as files
import pytest
from pth_files import assert_same, to_numpy

from flaxcnn.errors import WeightsError
from flaxcnn.pth import let_go, read_buffer, read_pth, write_pth

GOLDEN = Path(__file__).parent / "golden"


def one_tensor(numel: int = 3) -> bytes:
    """The description of a float32 tensor, the whole of storage 0."""
    return files.tensor(files.storage("FloatStorage", "0", numel), (numel,), (1,))


ARANGE = {"w": np.arange(3, dtype="float32")}


def zip_of(content: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A file with this pickle; storage 0 is that of ARANGE."""
    contents = {"0": ARANGE["w"].tobytes()} if storages is None else storages
    return files.zip_file(files.zip_parts(files.pickled(content), contents))


# --------------------------------------------------------------------------- the formats themselves
@pytest.mark.parametrize("kind", files.FORMATS)
def test_each_format(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(files.sample(kind))
    found = read_pth(path)
    path.unlink()  # the arrays hold on to the bytes
    assert_same(found, files.expected(kind))
    assert not any(array.flags.writeable for array in found.values())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells of each map")
def test_what_was_let_go_is_read_again(tmp_path: Path) -> None:
    """Its memory is free until then, and only its own."""
    path = tmp_path / "weights.pth"
    arrays = {
        name: np.random.default_rng(i).standard_normal((300, 700), np.float32)
        for i, name in enumerate("abc")
    }
    write_pth(path, arrays)

    def resident_kb() -> int:
        """Of the file, as this process has it in memory."""
        lines = Path("/proc/self/smaps").read_text().splitlines()
        (at,) = (i for i, line in enumerate(lines) if line.endswith(str(path)))
        (rss,) = (line for line in lines[at : at + 6] if line.startswith("Rss:"))
        return int(rss.split()[1])

    found = read_pth(path)
    whole = resident_kb()
    assert whole > 2400
    let_go(found["b"])
    assert whole - 830 < resident_kb() < whole - 800
    let_go(found["b"].T)
    let_go(found["c"][5:, 3:].T)
    assert resident_kb() < whole - 1600
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    assert resident_kb() == whole


def test_nothing_else_is_let_go(tmp_path: Path) -> None:
    """Pages of a map that can be written to would be lost."""
    path = tmp_path / "array"
    path.write_bytes(bytes(2**16))
    mapped = np.memmap(path, np.float32, "c")
    mapped += 1
    for array in (mapped, np.ones(2**14), np.frombuffer(b"1" * 2**16, np.uint8), mapped[0]):
        let_go(array)
    np.testing.assert_array_equal(mapped, 1)


@pytest.mark.parametrize("kind", files.FORMATS)
def test_golden_files(kind: str) -> None:
    """Written by torch 2.13 (`write_golden_pth.py`); the tar file by hand."""
    found = read_pth(GOLDEN / f"state_dict_{kind}.pth")
    weight = np.array([[0, 0.125, 0.25, 0.375], [0.5, 0.625, 0.75, 0.875], [1, 1.125, 1.25, 1.375]])
    weight = weight.astype("float32")
    expected = {
        "weight": weight,
        "transposed": weight.T,
        "row": np.array([0.625, 0.75, 0.875], "float32"),
        "num_batches_tracked": np.array(7),
        "half": np.array([0, 0.125, 0.25, 0.375], "float16"),
        "bfloat16": np.array([0, 0.5, 1], ml_dtypes.bfloat16),
        "empty": np.empty((0, 5), "float32"),
    }
    assert_same(found, files.expected("tar") if kind == "tar" else expected)


def test_the_zip_files_of_these_tests_are_sound() -> None:
    with zipfile.ZipFile(io.BytesIO(files.sample("zip"))) as archive:
        assert archive.testzip() is None
        assert "archive/data.pkl" in archive.namelist()


def test_nothing_is_copied(tmp_path: Path) -> None:
    numel = 2**22  # 16 MB
    content = zip_of(files.mapping({"w": one_tensor(numel)}), {"0": bytes(4 * numel)})
    path = tmp_path / "large.pth"
    path.write_bytes(content)
    read_pth(path)  # imports, caches
    tracemalloc.start()
    found = read_pth(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found["w"].nbytes == 4 * numel
    assert peak_bytes < 200_000


def test_views_of_one_storage_share_its_memory() -> None:
    found = read_buffer(files.sample("zip"))
    assert np.shares_memory(found["plain"], found["tail"])


# ----------------------------------------------------------------------------------- which mapping
def checkpoint(**entries: bytes) -> dict[str, np.ndarray]:
    return read_buffer(zip_of(files.mapping(entries)))


STATE = files.mapping({"w": one_tensor()})


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_a_checkpoint_holds_a_state_dict(key: str) -> None:
    entries = {"epoch": files.integer(3), "rng": one_tensor(), key: STATE, "optimizer": b"}"}
    assert_same(checkpoint(**entries), ARANGE)


def test_model_goes_before_state_dict() -> None:
    other = files.mapping({"other": one_tensor()})
    assert_same(checkpoint(state_dict=other, model=STATE), ARANGE)


def test_tensors_may_have_the_names_of_entries() -> None:
    assert list(checkpoint(model=one_tensor(), state_dict=one_tensor())) == ["model", "state_dict"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_go(prefix: str) -> None:
    found = checkpoint(**{f"{prefix}w": one_tensor(), f"{prefix}module.v": one_tensor()})
    assert list(found) == ["w", "module.v"]


def test_a_prefix_stays_where_one_name_lacks_it() -> None:
    assert list(checkpoint(**{"module.w": one_tensor(), "v": one_tensor()})) == ["module.w", "v"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (files.mapping({"w": one_tensor(), "epoch": files.integer(3)}), "'epoch' is 3, not a"),
        (files.mapping({"model": files.mapping({"w": b"N"})}), "'w' is None, not a"),
        (b"}(" + files.integer(5) + one_tensor() + b"u", "5 is <Tensor>, not a named tensor"),
        (one_tensor(), "holds no state_dict but <Tensor>"),
        (files.listed(one_tensor()), "holds no state_dict but <list>"),
        (
            files.name("torchvision.models.vgg", "VGG") + b")\x81}b",
            r"refused: torchvision\.models\.vgg\.VGG is not part of a state_dict; "
            r"save model\.state_dict\(\) alone",
        ),
    ],
)
def test_what_is_no_state_dict(content: bytes, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        read_buffer(zip_of(content))


def test_an_empty_state_dict() -> None:
    assert read_buffer(zip_of(b"}")) == {}


# ------------------------------------------------------------------------ how pickles have said it
PYTHON_2 = (
    # OrderedDict([['w', tensor]]), with byte strings and ints of more than 32 bits in decimal
    files.name("collections", "OrderedDict")
    + files.sequence(files.listed(files.listed(b"U\x01w", one_tensor())))
    + b"R"
    + files.mapping({"_metadata": b"I140234567890123\n"})
    + b"b"
)
TENSOR = one_tensor()
FLAGS = files.sequence(b"\x88", b"\x89", b"N")


@pytest.mark.parametrize(
    "state",
    [
        PYTHON_2,
        b"}T\x01\0\0\0w" + TENSOR + b"s",  # BINSTRING
        files.mapping(
            {"w": files.call(files.name("torch._utils", "_rebuild_parameter"), TENSOR, b"\x88N")}
        ),
        files.mapping(
            {"w": files.call(files.name("torch.nn.parameter", "Parameter"), TENSOR) + FLAGS + b"b"}
        ),
        files.mapping(
            {
                "w": files.name("torch.autograd.variable", "Variable")
                + b")\x81"
                + files.sequence(TENSOR, b"N", b"N", b"\x88", b"\x89")
                + b"b"
            }
        ),
        files.mapping(
            {
                "w": files.call(
                    files.name("torch._utils", "_rebuild_tensor"),
                    files.storage("FloatStorage", "0", 3),
                    files.integer(0),
                    files.call(files.name("torch", "Size"), files.integers((3,))),
                    files.integers((1,)),
                )
            }
        ),
        # protocol 4: short strings, a memo without indices, globals from the stack
        b"}\x94\x8c\x01w\x94"
        + TENSOR.replace(
            files.name("torch._utils", "_rebuild_tensor_v2"),
            b"\x8c\x0ctorch._utils\x94\x8c\x12_rebuild_tensor_v2\x93\x94",
        ).replace(
            files.name("torch", "FloatStorage"), b"\x8c\x05torch\x94\x8c\x0cFloatStorage\x93\x94"
        )
        + b"s\x8c\x01v\x94"
        + TENSOR.replace(files.name("torch._utils", "_rebuild_tensor_v2"), b"h\3").replace(
            files.name("torch", "FloatStorage"), b"h\5"
        )
        + b"s",
        files.mapping({"w": TENSOR.replace(b"ctorch\n", b"ctorch.cuda\n")}),
        files.mapping({"w": TENSOR.replace(b"ctorch\n", b"ctorch.storage\n")}),
    ],
    ids=[
        "python 2",
        "binstring",
        "parameter",
        "0.2",
        "0.1",
        "v1",
        "protocol 4",
        "cuda",
        "torch.storage",
    ],
)
def test_ways_to_say_the_same(state: bytes) -> None:
    found = read_buffer(zip_of(state))
    assert_same({"w": found["w"]}, ARANGE)
    assert all(array.tobytes() == ARANGE["w"].tobytes() for array in found.values())


def test_a_legacy_view_of_a_storage() -> None:
    """torch before 0.4: the last three of five elements are a storage of their own."""
    view = files.sequence(files.text("99"), files.integer(2), files.integer(3))
    tail = files.tensor(files.storage("FloatStorage", "0", 5, view), (2,), (1,), 1)
    whole = files.tensor(files.storage("FloatStorage", "0", 5, b"N"), (5,), (1,))
    elements = np.arange(5, dtype="float32")
    for entries in ({"tail": tail, "whole": whole}, {"whole": whole, "tail": tail}):
        pickle = files.pickled(files.mapping(entries))
        found = read_buffer(files.legacy_file(pickle, {"0": (5, elements.tobytes())}))
        np.testing.assert_array_equal(found["tail"], [3, 4])
        np.testing.assert_array_equal(found["whole"], elements)


def test_a_tar_view_of_a_storage() -> None:
    view = files.sequence(*map(files.integer, (8, 1, 2, 3)))
    elements = np.arange(5, dtype="float32")
    members = files.tar_members(
        files.pickled(files.mapping({"tail": files.text("2") + b"Q"})),
        [files.tar_tensor(2, 8, "FloatTensor", (2,), (1,), 1)],
        [files.tar_storage(1, "FloatStorage", 5, elements.tobytes())],
        files.listed(view),
    )
    assert_same(read_buffer(files.tar_file(members)), {"tail": np.array([3, 4], "float32")})


# ---------------------------------------------------------------------------------------- zip files
def test_64_bit_sizes() -> None:
    parts = files.zip_parts(files.pickled(STATE), {"0": ARANGE["w"].tobytes()})
    assert_same(read_buffer(files.zip_file(parts, wide=True)), ARANGE)


def test_a_comment() -> None:
    parts = files.zip_parts(files.pickled(STATE), {"0": ARANGE["w"].tobytes()})
    assert_same(read_buffer(files.zip_file(parts, comment=b"anything")), ARANGE)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_flipped_bit_is_told(index: int) -> None:
    parts = files.zip_parts(files.pickled(STATE), {"0": ARANGE["w"].tobytes()})
    flipped = bytearray(parts[index].content)
    flipped[-3] ^= 16
    parts[index].crc = zlib.crc32(parts[index].content)
    parts[index].content = bytes(flipped)
    with pytest.raises(WeightsError, match=f"damaged: the checksum of '{parts[index].name}'"):
        read_buffer(files.zip_file(parts))


def test_records_that_are_not_used_are_not_checked() -> None:
    parts = files.zip_parts(files.pickled(STATE), {"0": ARANGE["w"].tobytes(), "1": b"optimizer"})
    parts[3].crc = 5
    assert_same(read_buffer(files.zip_file(parts)), ARANGE)


def test_files_without_checksums() -> None:
    """`torch.serialization.set_crc32_options(False)` leaves 0 in all; in one alone it is wrong."""
    parts = files.zip_parts(files.pickled(STATE), {"0": ARANGE["w"].tobytes()})
    for part in parts:
        part.crc = 0
    assert_same(read_buffer(files.zip_file(parts)), ARANGE)
    parts[1].crc = None
    with pytest.raises(WeightsError, match="checksum"):
        read_buffer(files.zip_file(parts))


# ----------------------------------------------------------------------------------- other files
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n<!DOCTYPE html><html>404", "a web page, as from a download that failed"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "gzip: unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (struct.pack("<Q", 20) + b'{"__metadata__":{}}  ', "but safetensors"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"hello", r"is not a file of torch.save: it starts with b'hello'"),
        (files.pickled(files.integer(7)), "a pickle without its magic number"),
        (files.zip_file([files.Part("a/b", b"c")]), "a zip file without one data.pkl"),
        (files.tar_file({"pickle": b""}), "a tar file without s"),
        (
            files.zip_file([*files.zip_parts(b"", {}), files.Part("archive/constants.pkl", b"")]),
            r"is a TorchScript archive: save model\.state_dict\(\)",
        ),
        (
            files.zip_file([files.Part("a/data.pkl", b""), files.Part("a/byteorder", b"big")]),
            "big-endian",
        ),
        (
            files.legacy_file(files.pickled(b"}"), {}).replace(
                files.machine(), files.machine(b"\x89")
            ),
            "big-endian",
        ),
        (
            files.tar_file(files.sample_members() | {"sys_info": files.machine(b"\x89")}),
            "big-endian",
        ),
        (
            files.legacy_file(files.pickled(b"}"), {}).replace(
                files.pickled(files.integer(1001)), files.pickled(files.integer(1002))
            ),
            "has protocol 1002; known is 1001",
        ),
    ],
)
def test_other_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_pth(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < len(str(path)) + 300


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.pth: cannot be read: No such file"):
        read_pth(tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match="is not a file"):
        read_pth(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="is not a file"):
        read_pth(tmp_path / "pipe")


@pytest.mark.parametrize("kind", files.FORMATS)
def test_a_file_cut_anywhere_is_told(kind: str) -> None:
    content = files.sample(kind)
    end = content.rstrip(b"\0") if kind == "tar" else content  # the padding may go
    for length in range(1, len(end) - 1, 7):
        with pytest.raises(WeightsError):
            read_buffer(content[:length])


# -------------------------------------------------------------------------- files of torch itself
@pytest.fixture
def torch() -> Any:
    return importlib.import_module("torch")


def tensors(torch: Any) -> OrderedDict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, generator=generator)
    names = "float16 bfloat16 float64 uint8 int8 int16 int32 int64 bool complex64 complex128"
    return OrderedDict(
        x=x,
        shared=x[1:],
        transposed=x.transpose(0, 2),
        sliced=x[::2, 1:, ::3],
        element=x[3, 2, 4],
        counter=torch.tensor(2**40),
        empty=torch.zeros(0),
        empty_too=torch.zeros(3, 0, 2),
        parameter=torch.nn.Parameter(x[0]),
        special=torch.tensor([float("nan"), float("inf"), -0.0]),
        **{name: (x * 9).to(getattr(torch, name)) for name in names.split()},
        half_row=x.half()[1, 1],
    )


@pytest.mark.torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_files_of_torch(torch: Any, tmp_path: Path, new: bool, protocol: int) -> None:
    path = tmp_path / "weights.pth"
    saved = tensors(torch)
    saved["bfloat16_row"] = saved["bfloat16"][2, 1:, ::2]
    torch.save(saved, path, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    loaded = torch.load(path, weights_only=False)  # protocols above 3 need False
    assert_same(read_pth(path), {key: to_numpy(value) for key, value in loaded.items()})


@pytest.mark.torch
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_of_torch(torch: Any, tmp_path: Path, new: bool) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    saved = {
        "epoch": 3,
        "loss": 0.5,
        "milestones": Counter([3, 5, 5]),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "rng": torch.get_rng_state(),
        "model": {f"module.{key}": value for key, value in net.state_dict().items()},
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=new)
    expected = {key: to_numpy(value) for key, value in net.state_dict().items()}
    assert_same(read_pth(path), expected)


@pytest.mark.torch
def test_a_file_of_torch_without_checksums(torch: Any, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(3.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_pth(path), ARANGE)


@pytest.mark.torch
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_module_of_torch_is_refused(torch: Any, tmp_path: Path, new: bool) -> None:
    path = tmp_path / "module.pth"
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=new)
    with pytest.raises(WeightsError, match=r"refused: torch\.nn\.modules\.linear\.Linear is not"):
        read_pth(path)


@pytest.mark.torch
@pytest.mark.parametrize("kind", files.FORMATS)
def test_torch_reads_the_files_of_these_tests(torch: Any, tmp_path: Path, kind: str) -> None:
    """They are as the formats are, the tar file too, which no torch of today writes."""
    path = tmp_path / "weights.pth"
    path.write_bytes(files.sample(kind))
    loaded = torch.load(path, weights_only=False)
    found = {key: to_numpy(value) for key, value in loaded.items()}
    assert_same(found, files.expected(kind))
