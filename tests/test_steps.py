"""One step, on one device: what it computes, what it counts, and that it lowers for a TPU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from placing import on_devices
from plans import PLAN
from variables import random_variables

from train import optim, state, steps
from train.errors import UsageError
from train.plan import Plan

MEAN_AND_STD = ((0.5,), (0.25,))


def make(plan: Plan, log_every: int = 10) -> tuple[Any, Any, Any, state.TrainState]:
    """Model, train step, evaluation step (both over the local devices), and the first state."""
    model = state.create_model(plan, jax.device_count())
    optimiser = optim.optimiser(plan, optim.learning_rate_schedule(plan))
    train_step = steps.make_train_step(model, optimiser, plan, MEAN_AND_STD, log_every)
    eval_step = steps.make_eval_step(model, MEAN_AND_STD)
    first = steps.begin(lambda: state.create_state(model, plan, optimiser))
    return (
        model,
        steps.train_over_devices(train_step),
        steps.evaluate_over_devices(eval_step),
        first,
    )


def random_batch(size: int, plan: Plan, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (size, plan.image_size, plan.image_size, plan.channels)
    return {
        "image": rng.integers(0, 256, shape, dtype=np.uint8),
        "label": rng.integers(0, plan.num_classes, size, dtype=np.int32),
    }


def sent(batch: dict[str, np.ndarray], stop: bool = False) -> dict[str, Any]:
    (on_devices,) = steps.on_devices([batch])
    return {**on_devices, "stop": steps.told_to_stop(stop)}


def test_a_step_is_one_of_gradient_descent() -> None:
    plan = dataclasses.replace(PLAN, label_smoothing=0.1, weight_decay=0.0, warmup_steps=0)
    model, train_step, _, first = make(plan)
    before = jax.device_get(first)
    batch = random_batch(16, plan)

    def loss_fn(params: Any) -> jax.Array:
        images = (jnp.asarray(batch["image"], jnp.float32) / 255 - 0.5) / 0.25
        logits = model.apply({"params": params}, images, train=True)
        targets = 0.9 * jax.nn.one_hot(batch["label"], 10) + 0.01
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), -1))

    loss, gradients = jax.value_and_grad(loss_fn)(before.params)
    after, metrics = train_step(first, sent(batch))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert int(after.step) == 1
    for old, new, gradient in zip(
        *map(jax.tree.leaves, (before.params, after.params, gradients)), strict=True
    ):
        # Float32; the mean over eight devices sums in another order.
        np.testing.assert_allclose(new, old - plan.learning_rate * gradient, atol=1e-6)


def test_the_state_is_donated() -> None:
    _, train_step, _, first = make(PLAN)
    train_step(first, sent(random_batch(16, PLAN)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))


def test_totals_are_of_the_steps_since_the_last_log_line() -> None:
    _, train_step, _, current = make(PLAN, log_every=3)
    losses = []
    for step in range(1, 6):
        current, metrics = train_step(current, sent(random_batch(16, PLAN, seed=step)))
        losses.append(float(metrics["loss"]))
        since = losses[3:] if step > 3 else losses
        assert int(current.totals.steps) == len(since)
        assert float(current.totals.loss) == pytest.approx(sum(since), rel=1e-6)


def test_the_moving_average_is_evaluated() -> None:
    """Of parameters and statistics; its decay after step k is k / (9 + k), at most the plan's."""
    plan = dataclasses.replace(PLAN, arch="resnet20", image_size=8, ema_decay=0.15, steps=9)
    _, train_step, _, current = make(plan)
    assert current.evaluated is current.average
    expected = jax.device_get(current.variables)
    for step in range(1, 5):
        current, _ = train_step(current, sent(random_batch(16, plan, seed=step)))
        decay = min(0.15, step / (9 + step))  # the plan's from the second step on
        expected = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * new,
            expected,
            jax.device_get(current.variables),
        )
    far = []
    for ours, theirs, last in zip(
        *map(jax.tree.leaves, (current.evaluated, expected, current.variables)), strict=True
    ):
        # Float32, four sums in another order; the last values are a thousandth away at least.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        far.append(float(np.abs(ours - last).max()))
    assert max(far) > 1e-3
    _, _, _, without = make(PLAN)
    jax.tree.map(np.testing.assert_array_equal, without.evaluated, without.variables)
    assert without.average == {}


def test_the_average_of_what_stays_the_same_does() -> None:
    """To the last bit, as of what is frozen."""
    frozen = {"params": jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)}
    for step in (1, 50, 20_000):
        average = steps.moved(frozen, frozen, 0.999, jnp.int32(step))
        np.testing.assert_array_equal(average["params"], frozen["params"])


def test_told_to_stop_comes_back() -> None:
    _, train_step, _, current = make(PLAN)
    current, metrics = train_step(current, sent(random_batch(16, PLAN), stop=False))
    assert not bool(metrics["stop"])
    current, metrics = train_step(current, sent(random_batch(16, PLAN), stop=True))
    assert bool(metrics["stop"])


