"""What a network costs: parameters and multiply-adds, by tracing it, without running anything."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxcnn import registry
from flaxcnn.weights import COSTS, get_model_weights


class Cost(NamedTuple):
    """Of one network and one image; GoogLeNet without its auxiliary classifiers."""

    params: int
    macs: int  # one multiply-add is one: what papers and torchvision call FLOPs
    image_size: int  # pixels


@functools.cache
def cost(name: str) -> Cost:
    """Of network `name` for the images that its weights, or its paper, are for.

    Multiply-adds are those of convolutions and dense layers.

    Raises:
        InputError: a ValueError, for an unknown name.
    """
    if name in COSTS:  # a test compares them with what follows
        published = COSTS[name]
        side = get_model_weights(name).__members__["DEFAULT"].transforms().crop_size
        return Cost(published.num_params, round(published.gmacs * 1e9), side)
    arguments = {"aux_logits": False} if "aux_logits" in registry.argument_names(name) else {}
    model = registry.create_model(name, **arguments)
    side = model.default_image_size
    channels = 1 if registry.family_of(name) == "lenet" else 3
    macs = 0

    def count(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal macs
        result, module = next_call(*args, **kwargs), context.module
        if context.method_name == "__call__" and isinstance(module, nn.Conv | nn.Dense):
            per_output = args[0].shape[-1]
            if isinstance(module, nn.Conv):
                per_output = (
                    per_output // module.feature_group_count * math.prod(_kernel_size(module))
                )
            macs += result.size * per_output
        return result

    images = jnp.zeros((1, side, side, channels))
    with nn.intercept_methods(count):
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    params = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    return Cost(params, macs, side)


def _kernel_size(conv: nn.Conv) -> tuple[int, ...]:
    size = conv.kernel_size
    return (size,) if isinstance(size, int) else tuple(size)
