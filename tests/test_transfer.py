"""Transfer learning: what is trained changes, what is frozen stays to the last bit."""

import dataclasses
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from placing import on_devices
from plans import PLAN
from shallow import shallow
from variables import random_variables

import flaxcnn
from flaxcnn.cpu import onednn
from train import optim, state, steps, transfer
from train.errors import UsageError
from train.plan import Plan

MEAN_AND_STD = ((0.4,), (0.3,))
RESNET = dataclasses.replace(
    PLAN,
    arch="resnet20",
    image_size=16,
    weights="w.pth",
    weight_decay=0.1,
    ema_decay=0.9,
    batch_size=16,
    steps=50,
)


def leaves(tree: Any) -> dict[tuple[str, ...], np.ndarray]:
    return flax.traverse_util.flatten_dict(jax.device_get(tree))


def trained_for(plan: Plan, steps_done: int = 3, devices: int = 1) -> tuple[Any, Any]:
    """The state before and after some steps on random images."""
    model = state.create_model(plan, devices)
    split = transfer.split(model, plan)
    optimiser = split.scaled(optim.optimiser(plan, optim.learning_rate_schedule(plan)))
    variables = random_variables(model, (1, plan.image_size, plan.image_size, plan.channels))
    before = state.state_of(variables, plan, optimiser, split)
    step = jax.pmap(
        steps.make_train_step(model, optimiser, plan, MEAN_AND_STD, 10, split),
        steps.AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=jax.devices()[:devices],
    )
    after, rng = before, np.random.default_rng(0)
    side, per_device = plan.image_size, plan.batch_size // devices
    for _ in range(steps_done):
        images = rng.integers(0, 256, (devices, per_device, side, side, plan.channels))
        batch = {
            "image": images.astype(np.uint8),
            "label": rng.integers(0, plan.num_classes, (devices, per_device)).astype(np.int32),
            "stop": np.zeros(devices, bool),
        }
        after, _ = step(*on_devices(after, batch, devices))
    return before, after


def changed(before: Any, after: Any) -> set[str]:
    """The modules, by path, of which a parameter or a statistic is another than before.

    So it must be with their moving averages.
    """
    kinds = []
    for kind in ("variables", "average"):
        old, new = leaves(getattr(before, kind)), leaves(getattr(after, kind))
        assert old.keys() == new.keys()
        kinds.append({"/".join(p[1:-1]) for p in old if not np.array_equal(old[p], new[p])})
    assert kinds[0] == kinds[1]
    return kinds[0]


def modules(plan: Plan) -> set[str]:
    model = state.create_model(plan, 1)
    images = (1, plan.image_size, plan.image_size, plan.channels)
    return {"/".join(path[:-1]) for path in leaves(random_variables(model, images)["params"])}


# ------------------------------------------------------------------------------- what is trained
@pytest.mark.parametrize("devices", [1, 3])  # a mean over three equal numbers may be another
def test_a_linear_probe_trains_the_last_layer_alone(devices: int) -> None:
    plan = dataclasses.replace(RESNET, transfer="linear_probe", batch_size=12)
    before, after = trained_for(plan, devices=devices)
    assert changed(before, after) == {"fc"}
    assert {path[-2:] for path in leaves_with_arrays(after.opt_state)} == {
        ("fc", "bias"),
        ("fc", "kernel"),
    }


