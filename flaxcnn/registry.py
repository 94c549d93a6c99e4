"""Every network by name."""

import dataclasses
import difflib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from flaxcnn import alexnet, efficientnet, googlenet, lenet, resnet, resnet_v2, vgg, zfnet
from flaxcnn.errors import InputError
from flaxcnn.network import Network
from flaxcnn.weights import COSTS

# One module per paper, each with its VARIANTS: name -> the network, its arguments bound.
FAMILIES: Mapping[str, ModuleType] = {
    "lenet": lenet,
    "alexnet": alexnet,
    "zfnet": zfnet,
    "vgg": vgg,
    "googlenet": googlenet,
    "resnet": resnet,
    "resnet_v2": resnet_v2,
    "efficientnet": efficientnet,
}

_FAMILY_OF: Mapping[str, str] = {
    name: family for family, module in FAMILIES.items() for name in module.VARIANTS
}


def list_models(weights: bool = False) -> list[str]:
    """The names that `create_model` knows, sorted; or those of them with published weights."""
    return sorted(COSTS if weights else _FAMILY_OF)


def family_of(name: str) -> str:
    """The paper's module that holds network `name`: "vgg" for "vgg16_bn".

    Raises:
        InputError: a ValueError, for a name that no family has; it lists the nearest ones.
    """
    if name not in _FAMILY_OF:
        near = difflib.get_close_matches(name, _FAMILY_OF, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(list_models())}"
        raise InputError(f"unknown model {name!r}; {hint}")
    return _FAMILY_OF[name]


def create_model(name: str, **arguments: Any) -> Network:
    """A linen module: `create_model("resnet50", num_classes=10, dtype=jnp.bfloat16)`.

    `num_classes=0` gives the network without its classifier, which returns pooled features.

    Raises:
        InputError: a ValueError, for an unknown name.
        TypeError: for an argument that the network does not have; it lists those it has.
    """
    fields = argument_names(name)
    unknown = sorted(set(arguments) - set(fields))
    if unknown:
        raise TypeError(f"{name} has no argument {', '.join(unknown)}; it has {', '.join(fields)}")
    network: Network = FAMILIES[family_of(name)].VARIANTS[name](**arguments)
    return network


def argument_names(name: str) -> list[str]:
    """What `create_model(name, ...)` takes.

    Raises:
        InputError: a ValueError, for an unknown name.
    """
    network = FAMILIES[family_of(name)].VARIANTS[name].func
    fields = [field.name for field in dataclasses.fields(network)]
    return [field for field in fields if field not in ("parent", "name")]