@pytest.mark.parametrize("num_classes", [3, 10])
def test_evaluation_counts_each_example_and_no_padding(num_classes: int) -> None:
    plan = dataclasses.replace(PLAN, num_classes=num_classes)
    model, _, eval_step, current = make(plan)
    batches = [random_batch(16, plan, seed) for seed in range(4)]
    masks = [np.arange(16) < count for count in (16, 16, 16, 5)]
    batches = [{**b, "mask": m} for b, m in zip(batches, masks, strict=True)]
    found = steps.evaluate(eval_step, current.variables, steps.on_devices(batches))

    images = np.concatenate([b["image"][m] for b, m in zip(batches, masks, strict=True)])
    labels = np.concatenate([b["label"][m] for b, m in zip(batches, masks, strict=True)])
    images = (images.astype("float32") / 255 - 0.5) / 0.25
    logits = model.apply({"params": current.params}, images, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    ranks = np.argsort(-np.asarray(logits), -1)
    assert found["n"] == 53
    assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found["top1"] == np.mean(ranks[:, 0] == labels)
    assert found["top5"] == np.mean((ranks[:, :5] == labels[:, None]).any(-1))


class Dropping(nn.Module):
    """A network that is little but dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(x)


def test_evaluation_ends_when_told_to_stop() -> None:
    _, _, eval_step, current = make(PLAN)
    batches = [{**random_batch(16, PLAN, seed), "mask": np.ones(16, bool)} for seed in range(6)]
    asked = []

    def told() -> bool:
        asked.append(None)
        return len(asked) > 2

    assert steps.evaluate(eval_step, current.variables, steps.on_devices(batches), told) is None
    assert len(asked) == 5  # two were on their way


def test_dropout_differs_between_steps_and_devices_but_not_between_runs() -> None:
    plan = dataclasses.replace(PLAN, learning_rate=1e-30)
    image = random_batch(1, plan)
    batch = {name: np.repeat(value, 8, axis=0) for name, value in image.items()}  # one per device
    optimiser = optim.optimiser(plan, optim.learning_rate_schedule(plan))
    step = steps.make_train_step(Dropping(), optimiser, plan, MEAN_AND_STD, 10)
    train_step = steps.train_over_devices(step)

    def losses(batch: dict[str, np.ndarray]) -> list[float]:
        created = state.create_state(Dropping(), plan, optimiser)
        current = jax.device_put(created, steps.replicated())
        found = []
        for _ in range(3):
            current, metrics = train_step(current, sent(batch))
            found.append(float(metrics["loss"]))
        return found

    assert losses(batch) == losses(batch)
    assert len(set(losses(batch))) == 3
    # Each device has a mask of its own: the loss is the mean of eight different ones.
    created = state.create_state(Dropping(), plan, optimiser)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(plan.seed), 0), 0)
    alone = []
    for device in range(8):
        logits = Dropping().apply(
            {"params": created.params},
            steps.normalised(jnp.asarray(image["image"]), MEAN_AND_STD),
            train=True,
            rngs=steps.random_streams(jax.random.fold_in(key, device)),
        )
        alone.append(optax.softmax_cross_entropy_with_integer_labels(logits, image["label"])[0])
    assert len({float(loss) for loss in alone}) == 8
    assert losses(batch)[0] == pytest.approx(float(np.mean(alone)), rel=1e-5)


def test_lecun_head_starts_dense_layers_alone_afresh() -> None:
    params = {}
    for head_init in ("network", "lecun"):
        plan = dataclasses.replace(PLAN, head_init=head_init)
        optimiser = optim.optimiser(plan, optim.learning_rate_schedule(plan))
        params[head_init] = state.create_state(state.create_model(plan, 1), plan, optimiser).params
    network, lecun = params["network"], params["lecun"]
    np.testing.assert_array_equal(network["C5"]["kernel"], lecun["C5"]["kernel"])
    for name, fan_in in (("F6", 120), ("output", 84)):
        # LeNet-5's own start is uniform: deviation 1 / sqrt(3 fan_in).
        kernels = network[name]["kernel"], lecun[name]["kernel"]
        expected = (3 * fan_in) ** -0.5, fan_in**-0.5
        assert [float(k.std()) for k in kernels] == pytest.approx(expected, rel=0.1)


def test_he_start_draws_convolutions_alone_afresh() -> None:
    """And refuses LeNet's, whose convolutions of some of the maps have kernels of another shape."""
    params = {}
    for conv_init in ("network", "he"):
        plan = dataclasses.replace(PLAN, arch="resnet20", conv_init=conv_init)
        optimiser = optim.optimiser(plan, optim.learning_rate_schedule(plan))
        params[conv_init] = state.create_state(state.create_model(plan, 1), plan, optimiser).params
    network, he = params["network"], params["he"]
    np.testing.assert_array_equal(network["fc"]["kernel"], he["fc"]["kernel"])
    # resnet20's own start is by fan-out: 32 and 64 maps instead of 16 and 32.
    for stage, fan_in in (("layer2_0", 16 * 9), ("layer3_0", 32 * 9)):
        kernels = (start[stage]["conv1"]["kernel"] for start in (network, he))
        expected = (2 / (2 * fan_in)) ** 0.5, (2 / fan_in) ** 0.5
        assert [float(k.std()) for k in kernels] == pytest.approx(expected, rel=0.05)
        np.testing.assert_array_equal(network[stage]["bn1"]["scale"], he[stage]["bn1"]["scale"])
    with pytest.raises(UsageError, match="--conv_init=he: lenet5 has convolutions of some maps"):
        state.create_model(dataclasses.replace(PLAN, conv_init="he"), 1)


def test_what_the_network_lacks_is_refused() -> None:
    for change, message in (
        ({"bn": "sync"}, "--bn=sync: lenet5 has no batch normalisation"),
        ({"dropout_rate": 0.5}, "--dropout_rate: lenet5 has no argument dropout_rate"),
        ({"arch": "vgg11", "bn": "sync"}, "--bn=sync: vgg11 has no batch normalisation"),
        ({"arch": "resnet18", "batch_size": 1}, "more than one value per channel"),
    ):
        with pytest.raises(UsageError, match=message):
            state.create_model(dataclasses.replace(PLAN, **change), 1)


def five_steps(devices: int, bn: str) -> state.TrainState:
    """Five steps of a resnet18 on the same global batches, in float64."""
    with jax.enable_x64():
        plan = dataclasses.replace(PLAN, arch="resnet18", image_size=16, steps=5, bn=bn)
        plan = dataclasses.replace(plan, precision="float64")  # not the trainer's, but exact
        model = state.create_model(plan, devices)
        optimiser = optim.optimiser(plan, optim.learning_rate_schedule(plan))
        step = steps.make_train_step(model, optimiser, plan, MEAN_AND_STD, 10)
        over_devices = jax.pmap(
            step, "batch", in_axes=(None, 0), out_axes=(None, None), devices=jax.devices()[:devices]
        )
        images = jnp.zeros((1, 16, 16, 1))
        variables = random_variables(model, images.shape)
        current = jax.eval_shape(lambda: state.create_state(model, plan, optimiser))
        current = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), current)
        current = current.replace(**jax.tree.map(jnp.float64, variables))
        for seed in range(5):
            batch = random_batch(16, plan, seed)
            split = {k: v.reshape(devices, -1, *v.shape[1:]) for k, v in batch.items()}
            placed = on_devices(current, {**split, "stop": np.zeros(devices, bool)}, devices)
            current, _ = over_devices(*placed)
        return jax.device_get(current)


