"""Networks without batch norm, for inference: what it multiplies with goes into convolutions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from flaxcnn.blocks import BatchNorm, at_least_float32
from flaxcnn.network import Network
from flaxcnn.pretrained import channels_of

Path = tuple[str, ...]


def fold_batchnorm(model: Network, variables: Mapping[str, Any]) -> tuple[Network, dict[str, Any]]:
    """The same network for evaluation, and its variables {'params'}, without batch norm.

    In evaluation a batch norm is y = x * factor + offset per channel. The factor becomes part of
    the kernel of the convolution before it, and an addition is what stays of the norm. A norm that
    no convolution comes before, as at the start of a pre-activated block, keeps its factor too.
    Logits are those of before but for rounding. GoogLeNet's auxiliary heads, which evaluation does
    without, go. Otherwise a network that has no batch norm comes back as it is. Not for `jax.jit`:
    factors are computed on the host.

    Args:
        model: of `create_model`.
        variables: {'params', 'batch_stats'}; they stay as they are.

    Returns:
        A network whose `apply` takes `train=False` alone, and variables for it: {'params'}, where
        there was batch norm.

    Raises:
        TypeError: for a model that is none of flaxcnn's.
    """
    if not isinstance(model, Network):
        raise TypeError(f"only networks of flaxcnn.create_model; got {type(model).__name__}")
    if getattr(model, "aux_logits", False):
        model = model.clone(aux_logits=False)
        variables = {
            collection: {name: v for name, v in modules.items() if name not in ("aux1", "aux2")}
            for collection, modules in variables.items()
        }
    if not variables.get("batch_stats"):
        return model, dict(variables)
    convolutions = _convolutions_before_norms(model, variables)
    params = flatten_dict(variables["params"])
    stats = flatten_dict(variables["batch_stats"])
    for norm, (convolution, epsilon) in convolutions.items():
        # In float64, so that nothing but the result is rounded.
        of = [params[*norm, "scale"], params[*norm, "bias"], stats[*norm, "mean"]]
        scale, bias, mean, var = (np.float64(x) for x in (*of, stats[*norm, "var"]))
        factor = scale / np.sqrt(var + epsilon)
        params[*norm, "bias"] = _as_before(bias - mean * factor, params[*norm, "bias"])
        if convolution is None:
            params[*norm, "scale"] = _as_before(factor, params[*norm, "scale"])
            continue
        del params[*norm, "scale"]
        for leaf in ("kernel", "bias"):
            path = (*convolution, leaf)
            if path in params:
                params[path] = _as_before(np.float64(params[path]) * factor, params[path])
    return model.clone(norm=_offset), {"params": unflatten_dict(params)}


class Offset(nn.Module):
    """What is left of a batch norm: x + bias, or x * scale + bias; [..., C] -> [..., C].

    Which of them, the variables say: there is a scale where no convolution took it.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide, channels = at_least_float32(self.dtype), (x.shape[-1],)
        bias = self.param("bias", nn.initializers.zeros, channels, wide)
        if not self.has_variable("params", "scale"):
            # In that type cuDNN takes it into the convolution.
            return x.astype(self.dtype) + bias.astype(self.dtype)
        scale = self.param("scale", nn.initializers.ones, channels, wide)
        return (x.astype(wide) * scale + bias).astype(self.dtype)


def _offset(*, use_running_average: bool, dtype: DTypeLike, name: str, **_others: Any) -> Offset:
    """In place of `BatchNorm`, called with the same arguments."""
    if not use_running_average:
        raise ValueError("a network with folded batch norm evaluates only; train the one it is of")
    return Offset(dtype=dtype, name=name)


def _convolutions_before_norms(
    model: Network, variables: Mapping[str, Any]
) -> dict[Path, tuple[Path | None, float]]:
    """Batch norm -> the convolution that it follows, if there is one; and its epsilon.

    In all networks here nothing else looks at what such a convolution gives.
    """
    found: dict[Path, tuple[Path | None, float]] = {}
    outputs: list[tuple[jax.Array, Path]] = []  # kept, as objects are told apart by identity

    def watch(
        call: Any, arguments: Any, options: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        called = context.method_name == "__call__"
        if called and isinstance(module, BatchNorm):
            before = (path for output, path in outputs if output is arguments[0])
            found[module.path] = next(before, None), module.epsilon
        result = call(*arguments, **options)
        if called and isinstance(module, nn.Conv):
            outputs.append((result, module.path))
        return result

    side = max(32, model.min_size)
    channels = channels_of(model, variables)
    images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    with nn.intercept_methods(watch):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), dict(variables), images)
    return found


def _as_before(value: np.ndarray, like: jax.Array) -> jax.Array:
    return jnp.asarray(value, like.dtype)
