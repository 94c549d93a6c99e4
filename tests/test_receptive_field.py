"""Receptive fields along one axis against sets of pixels, and of operations against gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flaxcnn
from flaxcnn import pooling
from flaxcnn.accounting import receptive_field
from flaxcnn.accounting.receptive_field import Field
from flaxcnn.accounting.trace import trace


def pixels(field: Field) -> list[set[int]]:
    """What each unit sees of the image."""
    return [
        set(range(max(first, 0), min(last, field.image - 1) + 1))
        for first, last in zip(field.first.tolist(), field.last.tolist(), strict=True)
    ]


def seen_through(
    below: Sequence[set[int]], outputs: int, window: int, stride: int, dilation: int, before: int
) -> list[set[int]]:
    """The same by hand: the union of what the window's units see, the padding's being nothing."""
    found = []
    for output in range(outputs):
        units = [output * stride - before + tap * dilation for tap in range(window)]
        found.append(set().union(*(below[u] for u in units if 0 <= u < len(below))))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_windows_upon_windows(seed: int) -> None:
    """Without gaps between taps a field is an interval, and its pixels are the union's."""
    rng = np.random.default_rng(seed)
    image = int(rng.integers(40, 60))
    field = receptive_field.of_image(image)
    by_hand = [{pixel} for pixel in range(image)]
    for _ in range(3):
        window, units = int(rng.integers(1, 6)), len(by_hand)
        stride = int(rng.integers(1, window + 1))
        dilation = int(rng.integers(1, 3)) if field.size > 2 else 1
        before, after = rng.integers(0, window, 2).tolist()
        outputs = (units + before + after - (window - 1) * dilation - 1) // stride + 1
        if outputs < 2:
            break
        field = receptive_field.through_windows(field, outputs, window, stride, dilation, before)
        by_hand = seen_through(by_hand, outputs, window, stride, dilation, before)
        for unit, (found, expected) in enumerate(zip(pixels(field), by_hand, strict=True)):
            # Where dilation leaves gaps in the padding, the interval is filled to the edge.
            assert expected <= found, unit
            assert not expected or min(expected) == min(found) or min(found) == 0, unit
            assert not expected or max(expected) == max(found) or max(found) == image - 1, unit


@pytest.mark.parametrize("size", [64, 224])
def test_published_sizes_do_not_depend_on_the_image(size: int) -> None:
    """Araujo et al., table 1: VGG-16 212, ResNet-50 483 and ResNet-101 1027.

    Their ResNets halve a map where the next 3x3 convolution sees it halved; torchvision's, in that
    convolution itself, which therefore sees 2 * 4, 2 * 8 and 2 * 16 pixels less.
    """
    for name, stage, expected in (
        ("vgg16", "pool5", 212),
        ("resnet50", "layer4", 483 - 56),
        ("resnet101", "layer4", 1027 - 56),
    ):
        stages = {s.name: s for s in flaxcnn.summarize(name, image_size=size).stages}
        assert stages[stage].receptive_field == expected


def test_uneven_bins() -> None:
    """torch's adaptive bins of ten units in seven: starts 0, 1, 2, 4, 5, 7, 8, ends 2, 3, ..."""
    field = receptive_field.of_image(10)
    found = receptive_field.through_matrix(field, pooling._bin_averages(10, 7))
    assert found.first.tolist() == [0, 1, 2, 4, 5, 7, 8]
    assert found.last.tolist() == [1, 2, 4, 5, 7, 8, 9]
    assert found.jump is None
    even = receptive_field.through_matrix(field, pooling._bin_averages(10, 5))
    assert (even.jump, even.first.tolist()) == (2, [0, 2, 4, 6, 8])


# -------------------------------------------------------------------------------- by their gradient
def support(function: Callable[[jax.Array], jax.Array], images: np.ndarray) -> list[Any]:
    """For each place of the output [1, h, w, c]: first and last row and column that matter."""
    output, pull = jax.vjp(lambda x: function(x).sum(axis=-1), images)
    bounds = []
    for row in range(output.shape[1]):
        for column in range(output.shape[2]):
            one = jnp.zeros(output.shape).at[0, row, column].set(1)
            (gradient,) = pull(one)
            rows, columns = np.nonzero(np.abs(np.asarray(gradient)[0]).sum(axis=-1))
            bounds.append((rows.min(), rows.max(), columns.min(), columns.max()))
    return bounds


