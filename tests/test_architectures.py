"""What holds for every family: least image sizes, shape comments, dropout."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shapes import paper_images, stage_shapes
from variables import random_variables, variable_shapes

import flaxcnn
from flaxcnn import registry

MODELS = flaxcnn.list_models()
# Each kind of network -> the first that is it: sizes of maps do not depend on depth and width.
KINDS = {
    variant.func: name
    for module in registry.FAMILIES.values()
    for name, variant in reversed(module.VARIANTS.items())
}


# ------------------------------------------------------------------------------ least image size
@pytest.mark.parametrize("name", KINDS.values())
def test_min_size_is_enough(name: str) -> None:
    model = flaxcnn.create_model(name)
    images = (1, model.min_size, model.min_size, 3)
    maps = stage_shapes(model, images)
    assert all(min(shape) > 0 for shape in maps.values()), maps
    logits = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False),
        variable_shapes(model, images),
        jax.ShapeDtypeStruct(images, jnp.float32),
    )
    assert logits.shape == (1, model.num_classes)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in MODELS
        # Averaging to 16x16 would enlarge smaller images too; the paper's network sees 16x16.
        if flaxcnn.create_model(name).min_size > 1 and name != "lecun1989"
    ],
)
def test_min_size_is_the_least(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check, images a pixel smaller leave a map without a value."""
    model = flaxcnn.create_model(name)
    side = model.min_size - 1
    # The variables of images that are large enough: none of them depends on the size.
    variables = variable_shapes(model, (1, model.min_size, model.min_size, 3))
    monkeypatch.setattr(type(model), "min_size", 1)
    maps = jax.eval_shape(
        lambda v, x: flaxcnn.extract_features(model, v, x, model.stages),
        variables,
        jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),
    )
    assert 0 in maps[model.stages[-1]].shape


# --------------------------------------------------------------------------------- shape comments
def shapes_within(name: str) -> set[tuple[int, ...]]:
    """The shapes of all arrays of a training step's forward pass, the batch left out."""
    model, images = flaxcnn.create_model(name), paper_images(name, batch=3)

    def train(variables: object, x: jax.Array) -> object:
        rngs = {"dropout": jax.random.key(0), "stochastic_depth": jax.random.key(1)}
        return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)

    jaxpr = jax.make_jaxpr(train)(
        variable_shapes(model, images), jax.ShapeDtypeStruct(images, jnp.float32)
    )
    results = [variable.aval for equation in jaxpr.eqns for variable in equation.outvars]
    return {images[1:]} | {value.shape[1:] for value in results if value.shape[:1] == (3,)}


def commented(source: str) -> list[tuple[str, tuple[int, ...]]]:
    """Each `[N, ...]` in a comment behind code, and the stage that its line yields, if one."""
    found = []
    for line in source.splitlines():
        code, _, comment = line.partition("  # ")
        stage = re.search(r'yield "(\w+)"', code)
        for numbers in re.findall(r"\[N, ([\d, ]+)\]", comment):
            shape = tuple(int(number) for number in numbers.split(","))
            found.append((stage[1] if stage else "", shape))
    return found


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_shape_comments_are_true(family: str) -> None:
    """At the size that the paper states; those behind a `yield` are of the very stage."""
    module = registry.FAMILIES[family]
    names = {kind: name for kind, name in KINDS.items() if name in module.VARIANTS}
    within = set().union(*(shapes_within(name) for name in names.values()))
    comments = commented(inspect.getsource(module))
    assert comments
    assert [shape for _, shape in comments if shape not in within] == []
    for network, name in names.items():
        stages = stage_shapes(flaxcnn.create_model(name), paper_images(name))
        for stage, shape in commented(inspect.getsource(network)):
            if stage:
                assert shape == stages[stage], (name, stage)


# ---------------------------------------------------------------------------------------- dropout
def test_dropout_acts_in_training_only() -> None:
    model = flaxcnn.create_model("alexnet", num_classes=3)
    variables = random_variables(model, (1, 63, 63, 3))
    images = np.random.default_rng(0).normal(size=(2, 63, 63, 3)).astype("float32")

    def logits(key: int, train: bool) -> jax.Array:
        return model.apply(variables, images, train=train, rngs={"dropout": jax.random.key(key)})

    assert (logits(0, train=True) != logits(1, train=True)).any()
    assert (logits(0, train=True) == logits(0, train=True)).all()
    assert (logits(0, train=False) == logits(1, train=False)).all()
