"""torchvision's weights as Flax variables: strict, and without a table per architecture.

Every submodule is named after torchvision, so that a Flax path joined with dots, "_<digit>" read as
".<digit>", is the torchvision key. Only the leaves have other names and layouts.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcnn import registry
from flaxcnn.efficientnet import EfficientNetLite
from flaxcnn.lite_keys import lite_path
from flaxcnn.network import Network

Path = tuple[str, ...]

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def from_torchvision(
    name: str, state_dict: Mapping[str, Any], *, in_channels: int = 3, **arguments: Any
) -> dict[str, Any]:
    """The variables {'params', 'batch_stats'} of network `name` with torchvision's weights.

    Args:
        state_dict: torchvision's keys -> arrays, or torch tensors on the CPU; for EfficientNet-Lite
            the keys of pip's `efficientnet-lite-pytorch`.
        in_channels: of the images that the weights are for.
        arguments: those of `create_model`, such as `num_classes`.

    Raises:
        ValueError: naming every entry that is missing, not expected, of another shape, or not
            finite. Only `num_batches_tracked` is left out without a word: old files lack it.
    """
    model = registry.create_model(name, **arguments)
    side = max(32, model.min_size)
    images = jax.ShapeDtypeStruct((1, side, side, in_channels), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

    unused = {key for key in state_dict if not key.endswith("num_batches_tracked")}
    faults, values = [], []
    for path, target in leaves:
        names = tuple(entry.key for entry in path[1:])  # without 'params' or 'batch_stats'
        key = _published_key(model, names)
        if key not in state_dict:
            faults.append(f"missing: {key} (for {'/'.join(names)})")
            continue
        unused.discard(key)
        value = _to_flax(np.asarray(state_dict[key]), names, model.flattened)
        if value is None or value.shape != target.shape:
            found = tuple(np.shape(state_dict[key]))
            faults.append(f"shape: {key} {found} does not fit {'/'.join(names)} {target.shape}")
        elif not np.isfinite(value).all():
            faults.append(f"not finite: {key}")
        else:
            values.append(jnp.asarray(value, target.dtype))
    faults += [f"not expected: {key}" for key in sorted(unused)]
    if faults:
        raise ValueError(f"not a state_dict of {name}:\n  " + "\n  ".join(faults))
    return jax.tree_util.tree_unflatten(tree, values)


def _published_key(model: Network, path: Path) -> str:
    """The name of an entry in the weights that are published for this network."""
    if isinstance(model, EfficientNetLite):  # which torchvision lacks
        path = lite_path(model, path)
    return torchvision_key(path)


def torchvision_key(path: Path) -> str:
    """('layer1_0', 'downsample_1', 'scale') -> 'layer1.0.downsample.1.weight'."""
    modules = re.sub(r"_(?=\d)", ".", ".".join(path[:-1]))
    return f"{modules}.{_LEAVES[path[-1]]}"


def _to_flax(
    value: np.ndarray, path: Path, flattened: Mapping[str, tuple[int, int, int]]
) -> np.ndarray | None:
    """The array in Flax's layout; None if it has not the rank of its kind of layer."""
    if path[-1] != "kernel":
        return value
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)  # OIHW -> HWIO
    if value.ndim != 2:
        return None
    layer = ".".join(path[:-1])
    if layer in flattened:  # torch flattened [C, H, W] before it, we [H, W, C]
        c, h, w = flattened[layer]
        if value.shape[1] != c * h * w:
            return None
        value = value.reshape(-1, c, h, w).transpose(0, 2, 3, 1).reshape(len(value), -1)
    return value.T
