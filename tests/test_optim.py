"""The optimiser is torch's SGD; the schedules are what they are called."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plans import PLAN

from train import optim
from train.plan import Plan


def run(plan: Plan, params: Any, gradients: list[Any]) -> Any:
    optimiser = optim.optimiser(plan, optim.learning_rate_schedule(plan))
    state = optimiser.init(params)
    for gradient in gradients:
        updates, state = optimiser.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def draw(seed: int) -> dict[str, dict[str, jax.Array]]:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 4))},
        "bn": {"scale": jax.random.normal(keys[1], (4,))},
    }


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_sgd_is_torchs(nesterov: bool, decay_norm_and_bias: bool) -> None:
    """torch.optim.SGD's update rule, written out."""
    plan = dataclasses.replace(
        PLAN,
        weight_decay=0.1,
        momentum=0.9,
        nesterov=nesterov,
        decay_norm_and_bias=decay_norm_and_bias,
        schedule="step",
        warmup_steps=0,
        steps=9,
        learning_rate=0.5,
    )
    gradients = [draw(seed) for seed in range(1, 6)]
    ours = run(plan, draw(0), gradients)
    for layer, name, decayed in (("conv", "kernel", True), ("bn", "scale", decay_norm_and_bias)):
        p, buffer = np.asarray(draw(0)[layer][name]), 0.0
        for step, gradient in enumerate(gradients):
            learning_rate = 0.5 * (1, 0.1, 0.01)[step // 3]
            g = np.asarray(gradient[layer][name]) + (0.1 * p if decayed else 0)
            buffer = 0.9 * buffer + g
            p = p - learning_rate * (g + 0.9 * buffer if nesterov else buffer)
        np.testing.assert_allclose(ours[layer][name], p, rtol=1e-5)


@pytest.mark.parametrize("clip_norm", [0.0, 2.0])
@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_nesterov_is_optaxs(decay_norm_and_bias: bool, clip_norm: float) -> None:
    """Parameters and state after three steps, but for what fused multiply-adds round."""
    plan = dataclasses.replace(
        PLAN,
        weight_decay=0.1,
        nesterov=True,
        decay_norm_and_bias=decay_norm_and_bias,
        clip_norm=clip_norm,
    )
    rate = optim.learning_rate_schedule(plan)
    mask = {"conv": {"kernel": True}, "bn": {"scale": decay_norm_and_bias}}
    theirs = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.add_decayed_weights(plan.weight_decay, None if decay_norm_and_bias else mask),
        optax.sgd(rate, plan.momentum, nesterov=True),
    )

    def after_three(optimiser: optax.GradientTransformation) -> Any:
        @jax.jit
        def step(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
            updates, state = optimiser.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        params = draw(0)
        state = optimiser.init(params)
        for seed in (1, 2, 3):
            params, state = step(params, state, draw(seed))
        return params, state

    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, after_three(optim.optimiser(plan, rate)), after_three(theirs))


def test_on_a_cpu_nesterov_is_two_loops() -> None:
    """Over each array: the momentum's, and the parameter's. Three would be optax's."""
    plan = dataclasses.replace(PLAN, weight_decay=0.1, nesterov=True)
    optimiser = optim.optimiser(plan, lambda _: 0.1)

    def step(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    kernel = {"kernel": jnp.ones((64, 64))}
    program = jax.jit(step, donate_argnums=(0, 1)).lower(kernel, optimiser.init(kernel), kernel)
    text = program.compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert sum("f32[64,64]" in line and " fusion(" in line for line in entry.splitlines()) == 2


def test_clipping_bounds_the_gradient_before_the_decay_is_added() -> None:
    plan = dataclasses.replace(
        PLAN, clip_norm=2.0, weight_decay=0.5, learning_rate=1.0, momentum=0.0, warmup_steps=0
    )
    params = {"conv": {"kernel": jnp.ones((1, 2))}}
    gradient = {"conv": {"kernel": jnp.array([[30.0, 40.0]])}}
    ours = run(plan, params, [gradient])["conv"]["kernel"]
    np.testing.assert_allclose(ours, [[1 - 1.2 - 0.5, 1 - 1.6 - 0.5]], rtol=1e-6)


def test_step_schedule() -> None:
    plan = dataclasses.replace(PLAN, schedule="step", steps=90, warmup_steps=5, learning_rate=1.0)
    rate = optim.learning_rate_schedule(plan)
    found = [float(rate(step)) for step in (0, 3, 4, 5, 29, 30, 59, 60, 89, 90)]
    assert found == pytest.approx([0.2, 0.8, 1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])


def test_cosine_schedule() -> None:
    plan = dataclasses.replace(
        PLAN, schedule="cosine", steps=110, warmup_steps=10, learning_rate=2.0
    )
    rate = optim.learning_rate_schedule(plan)
    found = [float(rate(step)) for step in (0, 9, 10, 35, 60, 110)]
    half_root = 1 + np.cos(np.pi / 4)
    assert found == pytest.approx([0.2, 2, 2, half_root, 1, 0], abs=1e-6)
