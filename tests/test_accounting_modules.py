"""What modules of all sorts cost: nothing is lost, whatever they are made of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from variables import count

import flaxcnn
from flaxcnn.blocks import local_response_norm
from flaxcnn.errors import InputError

Images = jax.Array


class Of(nn.Module):
    """A module whose call is the function given, of itself and the images."""

    function: Callable[[nn.Module, Images], Any]

    @nn.compact
    def __call__(self, x: Images) -> Any:
        return self.function(self, x)


def conv(features: int, side: int, **arguments: Any) -> nn.Conv:
    return nn.Conv(features, (side, side), use_bias=False, **arguments)


class Unit(nn.Module):
    @nn.compact
    def __call__(self, x: Images) -> Images:
        return nn.relu(nn.BatchNorm(use_running_average=True)(conv(3, 3)(x)))


JittedUnit = nn.jit(Unit)


class Encoder(nn.Module):
    def setup(self) -> None:
        self.conv = nn.Conv(4, (3, 3))
        self.weights = self.param("weights", nn.initializers.ones, (4,))

    def encode(self, x: Images) -> Images:
        return self.conv(x) * self.weights

    def __call__(self, x: Images) -> Images:
        return self.encode(x)


def positions(_: nn.Module, x: Images) -> Images:
    tokens = conv(4, 2, strides=2)(x).reshape(1, -1, 4)
    return nn.Dense(3)(tokens + nn.Embed(tokens.shape[1], 4, name="at")(jnp.arange(16)))


def weights_made_from_weights(module: nn.Module, x: Images) -> Images:
    seed = module.param("seed", nn.initializers.normal(), (1, 4))
    kernel = nn.Dense(27 * 4, name="made")(seed).reshape(3, 3, 3, 4)
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def recurrent(_: nn.Module, x: Images) -> Images:
    return nn.RNN(nn.LSTMCell(4))(x.reshape(1, -1, 3))


def split_and_join(_: nn.Module, x: Images) -> Images:
    a, b = jnp.split(conv(8, 3)(x), 2, axis=-1)
    return conv(2, 3, name="last")(a * nn.sigmoid(b))


MODULES: dict[str, Callable[[nn.Module, Images], Any]] = {
    "embedded positions": positions,
    "weights made from weights": weights_made_from_weights,
    "a part that sees no image": lambda _, x: nn.Dense(3)(x) + nn.Dense(3)(jnp.ones((1, 1, 1, 5))),
    "attend": lambda _, x: nn.Embed(10, 3).attend(x),
    "another method": lambda _, x: Encoder()(x),
    "recurrent": recurrent,
    "jitted thrice": lambda _, x: nn.Dense(2)(JittedUnit()(JittedUnit()(JittedUnit()(x)))),
    "weight norm": lambda _, x: nn.WeightNorm(nn.Conv(4, (3, 3)))(x),
    "spectral norm": lambda _, x: nn.SpectralNorm(nn.Conv(4, (3, 3)))(x, update_stats=False),
    "several outputs": lambda _, x: {"a": conv(2, 3)(x), "b": (nn.Dense(4)(x), 1)},
    "vmap": lambda _, x: nn.vmap(
        nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1, out_axes=1
    )(2)(x),
    "no bias, from zeros": lambda _, x: nn.Dense(2, kernel_init=nn.initializers.zeros)(x),
    "general": lambda _, x: nn.DenseGeneral((2, 3), axis=(1, -1))(x),
    "split and join": split_and_join,
    "three dimensions": lambda _, x: nn.Conv(2, (2, 2, 2))(x[..., None]),
}


@pytest.mark.parametrize("name", MODULES)
def test_no_parameter_is_lost(name: str) -> None:
    module = Of(MODULES[name])
    summary = flaxcnn.summarize(module, image_size=8)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    everything = sum(layer.params for layer in summary.layers + summary.apart)
    assert everything == count(variables["params"])
    assert summary.params == everything  # nothing of these is for training alone
    names = [layer.name for layer in summary.layers + summary.apart]
    assert len(set(names)) == len(names)
    assert sum(stage.params for stage in summary.stages) == summary.params


def layers(function: Callable[[nn.Module, Images], Any], size: int = 8) -> dict[str, Any]:
    summary = flaxcnn.summarize(Of(function), image_size=size)
    return {layer.name: layer for layer in summary.layers}


def test_a_recurrent_network_by_hand() -> None:
    """64 steps of four gates, each of the input's 3 values and of the state's 4."""
    summary = flaxcnn.summarize(Of(recurrent), image_size=8)
    assert summary.macs == 64 * (4 * 3 * 4 + 4 * 4 * 4)


def test_loops_keep_what_each_step_keeps() -> None:
    def looped(_: nn.Module, x: Images) -> Images:
        loop = nn.scan(
            lambda module, x, _: (module(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=10,
        )
        return loop(conv(3, 3, name="conv"), x, None)[0]

    def unrolled(_: nn.Module, x: Images) -> Images:
        for _i in range(10):
            x = conv(3, 3)(x)
        return x

    loop, long = (flaxcnn.summarize(Of(f), image_size=8) for f in (looped, unrolled))
    for field in ("params", "macs", "activation_bytes", "kept_bytes"):
        assert getattr(loop, field) == getattr(long, field), field


def test_resizing_has_no_weights() -> None:
    found = layers(lambda _, x: conv(2, 3)(jax.image.resize(x, (1, 16, 16, 3), "bilinear")))
    assert {layer.kind for layer in found.values()} == {"resample", "conv"}
    assert sum(layer.macs for layer in found.values()) == 16 * 16 * 9 * 3 * 2


def upsampled(x: Images) -> Images:
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


@pytest.mark.parametrize(
    "join", [lambda a, b: a + b, lambda a, b: jnp.concatenate([a, b], axis=-1)]
)
def test_upsampling_joins_what_was_pooled(join: Callable[[Images, Images], Images]) -> None:
    def pyramid(_: nn.Module, x: Images) -> Images:
        a = conv(4, 3, name="first")(x)
        b = conv(4, 3, name="second")(nn.max_pool(a, (2, 2), (2, 2)))
        return conv(2, 1, name="last")(join(a, upsampled(b)))

    found = layers(pyramid, size=16)
    assert found["second"].receptive_field == 8
    assert found["last"].params in (8, 16)


def test_receptive_fields_of_rearranged_channels() -> None:
    assert layers(split_and_join)["last"].receptive_field == 5
    mirrored = layers(lambda _, x: conv(2, 3, name="last")(conv(3, 3)(x)[..., ::-1]))
    assert mirrored["last"].receptive_field == 5
    transposed = layers(lambda _, x: nn.Dense(2, name="d")(conv(2, 3)(x).transpose(1, 2, 0, 3)))
    assert transposed["d"].jump == 1
    pairs = layers(lambda _, x: jnp.einsum("nhwc,nijc->nhwij", x, x))
    (product,) = pairs.values()
    assert (product.kind, product.receptive_field, product.jump) == ("product", 8, None)


def test_pools_of_other_layouts() -> None:
    window, axes = (1, 1, 3, 2), (0, 3, 1, 2)
    channels_first = layers(
        lambda _, x: jax.lax.reduce_window(
            x.transpose(axes), -jnp.inf, jax.lax.max, window, window, "VALID"
        )
    )
    assert channels_first["max_pool"].kernel == (3, 2)


class MyNorm(nn.LayerNorm):
    """A norm by inheritance."""


def test_subclasses_of_norms_are_norms() -> None:
    found = layers(lambda _, x: MyNorm(name="norm")(conv(2, 3)(x)))
    assert [layer.kind for layer in found.values()] == ["conv", "layer norm"]


def test_lenet_is_grey_as_a_module_too() -> None:
    model = flaxcnn.create_model("lenet5")
    assert flaxcnn.summarize(model).params == flaxcnn.summarize("lenet5").params == 60_850


# ------------------------------------------------------------------------------- memory by hand
SIDE = 4 * 8 * 8  # bytes of one channel


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        # The first convolution keeps the image, the second its input.
        (lambda x: nn.relu(x), 3 + 2),
        (lambda x: nn.silu(x), 3 + 2 + 2),  # and what the function was given
        (lambda x: nn.silu(nn.BatchNorm(use_running_average=True)(x)), 3 + 2 + 2),  # the norm's
        (lambda x: x + nn.Conv(2, (1, 1))(x), 3 + 2 + 2),  # x twice, kept once; the sum
        (lambda x: local_response_norm(x), 3 + 2 + 2),
        (lambda x: nn.avg_pool(x, (3, 3), (1, 1), "SAME"), 3 + 2),
        (lambda x: nn.max_pool(x, (3, 3), (1, 1), "SAME"), 3 + 2 + 2),
        (lambda x: nn.Dropout(0.0, deterministic=True)(x), 3 + 2),
        (lambda x: nn.Dropout(0.5, deterministic=True)(x), 3 + 2 + 2 / 4),  # a byte a value
        (
            lambda x: nn.Dropout(0.5, broadcast_dims=(1, 2), deterministic=True)(x),
            3 + 2 + 2 / SIDE,
        ),
    ],
)
def test_what_the_backward_pass_needs(function: Callable[[Images], Images], kept: float) -> None:
    module = Of(lambda _, x: conv(2, 1)(function(conv(2, 1)(x))))
    assert flaxcnn.summarize(module, image_size=8).kept_bytes == SIDE * kept


def test_parameters_in_half_the_bytes() -> None:
    module = Of(lambda _, x: conv(2, 1, param_dtype=jnp.bfloat16)(x))
    summary = flaxcnn.summarize(module, image_size=8)
    assert summary.forward_bytes - summary.peak_bytes == 2 * 6


# ------------------------------------------------------------------------------- what cannot be
class Silent(nn.Module):
    def encode(self, x: Images) -> Images:
        return x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: flaxcnn.summarize(m, image_size=8.0), InputError, "whole numbers"),
        (lambda m: flaxcnn.summarize(m, image_size=70_000), InputError, "to 65,536"),
        (lambda m: flaxcnn.summarize(m, in_channels=4), InputError, r"cannot take images \[1, 224"),
        (lambda _: flaxcnn.summarize(nn.LSTMCell(3)), TypeError, "called with inputs too"),
        (lambda _: flaxcnn.summarize(Silent()), TypeError, "not called with images alone"),
        (
            lambda _: flaxcnn.summarize(
                Of(lambda _, x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, nn.Dense(2)(x)))
            ),
            InputError,
            "which branch",
        ),
    ],
)
def test_wrong_requests(call: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        call(Of(lambda _, x: x @ jnp.ones((3, 2))))
    assert "\n" not in str(raised.value)


def test_sizes_of_numpy() -> None:
    one, other = (
        flaxcnn.summarize("lenet5", image_size=n(40), batch_size=n(2)) for n in (int, np.int64)
    )
    assert one == other
