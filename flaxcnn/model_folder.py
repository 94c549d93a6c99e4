"""The portable result of a run: a folder with the weights, and with all that is needed to use them.

`weights.safetensors` holds the variables under their Flax paths, "params/conv1/kernel", and
`model.json` the network, its arguments, the names of the classes, and how pictures are prepared.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcnn import registry
from flaxcnn.convert import is_finite, variable_shapes
from flaxcnn.errors import WeightsError
from flaxcnn.network import Network
from flaxcnn.state_dicts import read_safetensors, write_safetensors
from flaxcnn.transforms import ImageClassification

DESCRIPTION, WEIGHTS = "model.json", "weights.safetensors"
_FORMAT = 1
_MOST_CLASSES = 1_000_000
# The arguments of networks that a folder may hold: all others are as `create_model` has them, and
# none of these makes a network that costs more to trace than its file is large.
_ARGUMENTS: Mapping[str, tuple[type, ...]] = {
    "num_classes": (int,),
    "aux_logits": (bool,),
    "transform_input": (bool,),
    "zero_init_residual": (bool,),
    "dropout_rate": (float, int),
    "aux_dropout_rate": (float, int),
    "stochastic_depth_rate": (float, int),
}
_NOT_KEPT = ("dtype", "norm")  # how it is computed, not what

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """What a model folder holds."""

    arch: str
    arguments: Mapping[str, Any]  # of `create_model`, `num_classes` among them
    variables: Mapping[str, Any]
    class_names: Sequence[str]
    transform: ImageClassification


def is_one(path: Path) -> bool:
    """Whether `path` is a model folder."""
    return os.path.isfile(os.path.join(path, DESCRIPTION))


def arguments_of(arch: str, model: Network) -> dict[str, Any]:
    """What `create_model(arch, ...)` was given: num_classes, and what is not usual.

    Raises:
        WeightsError: for an argument that a folder cannot hold.
    """
    usual = registry.create_model(arch)
    fields = {name: getattr(model, name) for name in registry.argument_names(arch)}
    given = {
        name: value
        for name, value in fields.items()
        if name == "num_classes" or (name not in _NOT_KEPT and value != getattr(usual, name))
    }
    if unknown := given.keys() - _ARGUMENTS.keys():
        raise WeightsError(f"a model folder cannot hold {arch} with another {', '.join(unknown)}")
    return given


def save(path: Path, model: ModelFolder) -> None:
    """Writes the folder; each of its files is there when it is whole, the description last.

    Raises:
        WeightsError: if it cannot be written.
    """
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / WEIGHTS, _named(jax.device_get(model.variables)))
        description = {
            "format": _FORMAT,
            "arch": model.arch,
            "arguments": dict(model.arguments),
            "classes": list(model.class_names),
            "transform": dataclasses.asdict(model.transform),
            "sha256": _sha256(folder / WEIGHTS),
        }
        part = folder / f"{DESCRIPTION}.{os.getpid()}.part"
        with part.open("w", encoding="utf-8") as file:
            json.dump(description, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / DESCRIPTION)
    except OSError as error:
        raise WeightsError(f"{folder}: not written: {error}") from error


def load(path: Path) -> ModelFolder:
    """Reads the folder, strictly.

    Raises:
        WeightsError: for a folder that is missing, broken, or does not fit its network.
    """
    folder = pathlib.Path(path)
    try:
        described, sha256 = _described((folder / DESCRIPTION).read_bytes())
    except OSError as error:
        raise WeightsError(f"{folder}: no model folder: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise WeightsError(f"{folder / DESCRIPTION}: not usable: {reason}") from error
    arrays = read_safetensors(folder / WEIGHTS)
    if _sha256(folder / WEIGHTS) != sha256:  # as between the two files of a second save
        raise WeightsError(f"{folder}: {WEIGHTS} is not the one that {DESCRIPTION} describes")
    model = registry.create_model(described.arch, **described.arguments)
    shapes = variable_shapes(model, len(described.transform.mean))
    variables = _strictly(arrays, shapes, f"{folder}: not a {described.arch}")
    return dataclasses.replace(described, variables=variables)


def _described(text: bytes) -> tuple[ModelFolder, str]:
    """What model.json says, and the hash of the weights that it says it of.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: for whatever is wrong with it.
    """
    description = json.loads(text.decode("utf-8"))
    if description["format"] != _FORMAT:
        raise ValueError(f"written in format {description['format']!r}, this reads {_FORMAT}")
    transform = dict(description["transform"])
    for statistic in ("mean", "std"):
        transform[statistic] = tuple(float(value) for value in list(transform[statistic]))
    arch, arguments = description["arch"], dict(description["arguments"])
    for name, value in arguments.items():
        if name not in _ARGUMENTS or type(value) not in _ARGUMENTS[name]:
            raise ValueError(f"the argument {name!r}, or its value, is not a model folder's")
    num_classes = arguments["num_classes"]
    if not 1 <= num_classes <= _MOST_CLASSES:
        raise ValueError(f"{num_classes} classes")
    classes = description["classes"]
    if not isinstance(classes, list) or len(classes) != num_classes:
        raise ValueError(f"there are not {num_classes} class names for as many classes")
    if not all(isinstance(name, str) and name.isprintable() for name in classes):
        raise ValueError("a class name is no printable text")
    if not isinstance(arch, str):
        raise TypeError(f"the network is called {arch!r}")
    registry.create_model(arch, **arguments)  # refuses unknown names
    described = ModelFolder(
        arch=arch,
        arguments=arguments,
        variables={},
        class_names=classes,
        transform=ImageClassification(**transform),
    )
    return described, description["sha256"]


def _strictly(arrays: Mapping[str, np.ndarray], shapes: Any, wrong: str) -> Any:
    """The arrays as the variables whose shapes these are; raises WeightsError(`wrong` ...)."""
    expected = _named(shapes)
    faults = [f"missing: {name}" for name in expected.keys() - arrays.keys()]
    faults += [f"not expected: {name}" for name in arrays.keys() - expected.keys()]
    for name in expected.keys() & arrays.keys():
        value, target = arrays[name], expected[name]
        if value.shape != target.shape:
            faults.append(f"shape: {name} {value.shape} is not {target.shape}")
        elif value.dtype != target.dtype:
            faults.append(f"type: {name} {value.dtype} is not {target.dtype}")
        elif not is_finite(value):
            faults.append(f"not finite: {name}")
    if faults:
        raise WeightsError(f"{wrong}:\n  " + "\n  ".join(sorted(faults)))
    leaves = [jnp.array(arrays[name]) for name in expected]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _named(variables: Mapping[str, Any]) -> dict[str, Any]:
    """{"params": {"conv1": {"kernel": ...}}} -> {"params/conv1/kernel": ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(variables))
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
