"""Blocks that are computed a second time: the same gradients, from less that is kept."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from plans import PLAN
from variables import random_variables

import flaxcnn
from train import datasets, optim, remat, state, steps
from train.config import make_plan, parse
from train.errors import UsageError

SHAPE = (4, 32, 32, 3)
# Reciprocal roots in a step of resnet20 on an accelerator: of 19 batch norms one for the value and
# one for the gradient, and there one more with each of the 10 ReLUs that are one with a norm.
ROOTS = 19 + 19 + 10


def loss_and_gradients(model: Any, variables: Any, recomputed: bool) -> Any:
    """Of training, with what is random in it: ((loss, statistics), gradients), to be compiled."""

    def loss_fn(params: Any, images: jax.Array) -> Any:
        rngs = {"dropout": jax.random.key(1), "stochastic_depth": jax.random.key(2)}
        with remat.blocks_computed_twice() if recomputed else contextlib.nullcontext():
            logits, updates = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs=rngs,
            )
        return jnp.sum(jnp.square(logits - 1)), updates

    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


# 1e-10: float64 sums of a deep network in another order.
@pytest.mark.parametrize("arch", ["resnet20", "efficientnet_b0"])
def test_gradients_and_statistics_are_the_same(arch: str) -> None:
    """In float64; of efficientnet_b0 the same examples skip the same blocks."""
    with jax.enable_x64():
        model = flaxcnn.create_model(arch, num_classes=5, dtype=jnp.float64)
        if arch == "efficientnet_b0":
            model = model.clone(stochastic_depth_rate=0.5)
        variables = jax.tree.map(jnp.float64, random_variables(model, SHAPE))
        images = jax.random.normal(jax.random.key(0), SHAPE, jnp.float64)
        programs = [
            loss_and_gradients(model, variables, how)
            .lower(variables["params"], images)
            .compile(quick.OPTIONS)
            for how in (False, True)
        ]
        kept, recomputed = (program(variables["params"], images) for program in programs)
    kept, recomputed = jax.device_get((kept, recomputed))
    assert jax.tree.structure(kept) == jax.tree.structure(recomputed)
    assert max(np.abs(x).max() for x in jax.tree.leaves(kept[1])) > 1e-3
    for part, again in zip(kept, recomputed, strict=True):
        largest = max(np.abs(x).max() for x in jax.tree.leaves(part))
        for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(again), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * largest)


def test_an_accelerator_computes_the_blocks_a_second_time() -> None:
    """By the program that a TPU is given: of 19 batch norms the values of the 18 in blocks again.

    Barriers keep each of the 9 blocks' inputs, and the output of the ReLU that ends it.
    """
    model = flaxcnn.create_model("resnet20", num_classes=5)
    variables = random_variables(model, SHAPE)
    counts = []
    for recomputed in (False, True):
        step = loss_and_gradients(model, variables, recomputed)
        traced = step.trace(variables["params"], jnp.zeros(SHAPE))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        counts.append([text.count(f"stablehlo.{op}") for op in ("rsqrt", "optimization_barrier")])
    assert counts == [[ROOTS, 9], [ROOTS + 18, 9 + 9]]


@pytest.mark.parametrize("wanted", [False, True])
def test_the_trainer_does_so_when_asked(wanted: bool) -> None:
    digits = datasets.load("digits", None, "train", None)
    plan = make_plan(parse(["--arch=resnet20", *["--remat=True"] * wanted]), digits, 1, False)
    model = state.create_model(plan, 1)
    optimiser = optim.optimiser(plan, optim.learning_rate_schedule(plan))
    step = steps.make_train_step(model, optimiser, plan, digits.mean_and_std, 10)
    shapes = jax.eval_shape(lambda: state.create_state(model, plan, optimiser))
    batch = {
        "image": jax.ShapeDtypeStruct((1, 16, 32, 32, 1), jnp.uint8),
        "label": jax.ShapeDtypeStruct((1, 16), jnp.int32),
        "stop": jax.ShapeDtypeStruct((1,), jnp.bool_),
    }
    traced = jax.jit(steps.train_over_devices(step)).trace(shapes, batch)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.rsqrt") == (ROOTS + 18 if wanted else ROOTS)


def test_networks_without_blocks_are_told() -> None:
    with pytest.raises(UsageError, match="--remat: lenet5 has no blocks"):
        state.create_model(dataclasses.replace(PLAN, remat=True), 1)
    state.create_model(dataclasses.replace(PLAN, arch="resnet20", remat=True), 1)
