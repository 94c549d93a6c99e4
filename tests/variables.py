"""Variables of a network, random or only their shapes, without compiling its initialisation."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn


def variable_shapes(model: nn.Module, shape: tuple[int, ...]) -> Any:
    """The variables of `model` for images of that shape, as shapes and types."""
    return jax.eval_shape(
        lambda: model.init(jax.random.key(0), jax.numpy.zeros(shape), train=False)
    )


def random_variables(
    model: nn.Module, shape: tuple[int, ...], seed: int = 0, gain: float = 2.0
) -> dict[str, Any]:
    """Variables of `model` for images of that shape: seeded weights, positive variances.

    Kernels have the variance gain / fan_in: 2 keeps the size of a signal through ReLUs.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name in ("var", "scale"):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        elif name == "kernel":
            value = rng.standard_normal(leaf.shape, np.float32)
            value *= (gain / np.prod(leaf.shape[:-1])) ** 0.5
        else:
            value = rng.normal(size=leaf.shape) * 0.1
        return value.astype(leaf.dtype, copy=False)

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(model, shape))


def count(tree: Any) -> int:
    """How many numbers the arrays of a tree hold."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def assert_same_state_dict(ours: Mapping[str, np.ndarray], theirs: Mapping[str, Any]) -> None:
    """The same keys, shapes, types and bits."""
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert (value.shape, value.dtype) == (theirs[key].shape, theirs[key].dtype), key
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)
