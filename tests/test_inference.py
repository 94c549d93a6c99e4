"""Networks made ready for inference give the logits of those they are of."""

import platform
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from flax.traverse_util import flatten_dict
from processor import skip_unless_computed
from shallow import shallow
from variables import random_variables

import flaxcnn
from flaxcnn import blocks, convolution
from flaxcnn.cpu import onednn
from flaxcnn.cpu.onednn_layers import Activation, Layer
from flaxcnn.network import FeatureMaps, Network

# Every block of every paper.
NAMES = (
    *("lecun1989", "lenet5", "alexnet", "alexnet_2012", "zfnet", "vgg11", "vgg11_bn"),
    *("googlenet", "googlenet_v1", "resnet18", "resnet20", "plain18", "resnext50_32x4d"),
    *("resnet18_v2", "resnet50_v2", "efficientnet_b0", "efficientnet_v2_s", "efficientnet_lite0"),
)
# Where the package is built for, it is a dependency: that it cannot be loaded there is a failure.
needs_onednn = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="oneDNN is for x86-64 Linux"
)


def logits(model: Any, variables: Any, images: Any) -> np.ndarray:
    program = jax.jit(partial(model.apply, train=False), compiler_options=quick.OPTIONS)
    return np.asarray(program(variables, images))


def assert_same(after: Any, before: Any) -> None:
    """But for rounding: sums in another order, kernels rounded once more with norms in them.

    Of the largest logit, as `test_folding` has it; what was measured is 1e-6.
    """
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def layers_of(fast: Any) -> list[Layer]:
    equations = fast._program.jaxpr.eqns
    return [e.params["layer"] for e in equations if e.primitive.name == "onednn_layer"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_same(name: str) -> None:
    """Random statistics and affine terms, an odd size, all the logits."""
    model = shallow(flaxcnn.create_model(name, num_classes=7))
    side = max(37, model.min_size + 2)
    channels = 1 if name in ("lecun1989", "lenet5") else 3
    images = np.random.default_rng(0).normal(size=(2, side, side, channels)).astype("float32")
    variables = random_variables(model, images.shape)
    fast, prepared = flaxcnn.optimize_for_inference(model, variables, images)
    assert_same(logits(fast, prepared, images), logits(model, variables, images))


def optimised(name: str, side: int = 64, dtype: Any = jnp.float32) -> Any:
    model = flaxcnn.create_model(name, dtype=dtype)
    like = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    return flaxcnn.optimize_for_inference(model, random_variables(model, like.shape), like)[0]


@needs_onednn
def test_what_the_layers_of_a_resnet_take_in() -> None:
    """17 convolutions of 20: layer4 has 2x2 maps, on which 3x3 kernels meet mostly padding."""
    fast = optimised("resnet18")
    layers = layers_of(fast)
    found = Counter((layer.bias, layer.residual, layer.activation) for layer in layers)
    assert found == {
        (True, False, Activation.RELU): 1 + 6,  # the first, and in six blocks the first
        (True, True, Activation.RELU): 6 + 1,  # which of layer4 is the 1x1 projection
        (True, False, Activation.NONE): 2 + 1,  # the projections before it, the dense layer
    }


@needs_onednn
@pytest.mark.parametrize("name", ["resnet50", "googlenet", "efficientnet_lite0", "vgg11_bn"])
def test_nothing_is_left_between_layers(name: str) -> None:
    fast = optimised(name, side=224)
    layers = layers_of(fast)
    assert all(layer.bias for layer in layers)
    left = Counter(e.primitive.name for e in fast._program.jaxpr.eqns)
    assert not {"add", "custom_jvp_call"} & left.keys()


@needs_onednn
def test_what_the_layers_of_an_efficientnet_end_with() -> None:
    """Its silu is told by the operations that JAX makes of it."""
    found = Counter(layer.activation for layer in layers_of(optimised("efficientnet_b0", 224)))
    silu = 1 + 15 + 16 + 1  # the first, those of 15 blocks that expand, depthwise ones, the last
    assert found == {Activation.SILU: silu, Activation.NONE: 16 + 1}


# ------------------------------------------------------------------------------------ in bfloat16
@needs_onednn
@pytest.mark.parametrize("name", ["resnet18", "googlenet", "efficientnet_b0", "vgg11_bn"])
def test_in_bfloat16_layers_take_in_the_same(name: str) -> None:
    """All in bfloat16, but for the last dense layer, whose logits are in float32."""
    skip_unless_computed(jnp.bfloat16)
    wide, narrow = (layers_of(optimised(name, 224, of)) for of in (jnp.float32, jnp.bfloat16))
    *others, head = narrow
    assert {layer.dtype for layer in others} == {np.dtype(jnp.bfloat16)}
    assert [layer._replace(dtype=wide[0].dtype) for layer in (*others, head)] == wide
    assert head.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet18", "googlenet", "efficientnet_b0", "vgg11_bn", "resnet18_v2", "resnext50_32x4d"],
)
def test_in_bfloat16_logits_are_as_near_to_those_of_float32(name: str) -> None:
    """As without it, or nearer, as each layer is rounded once."""
    images = np.random.default_rng(0).normal(size=(4, 70, 67, 3)).astype("float32")
    exact = shallow(flaxcnn.create_model(name, num_classes=100))
    variables = random_variables(exact, images.shape)
    model = exact.clone(dtype=jnp.bfloat16)
    fast, prepared = flaxcnn.optimize_for_inference(model, variables, images)
    wanted = logits(exact, variables, images)
    ours, before = (
        np.sqrt(np.mean(np.square(logits(*of, images) - wanted)))
        for of in ((fast, prepared), flaxcnn.fold_batchnorm(model, variables))
    )
    assert 0 < before < 0.1 * np.abs(wanted).max()
    assert ours < 1.1 * before


