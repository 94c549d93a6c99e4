"""torchvision's side of a comparison; imported only where torch is."""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from twins import seeded_weights

if importlib.util.find_spec("torchvision_cpu"):  # makes torchvision import beside a CPU torch
    importlib.import_module("torchvision_cpu")
import torchvision

torch.set_num_threads(1)  # as many workers as cores run beside each other


def twin(name: str, num_classes: int = 1000, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """torchvision's network with the weights of `twins.seeded_weights`, without any dropout."""
    net = fresh(name, num_classes)
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    weights = {key: torch.from_numpy(value) for key, value in seeded_weights(shapes).items()}
    net.load_state_dict(weights, strict=True)
    return without_dropout(net).to(dtype)


def fresh(name: str, num_classes: int) -> torch.nn.Module:
    """torchvision's network as it comes."""
    settings = {"init_weights": True} if name == "googlenet" else {}  # what it warns it will be
    return torchvision.models.get_model(name, num_classes=num_classes, **settings)


def without_dropout(net: torch.nn.Module) -> torch.nn.Module:
    """Nor stochastic depth."""
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout | torchvision.ops.StochasticDepth):
            module.p = 0.0
    return net


def state_dict(net: torch.nn.Module) -> dict[str, np.ndarray]:
    """Copies, as torch changes its statistics in place."""
    return {key: value.detach().numpy().copy() for key, value in net.state_dict().items()}


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def evaluate(
    net: torch.nn.Module, images: np.ndarray, stages: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits, and the feature map [N, H, W, C] of each stage, in evaluation mode."""
    maps: dict[str, np.ndarray] = {}

    def keep(stage: str) -> Any:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            maps[stage] = output.permute(0, 2, 3, 1).numpy().copy()

        return hook

    hooks = [_module(net, stage).register_forward_hook(keep(stage)) for stage in stages]
    with torch.no_grad():
        logits = net.eval()(channels_first(images)).numpy()
    for hook in hooks:
        hook.remove()
    return logits, maps


def _module(net: torch.nn.Module, stage: str) -> torch.nn.Module:
    """What ends a stage: a max pool, or the module of the same name."""
    if stage == "stem":
        return net.maxpool
    if stage.startswith("pool"):
        pools = [m for m in net.features if isinstance(m, torch.nn.MaxPool2d)]
        return pools[int(stage.removeprefix("pool")) - 1]
    return net.get_submodule(stage.replace("_", "."))