def leaves_with_arrays(tree: Any) -> list[tuple[str, ...]]:
    """The paths of the momentum of an optimiser's state."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [
        tuple(str(getattr(k, "key", k)) for k in path) for path, leaf in found if np.ndim(leaf) > 0
    ]


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("freeze_bn", [False, True])
def test_from_a_stage_on(freeze_bn: bool, devices: int) -> None:
    plan = dataclasses.replace(RESNET, transfer="from:layer2", freeze_bn=freeze_bn, batch_size=12)
    before, after = trained_for(plan, devices=devices)
    expected = {m for m in modules(plan) if m.startswith(("layer2", "layer3", "fc"))}
    if freeze_bn:
        expected = {m for m in expected if "bn" not in m and "downsample_1" not in m}
    assert changed(before, after) == expected
    momentum = {path[-3:-1] for path in leaves_with_arrays(after.opt_state)}
    assert not any(part[0].startswith(("conv1", "bn1", "layer1")) for part in momentum)


def test_finetuning_trains_everything() -> None:
    for freeze_bn in (False, True):
        plan = dataclasses.replace(RESNET, transfer="finetune", freeze_bn=freeze_bn)
        expected = {m for m in modules(plan) if not (freeze_bn and "bn" in m)}
        before, after = trained_for(plan)
        assert changed(before, after) == expected


def test_frozen_stages_compute_as_in_evaluation() -> None:
    """So the first loss is that of a network whose frozen stages are evaluated apart."""
    plan = dataclasses.replace(
        RESNET, arch="efficientnet_b0", image_size=32, transfer="from:head", weight_decay=0.0
    )
    model = state.create_model(plan, 1)
    variables = random_variables(model, (1, 32, 32, 1), gain=1.0)
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 1)).astype("float32")
    split = transfer.split(model, plan)
    with nn.intercept_methods(split.intercept):
        output, updates = model.clone(dropout_rate=0.0).apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"stochastic_depth": jax.random.key(0)},
        )
    np.testing.assert_array_equal(output, model.apply(variables, images, train=False))
    for path, leaf in leaves(updates["batch_stats"]).items():
        np.testing.assert_array_equal(leaf, leaves(variables["batch_stats"])[path])


# ------------------------------------------------------------------------------- at what rates
def test_rates_fall_towards_the_image() -> None:
    plan = dataclasses.replace(RESNET, transfer="layerwise", lr_decay=0.5, head_lr_scale=4.0)
    split = transfer.split(state.create_model(plan, 1), plan)
    rates = {"/".join(path): rate for path, rate in split.rates.items()}
    assert rates["fc/kernel"] == rates["fc/bias"] == 4
    for module, rate in (("layer3_0/conv1", 0.5), ("layer2_2/conv2", 0.25), ("conv1", 0.0625)):
        assert rates[f"{module}/kernel"] == rate


def test_a_rate_is_a_learning_rate() -> None:
    """Two steps of what torch does with groups of parameters: momentum is not scaled, steps are."""
    plan = dataclasses.replace(
        RESNET, transfer="layerwise", lr_decay=0.5, head_lr_scale=3.0, clip_norm=0.0
    )
    model = state.create_model(plan, 1)
    split = transfer.split(model, plan)
    optimiser = split.scaled(optim.optimiser(plan, lambda _: 0.1))
    params = random_variables(model, (1, 16, 16, 1))["params"]
    grads = jax.tree.map(lambda x: np.sin(x), params)
    ours, opt_state = params, optimiser.init(params)
    for _ in range(2):
        updates, opt_state = optimiser.update(grads, opt_state, ours)
        ours = optax.apply_updates(ours, updates)
    for path, rate in split.rates.items():
        start, gradient = leaves(params)[path], leaves(grads)[path]
        expected, momentum = start, 0.0
        for _ in range(2):
            momentum = plan.momentum * momentum + gradient + plan.weight_decay * expected
            expected = expected - 0.1 * rate * momentum
        np.testing.assert_allclose(leaves(ours)[path], expected, rtol=1e-5, atol=1e-6)


FROM_ALL_TO_NOTHING = ("finetune", "from:layer3", "linear_probe")


def compiled_step(how: str) -> Any:
    """Of resnet18, on 8 images of 128x128 pixels."""
    plan = dataclasses.replace(RESNET, arch="resnet18", image_size=128, batch_size=8, transfer=how)
    model = state.create_model(plan, 1)
    split = transfer.split(model, plan)
    optimiser = split.scaled(optim.optimiser(plan, lambda _: 0.1))
    step = jax.pmap(
        steps.make_train_step(model, optimiser, plan, MEAN_AND_STD, 10, split),
        steps.AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=jax.devices()[:1],
    )
    shapes = jax.eval_shape(lambda: state.create_state(model, plan, optimiser, split))
    batch = {
        "image": jax.ShapeDtypeStruct((1, 8, 128, 128, 1), jnp.uint8),
        "label": jax.ShapeDtypeStruct((1, 8), jnp.int32),
        "stop": jax.ShapeDtypeStruct((1,), jnp.bool_),
    }
    return jax.jit(step).lower(shapes, batch).compile()


def test_what_is_frozen_takes_no_memory() -> None:
    """XLA's plan for a step: without gradients, momentum and kept activations of frozen stages."""
    plans = [compiled_step(how).memory_analysis() for how in FROM_ALL_TO_NOTHING]
    needed = [plan.temp_size_in_bytes + plan.argument_size_in_bytes for plan in plans]
    for smaller, larger in zip(needed[1:], needed, strict=False):
        assert smaller < 0.95 * larger


def test_what_is_frozen_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By XLA's count of operations, which does not see what oneDNN computes: so without it."""
    monkeypatch.setattr(onednn, "available", lambda: False)
    jax.clear_caches()
    flops = [compiled_step(how).cost_analysis()["flops"] for how in FROM_ALL_TO_NOTHING]
    jax.clear_caches()
    for smaller, larger in zip(flops[1:], flops, strict=False):
        assert smaller < 0.7 * larger  # a forward pass and two, one and no gradients, about


# ------------------------------------------------------------------------------- wrong requests
def test_unknown_stages() -> None:
    plan = dataclasses.replace(RESNET, transfer="from:layer9")
    with pytest.raises(UsageError, match="no such stage but stem, layer1, layer2, layer3, head"):
        transfer.split(state.create_model(plan, 1), plan)


@pytest.mark.parametrize("name", flaxcnn.list_models())
def test_every_network_has_a_last_layer(name: str) -> None:
    """Whatever its family calls it; a probe leaves auxiliary classifiers alone."""
    model = shallow(flaxcnn.create_model(name, num_classes=10))
    size = max(32, model.min_size)
    channels = 1 if name in ("lecun1989", "lenet5") else 3
    plan = dataclasses.replace(
        PLAN, arch=name, image_size=size, channels=channels, weights="w", transfer="linear_probe"
    )
    split = transfer.split(model, plan)
    heads = {path[:-1] for path in transfer.last_layer(model, plan)}
    assert len(heads) == (3 if "googlenet" in name else 1)
    (probed,) = {path[:-1] for path in split.rates}
    assert probed in heads
    assert len(probed) == 1
    assert {path[-1] for path in split.rates} == {"kernel", "bias"}
