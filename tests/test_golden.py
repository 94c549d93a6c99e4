"""Every network that torchvision has gives torchvision's numbers; this needs no torch.

`write_golden.py` says what the files hold, and writes them.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import quick
from twins import MODELS, odd_size, seeded_images, seeded_weights, summary
from variables import assert_same_state_dict

import flaxcnn
from flaxcnn import blocks, pooling
from flaxcnn.blocks import BatchNorm

GOLDEN = Path(__file__).parent / "golden"


def check(name: str, **arguments: Any) -> None:
    """Logits and stages of `name` against its golden file; stages first, as faults start there."""
    with np.load(GOLDEN / f"{name}.npz") as golden:
        shapes = {key: tuple(shape) for key, shape in json.loads(str(golden["shapes"])).items()}
        expected = {key: golden[key] for key in golden.files if key != "shapes"}
    model = flaxcnn.create_model(name, **arguments)
    state_dict = seeded_weights(shapes)
    variables = flaxcnn.from_torchvision(name, state_dict)
    images = seeded_images(odd_size(name))

    # Of both at once: XLA computes what they share, all of it, once.
    @functools.partial(jax.jit, compiler_options=quick.OPTIONS)
    def run(variables: Any, images: jax.Array) -> Any:
        maps = flaxcnn.extract_features(model, variables, images, model.stages)
        return maps, model.apply(variables, images, train=False)

    maps, logits = run(variables, images)
    for stage in model.stages:
        # Float32 sums in another order; a fault is a thousand times as much.
        np.testing.assert_allclose(
            summary(maps[stage]),
            expected.pop(stage),
            atol=1e-4 * np.abs(maps[stage]).max(),
            rtol=0,
            err_msg=stage,
        )
    theirs = expected.pop("logits")
    np.testing.assert_allclose(logits, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)
    assert not expected, "stages that the model does not have"
    assert_same_state_dict(flaxcnn.to_torchvision(name, variables), state_dict)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_stages_and_logits_are_torchvisions(name: str) -> None:
    check(name)


def test_every_variant_has_a_golden_file() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.npz")) == MODELS


def test_a_wrong_padding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pooling.max_pool
    monkeypatch.setattr(
        pooling, "max_pool", lambda x, k, s, padding=0: right(x, k, s, 0, ceil_mode=True)
    )
    with pytest.raises(AssertionError, match="stem"):
        check("resnet18")


def test_a_wrong_epsilon_is_seen() -> None:
    with pytest.raises(AssertionError, match="stem"):
        check("resnet18", norm=functools.partial(BatchNorm, epsilon=1e-3))


def test_a_missing_relu_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one of the classifier: the stages before it are right."""
    right, last = blocks.relu, 4096
    monkeypatch.setattr(blocks, "relu", lambda x: x if x.shape[-1] == last else right(x))
    with pytest.raises(AssertionError, match="Mismatched elements"):
        check("vgg11")
