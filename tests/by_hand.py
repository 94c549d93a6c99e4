"""Layers written out in numpy, to compare with: plain, slow, and in float64.

Feature maps are [N, H, W, C]; a layer is its parameters as Flax names them.
"""

from collections.abc import Mapping

import numpy as np

Layer = Mapping[str, np.ndarray]


def convolution(
    x: np.ndarray, layer: Layer, strides: int = 1, padding: int = 0, groups: int = 1
) -> np.ndarray:
    """Zeros around the map; a kernel [h, w, C / groups, O], and a bias if there is one."""
    x = np.pad(x.astype("float64"), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    kernel = layer["kernel"]
    height, width = kernel.shape[:2]
    rows = range(0, x.shape[1] - height + 1, strides)
    columns = range(0, x.shape[2] - width + 1, strides)
    y = np.zeros((len(x), len(rows), len(columns), kernel.shape[-1]))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            window = x[:, row : row + height, column : column + width]
            parts = zip(np.split(window, groups, -1), np.split(kernel, groups, -1), strict=True)
            y[:, i, j] = np.concatenate([np.tensordot(a, b, 3) for a, b in parts], -1)
    return y + layer.get("bias", np.zeros(()))


def dense(x: np.ndarray, layer: Layer) -> np.ndarray:
    return x @ layer["kernel"].astype("float64") + layer["bias"]


def norm(x: np.ndarray, params: Layer, stats: Layer) -> np.ndarray:
    """Batch norm by running statistics."""
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def max_pool(
    x: np.ndarray, window: int, strides: int, padding: int = 0, ceil: bool = False
) -> np.ndarray:
    """With `ceil` the last windows may run off the edge."""
    edge = ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0))
    x = np.pad(x, edge, constant_values=-np.inf)
    rows, columns = (
        range(0, size - window + (strides if ceil else 1), strides) for size in x.shape[1:3]
    )
    return np.stack(
        [
            np.stack([x[:, i : i + window, j : j + window].max((1, 2)) for j in columns], 1)
            for i in rows
        ],
        1,
    )


def response_norm(x: np.ndarray) -> np.ndarray:
    """Krizhevsky et al. 2012, section 3.3."""
    n, alpha, beta, k = 5, 1e-4, 0.75, 2
    y, channels = np.empty(x.shape), x.shape[-1]
    for i in range(channels):
        near = x[..., max(0, i - n // 2) : min(channels - 1, i + n // 2) + 1].astype("float64")
        y[..., i] = x[..., i] / (k + alpha * (near**2).sum(-1)) ** beta
    return y
