"""torchvision's files of every age load where torch cannot be imported, and give its logits."""

import importlib
import pathlib
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pth_files
import pytest
from twins import odd_size, seeded_images

pytestmark = [pytest.mark.torch, pytest.mark.slow]

# Name -> the format that its weights are published in.
PUBLISHED = {
    "resnet50": "zip",
    "vgg16_bn": "legacy",
    "alexnet": "tar",
    "googlenet": "legacy",
    "wide_resnet50_2": "half",
    "efficientnet_b0": "zip",
}
# Reads NAME.pth and NAME.npy of a folder, writes NAME.logits.npy.
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None  # importing them fails from now on
import numpy as np
import flaxcnn
folder, *names = sys.argv[1:]
for name in names:
    model, variables = flaxcnn.load_pretrained(name, f"{folder}/{name}.pth")
    images = np.load(f"{folder}/{name}.npy")
    np.save(f"{folder}/{name}.logits.npy", model.apply(variables, images, train=False))
"""


def write(torch: Any, form: str, state_dict: Any, path: pathlib.Path) -> None:
    if form == "tar":  # which torch no longer writes
        path.write_bytes(as_tar({key: value.numpy() for key, value in state_dict.items()}))
    elif form == "legacy":  # as old as to count no batches
        old = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
        torch.save(old, path, _use_new_zipfile_serialization=False)
    elif form == "half":
        torch.save(
            {k: v.half() if v.is_floating_point() else v for k, v in state_dict.items()}, path
        )
    else:
        torch.save(state_dict, path)


def as_tar(state_dict: dict[str, np.ndarray]) -> bytes:
    entries, tensors, storages = {}, [], []
    for i, (key, value) in enumerate(state_dict.items()):
        strides = [stride // value.itemsize for stride in value.strides]
        entries[key] = pth_files.text(str(i + 1000)) + b"Q"
        tensors.append(pth_files.tar_tensor(i + 1000, i, "FloatTensor", value.shape, strides))
        storages.append(pth_files.tar_storage(i, "FloatStorage", value.size, value.tobytes()))
    pickle = pth_files.pickled(pth_files.ordered(entries))
    return pth_files.tar_file(pth_files.tar_members(pickle, tensors, storages))


def test_logits_are_torchs(tmp_path: pathlib.Path) -> None:
    torch = importlib.import_module("torch")
    side = importlib.import_module("torch_side")
    expected = {}
    for name, form in PUBLISHED.items():
        net = side.twin(name)
        if form == "half":
            net = net.half().float()
        if name == "googlenet":
            net.transform_input = True  # as it is with weights
        write(torch, form, net.state_dict(), tmp_path / f"{name}.pth")
        images = seeded_images(odd_size(name))
        np.save(tmp_path / f"{name}.npy", images)
        expected[name], _ = side.evaluate(net, images, [])
    heads = {name: (tmp_path / f"{name}.pth").read_bytes()[:4] for name in PUBLISHED}
    assert {name for name, head in heads.items() if head == b"PK\3\4"} == {
        *("resnet50", "wide_resnet50_2", "efficientnet_b0")
    }
    assert heads["vgg16_bn"][:1] == struct.pack("B", 0x80)  # a pickle

    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path), *PUBLISHED]
    subprocess.run(command, check=True)
    for name, theirs in expected.items():
        ours = np.load(tmp_path / f"{name}.logits.npy")
        assert ours.shape == (2, 1000)
        # Float32 sums of up to 25088 terms in another order.
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max(), name
