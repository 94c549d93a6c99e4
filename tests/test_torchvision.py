"""Live parity with torchvision: random weights, random statistics, every logit, every gradient."""

import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxcnn

pytestmark = pytest.mark.torch

MODELS = [name for name in flaxcnn.list_models() if not name.startswith("lenet")]
BN_MODELS = [name for name in MODELS if name.startswith("resnet") or name.endswith("_bn")]
NUM_CLASSES = 7


def torchvision_models() -> Any:
    if importlib.util.find_spec("torchvision_cpu"):  # makes torchvision import beside a CPU torch
        importlib.import_module("torchvision_cpu")
    return importlib.import_module("torchvision.models")


def make_twin(name: str, dtype: str) -> tuple[Any, dict[str, np.ndarray]]:
    """torchvision's network with seeded random weights and statistics, and its state_dict."""
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    net = torchvision_models().get_model(name, num_classes=NUM_CLASSES).to(getattr(torch, dtype))
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if key.endswith("running_mean"):
                value.normal_(0, 0.2)
            elif key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.ndim == 1 and value.is_floating_point():  # affine terms and biases
                value.copy_(torch.empty_like(value).uniform_(-0.2, 0.2))
                if key.endswith("weight"):
                    value.add_(1)
    # Copies: in training torch changes its statistics in place.
    return net, {key: value.numpy().copy() for key, value in net.state_dict().items()}


def random_images(size: int, dtype: str) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(dtype)


def relative_error(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest value."""
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str) -> None:
    torch = importlib.import_module("torch")
    net, weights = make_twin(name, "float32")
    model = flaxcnn.create_model(name, num_classes=NUM_CLASSES)
    variables = flaxcnn.from_torchvision(name, weights, num_classes=NUM_CLASSES)
    odd = 77 if name.startswith("vgg") else 83
    for size in (224, odd, 32):
        images = random_images(size, "float32")
        with torch.no_grad():
            theirs = net.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        ours = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
        # Float32 sums of up to 25088 terms in another order.
        assert relative_error(ours, theirs) < 1e-4, size


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11", "vgg11_bn"])
def test_training_step(name: str) -> None:
    """In float64: the loss, the gradient of every parameter and the new running statistics."""
    torch = importlib.import_module("torch")
    net, weights = make_twin(name, "float64")
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    images, labels = random_images(64, "float64"), np.array([1, 5])
    logits = net.train()(torch.from_numpy(images).permute(0, 3, 1, 2))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    loss.backward()
    gradients = {key: p.grad.numpy() for key, p in net.named_parameters()}
    after = {key: value.detach().numpy() for key, value in net.state_dict().items()}

    with jax.enable_x64():
        arguments = {"num_classes": NUM_CLASSES, "dtype": jnp.float64}
        without_dropout = {"dropout_rate": 0.0} if name.startswith("vgg") else {}
        model = flaxcnn.create_model(name, **arguments, **without_dropout)
        variables = flaxcnn.from_torchvision(name, weights, **arguments)

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        (our_loss, updates), our_gradients = jax.device_get(value_and_grad(variables["params"]))
        # torch's gradients and statistics in our layout, through the same strict converter.
        expected = jax.device_get(
            flaxcnn.from_torchvision(name, {**after, **gradients}, **arguments)
        )

    assert abs(float(our_loss) - loss.item()) < 1e-9 * abs(loss.item())
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(expected["params"])))
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(our_gradients),
        jax.tree.leaves(expected["params"]),
        strict=True,
    ):
        error = np.linalg.norm((ours - theirs).ravel()) / norm
        assert error < 1e-9, jax.tree_util.keystr(path)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(updates.get("batch_stats", {})),
        jax.tree.leaves(expected.get("batch_stats", {})),
        strict=True,
    ):
        assert relative_error(ours, theirs) < 1e-9, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11_bn"])
def test_initialisation(name: str) -> None:
    """Each parameter starts with the mean, the spread and the reach that torch gives it."""
    net = torchvision_models().get_model(name, num_classes=NUM_CLASSES)
    weights = {key: value.numpy() for key, value in net.state_dict().items()}
    theirs = flaxcnn.from_torchvision(name, weights, num_classes=NUM_CLASSES)
    model = flaxcnn.create_model(name, num_classes=NUM_CLASSES)
    ours = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))()
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(ours)),
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
