"""Every network by name."""

import dataclasses
import difflib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from flaxcnn import alexnet, efficientnet, googlenet, lenet, resnet, resnet_v2, vgg, zfnet
from flaxcnn.network import Network

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


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted."""
    return sorted(_FAMILY_OF)


def family_of(name: str) -> str:
    """The paper's module that holds network `name`: "vgg" for "vgg16_bn".

    Raises:
        ValueError: for a name that no family has; it lists the nearest ones.
    """
    if name not in _FAMILY_OF:
        near = difflib.get_close_matches(name, _FAMILY_OF, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(list_models())}"
        raise ValueError(f"unknown model {name!r}; {hint}")
    return _FAMILY_OF[name]


def create_model(name: str, **arguments: Any) -> Network:
    """A linen module: `create_model("resnet50", num_classes=10, dtype=jnp.bfloat16)`.

    `num_classes=0` gives the network without its classifier, which returns pooled features.

    Raises:
        ValueError: for an unknown name.
        TypeError: for an argument that the network does not have; it lists those it has.
    """
    variant = FAMILIES[family_of(name)].VARIANTS[name]
    names = [field.name for field in dataclasses.fields(variant.func)]
    fields = [name for name in names if name not in ("parent", "name")]
    unknown = sorted(set(arguments) - set(fields))
    if unknown:
        raise TypeError(f"{name} has no argument {', '.join(unknown)}; it has {', '.join(fields)}")
    network: Network = variant(**arguments)
    return network
