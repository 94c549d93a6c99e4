"""Images a second that the input pipeline of `train.main` delivers, by data set and threads.

    python -m benchmarks.loader --csv loader.csv

Nothing is trained: batches arrive on the host, shuffled, cropped and flipped as a run would have
them. `photos` are JPEG files of 500x375 pixels, written for the purpose from
scikit-learn's two, in the folders of `--dataset=folder`; `digits` need no decoding. Compare with
the images a second of `benchmarks.throughput`: a network that is slower than this never waits.
"""

import argparse
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.machine import cpu_name
from benchmarks.paired import Contestant, Timing, time_in_turns
from benchmarks.row_files import make_folders, write_csv

PHOTOS_OF_A_CLASS = 128
BATCHES = 64  # of each pipeline; beyond the last, it has read ahead two for each thread
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
    """A pipeline's first batches, as many as `BATCHES`."""
    from train import data
    from train.config import load_dataset, make_plan, parse

    flags = [*FLAGS[dataset], "--arch=resnet18", f"--batch_size={batch_size}"]
    if dataset == "photos":
        flags.append(f"--data_dir={data_dir}")
    config = parse(flags)
    loaded = load_dataset(config)
    plan = make_plan(config, loaded, 1, False)

    def step() -> None:
        # From a pipeline of its own: one that waits for its next turn reads ahead meanwhile.
        batches = data.training_batches(loaded.train, plan, 0, read_threads)
        for _ in itertools.islice(batches, BATCHES):
            pass

    return step, {"versions": f"grain {metadata.version('grain')}"}


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
    parser.add_argument("--batch_size", type=int, default=16, help="images (16)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (9)")
    parser.add_argument("--csv", type=Path, help="file to write the rounds to")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.batch_size, *options.read_threads) < 1:
        parser.error("rounds, batch size and threads are at least 1")
    make_folders(options.csv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if "photos" in options.dataset:
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
                print(line(dataset, options.batch_size, timing), flush=True)
                rows += rows_of(dataset, options.batch_size, timing)
            write_csv(options.csv, rows)


def rows_of(dataset: str, batch_size: int, timing: Timing) -> list[dict[str, Any]]:
    """One row for each round."""
    return [
        {
            "dataset": dataset,
            "read_threads": timing.name,
            "batch_size": batch_size,
            "round": number,
            "images_per_second": round(BATCHES * batch_size / seconds, 1),
            "versions": timing.facts["versions"],
            "cpu": cpu_name(),
        }
        for number, seconds in enumerate(timing.seconds)
    ]


def line(dataset: str, batch_size: int, timing: Timing) -> str:
    """Median images a second, and those of the slowest and the fastest round."""
    images = BATCHES * batch_size
    fastest, slowest = (1e3 * images / ms for ms in timing.range_ms)
    median = 1e3 * images / timing.median_ms
    return (
        f"{dataset}, {timing.name} threads: {median:.0f} images/s ({slowest:.0f} .. {fastest:.0f})"
    )


if __name__ == "__main__":
    main()
