"""Live parity with torchvision: random weights, random statistics, every logit, every gradient."""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from twins import MODELS, OWN_SIZES, odd_size, seeded_images
from variables import assert_same_state_dict

import flaxcnn
from train.steps import training_loss

pytestmark = [pytest.mark.torch, pytest.mark.slow]

NUM_CLASSES = 7
LABELS = np.array([1, 5])
# One network of each family is compiled as a user's program is; the others quickly.
AS_USERS_DO = ("alexnet", "vgg11_bn", "googlenet", "resnet50", "efficientnet_b0")
NO_DROPOUT = ("dropout_rate", "aux_dropout_rate", "stochastic_depth_rate")


@pytest.fixture(name="torch")
def imported_torch() -> Any:
    return importlib.import_module("torch")


@pytest.fixture(name="side")
def imported_torch_side() -> Any:
    return importlib.import_module("torch_side")


def relative_error(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest value."""
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def ours(name: str, net_state: dict[str, np.ndarray], **arguments: Any) -> tuple[Any, Any]:
    """Our network with the state_dict of torch's, dropout and stochastic depth switched off."""
    fields = flaxcnn.create_model(name).__dataclass_fields__
    off = {field: 0.0 for field in NO_DROPOUT if field in fields}
    arguments = {"num_classes": NUM_CLASSES, **arguments}
    model = flaxcnn.create_model(name, **arguments, **off)
    return model, flaxcnn.from_torchvision(name, net_state, **arguments)


# ------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("name", MODELS)
def test_stages_and_logits(name: str, side: Any) -> None:
    net = side.twin(name, NUM_CLASSES)
    model, variables = ours(name, side.state_dict(net))
    # The way back: what torch loads with strict=True, to the last bit.
    exported = flaxcnn.to_torchvision(name, variables)
    assert_same_state_dict(exported, side.state_dict(net))

    def run(variables: Any, images: jax.Array) -> Any:
        maps = flaxcnn.extract_features(model, variables, images, model.stages)
        return model.apply(variables, images, train=False), maps

    compiled = jax.jit(run, compiler_options=None if name in AS_USERS_DO else quick.OPTIONS)
    # 32: where VGG's classifier takes a short cut, and the last maps are single values.
    smaller = [] if name == "alexnet" else [32]
    for size in (OWN_SIZES[name], odd_size(name), *smaller):
        images = seeded_images(size)
        logits, maps = side.evaluate(net, images, model.stages)
        our_logits, our_maps = compiled(variables, images)
        for stage in model.stages:
            # Float32 sums of up to 25088 terms in another order.
            assert our_maps[stage].shape == maps[stage].shape, (size, stage)
            assert relative_error(our_maps[stage], maps[stage]) < 1e-4, (size, stage)
        assert relative_error(our_logits, logits) < 1e-4, size


def test_transform_input(side: Any) -> None:
    """What GoogLeNet's published weights do with images normalised by ImageNet's statistics."""
    net = side.twin("googlenet", NUM_CLASSES)
    net.transform_input = True
    model, variables = ours("googlenet", side.state_dict(net), transform_input=True)
    images = seeded_images(64)
    logits, _ = side.evaluate(net, images, [])
    assert relative_error(model.apply(variables, images, train=False), logits) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_near_to_float32_as_torchs_is(name: str, torch: Any, side: Any) -> None:
    net = side.twin(name, NUM_CLASSES).eval()
    images = seeded_images(64, batch=8)
    with torch.no_grad():
        theirs = net(side.channels_first(images)).numpy()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs_narrow = net(side.channels_first(images)).float().numpy()
    model, variables = ours(name, side.state_dict(net))
    narrow = model.clone(dtype=jnp.bfloat16)
    run = jax.jit(
        lambda v, x: narrow.apply(v, x, train=False),
        compiler_options=None if name in AS_USERS_DO else quick.OPTIONS,
    )
    error = np.linalg.norm(run(variables, images) - theirs) / np.linalg.norm(theirs)
    allowed = np.linalg.norm(theirs_narrow - theirs) / np.linalg.norm(theirs)
    # Roundings are as good as random, so that two runs of the same quality differ in the error of
    # eight images by some tens of per cent; a layer in fewer bits costs a factor.
    assert error < 1.5 * allowed, f"{error:.4f}, torch {allowed:.4f}"


# --------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("name", MODELS)
def test_training_step(name: str, torch: Any, side: Any) -> None:
    """In float64: the loss, the gradient of every parameter and the new running statistics."""
    net = side.twin(name, NUM_CLASSES, torch.float64)
    size = 32 if name == "vgg13" else 64  # 32: where VGG's classifier takes a short cut
    before, images = side.state_dict(net), seeded_images(size, dtype="float64")
    loss = _torch_loss(torch, net.train()(side.channels_first(images)), LABELS)
    loss.backward()
    gradients = {key: p.grad.numpy() for key, p in net.named_parameters()}
    after = side.state_dict(net)

    with jax.enable_x64():
        model, variables = ours(name, before, dtype=jnp.float64)
        value_and_grad = jax.jit(
            jax.value_and_grad(partial(_our_loss, model), has_aux=True),
            compiler_options=quick.OPTIONS,
        )
        (our_loss, updates), our_gradients = jax.device_get(
            value_and_grad(variables["params"], variables.get("batch_stats", {}), images, LABELS)
        )
        # torch's gradients and statistics in our layout, through the same strict converter.
        _, expected = jax.device_get(ours(name, {**after, **gradients}, dtype=jnp.float64))

    assert abs(float(our_loss) - loss.item()) < 1e-9 * abs(loss.item())
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(expected["params"])))
    for (path, leaf), theirs in zip(
        jax.tree_util.tree_leaves_with_path(our_gradients),
        jax.tree.leaves(expected["params"]),
        strict=True,
    ):
        error = np.linalg.norm((leaf - theirs).ravel()) / norm
        assert error < 1e-9, jax.tree_util.keystr(path)
    for (path, leaf), theirs in zip(
        jax.tree_util.tree_leaves_with_path(updates),
        jax.tree.leaves(expected.get("batch_stats", {})),
        strict=True,
    ):
        assert relative_error(leaf, theirs) < 1e-9, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11_bn", "alexnet", "googlenet", "efficientnet_b0"]
)
def test_ten_steps(name: str, torch: Any, side: Any) -> None:
    """SGD with momentum and weight decay, the same ten batches, in float64: torch's losses."""
    settings = {"momentum": 0.9, "nesterov": True}
    rate, decay = 1e-3, 5e-4
    rng = np.random.default_rng(0)
    batches = [
        (seeded_images(64 + step, batch=16, dtype="float64")[:, :64, :64], rng.integers(0, 7, 16))
        for step in range(10)
    ]
    torch.manual_seed(0)
    net = side.without_dropout(side.fresh(name, NUM_CLASSES)).to(torch.float64)
    before, theirs = side.state_dict(net), []
    sgd = torch.optim.SGD(net.parameters(), lr=rate, weight_decay=decay, **settings)
    for images, labels in batches:
        sgd.zero_grad()
        loss = _torch_loss(torch, net.train()(side.channels_first(images)), labels)
        loss.backward()
        sgd.step()
        theirs.append(loss.item())

    with jax.enable_x64():
        model, variables = ours(name, before, dtype=jnp.float64)
        optimiser = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, **settings))

        @partial(jax.jit, donate_argnums=(0, 1, 2), compiler_options=quick.OPTIONS)
        def step(params: Any, stats: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
            loss_and_grads = jax.value_and_grad(partial(_our_loss, model), has_aux=True)
            (loss, stats), grads = loss_and_grads(params, stats, images, labels)
            updates, state = optimiser.update(grads, state, params)
            return optax.apply_updates(params, updates), stats, state, loss

        params, stats = variables["params"], variables.get("batch_stats", {})
        state, losses = optimiser.init(params), []
        for images, labels in batches:
            params, stats, state, loss = step(params, stats, state, images, labels)
            losses.append(float(loss))
    # Norms behind small fresh weights magnify rounding with each step: to 7e-11 after ten for
    # GoogLeNet (with batches of 4: to 2e-7), to 3e-10 for EfficientNet; the others stay at 1e-15.
    np.testing.assert_allclose(losses, theirs, rtol=1e-8)


def _torch_loss(torch: Any, output: Any, labels: np.ndarray) -> Any:
    loss = partial(torch.nn.functional.cross_entropy, target=torch.from_numpy(labels))
    if hasattr(output, "aux_logits1"):  # GoogLeNet
        return loss(output.logits) + 0.3 * (loss(output.aux_logits1) + loss(output.aux_logits2))
    return loss(output)


def _our_loss(
    model: Any, params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, Any]:
    variables = {"params": params, "batch_stats": batch_stats}
    output, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return training_loss(output, labels, 0.0), updates.get("batch_stats", {})


# --------------------------------------------------------------------------------- initialisation
@pytest.mark.parametrize(
    "name",
    [
        *("alexnet", "vgg11_bn", "googlenet", "resnet18", "resnet50", "resnext50_32x4d"),
        *("efficientnet_b0", "efficientnet_v2_s"),
    ],
)
def test_initialisation(name: str, torch: Any, side: Any) -> None:
    """Each parameter starts with the mean, the spread and the reach that torch gives it."""
    # Of hundreds of samples a run, one in some runs has a draw beyond five deviations.
    torch.manual_seed(0)
    weights = side.state_dict(side.fresh(name, NUM_CLASSES))
    model, theirs = ours(name, weights)
    images = jnp.zeros((1, 64, 64, 3))
    initialise = partial(model.init, jax.random.key(0), images, train=False)
    started = jax.jit(initialise, compiler_options=quick.OPTIONS)()
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(started)),
        jax.tree.leaves(jax.device_get(theirs)),
        strict=True,
    ):
        where, spread = jax.tree_util.keystr(path), b.std()
        # Six standard errors of the difference between two samples of this size, and rounding.
        allowed = 6 * spread * (2 / b.size) ** 0.5 + 1e-6
        assert abs(a.mean() - b.mean()) < allowed, where
        assert abs(a.std() - spread) < allowed, where
        # A uniform distribution ends at 1.7 deviations, a normal one's largest draws vary.
        assert abs(np.abs(a).max() - np.abs(b).max()) < 1.5 * spread + 1e-6, where