@pytest.mark.slow
def test_synchronous_batch_norm_makes_eight_devices_one() -> None:
    """The same parameters after five steps; with statistics per device they are others.

    In float64: in float32 units at the kinks of their ReLUs go one way or the other by rounding.
    """
    one, sync, local = five_steps(1, "local"), five_steps(8, "sync"), five_steps(8, "local")

    def distance(other: state.TrainState, part: str) -> float:
        ours, theirs = jax.tree.leaves(getattr(other, part)), jax.tree.leaves(getattr(one, part))
        return max(
            float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True)
        )

    for part in ("params", "batch_stats"):
        assert distance(sync, part) < 1e-9, part
        assert distance(local, part) > 1e-3, part


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_train_step_lowers_for_tpu_with_plain_convolutions(precision: str) -> None:
    """Without a TPU. On a CPU most convolutions of resnet18 at 32 pixels take the CPU's paths.

    By oneDNN those of one shape are one function of the program: there are 11 forward.
    """
    plan = dataclasses.replace(PLAN, arch="resnet18", precision=precision)
    model = state.create_model(plan, 1)
    optimiser = optim.optimiser(plan, optim.learning_rate_schedule(plan))
    train_step = steps.train_over_devices(
        steps.make_train_step(model, optimiser, plan, MEAN_AND_STD, 10)
    )
    shapes = jax.eval_shape(lambda: state.create_state(model, plan, optimiser))
    batch = {
        "image": jax.ShapeDtypeStruct((1, 16, 32, 32, 1), jnp.uint8),
        "label": jax.ShapeDtypeStruct((1, 16), jnp.int32),
        "stop": jax.ShapeDtypeStruct((1,), jnp.bool_),
    }
    traced = jax.jit(train_step).trace(shapes, batch)
    tpu, cpu = (traced.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cpu"))
    # Matrix products: the classifier and its two gradients, no more; on a CPU also convolutions.
    assert tpu.count("stablehlo.dot_general") == 3
    assert cpu.count("stablehlo.dot_general") + cpu.count("@flaxcnn_onednn") > 30
    assert "onednn" not in tpu
    assert tpu.count("stablehlo.convolution") > 30 > cpu.count("stablehlo.convolution")
    assert ("bf16" in tpu) == (precision == "bfloat16")
