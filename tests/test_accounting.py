"""What networks cost: against torchvision's figures, by hand, by gradients, by their papers."""

import csv
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from shapes import macs_of, paper_images
from variables import count, random_variables, variable_shapes

import flaxcnn
from flaxcnn.accounting import costs
from flaxcnn.errors import InputError
from flaxcnn.weights import COSTS

EVERY_NETWORK = flaxcnn.list_models()


def layers_of(model: Any, **arguments: Any) -> dict[str, Any]:
    """By name, which is unique."""
    summary = flaxcnn.summarize(model, **arguments)
    layers = summary.layers + summary.apart
    found = {layer.name: layer for layer in layers}
    assert len(found) == len(layers)
    return found


# ----------------------------------------------------------------------------------- every network
@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_NETWORK)
def test_totals_of_every_network(name: str) -> None:
    """Against torchvision's metadata, against what `init` makes, and the table of `costs`."""
    size = costs.image_size(name)
    summary = flaxcnn.summarize(name, image_size=size)
    if name in COSTS:
        assert summary.params == COSTS[name].num_params
        assert summary.macs == pytest.approx(COSTS[name].gmacs * 1e9, rel=5e-3)
    assert costs.cost(name) == (
        size,
        *(getattr(summary, field) for field in costs.Cost._fields[1:]),
    )
    arguments = {"aux_logits": False} if "googlenet" in name else {}
    model, images = flaxcnn.create_model(name, **arguments), summary.images
    shapes = variable_shapes(model, images)
    assert summary.params == count(shapes["params"])
    # Counted another way, by the modules' calls; LeNet's partial layers are of neither kind.
    if name not in ("lecun1989", "lenet5"):
        assert summary.macs == sum(macs_of(model, images).values())
    assert [stage.name for stage in summary.stages] == [*model.stages, "head"]
    for field in ("params", "macs", "activation_bytes"):
        assert sum(getattr(s, field) for s in summary.stages) == getattr(summary, field)
        assert sum(getattr(layer, field) for layer in summary.layers) == getattr(summary, field)
    assert summary.flops == 2 * summary.macs
    assert len({layer.name for layer in summary.layers}) == len(summary.layers)
    variable_bytes = 4 * sum(count(tree) for tree in shapes.values())
    assert summary.forward_bytes == variable_bytes + summary.peak_bytes
    assert summary.training_bytes == variable_bytes + 8 * summary.params + summary.kept_bytes


def test_the_table_has_every_network() -> None:
    assert sorted(costs._costs()) == EVERY_NETWORK
    with pytest.raises(InputError, match="did you mean resnet18"):
        costs.cost("resnet81")


def test_auxiliary_classifiers_are_apart() -> None:
    """GoogLeNet has 13,004,888 parameters with them and 6,624,904 without."""
    summary = flaxcnn.summarize("googlenet")
    assert summary.params == 6_624_904
    assert sum(layer.params for layer in summary.apart) == 13_004_888 - 6_624_904
    assert {layer.name.partition("/")[0] for layer in summary.apart} == {"aux1", "aux2"}
    alone = flaxcnn.summarize(flaxcnn.create_model("googlenet", aux_logits=False))
    assert not alone.apart
    assert alone.layers == summary.layers
    assert alone.training_bytes == summary.training_bytes


# ------------------------------------------------------------------------------ by their own hand
def test_lenet5_by_hand() -> None:
    """Section II.B: layers, parameters, and the connections less those of the biases."""
    found = layers_of("lenet5")
    expected = {  # name -> output [H, W, C], parameters, multiply-adds
        "C1": ((28, 28, 6), 156, 122_304 - 28 * 28 * 6),
        "S2": ((14, 14, 6), 12, 0),
        "C3": ((10, 10, 16), 1516, 151_600 - 10 * 10 * 16),
        "S4": ((5, 5, 16), 32, 0),
        "C5": ((1, 1, 120), 48_120, 48_000),
        "F6": ((84,), 10_164, 10_080),
        "output": ((10,), 850, 840),
    }
    for name, (shape, params, macs) in expected.items():
        layer = found.pop(name)
        assert (layer.output_shape[1:], layer.params, layer.macs) == (shape, params, macs), name
    assert [layer.kind for layer in found.values()] == ["global avg pool"]


