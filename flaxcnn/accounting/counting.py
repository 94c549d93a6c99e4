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
import math
import operator
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

LARGEST = 65_536  # of an image's sizes

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
        in_channels = 1 if type(module).__module__ == registry.FAMILIES["lenet"].__name__ else 3
    if image_size is None:
        image_size = getattr(module, "default_image_size", 224)
    sides = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
    shape = _sizes((batch_size, *sides, in_channels))
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    arguments = _evaluation(module)
    try:
        traced = trace(module, images, arguments)
    except InputError:
        raise
    except (ValueError, TypeError, ZeroDivisionError) as error:
        what = f"{name} cannot take images {list(shape)}: {str(error).partition(chr(10))[0]}"
        raise InputError(what) from error
    compute_dtype = jnp.dtype(getattr(module, "dtype", None) or jnp.float32)
    return _summary(name, compute_dtype.name, shape, traced)


def _sizes(shape: Sequence[Any]) -> tuple[int, ...]:
    """The shape of images, as whole numbers."""
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = ()
    if len(sizes) != 4 or not all(0 < size <= LARGEST for size in sizes):
        raise InputError(
            f"images are [N, H, W, C], whole numbers from 1 to {LARGEST:,}; got {list(shape)}"
        )
    return sizes


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


def _evaluation(module: nn.Module) -> dict[str, bool]:
    """The arguments of a module's call, beside the images.

    Raises:
        TypeError: for a module that is called with something else.
    """
    try:
        images, *others = inspect.signature(module.__call__).parameters.values()
    except (AttributeError, ValueError):  # it has no call, or one without arguments
        images, others = None, []
    if images is None or images.kind is images.KEYWORD_ONLY:
        raise TypeError(f"{type(module).__name__} is not called with images alone; wrap it")
    arguments = {}
    for parameter in others:
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if parameter.name in _EVALUATION:
            arguments[parameter.name] = _EVALUATION[parameter.name]
        elif required:
            raise TypeError(
                f"{type(module).__name__} is called with {parameter.name} too, which is unknown "
                "here; wrap it in a module that is called with images alone"
            )
    return arguments


# ---------------------------------------------------------------------------------------- summary
def _summary(name: str, dtype: str, images: tuple[int, ...], found: Trace) -> Summary:
    depths = _depths(found.layers)
    every = [_layer(layer, depth) for layer, depth in zip(found.layers, depths, strict=True)]
    used_layers = [found.layers[i] for i in sorted(found.used)]
    layers = tuple(every[i] for i in sorted(found.used))
    params = sum(layer.params for layer in used_layers)
    macs = sum(layer.macs for layer in used_layers)
    param_bytes = sum(layer.param_bytes for layer in used_layers)
    variable_bytes = param_bytes + sum(layer.state_bytes for layer in used_layers)
    kept = {kept.array: kept.size_bytes for layer in used_layers for kept in layer.kept}
    peak_bytes = _peak_bytes(found, math.prod(images) * 4)
    return Summary(
        model=name,
        images=images,
        dtype=dtype,
        layers=layers,
        apart=tuple(layer for i, layer in enumerate(every) if i not in found.used),
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


def _depths(layers: Sequence[TracedLayer]) -> list[int]:
    depths: list[int] = []
    for layer in layers:
        before = max((depths[number] for number in layer.inputs if number != IMAGES), default=0)
        depths.append(before + (layer.window is not None or layer.macs > 0))
    return depths


def _layer(layer: TracedLayer, depth: int) -> Layer:
    rows, columns, row_axis, column_axis = layer.seen
    jumps = (
        None if row_axis is None else rows.jump,
        None if column_axis is None else columns.jump,
    )
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
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.stage, []).append(layer)
    for name, group in groups.items():
        last = [layer for layer in group if layer.kind != "variables"] or group
        yield Stage(
            name=name,
            layers=len(group),
            output_shape=last[-1].output_shape,
            params=sum(layer.params for layer in group),
            macs=sum(layer.macs for layer in group),
            activation_bytes=sum(layer.activation_bytes for layer in group),
            receptive_field=last[-1].receptive_field,
        )


def _peak_bytes(found: Trace, image_bytes: int) -> int:
    """The most that images and activations take at one time, each freed behind its last use."""
    last_use = dict.fromkeys(found.outputs, len(found.layers))
    for number in sorted(found.used):
        for source in found.layers[number].inputs:
            last_use[source] = max(last_use.get(source, 0), number)
    there, peak = {IMAGES: image_bytes}, image_bytes
    for number in sorted(found.used):
        layer = found.layers[number]
        last = [source for source in layer.inputs if last_use[source] == number]
        room = max((there[source] for source in last), default=0) if layer.in_place else 0
        peak = max(peak, sum(there.values()) + max(layer.output_bytes - room, 0))
        for source in last:
            del there[source]
        there[number] = layer.output_bytes
    return peak
