"""Checkpoints: exact, complete or not there, and only under their own plan."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plans import PLAN

from train import datasets, optim, state, steps
from train.checkpoint import Checkpoints
from train.config import make_plan, parse
from train.errors import DivergedError, UsageError


def make_state(step: int, seed: int = 0) -> state.TrainState:
    plan = dataclasses.replace(PLAN, seed=seed)
    model = state.create_model(plan, 1)
    optimiser = optim.optimiser(plan, optim.learning_rate_schedule(plan))
    made = state.create_state(model, plan, optimiser)
    noise = jax.tree.map(lambda x: x + 1e-3 * (step + 1) if x.dtype == jnp.float32 else x, made)
    return jax.device_put(noise.replace(step=jnp.int32(step)), steps.replicated())


def test_what_is_saved_comes_back_to_the_last_bit(tmp_path: pathlib.Path) -> None:
    saved = make_state(7)
    with Checkpoints(str(tmp_path), PLAN) as checkpoints:
        assert checkpoints.restore(saved) is None
        checkpoints.save(saved)
    with Checkpoints(str(tmp_path), PLAN) as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(lambda: make_state(7)))
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    assert all(leaf.sharding == steps.replicated() for leaf in jax.tree.leaves(restored))


def test_the_newest_three_and_the_best_are_kept(tmp_path: pathlib.Path) -> None:
    results = {1: 0.5, 2: 0.9, 3: 0.7, 4: None, 5: 0.8, 6: None, 7: 0.1}
    with Checkpoints(str(tmp_path), PLAN) as checkpoints:
        assert checkpoints.best_top1 == -1
        for step, top1 in results.items():
            checkpoints.save(make_state(step), None if top1 is None else {"top1": top1})
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()}
    assert kept == {2, 5, 6, 7}
    with Checkpoints(str(tmp_path), PLAN) as checkpoints:
        assert checkpoints.best_top1 == 0.9
        assert int(checkpoints.restore(make_state(0)).step) == 7
        checkpoints.save(make_state(8))  # the best stays the best after a restart
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()}
    assert kept == {2, 6, 7, 8}


def test_another_plan_is_refused_by_its_differences(tmp_path: pathlib.Path) -> None:
    with Checkpoints(str(tmp_path), PLAN) as checkpoints:
        checkpoints.save(make_state(1))
    other = dataclasses.replace(PLAN, momentum=0.8, batch_size=32)
    with (
        Checkpoints(str(tmp_path), other) as checkpoints,
        pytest.raises(
            UsageError, match=r"batch_size 16 there, 32 here; momentum 0.9 there, 0.8 here"
        ),
    ):
        checkpoints.restore(make_state(0))


def test_a_plan_from_before_a_field_was_there_fits_its_default(tmp_path: pathlib.Path) -> None:
    with Checkpoints(str(tmp_path), PLAN) as checkpoints:
        checkpoints.save(make_state(1))
    file = tmp_path / "checkpoints" / "1" / "run" / "metadata"
    kept = json.loads(file.read_text())
    for name in ("conv_init", "ema_decay", "lr_decay", "remat"):
        del kept["plan"][name]
    file.write_text(json.dumps(kept))
    made = make_plan(
        parse(["--arch=lenet5"]), datasets.load("digits", None, "train", None), 1, False
    )
    assert made.lr_decay == PLAN.lr_decay
    with Checkpoints(str(tmp_path), PLAN) as checkpoints:
        assert checkpoints.restore(make_state(0)) is not None
    other = dataclasses.replace(PLAN, conv_init="he")
    with (
        Checkpoints(str(tmp_path), other) as checkpoints,
        pytest.raises(UsageError, match="fit: conv_init 'network' there, 'he' here;"),
    ):
        checkpoints.restore(make_state(0))


def test_a_run_may_go_on_with_less_memory(tmp_path: pathlib.Path) -> None:
    with Checkpoints(str(tmp_path), PLAN) as checkpoints:
        checkpoints.save(make_state(1))
    with Checkpoints(str(tmp_path), dataclasses.replace(PLAN, remat=True)) as checkpoints:
        assert checkpoints.restore(make_state(0)) is not None


def test_a_half_written_checkpoint_is_not_seen(tmp_path: pathlib.Path) -> None:
    with Checkpoints(str(tmp_path), PLAN) as checkpoints:
        checkpoints.save(make_state(1))
        checkpoints.save(make_state(2))
    newest = tmp_path / "checkpoints" / "2"
    # As a process that was killed leaves it: under the name that orbax writes to before renaming.
    newest.rename(newest.with_name("2.orbax-checkpoint-tmp"))
    with Checkpoints(str(tmp_path), PLAN) as checkpoints:
        restored = checkpoints.restore(make_state(0))
        assert int(restored.step) == 1
        checkpoints.save(make_state(2))
    with Checkpoints(str(tmp_path), PLAN) as checkpoints:
        assert int(checkpoints.restore(make_state(0)).step) == 2


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: pathlib.Path) -> None:
    broken = make_state(3)
    broken = broken.replace(params=jax.tree.map(lambda x: x.at[0].set(jnp.nan), broken.params))
    with Checkpoints(str(tmp_path), PLAN) as checkpoints:
        with pytest.raises(DivergedError, match="after step 3 is not finite"):
            checkpoints.save(broken)
        assert checkpoints.restore(make_state(0)) is None