def positive(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Weights among which nothing cancels."""
    return jax.random.uniform(key, shape, dtype, 0.5, 1.5)


class Applied(nn.Module):
    """One function of a map between two convolutions."""

    function: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(2, (3, 3), strides=2, padding=((1, 1), (1, 1)), kernel_init=positive)(x)
        x = self.function(x)
        return nn.Conv(2, (3, 3), padding=((1, 1), (0, 0)), kernel_init=positive)(x)


def space_to_depth(x: jax.Array) -> jax.Array:
    n, h, w, c = x.shape
    x = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h // 2, w // 2, 4 * c)


CONV = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "dilated": lambda x: jax.lax.conv_general_dilated(
        x, jnp.ones((3, 1, 2, 2)), (1, 1), ((2, 2), (0, 0)), rhs_dilation=(2, 1), **CONV
    ),
    "average": lambda x: nn.avg_pool(x, (3, 2), (2, 1), ((1, 1), (0, 0))),
    "crop": lambda x: x[:, 1:, 2:-1],
    "every other": lambda x: x[:, ::2, 1::2],
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 1), (0, 0))),
    "transpose": lambda x: x.transpose(0, 2, 1, 3),
    "space to depth": space_to_depth,
    "channels apart": lambda x: jnp.concatenate([x[..., :1], 2 * x[..., 1:]], axis=-1),
    "two paths": lambda x: jnp.concatenate(
        [nn.avg_pool(x, (5, 5), (1, 1), ((2, 2), (2, 2))), x], axis=-1
    ),
    "residual": lambda x: x + nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1))),
    "gate": lambda x: x * jnp.mean(x, axis=(1, 2), keepdims=True),
    "adaptive": lambda x: pooling.adaptive_avg_pool(x, 5),
    "adaptive up": lambda x: pooling.adaptive_avg_pool(x, 9),
    "row sums": lambda x: x + x.sum(axis=2, keepdims=True),
    "norm over channels": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "response norm": flaxcnn.blocks.local_response_norm,
    "dropped axis": lambda x: x[0][None],
    "remat": jax.checkpoint(lambda x: nn.avg_pool(x, (2, 2), (2, 2))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("size", [(16, 16), (15, 20)])
def test_fields_are_what_gradients_reach(name: str, size: tuple[int, int]) -> None:
    """At every place."""
    if name == "space to depth":
        size = (16, 20)
    module = Applied(FUNCTIONS[name])
    images = np.random.default_rng(0).uniform(0.5, 1.5, (1, *size, 3)).astype("float32")
    variables = module.init(jax.random.key(0), images)
    expected = support(lambda x: module.apply(variables, x), images)

    layer = trace(module, jax.ShapeDtypeStruct(images.shape, jnp.float32), {}).layers[-1]
    exact = 0
    for place, bounds in zip(np.ndindex(layer.output_shape[1:3]), expected, strict=True):
        for field, axis, (first, last) in (
            (layer.seen.rows, layer.seen.row_axis, bounds[:2]),
            (layer.seen.columns, layer.seen.column_axis, bounds[2:]),
        ):
            unit = 0 if axis is None else place[axis - 1]
            found = int(field.first[unit]), int(field.last[unit])
            if min(found) >= 0 and max(found) < field.image:
                assert found == (first, last), place
                exact += 1
            else:  # at the margins a bound
                assert found[0] <= first <= last <= found[1], place
    assert exact >= 6


def test_what_mixes_everything_sees_everything() -> None:
    class Sorted(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.Conv(2, (3, 3))(x)
            return nn.Conv(2, (1, 1), name="last")(jnp.sort(x, axis=1))

    assert flaxcnn.summarize(Sorted(), image_size=9).layers[-1].receptive_field == 9
