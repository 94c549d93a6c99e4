"""What trained weights are worth where labels are few: EfficientNet-Lite0 on Fashion-MNIST.

    python -m benchmarks.transfer --csv benchmarks/results/transfer_fashion_mnist.csv

With 10, 50 and 100 training images of each class, drawn by three seeds: a linear probe and
fine-tuning, both from ImageNet's weights, and training from scratch, at 96 pixels. From scratch has
more steps, of smaller batches: this network's running statistics (momentum 0.99) have not yet left
their beginning after 250 steps, and it evaluates at chance. All 10,000 test images, once, after
the last step. Each run is `python -m train.main` as its recipes are; a row that the file has is not
run again, so that the benchmark goes on where it was stopped.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from benchmarks.kept_rows import KeptRows, parse_arguments
from benchmarks.machine import cpu_name

FIELDS = ("method", "images_per_class", "seed", "top1", "seconds", "jax", "cpu")
COMMON = ("--arch=efficientnet_lite0", "--dataset=fashion_mnist", "--image_size=96")
METHODS = {
    "linear probe": ("--weights=DEFAULT", "--transfer=linear_probe"),
    "fine-tuning": ("--weights=DEFAULT", "--transfer=finetune", "--batch_size=32"),
    # At the recipe's rate, 0.006 for this batch, it hardly learnt.
    "from scratch": ("--recipe=small", "--batch_size=8", "--learning_rate=0.05"),
}
# By images of a class, for what trains every layer: as much as an hour allows.
EPOCHS = {
    "fine-tuning": {10: 20, 50: 10, 100: 6},
    "from scratch": {10: 60, 50: 15, 100: 8},
}
COUNTS = (10, 50, 100)  # images of a class


def flags_of(method: str, images_per_class: int, seed: int) -> list[str]:
    """Those of `train.main`; a probe has the epochs of its recipe."""
    flags = [*COMMON, *METHODS[method], f"--images_per_class={images_per_class}", f"--seed={seed}"]
    if method in EPOCHS:
        flags.append(f"--epochs={EPOCHS[method][images_per_class]}")
    return flags


def run(method: str, images_per_class: int, seed: int) -> tuple[float, float]:
    """Top-1 on the test images as a share of one, and the seconds of the whole process."""
    flags = flags_of(method, images_per_class, seed)
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "train.main", *flags, f"--workdir={workdir}"]
        started = time.perf_counter()
        subprocess.run([*command, "--eval_every=1000000"], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        lines = Path(workdir, "metrics.jsonl").read_text().splitlines()
    (test,) = (record for record in map(json.loads, lines) if record["split"] == "test")
    assert test["n"] == 10_000
    return test["top1"], seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints each run; appends one row for each to `--csv`."""
    options = parse_arguments(__doc__, arguments)
    rows = KeptRows(options.csv, FIELDS, keys=3)
    for seed, count, method in itertools.product(range(options.seeds), COUNTS, METHODS):
        if rows.has(method, count, seed):
            continue
        top1, seconds = run(method, count, seed)
        print(f"{method}, {count} a class, seed {seed}: {top1:.2%} in {seconds:.0f} s", flush=True)
        rows.append(
            (method, count, seed, top1, round(seconds, 1), metadata.version("jax"), cpu_name())
        )


if __name__ == "__main__":
    main()
