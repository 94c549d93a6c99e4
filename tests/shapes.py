"""What the shapes of a network tell: its maps and its multiply-adds, without running anything."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from variables import variable_shapes

import flaxcnn

Shape = tuple[int, ...]


class Traced(NamedTuple):
    """Of one network and one shape of images; modules are named like "layer1_0/conv1"."""

    variables: Any  # their shapes and types
    modules: dict[str, Shape]  # what each returns, the batch left out
    macs: dict[str, int]  # of each convolution and dense layer


@functools.cache  # a second for the deepest networks
def traced(model: nn.Module, images: Shape) -> Traced:
    """`model` on images [N, H, W, C], with what only training needs."""
    modules: dict[str, Shape] = {}
    macs: dict[str, int] = {}

    def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result, module = next_call(*args, **kwargs), context.module
        if context.method_name == "__call__" and isinstance(result, jax.Array):
            path = "/".join(module.path)
            modules[path] = result.shape[1:]
            if isinstance(module, nn.Conv | nn.Dense):
                seen = args[0].shape[-1]
                if isinstance(module, nn.Conv):
                    assert not isinstance(module.kernel_size, int)
                    seen = seen // module.feature_group_count * math.prod(module.kernel_size)
                macs[path] = result.size * seen
        return result

    with nn.intercept_methods(record):
        variables = variable_shapes(model, images)
    return Traced(variables, modules, macs)


def paper_images(name: str, batch: int = 1) -> Shape:
    """The images [N, H, W, C] that network `name` was published for."""
    side = flaxcnn.create_model(name).default_image_size
    return (batch, side, side, 1 if name in ("lecun1989", "lenet5") else 3)


def stage_shapes(model: nn.Module, images: Shape) -> dict[str, Shape]:
    """Stage -> [h, w, c] of its feature map, in the order of `model.stages`."""
    maps = jax.eval_shape(
        lambda v, x: flaxcnn.extract_features(model, v, x, model.stages),
        traced(model, images).variables,
        jax.ShapeDtypeStruct(images, jnp.float32),
    )
    return {stage: maps[stage].shape[1:] for stage in model.stages}


def macs_of(model: nn.Module, images: Shape) -> dict[str, int]:
    """Module -> multiply-adds, each counted as one, of its products with weights in evaluation.

    For the layers of `nn.Conv` and `nn.Dense`; of biases, norms and pools nothing is counted.
    """
    macs = traced(model, images).macs
    return {path: n for path, n in macs.items() if not path.startswith("aux")}


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
