"""Writes tests/golden/*.npz again, from torchvision: `python tests/write_golden.py [NAME ...]`.

Each file has what torchvision's network gives, in float64, for the weights of
`twins.seeded_weights` and two images of an odd size: the logits, and a summary of each stage. The
names and shapes of its state_dict are there as well, so that the weights can be drawn again where
torch is not.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch_side import evaluate, twin
from twins import MODELS, odd_size, seeded_images, summary

import flaxcnn

GOLDEN = Path(__file__).parent / "golden"


def write(name: str) -> None:
    net = twin(name, dtype=torch.float64)
    shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
    images = seeded_images(odd_size(name)).astype("float64")
    logits, maps = evaluate(net, images, flaxcnn.create_model(name).stages)
    stages = {stage: summary(feature_map) for stage, feature_map in maps.items()}
    np.savez_compressed(
        GOLDEN / f"{name}.npz",
        logits=logits.astype("float32"),
        shapes=np.array(json.dumps(shapes)),
        **stages,
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        write(name)
        print(name)