# ----------------------------------------------------------------- networks that are not so simple
class Small(Network):
    """Convolutions `a` and `b` of one size, and what `made` makes of them."""

    made: Any = None
    features: int = 32

    def stage_maps(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """One stage."""
        del train
        conv = partial(blocks.conv, self.features, 3, padding=1, use_bias=True, dtype=self.dtype)
        yield "all", self.made(x, conv(name="a"), conv(name="b"))

    def head(self, maps: FeatureMaps, train: bool) -> Any:
        """The map itself."""
        del train
        return maps["all"]


def _used_twice(x: Any, a: Any, b: Any) -> Any:
    del b
    y = a(x)
    return nn.relu(y) - y


def _residual_is_used_again(x: Any, a: Any, b: Any) -> Any:
    y = nn.relu(a(x))
    return jnp.concatenate([nn.relu(b(y) + y), y, jnp.tanh(y)])


def _residual_is_the_first_summand(x: Any, a: Any, b: Any) -> Any:
    y = a(x)
    return b(nn.relu(y)) + y


def _several_biases(x: Any, a: Any, b: Any) -> Any:
    """Of which b's own is used again."""
    z = b(nn.relu(a(x)))
    more = b.get_variable("params", "bias")
    return nn.relu(a(x) + more + more) + z


def _sum_of_two(x: Any, a: Any, b: Any) -> Any:
    return nn.relu(a(x) + b(x))


def _twice_itself(x: Any, a: Any, b: Any) -> Any:
    del b
    y = a(x)
    return nn.relu(y + y)


def _activation_before_the_sum(x: Any, a: Any, b: Any) -> Any:
    return nn.silu(a(x)) + nn.relu6(b(x))


def _with_the_images(x: Any, a: Any, b: Any) -> Any:
    return nn.relu(b(nn.relu(a(x) + x)) + x)


def _along_another_axis(x: Any, a: Any, b: Any) -> Any:
    """A vector as long as there are channels, added along the columns."""
    del b
    y = a(x)
    return nn.relu(y + jax.lax.broadcast_in_dim(a.get_variable("params", "bias"), y.shape, (2,)))


def _another_activation(x: Any, a: Any, b: Any) -> Any:
    return nn.leaky_relu(a(x)) + jnp.maximum(b(x), 0.5)


def _half(x: Any, a: Any, b: Any) -> Any:
    return nn.relu(0.5 * a(x)) + (b(x) + 1)


GRAPHS = (
    *(_used_twice, _residual_is_used_again, _residual_is_the_first_summand),
    *(_several_biases, _sum_of_two, _twice_itself),
    *(_activation_before_the_sum, _with_the_images, _along_another_axis, _another_activation),
    _half,
)


@pytest.mark.parametrize("made", GRAPHS, ids=lambda f: f.__name__)
def test_other_graphs(made: Any) -> None:
    """32 channels and 32 columns, so that an axis is easily taken for another."""
    model = Small(made=made, features=3 if made is _with_the_images else 32)
    images = np.random.default_rng(1).normal(size=(2, 5, 32, 3)).astype("float32")
    variables = random_variables(model, images.shape)
    fast, prepared = flaxcnn.optimize_for_inference(model, variables, images)
    assert_same(logits(fast, prepared, images), logits(model, variables, images))


# ----------------------------------------------------------------------------- where, and what not
class Scalar(Network):
    """A convolution and one learned number, or an array of one, that is added to all of it."""

    shape: tuple[int, ...] = ()

    def stage_maps(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """One stage."""
        del train
        y = blocks.conv(8, 3, padding=1, dtype=self.dtype, name="conv")(x)
        yield "all", nn.relu(y + self.param("bias", nn.initializers.ones, self.shape))

    def head(self, maps: FeatureMaps, train: bool) -> Any:
        """The map itself."""
        del train
        return maps["all"]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1), (8,)])
def test_a_learned_number_is_no_bias_per_channel(shape: tuple[int, ...]) -> None:
    model = Scalar(shape=shape)
    images = np.random.default_rng(1).normal(size=(2, 6, 6, 3)).astype("float32")
    variables = random_variables(model, images.shape)
    fast, prepared = flaxcnn.optimize_for_inference(model, variables, images)
    assert_same(logits(fast, prepared, images), logits(model, variables, images))


