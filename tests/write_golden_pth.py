"""Writes tests/golden/state_dict_*.pth again: `python tests/write_golden_pth.py`, with torch.

What they hold is `golden_tensors`: test_pth.py states the same in NumPy. The tar file is put
together by hand, as no torch of today writes it; torch reads it (a test of its own).
"""

from collections import OrderedDict
from pathlib import Path

import pth_files
import torch

GOLDEN = Path(__file__).parent / "golden"


def golden_tensors() -> OrderedDict[str, torch.Tensor]:
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 8
    return OrderedDict(
        {
            "weight": weight,
            "transposed": weight.t(),
            "row": weight[1, 1:],
            "num_batches_tracked": torch.tensor(7),
            "half": weight[0].half(),
            "bfloat16": weight[:, 0].bfloat16(),
            "empty": torch.zeros(0, 5),
        }
    )


if __name__ == "__main__":
    torch.save(golden_tensors(), GOLDEN / "state_dict_zip.pth")
    torch.save(
        golden_tensors(), GOLDEN / "state_dict_legacy.pth", _use_new_zipfile_serialization=False
    )
    (GOLDEN / "state_dict_tar.pth").write_bytes(pth_files.sample("tar"))
