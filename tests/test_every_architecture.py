"""Every registered network, made shallow, trains: by the trainer's own plan, optimiser and step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from placing import on_devices
from shallow import shallow
from variables import count, random_variables

import flaxcnn
from train import data, datasets, optim, state, steps
from train.config import make_plan, parse
from train.recipes import RECIPES

STEPS = 4


def without_noise(model: Any) -> Any:
    """Nothing dropped at random: of eight images that alone can raise the loss."""
    rates = ("dropout_rate", "aux_dropout_rate", "stochastic_depth_rate")
    return model.clone(**{rate: 0.0 for rate in rates if hasattr(model, rate)})


@pytest.mark.slow
@pytest.mark.parametrize("name", flaxcnn.list_models())
def test_a_few_steps_on_digits_lower_the_loss(name: str) -> None:
    digits = datasets.load("digits", None, "train", None)
    config = parse([f"--arch={name}", "--batch_size=8", f"--steps={STEPS}", "--warmup_epochs=0"])
    plan = make_plan(config, digits, 1, False)
    model = without_noise(shallow(state.create_model(plan, 1)))
    optimiser = optim.optimiser(plan, optim.learning_rate_schedule(plan))
    # What saturates the sigmoids of squeeze-and-excitation does not train.
    gain = 1.0 if hasattr(model, "table") else 2.0
    shape = (1, plan.image_size, plan.image_size, plan.channels)
    variables = random_variables(model, shape, gain=gain)
    # Zeros, which `init` would compile for each shape.
    begins = jax.eval_shape(optimiser.init, variables["params"])
    current = state.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), begins),
        totals=state.Totals.zeros(),
        average={},
    )
    train_step = jax.pmap(
        steps.make_train_step(model, optimiser, plan, digits.mean_and_std, 10),
        steps.AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=jax.devices()[:1],
    )
    batch = next(iter(data.training_batches(digits.train, plan, 0, 1)))
    batch: Any = {key: value[None] for key, value in batch.items()}
    batch["stop"] = np.zeros(1, bool)
    current, batch = on_devices(current, batch, 1)
    # Quickly, but where most of it goes over large dense layers: those loops are to be optimised.
    wide = count(variables["params"]) > 30_000_000
    train_step = train_step.lower(current, batch).compile(None if wide else quick.OPTIONS)
    losses = []
    for _ in range(STEPS):
        current, metrics = train_step(current, batch)
        losses.append(float(metrics["loss"]))
    assert min(losses[1:]) < losses[0]
    assert all(loss < 1.5 * losses[0] for loss in losses), losses


def test_every_family_has_its_recipes() -> None:
    families = flaxcnn.registry.FAMILIES
    assert set(RECIPES) == {
        (recipe, family)
        for recipe in ("classic", "small", "transfer", "probe")
        for family in families
    }
