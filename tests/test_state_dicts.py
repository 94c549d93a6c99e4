"""Files of weights: what is in them says which kind they are, and broken ones are named."""

import json
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from flaxcnn import state_dicts
from flaxcnn.errors import WeightsError

RNG = np.random.default_rng(0)
ARRAYS = {
    "conv.weight": RNG.normal(size=(4, 3, 2, 2)).astype("float32"),
    "half": RNG.normal(size=(3, 5)).astype("float16"),
    "bfloat16": RNG.normal(size=7).astype(jnp.bfloat16),
    "double": RNG.normal(size=(2, 2)),
    "transposed": RNG.normal(size=(3, 2)).T,
    "bn.num_batches_tracked": np.array(5),
    "empty": np.zeros((0, 3), "float32"),
}


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt"])
def test_arrays_come_back_from_each_kind_whatever_its_name(
    tmp_path: pathlib.Path, suffix: str
) -> None:
    state_dicts.write_state_dict(tmp_path / f"weights.{suffix}", ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == [f"weights.{suffix}"]  # no part is left
    (tmp_path / f"weights.{suffix}").rename(tmp_path / "renamed")
    found = state_dicts.read_state_dict(tmp_path / "renamed")
    assert found.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_other_suffixes_and_places_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(WeightsError, match=r"written as \.safetensors, \.pth, \.pt"):
        state_dicts.write_state_dict(tmp_path / "weights.npz", ARRAYS)
    for suffix in ("safetensors", "pth"):
        with pytest.raises(WeightsError, match="gone"):
            state_dicts.write_state_dict(tmp_path / "gone" / f"weights.{suffix}", ARRAYS)


def test_broken_safetensors_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "weights.safetensors"
    state_dicts.write_state_dict(path, ARRAYS)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    wrong = {
        "cut in the data": whole[:-1],
        "cut in the header": whole[:100],
        "a header of terabytes": (2**42).to_bytes(8, "little") + whole[8:],
        "offsets beyond the file": whole.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
        "no JSON": whole[:8] + b"{" * header + whole[8 + header :],
        "an unknown type": whole.replace(b'"F64"', b'"F65"'),
    }
    for name, content in wrong.items():
        assert content != whole, name
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=re.escape(str(path))):
            state_dicts.read_state_dict(path)


def test_mutated_safetensors_are_read_or_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "weights.safetensors"
    state_dicts.write_state_dict(path, ARRAYS)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(500):
        mutated = whole.copy()
        mutated[rng.integers(0, len(whole), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(mutated.tobytes())
        try:
            state_dicts.read_safetensors(path)
        except WeightsError:
            refused += 1
    assert 100 < refused < 500


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("F32", [2**63, 0]), ("F32", [1] * 100), ("F8_E5M2", [4]), ("F4", [8]), ("F32", [-1])],
)
def test_headers_that_numpy_cannot_follow(
    tmp_path: pathlib.Path, dtype: str, shape: list[int]
) -> None:
    size = 0 if 0 in shape else 4
    entry = {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    header = json.dumps(entry).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        state_dicts.read_state_dict(path)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_full_disk_leaves_nothing(tmp_path: pathlib.Path, suffix: str) -> None:
    """Here a limit on the size of files; the process is another's, as the limit stays."""
    script = f"""
import resource, signal, sys
import numpy as np
from flaxcnn import state_dicts, errors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    state_dicts.write_state_dict({str(tmp_path)!r} + "/w.{suffix}", {{"x": np.ones(10_000)}})
except errors.WeightsError as error:
    sys.exit(0 if "not written" in str(error) else 3)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert not list(tmp_path.iterdir())


def test_missing_files_are_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(WeightsError, match="No such file"):
        state_dicts.read_state_dict(tmp_path / "gone.pth")
    with pytest.raises(WeightsError, match="directory"):
        state_dicts.read_state_dict(tmp_path)
