"""The same transfer with torch: same weights, images, split and recipe, 50 images of each class.

    python -m benchmarks.transfer_versus_torch --csv benchmarks/results/transfer_torch.csv

Needs the extra `torch`; flaxcnn's side is `benchmarks.transfer`. Images are prepared by flaxcnn on
both sides. torch's network has first kernels summed over the colours, as flaxcnn's for grey images,
and a last layer of zeros. The order of the images, dropout and stochastic depth are each library's
own. Rows that the file has are not run again.
"""

import importlib
import itertools
import math
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np

from benchmarks.kept_rows import KeptRows, parse_arguments
from benchmarks.machine import cpu_name
from benchmarks.transfer import flags_of
from flaxcnn.pretrained import weights_file
from flaxcnn.weights import get_weight
from train import transfer
from train.plan import Plan

IMAGES_PER_CLASS = 50
FIELDS = ("method", "images_per_class", "seed", "top1", "seconds", "torch", "cpu")


def with_torch(method: str, seed: int) -> tuple[float, float]:
    """Top-1 on the test images as a share of one, and seconds, preparation of images included."""
    from train import data
    from train.config import load_dataset, make_plan, parse

    torch = importlib.import_module("torch")
    started = time.perf_counter()
    config = parse(flags_of(method, IMAGES_PER_CLASS, seed))
    dataset = load_dataset(config)
    plan = make_plan(config, dataset, 1, False)
    assert plan.weights is not None
    prepared = transfer.preparation(plan.arch, plan.weights)
    transform = data.evaluation_transform(plan, dataset.mean_and_std, prepared)
    sides = []
    for source in (dataset.train, dataset.test):
        images = np.stack([transform.view(source[i][0]) for i in range(len(source))])
        scaled = (images.astype("float32") / 255 - np.float32(transform.mean[0])) / np.float32(
            transform.std[0]
        )
        batch = torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))
        sides.append((batch, torch.from_numpy(np.asarray(source.labels, np.int64))))
    torch.manual_seed(seed)
    (images, labels), test = sides
    net = _network(torch, plan)
    if method == "linear probe":
        images, test = _features(torch, net, images), (_features(torch, net, test[0]), test[1])
        net = net._fc
    _train(torch, net, plan, images, labels)
    return _top1(torch, net, *test), time.perf_counter() - started


def _network(torch: Any, plan: Plan) -> Any:
    package = importlib.import_module("efficientnet_lite_pytorch")
    net = package.EfficientNet.from_name("efficientnet-lite0", image_size=None)
    published = weights_file(get_weight("EfficientNet_Lite0_Weights.IMAGENET1K_V1"))
    state = torch.load(published, weights_only=True)
    net.load_state_dict(state)
    first = net._conv_stem
    first.weight = torch.nn.Parameter(first.weight.detach().sum(1, keepdim=True))
    first.in_channels = 1
    net._fc = torch.nn.Linear(net._fc.in_features, plan.num_classes)
    torch.nn.init.zeros_(net._fc.weight)
    torch.nn.init.zeros_(net._fc.bias)
    return net


def _features(torch: Any, net: Any, images: Any) -> Any:
    """What the last layer sees in evaluation."""
    head, net._fc = net._fc, torch.nn.Identity()
    with torch.no_grad():
        found = torch.cat([net.eval()(part) for part in images.split(64)])
    net._fc = head
    return found


def _train(torch: Any, net: Any, plan: Plan, images: Any, labels: Any) -> None:
    """SGD by the plan: epochs without a gap, warm-up and cosine by the step."""
    net.train()
    for module in net.modules():
        if plan.freeze_bn and isinstance(module, torch.nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    kernels = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim == 1]
    groups = [
        {"params": kernels, "weight_decay": plan.weight_decay},
        {"params": others, "weight_decay": plan.weight_decay * plan.decay_norm_and_bias},
    ]
    sgd = torch.optim.SGD(
        groups, lr=plan.learning_rate, momentum=plan.momentum, nesterov=plan.nesterov
    )
    order = itertools.chain.from_iterable(
        torch.randperm(len(images)).tolist() for _ in itertools.count()
    )
    for step in range(plan.steps):
        if step < plan.warmup_steps:
            factor = (step + 1) / plan.warmup_steps
        else:
            done = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
            factor = 0.5 * (1 + math.cos(math.pi * done))
        for group in sgd.param_groups:
            group["lr"] = plan.learning_rate * factor
        chosen = list(itertools.islice(order, plan.batch_size))
        batch = images[chosen]
        if plan.flip:
            mirrored = torch.rand(len(batch)) < 0.5
            batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(net(batch), labels[chosen]).backward()
        if plan.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained, plan.clip_norm)
        sgd.step()


def _top1(torch: Any, net: Any, images: Any, labels: Any) -> float:
    net.eval()
    with torch.no_grad():
        guesses = torch.cat([net(part).argmax(-1) for part in images.split(64)])
    return float((guesses == labels).double().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints each run; appends one row for each to `--csv`."""
    options = parse_arguments(__doc__, arguments)
    rows = KeptRows(options.csv, FIELDS, keys=3)
    for method, seed in itertools.product(("linear probe", "fine-tuning"), range(options.seeds)):
        if rows.has(method, IMAGES_PER_CLASS, seed):
            continue
        top1, seconds = with_torch(method, seed)
        print(f"torch, {method}, seed {seed}: {top1:.2%} in {seconds:.0f} s", flush=True)
        version = metadata.version("torch")
        rows.append((method, IMAGES_PER_CLASS, seed, top1, round(seconds, 1), version, cpu_name()))


if __name__ == "__main__":
    main()
