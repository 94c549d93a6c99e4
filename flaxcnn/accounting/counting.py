"""What every layer of a network costs: parameters, multiply-adds, memory, receptive field.

One multiply-add counts as one MAC, which is what papers and torchvision print as FLOPs; `flops`
counts two operations for it. Only products are counted, not biases, norms or pools.

Memory is counted in bytes, with elementwise functions computed in place, as compilers do:

- `activation_bytes` of a layer is its output;
- `forward_bytes`: all variables, and as much of the activations as has to be there at one time;
- `training_bytes`: what the backward pass needs of the forward pass (`kept_bytes`), the variables,
  and a gradient and a momentum for each parameter. A convolution and a dense layer need their
  input, so does a norm and a max pool; a product needs its factors; a sum needs nothing.
"""

import inspect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from flaxcnn import registry
from flaxcnn.accounting.layers import IMAGES, TracedLayer
from flaxcnn.accounting.summary import Layer, Stage, Summary
from flaxcnn.accounting.trace import Trace, trace
from flaxcnn.errors import InputError

# What says, to a module's call, that it is not trained now.
_EVALUATION: Mapping[str, bool] = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}


def summarize(
    model: str | nn.Module,
    *,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    in_channels: int | None = None,
    dtype: DTypeLike | None = None,
) -> Summary:
    """What each layer of a network costs, by tracing it: nothing is run or allocated.

    Args:
        model: a name that `create_model` knows, or any linen module of images [N, H, W, C].
        image_size: pixels, of a square or (height, width); by default what the network was
            published for, 224 for a module that does not say.
        batch_size: images.
        in_channels: of the images; 3, or 1 for LeNet, by default.
        dtype: of the computation; by default the model's.

    Raises:
        InputError: a ValueError, for an unknown name, images that the network can't take, or
            arguments that are no sizes.
        TypeError: for what is no linen module, or one whose call needs more than images.
    """
    name, module = _module(model, dtype)
    if in_channels is None:
        in_channels = 1 if _family(name) == "lenet" else 3
    if image_size is None:
        image_size = getattr(module, "default_image_size", 224)
    sides = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
    shape = (batch_size, *sides, in_channels)
    if len(shape) != 4 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise InputError(f"images are [N, H, W, C], each at least 1; got {list(shape)}")
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    try:
        traced = trace(module, images, _evaluation(module))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error).partition("\n")[0]) from error
    compute_dtype = jnp.dtype(getattr(module, "dtype", None) or jnp.float32)
    return _summary(name, compute_dtype.name, shape, traced)


def _module(model: str | nn.Module, dtype: DTypeLike | None) -> tuple[str, nn.Module]:
    if isinstance(model, str):
        arguments = {} if dtype is None else {"dtype": dtype}
        return model, registry.create_model(model, **arguments)
    if not isinstance(model, nn.Module):
        found = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(f"a network's name or a linen module can be summarized; got {found}")
    if dtype is not None:
        if not hasattr(model, "dtype"):
            raise TypeError(f"{type(model).__name__} has no field dtype; give the module its own")
        model = model.clone(dtype=dtype)
    return type(model).__name__, model


def _family(name: str) -> str | None:
    return registry.family_of(name) if name in registry.list_models() else None


def _evaluation(module: nn.Module) -> dict[str, bool]:
    """The arguments of a module's call, beside the images."""
    arguments = {}
    _, *others = inspect.signature(module.__call__).parameters.values()
    for parameter in others:
        if parameter.name in _EVALUATION:
            arguments[parameter.name] = _EVALUATION[parameter.name]
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise TypeError(
                f"{type(module).__name__} is called with {parameter.name}, which is unknown here; "
                "wrap it in a module that is called with images alone"
            )
    return arguments


