"""The portable result of a run: a folder with the weights, and with all that is needed to use them.

`weights.safetensors` holds the variables under their Flax paths, "params/conv1/kernel", and
`model.json` the network, its arguments, the names of the classes, and how pictures are prepared.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcnn import registry
from flaxcnn.convert import variable_shapes
from flaxcnn.errors import WeightsError
from flaxcnn.network import Network
from flaxcnn.state_dicts import read_safetensors, write_safetensors
from flaxcnn.transforms import ImageClassification

DESCRIPTION, WEIGHTS = "model.json", "weights.safetensors"
_FORMAT = 1

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
    return (pathlib.Path(path) / DESCRIPTION).is_file()


def save(path: Path, model: ModelFolder) -> None:
    """Writes the folder; each of its files is there when it is whole, the description last.

    Raises:
        WeightsError: if it cannot be written.
    """
    folder = pathlib.Path(path)
    description = {
        "format": _FORMAT,
        "arch": model.arch,
        "arguments": dict(model.arguments),
        "classes": list(model.class_names),
        "transform": dataclasses.asdict(model.transform),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / WEIGHTS, _named(jax.device_get(model.variables)))
        part = folder / f"{DESCRIPTION}.part"
        part.write_text(json.dumps(description, indent=1), encoding="utf-8")
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
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if description["format"] != _FORMAT:
            raise WeightsError(
                f"{folder}: written in format {description['format']!r}, this reads {_FORMAT}"
            )
        arch, arguments = description["arch"], dict(description["arguments"])
        wrong = [k for k, v in arguments.items() if not isinstance(v, int | float)]
        if wrong:
            raise WeightsError(f"{folder / DESCRIPTION}: no numbers: {', '.join(wrong)}")
        class_names = [str(name) for name in description["classes"]]
        shapes = variable_shapes(
            registry.create_model(arch, **arguments), len(description["transform"]["mean"])
        )
        transform = description["transform"]
        for statistic in ("mean", "std"):
            transform[statistic] = tuple(float(value) for value in transform[statistic])
        transform = ImageClassification(**transform)
        if len(class_names) != arguments["num_classes"]:
            raise WeightsError(
                f"{folder / DESCRIPTION}: {len(class_names)} class names for "
                f"{arguments['num_classes']} classes"
            )
    except OSError as error:
        raise WeightsError(f"{folder}: no model folder: {error.strerror}") from error
    except WeightsError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{folder / DESCRIPTION}: not usable: {error!r}") from error
    arrays = read_safetensors(folder / WEIGHTS)
    expected = _named(shapes)
    faults = [f"missing: {name}" for name in expected.keys() - arrays.keys()]
    faults += [f"not expected: {name}" for name in arrays.keys() - expected.keys()]
    faults += [
        f"shape: {name} {arrays[name].shape} is not {expected[name].shape}"
        for name in expected.keys() & arrays.keys()
        if arrays[name].shape != expected[name].shape
    ]
    faults += [f"not finite: {name}" for name, x in arrays.items() if not np.isfinite(x).all()]
    if faults:
        raise WeightsError(f"{folder}: not a {arch}:\n  " + "\n  ".join(sorted(faults)))
    leaves = [jnp.asarray(arrays[name], target.dtype) for name, target in expected.items()]
    return ModelFolder(
        arch=arch,
        arguments=arguments,
        variables=jax.tree.unflatten(jax.tree.structure(shapes), leaves),
        class_names=class_names,
        transform=transform,
    )


def arguments_of(arch: str, model: Network) -> dict[str, Any]:
    """What `create_model(arch, ...)` was given of numbers: num_classes, and what is not usual."""
    usual = registry.create_model(arch)
    fields = {name: getattr(model, name) for name in registry.argument_names(arch)}
    return {
        name: value
        for name, value in fields.items()
        if name == "num_classes"
        or (isinstance(value, int | float) and value != getattr(usual, name))
    }


def _named(variables: Mapping[str, Any]) -> dict[str, Any]:
    """{"params": {"conv1": {"kernel": ...}}} -> {"params/conv1/kernel": ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(variables))
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}
