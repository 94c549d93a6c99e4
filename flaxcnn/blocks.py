"""What several papers share: convolution, dense layer and batch norm as torchvision has them.

Each stands for one torch layer and starts from torch's own initialisation, so that a network built
of them begins, trains and ends as torchvision's does.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from flaxcnn.convolution import PLAIN, conv_general_dilated
from flaxcnn.cpu.written import written
from flaxcnn.matrix_product import dot_general
from flaxcnn.normalisation import Activation, activated, normalised
from flaxcnn.operators.moments import Normalised, by_moments, by_statistics, moments
from flaxcnn.operators.primitives import explicitly_sharded, varying_alike

Initializer = Callable[..., jax.Array]
NormFactory = Callable[..., nn.Module]

# torch.nn.init.kaiming_normal_(mode="fan_out", nonlinearity="relu"); He et al. 2015, section 2.2.
kaiming_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The type of parameters, statistics and logits where `dtype` is the compute type."""
    return jnp.promote_types(dtype, jnp.float32)


def uniform_fan_in(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's default for weights and biases alike."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def conv(
    features: int,
    kernel_size: int,
    *,
    strides: int = 1,
    padding: int = 0,
    groups: int = 1,
    use_bias: bool = False,
    kernel_init: Initializer = kaiming_normal_fan_out,
    bias_init: Initializer = nn.initializers.zeros,
    dtype: DTypeLike,
    name: str,
) -> nn.Conv:
    """A square convolution with torch's meaning of `padding`: so many zeros on each side.

    "SAME" would put (0, 1) where torch puts (1, 1) at stride 2.
    """
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=(strides, strides),
        padding=((padding, padding), (padding, padding)),
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        param_dtype=at_least_float32(dtype),
        promote_dtype=_promotion(dtype, strides, padding),
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


