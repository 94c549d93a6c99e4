"""Networks as building blocks: feature maps by name, and every transformation of JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from variables import random_variables

import flaxcnn

# One of each base, with several outputs, batch statistics and random layers among them.
NAMES = ["lenet5", "alexnet", "vgg11_lrn", "googlenet", "resnet20", "resnet18_v2"]


def side_of(name: str) -> int:
    return max(32, flaxcnn.create_model(name).min_size)


def images_for(name: str, batch: int = 2) -> np.ndarray:
    shape = (batch, side_of(name), side_of(name), 3)
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.fixture(scope="module", name="small")
def small_network() -> tuple[Any, Any, np.ndarray]:
    model = flaxcnn.create_model("resnet20", num_classes=5)
    return model, random_variables(model, (1, 32, 32, 3)), images_for("resnet20", batch=4)


# -------------------------------------------------------------------------------- feature maps
@pytest.mark.parametrize("name", flaxcnn.list_models())
def test_every_stage_can_be_extracted_alone(name: str) -> None:
    model = flaxcnn.create_model(name)
    images = jax.ShapeDtypeStruct(images_for(name).shape, jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)

    def shapes(stages: list[str]) -> dict[str, tuple[int, ...]]:
        maps = jax.eval_shape(
            lambda v, x: flaxcnn.extract_features(model, v, x, stages), variables, images
        )
        return {stage: feature_map.shape for stage, feature_map in maps.items()}

    every = shapes(list(model.stages))
    assert set(every) == set(model.stages)
    assert all(len(shape) == 4 and shape[0] == 2 for shape in every.values())
    for stage in (model.stages[0], model.stages[-2]):
        assert shapes([stage]) == {stage: every[stage]}


def test_features_are_those_on_the_way_to_the_logits(small: Any) -> None:
    model, variables, images = small
    maps = flaxcnn.extract_features(model, variables, images, ["layer3", "layer1"])
    assert set(maps) == {"layer3", "layer1"}
    pooled = model.clone(num_classes=0).apply(variables, images, train=False)
    np.testing.assert_allclose(maps["layer3"].mean((1, 2)), pooled, rtol=1e-5)
    compiled = jax.jit(lambda v, x: flaxcnn.extract_features(model, v, x, ["layer3", "layer1"]))
    close(compiled(variables, images), maps)


def test_nothing_behind_the_last_stage_is_computed(small: Any) -> None:
    model, variables, images = small
    called = []

    def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        called.append("/".join(context.module.path))
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        flaxcnn.extract_features(model, variables, images, ["stem", "layer1"])
    assert "layer1_2/bn2" in called
    assert not [path for path in called if path.startswith(("layer2", "fc"))]


def test_wrong_stages_are_refused_with_the_right_ones(small: Any) -> None:
    model, variables, images = small
    with pytest.raises(ValueError, match=r"no stage pool1; it has stem, layer1, layer2, layer3"):
        flaxcnn.extract_features(model, variables, images, ["stem", "pool1"])
    with pytest.raises(ValueError, match=r"no stages were asked for; it has stem"):
        flaxcnn.extract_features(model, variables, images, [])
    with pytest.raises(TypeError, match=r"got Dense"):
        flaxcnn.extract_features(nn.Dense(3), {}, images, ["stem"])


# ----------------------------------------------------------------------------- transformations
def close(ours: Any, expected: Any) -> None:
    """Equal to the rounding of sums in another order, relative to the largest value."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max()),
        ours,
        expected,
    )


@pytest.mark.parametrize("name", NAMES)
def test_jit(name: str) -> None:
    model = flaxcnn.create_model(name, num_classes=5)
    images = images_for(name)
    variables = random_variables(model, images.shape)
    eager = model.apply(variables, images, train=False)
    close(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images), eager)


def test_vmap(small: Any) -> None:
    model, variables, images = small
    one_by_one = jax.vmap(lambda x: model.apply(variables, x[None], train=False)[0])(images)
    close(one_by_one, model.apply(variables, images, train=False))


def test_vmap_where_the_classifier_takes_a_short_cut() -> None:
    model = flaxcnn.create_model("vgg11", num_classes=5)
    images = images_for("vgg11")
    variables = random_variables(model, images.shape)
    one_by_one = jax.vmap(lambda x: model.apply(variables, x[None], train=False)[0])(images)
    close(one_by_one, model.apply(variables, images, train=False))


def loss_of(model: nn.Module, variables: Any, images: np.ndarray) -> Any:
    """params -> a number, in training."""

    def loss(params: Any) -> jax.Array:
        logits, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.square(logits))

    return loss


def test_grad(small: Any) -> None:
    """Against the slope of the loss along a random direction."""
    with jax.enable_x64():
        model = small[0].clone(dtype=jnp.float64)
        variables, images = jax.tree.map(lambda leaf: leaf.astype("float64"), small[1:])
        loss = jax.jit(loss_of(model, variables, images))
        rng = np.random.default_rng(1)
        params = variables["params"]
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) / 1000, params)
        step = 1e-6
        ahead, behind = (
            loss(jax.tree.map(lambda p, d, s=sign: p + s * step * d, params, direction))
            for sign in (1, -1)
        )
        along = jax.tree.map(lambda g, d: jnp.sum(g * d), jax.grad(loss)(params), direction)
        np.testing.assert_allclose(
            sum(jax.tree.leaves(along)), (ahead - behind) / (2 * step), rtol=1e-5
        )


def test_checkpoint(small: Any) -> None:
    model, variables, images = small
    loss = loss_of(model, variables, images)
    close(
        jax.jit(jax.grad(jax.checkpoint(loss)))(variables["params"]),
        jax.jit(jax.grad(loss))(variables["params"]),
    )


def test_pmap(small: Any) -> None:
    model, variables, images = small
    over_devices = jax.pmap(lambda v, x: model.apply(v, x, train=False), in_axes=(None, 0))
    logits = over_devices(variables, images.reshape(4, 1, *images.shape[1:]))
    close(logits.reshape(4, 5), model.apply(variables, images, train=False))


def test_eval_shape_computes_nothing() -> None:
    """Of a network and a batch that would not fit into memory."""
    model = flaxcnn.create_model("vgg19")
    images = jax.ShapeDtypeStruct((100_000, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    logits = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    assert logits.shape == (100_000, 1000)


def test_nnx_bridge(small: Any) -> None:
    """As an NNX module, given the same variables, it computes the same."""
    model, variables, images = small
    bridged = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(images, train=False)
    values = {path[1:]: leaf for path, leaf in flatten_dict(variables).items()}
    state = nnx.to_flat_state(nnx.state(bridged, (nnx.Param, nnx.BatchStat)))
    assert {path for path, _ in state} == set(values)
    nnx.update(
        bridged, nnx.from_flat_state([(path, leaf.replace(values[path])) for path, leaf in state])
    )
    close(bridged(images, train=False), model.apply(variables, images, train=False))
