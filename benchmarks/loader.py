"""Images a second that the input pipeline of `train.main` delivers, by data set and threads.

    python -m benchmarks.loader --csv benchmarks/results/loader.csv

Nothing is trained: each step is the next batch on the host, shuffled, cropped and flipped as the
run would have it. `photos` are JPEG files of 500x375 pixels, written for the purpose from
scikit-learn's two, in the folders of `--dataset=folder`; `digits` need no decoding. Compare with
the images a second of `benchmarks.throughput`: a network that is slower than this never waits.
"""

import argparse
import csv
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.machine import cpu_name
from benchmarks.paired import Contestant, Timing, time_in_turns

PHOTOS_OF_A_CLASS = 128
FLAGS: Mapping[str, Sequence[str]] = {
    "digits": ("--dataset=digits", "--image_size=32"),
    "photos": (
        *("--dataset=folder", "--holdout=0.1", "--image_size=224"),
        *("--augmentation=resized_crop", "--flip=True"),
    ),
}


def write_photos(folder: Path) -> None:
    """Two classes of pieces of scikit-learn's photos, as JPEG of quality 90."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for name, photo in zip(("palace", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        height, width, _ = photo.shape
        for i in range(PHOTOS_OF_A_CLASS):
            y, x = rng.integers(0, height - 375), rng.integers(0, width - 500)
            piece = Image.fromarray(photo[y : y + 375, x : x + 500])
            piece.save(folder / name / f"{i}.jpg", quality=90)


def batches(
    dataset: str, data_dir: str, batch_size: int, read_threads: int
) -> tuple[Any, Mapping[str, str]]:
    """The next training batch, again and again."""
    from train import data
    from train.config import load_dataset, make_plan, parse

    flags = [*FLAGS[dataset], "--arch=resnet18", f"--batch_size={batch_size}"]
    if dataset == "photos":
        flags.append(f"--data_dir={data_dir}")
    config = parse(flags)
    loaded = load_dataset(config)
    plan = make_plan(config, loaded, 1, False)
    images = data.training_batches(loaded.train, plan, 0, read_threads)
    return lambda: next(images), {"versions": f"grain {metadata.version('grain')}"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints medians and ranges; writes one row for each round to `--csv`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", nargs="+", choices=list(FLAGS), default=list(FLAGS), help="(digits photos)"
    )
    parser.add_argument(
        "--read_threads", nargs="+", type=int, default=[1, 2, 4, 8], help="(1 2 4 8)"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images (64)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (9)")
    parser.add_argument("--csv", type=Path, help="file to write the rounds to")
    options = parser.parse_args(arguments)
    rows: list[Sequence[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder))
        for dataset in options.dataset:
            timings = time_in_turns(
                [
                    Contestant(
                        str(threads),
                        "benchmarks.loader",
                        "batches",
                        {
                            "dataset": dataset,
                            "data_dir": folder,
                            "batch_size": options.batch_size,
                            "read_threads": threads,
                        },
                        {"JAX_PLATFORMS": "cpu"},
                    )
                    for threads in options.read_threads
                ],
                rounds=options.rounds,
            )
            for timing in timings:
                print(line(dataset, options.batch_size, timing))
                rows += [
                    (
                        *(dataset, timing.name, options.batch_size, number),
                        round(options.batch_size / seconds, 1),
                        timing.facts["versions"],
                        cpu_name(),
                    )
                    for number, seconds in enumerate(timing.seconds)
                ]
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            titles = ("dataset", "read_threads", "batch_size", "round", "images_per_second")
            writer.writerow((*titles, "versions", "cpu"))
            writer.writerows(rows)


def line(dataset: str, batch_size: int, timing: Timing) -> str:
    """Median images a second, and those of the slowest and the fastest round."""
    fastest, slowest = (1e3 * batch_size / ms for ms in timing.range_ms)
    median = 1e3 * batch_size / timing.median_ms
    return (
        f"{dataset}, {timing.name} threads: {median:.0f} images/s ({slowest:.0f} .. {fastest:.0f})"
    )


if __name__ == "__main__":
    main()