def _promotion(dtype: DTypeLike, strides: int, padding: int) -> Callable[..., list[Any]]:
    """`promote_dtype` of such a convolution.

    In a narrow type the bias is spread over the map before it is converted, so that its gradient is
    summed in float32: of 1.6 million values in bfloat16 an H100 was wrong by 1 %.
    """
    plain: Callable[..., list[Any]] = nn.dtypes.promote_dtype
    if PLAIN or at_least_float32(dtype) == dtype:
        return plain

    def promote(
        x: jax.Array, kernel: jax.Array, bias: jax.Array | None, **how: Any
    ) -> list[jax.Array | None]:
        known = all(isinstance(size, int) for size in x.shape[1:3])
        if bias is None or not known or explicitly_sharded(x, bias):
            return plain(x, kernel, bias, **how)
        x, kernel = plain(x, kernel, **how)
        height, width = (
            max(0, (size + 2 * padding - window) // strides + 1)
            for size, window in zip(x.shape[1:3], kernel.shape[:2], strict=True)
        )
        _, bias = varying_alike(x, bias)  # before it is spread: devices add sums, not maps
        shape = (x.shape[0], height, width, kernel.shape[-1])
        return [x, kernel, _spread(bias, shape, x.dtype)]

    return promote


@partial(jax.jit, static_argnums=(1, 2), inline=True)  # outside of a jit it would be a map twice
def _spread(bias: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jnp.broadcast_to(bias, shape).astype(dtype)


def dense(
    features: int,
    *,
    kernel_init: Initializer,
    bias_init: Initializer = nn.initializers.zeros,
    copies: int = 1,
    dtype: DTypeLike,
    name: str,
) -> nn.Dense:
    """A fully connected layer with its parameters in at least float32.

    `copies` says that the inputs [N, C] are that many copies of their first [N, C / copies], as
    adaptive pooling makes of a map with one value. Then it is enough to multiply those with the sum
    of the kernel's parts: the same result for a fraction of the work.
    """
    return nn.Dense(
        features,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        param_dtype=at_least_float32(dtype),
        dot_general=dot_general if copies == 1 else partial(_dot_of_copies, copies),
        name=name,
    )


def _dot_of_copies(
    copies: int, x: jax.Array, kernel: jax.Array, *arguments: Any, **options: Any
) -> jax.Array:
    """`dot_general` of [N, C] and [C, F] for `dense`.

    The sum is a product with ones: XLA's CPU reduction over the leading axis took 40 times as long
    (411 MB: 700 ms against 15 ms).
    """
    parts = kernel.reshape(copies, -1)
    total = jnp.matmul(
        jnp.ones((1, copies), kernel.dtype),
        parts,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=at_least_float32(kernel.dtype),
    )
    total = total.astype(kernel.dtype).reshape(-1, kernel.shape[1])
    return dot_general(x[:, : len(total)], total, *arguments, **options)


class BatchNorm(nn.Module):
    """Batch normalisation over all but the last axis (Ioffe and Szegedy, 2015), as torch does it.

    Unlike `flax.linen.BatchNorm` the running variance is the unbiased one, n / (n - 1) of the
    batch's. Statistics and the normalisation itself are in at least float32.

    Shapes: [..., C] -> [..., C] in `dtype`.

    Raises:
        ValueError: in training, when there is a single value per channel to take statistics of.
    """

    use_running_average: bool
    epsilon: float = 1e-5
    momentum: float = 0.9  # what stays of the old running value: 1 - torch's momentum
    dtype: DTypeLike = jnp.float32
    scale_init: Initializer = nn.initializers.ones
    axis_name: str | None = None  # share statistics over this mapped axis ("sync")
    axis_index_groups: Sequence[Sequence[int]] | None = None  # or within groups of it

    @nn.compact
    def __call__(self, x: jax.Array, activation: Activation | None = None) -> jax.Array:
        """With an activation, as `norm_act` calls it, that of the normalised."""
        stats_dtype = at_least_float32(self.dtype)
        channels = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, channels, stats_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, stats_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, stats_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, stats_dtype)

        wide = x.astype(stats_dtype)
        if self.use_running_average:
            made_of = (wide, scale, bias, running_mean.value, running_var.value)
            y = by_statistics(*made_of, self.epsilon).astype(self.dtype)
            return activation(y) if activation else y
        n = self._values_per_channel(x)
        near = jax.lax.stop_gradient(running_mean.value)  # to the mean, but in the first steps
        relu = activation is nn.relu
        if self._shares_statistics:
            y, mean, var = self._normalised_together(wide - near, scale, bias)
            y, mean = nn.relu(y) if relu else y, mean + near
        else:
            # Not wide, if what comes of it is to be as narrow: less memory to go over.
            operand = x if x.dtype == self.dtype else wide
            y, mean, var = normalised(operand, scale, bias, near, epsilon=self.epsilon, relu=relu)
        if not self.is_initializing():
            keep = self.momentum
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * var * (n / (n - 1))
        y = y.astype(self.dtype)
        if activation is None or relu:
            return y
        return self._activated(activation, y, wide, scale, bias, mean, var)

    def as_in_evaluation(self, x: jax.Array, activation: Activation | None = None) -> jax.Array:
        """By the running statistics, whatever `use_running_average` says; they stay as they are."""
        params, stats = self.variables["params"], self.variables["batch_stats"]
        x = x.astype(at_least_float32(self.dtype))
        made_of = (x, params["scale"], params["bias"], stats["mean"], stats["var"])
        y = by_statistics(*made_of, self.epsilon).astype(self.dtype)
        return self._activated(activation, y, *made_of) if activation else y

    def _activated(self, activation: Activation, y: jax.Array, *made_of: jax.Array) -> jax.Array:
        if y.dtype != at_least_float32(self.dtype):  # of y as it was rounded, not as it is made
            return activation(y)
        return activated(activation, y, *made_of, epsilon=self.epsilon)

    @property
    def _shares_statistics(self) -> bool:
        return self.axis_name is not None and not self.is_initializing()

    def _normalised_together(self, x: jax.Array, scale: jax.Array, bias: jax.Array) -> Normalised:
        """By the moments of all devices that share statistics."""
        groups = self.axis_index_groups
        shared = jax.lax.pmean(moments(x), self.axis_name, axis_index_groups=groups)
        return by_moments(x, shared, scale, bias, self.epsilon)

    def _values_per_channel(self, x: jax.Array) -> int:
        n = x.size // x.shape[-1]
        if self._shares_statistics:
            groups = self.axis_index_groups
            n *= len(groups[0]) if groups else jax.lax.axis_size(self.axis_name)
        if n == 1:
            raise ValueError(
                f"{'/'.join(self.path)}: batch normalisation in training needs more than one value "
                "per channel; use a larger batch or larger images"
            )
        return n


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), of any shape; the derivative at 0 is 0.

    `jax.nn.relu` tells by x where its derivative is 1, so that x stays in memory until then; this
    one by what it returns, which the next layer keeps anyway. Where x is cheap to compute again, as
    behind a norm, there is nothing in it. On a CPU what it returns is `written` to memory.
    """
    return jax.nn.relu(x) if PLAIN else _relu(x)


@jax.custom_jvp
def _relu(x: jax.Array) -> jax.Array:
    return written(jnp.maximum(x, 0))


@_relu.defjvp
def _relu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    y = _relu(x)
    kept = jax.lax.optimization_barrier(y)  # XLA knows that max(x, 0) > 0 is x > 0
    return y, jnp.where(kept > 0, dx, 0)


def norm_act(norm: nn.Module, x: jax.Array, activation: Activation) -> jax.Array:
    """`activation(norm(x))`; in training, where it pays, both in one: see `normalisation`.

    Then what the norm returns, as interceptors see it, is behind the activation. Others than
    `BatchNorm` itself, among them what `nn.remat` makes of it, are called as they are.
    """
    if type(norm) is BatchNorm and not norm.use_running_average:
        together: jax.Array = norm(x, activation)
        return together
    return activation(norm(x))


def norm_relu(norm: nn.Module, x: jax.Array) -> jax.Array:
    """`norm_act` with `nn.relu`."""
    return norm_act(norm, x, nn.relu)


# `jax.jit` so that the trace of a network shows it as one layer.
@partial(jax.jit, static_argnames=("size", "alpha", "beta", "k"))
def local_response_norm(
    x: jax.Array, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0
) -> jax.Array:
    """Divides by (k + alpha * the sum of squares over `size` neighbouring channels) ** beta.

    Krizhevsky et al. 2012, section 3.3, with the paper's constants; at least float32 inside.
    torch.nn.LocalResponseNorm(size, alpha * size, beta, k) is the same.

    Shapes: [..., C] -> [..., C].
    """
    wide = x.astype(at_least_float32(x.dtype))
    sides = [(0, 0)] * (x.ndim - 1) + [(size // 2, (size - 1) // 2)]
    squares = jnp.pad(jnp.square(wide), sides)
    channels = x.shape[-1]
    total = sum(squares[..., i : i + channels] for i in range(size))
    return (wide * (k + alpha * total) ** -beta).astype(x.dtype)


def check_image_size(images: jax.Array, least: int, network: str) -> None:
    """Refuses images that the network would shrink to nothing.

    Raises:
        ValueError: for images that are not [N, H, W, C], or have H or W below `least`.
    """
    if images.ndim != 4:
        raise ValueError(f"{network} takes images [N, H, W, C]; got shape {images.shape}")
    height, width = images.shape[1:3]
    if min(height, width) < least:
        raise ValueError(
            f"{network} needs images of at least {least}x{least}; got {height}x{width}"
        )