# ---------------------------------------------------------------------------------------- summary
def _summary(name: str, dtype: str, images: tuple[int, ...], found: Trace) -> Summary:
    used = _reached(found)
    used_layers = [layer for i, layer in enumerate(found.layers) if i in used]
    depths = _depths(found.layers)
    every = [_layer(layer, depth) for layer, depth in zip(found.layers, depths, strict=True)]
    layers = tuple(layer for i, layer in enumerate(every) if i in used)
    params = sum(layer.params for layer in used_layers)
    macs = sum(layer.macs for layer in used_layers)
    param_bytes = sum(layer.param_bytes for layer in used_layers)
    variable_bytes = param_bytes + sum(layer.state_bytes for layer in used_layers)
    kept = {kept.array: kept.size_bytes for layer in used_layers for kept in layer.kept}
    peak_bytes = _peak_bytes(found, used, math.prod(images) * 4)
    return Summary(
        model=name,
        images=images,
        dtype=dtype,
        layers=layers,
        apart=tuple(layer for i, layer in enumerate(every) if i not in used),
        stages=tuple(_stages(layers)),
        params=params,
        macs=macs,
        flops=2 * macs,
        activation_bytes=sum(layer.activation_bytes for layer in layers),
        peak_bytes=peak_bytes,
        forward_bytes=variable_bytes + peak_bytes,
        kept_bytes=sum(kept.values()),
        training_bytes=variable_bytes + 2 * param_bytes + sum(kept.values()),
    )


def _reached(found: Trace) -> set[int]:
    """The layers that the output depends on."""
    reached: set[int] = set()
    waiting = list(found.outputs)
    while waiting:
        number = waiting.pop()
        if number != IMAGES and number not in reached:
            reached.add(number)
            waiting.extend(found.layers[number].inputs)
    return reached


def _depths(layers: Sequence[TracedLayer]) -> list[int]:
    depths: list[int] = []
    for layer in layers:
        before = max((depths[number] for number in layer.inputs if number != IMAGES), default=0)
        depths.append(before + (layer.window is not None or layer.macs > 0))
    return depths


def _layer(layer: TracedLayer, depth: int) -> Layer:
    rows, columns, row_axis, column_axis = layer.seen
    jumps = (rows.jump if row_axis else None, columns.jump if column_axis else None)
    kernel, strides, dilation = layer.window or (None, None, None)
    return Layer(
        name=layer.name,
        kind=layer.kind,
        stage=layer.stage,
        depth=depth,
        kernel=kernel,
        strides=strides,
        dilation=dilation,
        output_shape=layer.output_shape,
        params=layer.params,
        macs=layer.macs,
        activation_bytes=layer.output_bytes,
        receptive_field=_sides(rows.size, columns.size),
        jump=None if None in jumps else _sides(*jumps),
        offset=_sides(rows.offset, columns.offset),
    )


def _sides(rows: Any, columns: Any) -> Any:
    return rows if rows == columns else (rows, columns)


def _stages(layers: Iterable[Layer]) -> Iterator[Stage]:
    for name, group in itertools.groupby(layers, key=lambda layer: layer.stage):
        of_stage = list(group)
        yield Stage(
            name=name,
            layers=len(of_stage),
            output_shape=of_stage[-1].output_shape,
            params=sum(layer.params for layer in of_stage),
            macs=sum(layer.macs for layer in of_stage),
            activation_bytes=sum(layer.activation_bytes for layer in of_stage),
            receptive_field=of_stage[-1].receptive_field,
        )


def _peak_bytes(found: Trace, used: set[int], image_bytes: int) -> int:
    """The most that images and activations take at one time, each freed behind its last use."""
    last_use = dict.fromkeys(found.outputs, len(found.layers))
    for number in sorted(used):
        for source in found.layers[number].inputs:
            last_use[source] = max(last_use.get(source, 0), number)
    there, peak = {IMAGES: image_bytes}, image_bytes
    for number in sorted(used):
        layer = found.layers[number]
        last = [source for source in layer.inputs if last_use[source] == number]
        room = max((there[source] for source in last), default=0) if layer.in_place else 0
        peak = max(peak, sum(there.values()) + max(layer.output_bytes - room, 0))
        for source in last:
            del there[source]
        there[number] = layer.output_bytes
    return peak
