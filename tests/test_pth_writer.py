"""What is written is what was given; torch reads it too."""

import importlib
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from pth_files import assert_same, to_numpy

from flaxcnn.errors import WeightsError
from flaxcnn.pth import read_pth, write_pth, writer


def arrays() -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype("float32")
    types = ["float16", "float64", "uint8", "int8", "int16", "int32", "int64", "bool", "complex64"]
    return {
        "conv.weight": x,
        "transposed": x.T,
        "sliced": x[::2, 1:],
        "bn.num_batches_tracked": np.array(2**40),
        "empty": np.empty((0, 3), "float32"),
        "bfloat16": x.astype(ml_dtypes.bfloat16),
        "nön-ascii": x[0],
        **{name: np.abs(x * 9).astype(name) for name in types},
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    write_pth(path, arrays())
    assert_same(read_pth(path), arrays())
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.pth"]


def test_records_are_stored_at_multiples_of_64(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    write_pth(path, arrays())
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for record in archive.infolist():
            assert record.compress_type == zipfile.ZIP_STORED
            header = content[record.header_offset :][:30]
            lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:], "little")
            assert (record.header_offset + 30 + sum(lengths)) % 64 == 0


def test_big_endian_arrays(tmp_path: Path) -> None:
    write_pth(tmp_path / "w.pth", {"w": np.arange(3, dtype=">f4")})
    assert_same(read_pth(tmp_path / "w.pth"), {"w": np.arange(3, dtype="<f4")})


def test_large_records_have_64_bit_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_LARGE", 100)  # rather than a file of gigabytes
    test_what_is_written_is_read(tmp_path)
    test_records_are_stored_at_multiples_of_64(tmp_path)


def test_nothing_is_copied(tmp_path: Path) -> None:
    state = {"w": np.ones(2**22, "float32")}  # 16 MB
    write_pth(tmp_path / "w.pth", {"w": np.ones(3)})  # imports, caches
    tracemalloc.start()
    write_pth(tmp_path / "w.pth", state)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 200_000


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pth(tmp_path / name, arrays())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_may_be_replaced_by_its_own_arrays(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    write_pth(path, arrays())
    found = read_pth(path)
    write_pth(path, {"new": found["conv.weight"]})
    assert_same(read_pth(path), {"new": arrays()["conv.weight"]})
    assert_same(found, arrays())


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    write_pth(path, {"w": np.arange(3)})
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_pth(path, arrays())
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.pth"]


def test_what_torch_has_no_storage_for(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="w: no storage of torch has type uint16; known: float"):
        write_pth(tmp_path / "w.pth", {"w": np.zeros(3, "uint16")})
    with pytest.raises(WeightsError, match="names are strings, not 3"):
        write_pth(tmp_path / "w.pth", {3: np.zeros(3)})  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


@pytest.mark.torch
@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_it(tmp_path: Path, mapped: bool) -> None:
    torch: Any = importlib.import_module("torch")
    path = tmp_path / "weights.pth"
    write_pth(path, arrays())
    loaded = torch.load(path, weights_only=True, mmap=mapped)
    assert_same({key: to_numpy(value) for key, value in loaded.items()}, arrays())
    assert loaded["bn.num_batches_tracked"].dtype == torch.int64
    assert loaded["bfloat16"].dtype == torch.bfloat16


@pytest.mark.torch
def test_a_network_of_torch_takes_it(tmp_path: Path) -> None:
    torch: Any = importlib.import_module("torch")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = {key: np.full_like(to_numpy(value), 3) for key, value in net.state_dict().items()}
    write_pth(tmp_path / "w.pth", state)
    net.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True), strict=True)
    assert int(net[1].num_batches_tracked) == 3
    assert float(net[0].weight.detach().sum()) == 3 * 4 * 3 * 9