def test_without_jit_and_of_float64_images() -> None:
    model = flaxcnn.create_model("resnet20")
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    variables = random_variables(model, images.shape)
    fast, prepared = flaxcnn.optimize_for_inference(model, variables, images)
    assert_same(fast.apply(prepared, images, train=False), logits(model, variables, images))


def test_variables_of_another_network_are_refused() -> None:
    images = jnp.zeros((1, 64, 64, 3))
    variables = random_variables(flaxcnn.create_model("alexnet"), images.shape)
    with pytest.raises(ScopeParamShapeError):
        flaxcnn.optimize_for_inference(
            flaxcnn.create_model("alexnet", num_classes=10), variables, images
        )


@needs_onednn
def test_images_of_another_shape_are_refused() -> None:
    fast = optimised("resnet20")
    with pytest.raises(ValueError, match=r"optimised for images \(2, 64, 64, 3\) of float32, not"):
        fast.apply({}, jnp.zeros((1, 64, 64, 3)), train=False)
    with pytest.raises(ValueError, match="evaluates only"):
        fast.apply({}, jnp.zeros((2, 64, 64, 3)), train=True)


def test_images_that_are_too_small_are_refused() -> None:
    model = flaxcnn.create_model("alexnet")
    variables = random_variables(model, (1, 64, 64, 3))
    with pytest.raises(ValueError, match="at least 63x63"):
        flaxcnn.optimize_for_inference(model, variables, jnp.zeros((1, 40, 40, 3)))


def test_elsewhere_batch_norm_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In types that oneDNN does not compute, where it is not installed, with plain convolutions."""
    images = jnp.zeros((1, 32, 32, 3))

    def is_folded(dtype: Any = jnp.float32) -> bool:
        model = flaxcnn.create_model("resnet20", dtype=dtype)
        variables = random_variables(model, images.shape)
        fast, prepared = flaxcnn.optimize_for_inference(model, variables, images)
        folded, of_folded = flaxcnn.fold_batchnorm(model, variables)
        return fast == folded and jax.tree.structure(prepared) == jax.tree.structure(of_folded)

    assert is_folded(jnp.float16)
    assert is_folded(jnp.bfloat16) == (not onednn.computes(jnp.bfloat16))
    assert is_folded() == (not onednn.available())
    monkeypatch.setattr(onednn, "available", lambda: False)
    assert is_folded()
    monkeypatch.undo()
    monkeypatch.setattr(convolution, "PLAIN", True)
    assert is_folded()


@pytest.mark.parametrize("name", ["vgg11", "resnet18_v2", "efficientnet_b0"])
def test_elsewhere_variables_come_in_the_types_of_their_layers(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """But for what logits are made of, and for norms that multiply: they compute in float32."""
    monkeypatch.setattr(onednn, "available", lambda: False)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    model = flaxcnn.create_model(name, num_classes=10, dtype=jnp.bfloat16)
    variables = random_variables(model, images.shape)
    fast, prepared = flaxcnn.optimize_for_inference(model, variables, images)
    folded, of_folded = flaxcnn.fold_batchnorm(model, variables)
    np.testing.assert_array_equal(logits(fast, prepared, images), logits(folded, of_folded, images))
    params = flatten_dict(prepared["params"])
    wide = {path[:-1] for path, value in params.items() if value.dtype == jnp.float32}
    multiplying = {path[:-1] for path in params if path[-1] == "scale"}
    head = {"vgg11": "classifier_6", "resnet18_v2": "fc", "efficientnet_b0": "classifier_1"}[name]
    assert wide == {(head,), *multiplying}
    assert bool(multiplying) == (name == "resnet18_v2")


def test_another_module_is_refused() -> None:
    with pytest.raises(TypeError, match="create_model"):
        flaxcnn.optimize_for_inference(nn.Dense(3), {}, jnp.zeros((1, 8, 8, 3)))  # type: ignore[arg-type]


def test_the_variables_stay_as_they_are() -> None:
    model = flaxcnn.create_model("resnet20")
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    variables = random_variables(model, images.shape)
    before = jax.tree.map(np.copy, variables)
    flaxcnn.optimize_for_inference(model, variables, images)
    jax.tree.map(np.testing.assert_array_equal, before, variables)


@needs_onednn
def test_over_devices_by_pmap() -> None:
    model = flaxcnn.create_model("resnet20")
    images = np.random.default_rng(0).normal(size=(1, 2, 32, 32, 3)).astype("float32")
    variables = random_variables(model, images.shape[1:])
    fast, prepared = flaxcnn.optimize_for_inference(model, variables, images[0])
    program = jax.pmap(partial(fast.apply, train=False), in_axes=(None, 0))
    assert_same(program(prepared, images)[0], logits(model, variables, images[0]))
