"""torchvision's side of a comparison: the setups of `benchmarks.workloads`, in PyTorch.

Imported in worker processes alone, where torch is.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

if importlib.util.find_spec("torchvision_cpu"):  # makes torchvision import beside a CPU torch
    importlib.import_module("torchvision_cpu")
import torchvision

from benchmarks.torch_cifar_resnet import CifarResNet
from train import cpu

Setup = tuple[Callable[[], object], dict[str, str]]


def write_weights(arch: str, image_size: int, num_classes: int, folder: str) -> Setup:
    """Draws the weights and the images of a comparison; no step is of any use."""
    torch.manual_seed(0)
    net = _network(arch, num_classes)
    for weights in net.parameters():
        if weights.ndim > 1:  # GoogLeNet's own start leaves nothing but biases in the logits
            torch.nn.init.kaiming_normal_(weights)
    torch.save(net.state_dict(), Path(folder, "weights.pth"))
    images = np.random.default_rng(0).normal(size=(2, image_size, image_size, 3))
    np.save(Path(folder, "images.npy"), images.astype(np.float32))
    return lambda: None, {}


def training(
    arch: str,
    image_size: int,
    batch_size: int,
    num_classes: int,
    precision: str,
    folder: str,
    layout: str,
    compiled: bool,
    threads: int,
) -> Setup:
    """Forward, cross entropy, backward and SGD as in `workloads.plan_for`, on one random batch."""
    net, prepare, facts = _prepared(arch, num_classes, precision, folder, layout, threads)
    net.train()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
    )
    images = prepare(torch.randn(batch_size, 3, image_size, image_size))
    labels = torch.arange(batch_size) % num_classes
    labels = labels.to(images.device)
    cross_entropy = torch.nn.functional.cross_entropy

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        with _autocast(images.device, precision):
            output = net(images)
            if not hasattr(output, "aux_logits1"):
                return cross_entropy(output, labels)
            aux = (output.aux_logits1, output.aux_logits2)  # GoogLeNet
            losses = [cross_entropy(logits, labels) for logits in aux]
            return cross_entropy(output.logits, labels) + 0.3 * sum(losses)

    forward = torch.compile(loss_of) if compiled else loss_of

    def step() -> None:
        optimizer.zero_grad()
        forward(images).backward()
        optimizer.step()
        _wait(images.device)

    return step, facts | {"first_step_seconds": _seconds(step)}


def prediction(
    arch: str,
    image_size: int,
    batch_size: int,
    num_classes: int,
    precision: str,
    folder: str,
    layout: str,
    compiled: bool,
    threads: int,
) -> Setup:
    """Logits of one random batch in evaluation mode."""
    net, prepare, facts = _prepared(arch, num_classes, precision, folder, layout, threads)
    images = prepare(torch.randn(batch_size, 3, image_size, image_size))
    forward = torch.compile(net) if compiled else net

    def step() -> None:
        with torch.inference_mode(), _autocast(images.device, precision):
            forward(images)
        _wait(images.device)

    return step, facts | {"first_step_seconds": _seconds(step)}


def _prepared(
    arch: str, num_classes: int, precision: str, folder: str, layout: str, threads: int
) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor], dict[str, str]]:
    """The network with the comparison's weights, what its images go through, and its logits."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        cpu.keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # tries its algorithms, as XLA does
    # float32 is float32, as on flaxcnn's side.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    net = _network(arch, num_classes)
    net.load_state_dict(torch.load(Path(folder, "weights.pth"), weights_only=True))
    place: Any = net.to(device).to  # torch's types lack memory formats
    net = place(memory_format=memory_format).eval()

    def prepare(images: torch.Tensor) -> torch.Tensor:
        return images.to(device=device, memory_format=memory_format)

    shown = torch.from_numpy(np.load(Path(folder, "images.npy"))).permute(0, 3, 1, 2)
    with torch.inference_mode(), _autocast(device, precision):
        logits = net(prepare(shown)).float().cpu().numpy()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return net, prepare, {"versions": versions, "device": name, "logits": _as_text(logits)}


# Depth 6n + 2 -> n.
_CIFAR_RESNETS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}


def _network(arch: str, num_classes: int) -> torch.nn.Module:
    if arch in _CIFAR_RESNETS:
        return CifarResNet(_CIFAR_RESNETS[arch], num_classes)
    settings = {"init_weights": False} if arch == "googlenet" else {}
    return torchvision.models.get_model(arch, num_classes=num_classes, **settings)


def _autocast(device: Any, precision: str) -> torch.autocast:
    kind = getattr(device, "type", device)
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _seconds(step: Callable[[], object]) -> str:
    """Of the first call, which compiles what is compiled."""
    started = time.perf_counter()
    step()
    return f"{time.perf_counter() - started:.2f}"


def _as_text(logits: np.ndarray) -> str:
    return " ".join(f"{value:.9g}" for value in logits.ravel())