def test_resnet20_by_hand() -> None:
    """Section 4.2: three stages of six 3x3 convolutions on maps of 32, 16 and 8 pixels."""
    stem, dense = 32 * 32 * 9 * 3 * 16, 64 * 10
    stages = sum(
        side * side * 9 * (before * width + 5 * width * width)
        for side, before, width in ((32, 16, 16), (16, 16, 32), (8, 32, 64))
    )
    summary = flaxcnn.summarize("resnet20")
    assert summary.macs == stem + stages + dense
    assert summary.stages[1].receptive_field == 3 + 6 * 2  # the stem, six more of 3x3


def test_vgg16_by_hand() -> None:
    """Receptive field and jump grow as section 2.3 says; memory is that of the outputs."""
    summary = flaxcnn.summarize("vgg16")
    field, jump, offset, shown = 1, 1, 0, []
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convolutions):
            field, offset = field + 2 * jump, offset + jump
            shown.append((field, jump, offset, 224 // jump, width))
        field, jump = field + jump, 2 * jump
        shown.append((field, jump, offset, 224 // jump, width))
    for layer, (field, jump, offset, side, width) in zip(summary.layers, shown, strict=False):
        assert (layer.receptive_field, layer.jump, layer.offset) == (field, jump, offset)
        assert layer.output_shape == (1, side, side, width)
        assert layer.activation_bytes == 4 * side * side * width
    assert [layer.depth for layer in summary.layers] == list(range(1, 22))
    dense = summary.layers[18:]
    assert [layer.name for layer in dense] == ["classifier_0", "classifier_3", "classifier_6"]
    assert all(layer.jump is None and layer.receptive_field == 224 for layer in dense)
    # The first two maps of 64 channels, one read and one written, are the most at a time.
    assert summary.peak_bytes == 2 * 4 * 224 * 224 * 64
    # A convolution keeps its input, a pool as well: each map once, the image, and three vectors.
    maps = sum(layer.activation_bytes for layer in summary.layers[:18])
    masks = 2 * 4096
    assert summary.kept_bytes == maps + 4 * 224 * 224 * 3 + 4 * 2 * 4096 + masks


class EveryKind(nn.Module):
    """One layer of each kind; the comments count it for images [2, 12, 16, 3]."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(8, (3, 5), strides=(1, 2), padding=((1, 1), (2, 2)), name="strided")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))  # [2, 12, 8, 8]
        y = nn.Conv(8, (3, 3), kernel_dilation=2, use_bias=False, name="dilated", padding=2)(x)
        x = x + nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(y)
        x = nn.Conv(16, (5, 5), feature_group_count=8, use_bias=False, name="depthwise")(x)
        x = nn.max_pool(x, (2, 2), (2, 2))  # [2, 6, 4, 16]
        x = nn.avg_pool(x, (3, 1), (3, 1))  # [2, 2, 4, 16]
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2), name="transposed")(x)  # [2, 4, 8, 4]
        x = nn.GroupNorm(2, name="groups")(x)
        x = jnp.concatenate([x, nn.silu(nn.Dense(6, name="each")(x))], axis=-1)  # [2, 4, 8, 10]
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(2, -1))
        return nn.Dense(5, name="classifier")(x)


def test_every_kind_by_hand() -> None:
    found = layers_of(EveryKind(), image_size=(12, 16), batch_size=2)
    expected = {  # name -> kind, output, parameters, multiply-adds
        "strided": ("conv", (2, 12, 8, 8), 3 * 5 * 3 * 8 + 8, 2 * 96 * 3 * 5 * 3 * 8),
        "norm": ("batch norm", (2, 12, 8, 8), 16, 0),
        "dilated": ("conv", (2, 12, 8, 8), 9 * 64, 2 * 96 * 9 * 64),
        "grouped": ("grouped conv", (2, 12, 8, 8), 9 * 32 + 8, 2 * 96 * 9 * 32),
        "add": ("add", (2, 12, 8, 8), 0, 0),
        "depthwise": ("depthwise conv", (2, 12, 8, 16), 25 * 16, 2 * 96 * 25 * 16),
        "max_pool": ("max pool", (2, 6, 4, 16), 0, 0),
        "avg_pool": ("avg pool", (2, 2, 4, 16), 0, 0),
        "transposed": ("transposed conv", (2, 4, 8, 4), 4 * 64 + 4, 2 * 8 * 4 * 64),
        "groups": ("group norm", (2, 4, 8, 4), 8, 0),
        "each": ("dense", (2, 4, 8, 6), 30, 2 * 32 * 24),
        "concatenate": ("concatenate", (2, 4, 8, 10), 0, 0),
        "classifier": ("dense", (2, 5), 320 * 5 + 5, 2 * 320 * 5),
    }
    assert list(found) == list(expected)
    for name, layer in found.items():
        shown = (layer.kind, layer.output_shape, layer.params, layer.macs)
        assert shown == expected[name], name
    assert (found["strided"].kernel, found["strided"].strides) == ((3, 5), (1, 2))
    assert found["dilated"].dilation == (2, 2)
    # Rows and columns: 3x5, then 2 * 2 * jump more on both sides, then 2 * jump, and 4 * jump.
    fields = [
        found[name].receptive_field for name in ("strided", "dilated", "grouped", "depthwise")
    ]
    assert fields == [(3, 5), (7, 13), (9, 17), (13, 25)]
    assert found["strided"].jump == (1, 2)
    assert found["add"].receptive_field == (9, 17)
    assert found["max_pool"].jump == (2, 4)
    assert found["classifier"].receptive_field == (12, 16)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        return nn.max_pool(x, (2, 2), (2, 2))


def test_memory_by_hand() -> None:
    summary = flaxcnn.summarize(Block(), image_size=8, batch_size=3, in_channels=2)
    image, full, pooled = 4 * 3 * 64 * 2, 4 * 3 * 64 * 4, 4 * 3 * 16 * 4
    # The convolution reads the image; norm and ReLU are computed in place, then the pool reads.
    assert summary.peak_bytes == max(image + full, full + pooled)
    # Kept: the image for the kernel's gradient, the norm's input, and the pool's input.
    assert summary.kept_bytes == image + 2 * full
    params, statistics = 9 * 2 * 4 + 8, 8
    assert summary.forward_bytes == 4 * (params + statistics) + summary.peak_bytes
    assert summary.training_bytes == 4 * (3 * params + statistics) + summary.kept_bytes


def test_half_the_bytes_in_bfloat16() -> None:
    wide, narrow = (flaxcnn.summarize("vgg11", dtype=d) for d in ("float32", "bfloat16"))
    assert (wide.params, wide.macs) == (narrow.params, narrow.macs)
    for a, b in zip(wide.layers[:-1], narrow.layers[:-1], strict=True):
        assert a.activation_bytes == 2 * b.activation_bytes
    assert wide.layers[-1].activation_bytes == narrow.layers[-1].activation_bytes  # the logits
    assert narrow.dtype == "bfloat16"


def test_a_batch_costs_its_images() -> None:
    one, three = (flaxcnn.summarize("resnet18", image_size=40, batch_size=n) for n in (1, 3))
    assert 3 * one.macs == three.macs
    assert 3 * one.activation_bytes == three.activation_bytes
    assert 3 * one.kept_bytes == three.kept_bytes
    assert one.params == three.params


# --------------------------------------------------------------------------------- by the gradient
RAMP = 1 / 64  # per pixel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("vgg16", 256), ("resnet18", 480), ("googlenet", 448), ("alexnet", 256)]
)
def test_receptive_fields_are_what_gradients_reach(name: str, size: int) -> None:
    """Of one unit in the middle of each stage.

    Positive weights, so that nothing cancels. A max pool passes a gradient to one value alone: to
    the last of its window where images grow from corner to corner, to the first where they fall.
    """
    model = flaxcnn.create_model(name)
    variables = random_variables(model, (1, size, size, 3))
    variables = jax.tree.map(np.abs, variables)
    variables["batch_stats"] = jax.tree_util.tree_map_with_path(
        lambda path, x: np.zeros_like(x) if path[-1].key == "mean" else x,
        variables.get("batch_stats", {}),
    )
    summary = flaxcnn.summarize(model, image_size=size)
    *stages, _ = summary.stages

    @jax.jit
    @jax.grad
    def gradient(images: jax.Array, chosen: jax.Array) -> jax.Array:
        maps = flaxcnn.extract_features(model, variables, images, model.stages)
        units = [m[0, m.shape[1] // 2, m.shape[2] // 2].sum() for m in maps.values()]
        return jnp.where(chosen, jnp.stack(units), 0).sum()

    ramp = RAMP * np.add.outer(np.arange(size), np.arange(size))[None, :, :, None]
    ramp = np.broadcast_to(ramp, (1, size, size, 3)).astype("float32")
    for number, stage in enumerate(stages):
        chosen = np.arange(len(stages)) == number
        growing, falling = (
            np.abs(np.asarray(gradient(images, chosen))[0]).sum(axis=-1)
            for images in (1 + ramp, 1 + ramp.max() - ramp)
        )
        layer = [layer for layer in summary.layers if layer.stage == stage.name][-1]
        first = layer.output_shape[1] // 2 * layer.jump - layer.offset
        expected = (max(first, 0), min(first + layer.receptive_field, size) - 1)
        for axis in (0, 1):
            low = np.nonzero(falling.sum(axis=1 - axis))[0].min()
            high = np.nonzero(growing.sum(axis=1 - axis))[0].max()
            assert (low, high) == expected, (stage.name, axis)


def test_squeeze_and_excitation_sees_everything() -> None:
    stages = flaxcnn.summarize("efficientnet_b0", image_size=64).stages
    assert [stage.receptive_field for stage in stages[:2]] == [3, 64]


# ---------------------------------------------------------------------------- modules of all sorts
class Attention(nn.Module):
    """Patches, one block of a vision transformer, and a mean: not a convolutional network."""

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        x = nn.Conv(8, (4, 4), strides=4, name="patches")(x)
        x = x.reshape(x.shape[0], -1, 8)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 8))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, deterministic=deterministic)(y)
        return nn.Dense(3)(x.mean(axis=1))


class Looped(nn.Module):
    """The same convolution five times, by nn.scan."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def body(conv: nn.Conv, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return conv(x), None

        loop = nn.scan(body, variable_broadcast="params", split_rngs={"params": False}, length=5)
        return loop(nn.Conv(3, (3, 3), use_bias=False, name="conv"), x, None)[0]


class Shared(nn.Module):
    """One convolution called twice, and one that nothing is done with."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = nn.Conv(3, (3, 3), use_bias=False, name="conv")
        nn.Conv(7, (1, 1), name="unused")(x)
        return conv(conv(x))


class Scaled(nn.Module):
    """An elementwise function with a parameter, within checkpoint and jit."""

    @nn.compact
    def __call__(self, x: jax.Array, training: bool = True) -> jax.Array:
        class Scale(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                return x * self.param("scale", nn.initializers.ones, (3,))

        x = nn.remat(Scale)(name="scale")(x)
        return nn.jit(nn.Conv)(2, (1, 1), name="conv")(x)


def test_modules_of_users() -> None:
    attention = layers_of(Attention(), image_size=8)
    assert sum(layer.params for layer in attention.values()) == count(
        jax.eval_shape(
            lambda: Attention().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), deterministic=True)
        )["params"]
    )
    products = [layer for layer in attention.values() if layer.kind == "product"]
    assert [layer.macs for layer in products] == [4 * 4 * 8] * 2  # tokens x tokens x channels
    assert attention["patches"].receptive_field == 4

    looped = layers_of(Looped(), image_size=6)
    assert (looped["conv"].params, looped["conv"].macs) == (81, 5 * 36 * 81)
    shared = layers_of(Shared(), image_size=6)
    assert [(la.name, la.params, la.receptive_field) for la in shared.values()] == [
        ("conv", 81, 3),
        ("conv/conv", 0, 5),
        ("unused", 28, 1),  # apart
    ]
    scaled = layers_of(Scaled(), image_size=6)
    assert [(la.name, la.kind, la.params) for la in scaled.values()] == [
        ("scale", "Scale", 3),
        ("conv", "conv", 8),
    ]


class Unbounded(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, nn.Dense(2)(x))


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        return x * mask


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: flaxcnn.summarize("vgg61"), InputError, "did you mean vgg"),
        (lambda: flaxcnn.summarize("vgg16", image_size=20), InputError, "at least 32x32"),
        (lambda: flaxcnn.summarize("vgg16", image_size=0), InputError, "whole numbers from 1"),
        (
            lambda: flaxcnn.summarize("vgg16", image_size=(32,)),
            InputError,
            "whole numbers from 1 to",
        ),
        (lambda: flaxcnn.summarize("vgg16", batch_size=0), InputError, "whole numbers from 1"),
        (lambda: flaxcnn.summarize(nn.Dense), TypeError, "a linen module .*; got Dense"),
        (lambda: flaxcnn.summarize(lambda x: x), TypeError, "a linen module .*; got function"),
        (lambda: flaxcnn.summarize(Masked()), TypeError, "called with mask"),
        (lambda: flaxcnn.summarize(Block(), dtype="float16"), TypeError, "no field dtype"),
        (lambda: flaxcnn.summarize(Unbounded()), InputError, "while loop"),
    ],
)
def test_what_cannot_be_summarized(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


# -------------------------------------------------------------------------------------- as text
def test_text() -> None:
    summary = flaxcnn.summarize("googlenet", image_size=64, batch_size=2)
    table = str(summary).splitlines()
    assert table[0] == "googlenet: 2 images of 64x64x3, float32"
    assert table[4].split() == [
        *("conv1/conv", "conv", "7x7/2", "2x32x32x64", "9,408", "19.3", "0.524", "7", "2", "3")
    ]
    assert "parameters: 6,624,904" in table
    assert any("one multiply-add counted as one" in line and "GFLOPs" in line for line in table)
    widths = {len(line) for line in table[4:10]}
    assert max(map(len, table)) <= 140
    assert len(widths) == 1  # aligned to the right
    markdown = summary.to_markdown().splitlines()
    assert (
        "| conv1/conv | conv | 7x7/2 | 2x32x32x64 | 9,408 | 19.3 | 0.524 | 7 | 2 | 3 |" in markdown
    )
    rows = list(csv.DictReader(io.StringIO(summary.to_csv())))
    assert len(rows) == len(summary.layers) + len(summary.apart)
    assert sum(int(row["macs"]) for row in rows if row["apart"] == "0") == summary.macs
    assert rows[0]["kernel"] == "7x7"
    assert summary.to_dict() == dataclasses.asdict(summary)


def test_networks_of_papers_cost_what_they_print() -> None:
    """VGG, table 2, millions of parameters; ResNet, table 1, thousand million multiply-adds."""
    for name, millions in (("vgg11", 133), ("vgg13", 133), ("vgg16", 138), ("vgg19", 144)):
        assert round(flaxcnn.summarize(name).params / 1e6) == millions
    for name, gmacs in (("resnet18", 1.8), ("resnet34", 3.6)):
        # The table counts convolutions alone, and cuts off: 3.66 is printed as 3.6.
        assert int(flaxcnn.summarize(name).macs / 1e8) / 10 == gmacs
    assert paper_images("vgg16") == (1, 224, 224, 3)
