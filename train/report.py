"""What a run has learnt, and where it errs: `python -m train.report WORKDIR` writes one HTML file.

The network is the best so far, WORKDIR/model; the test images are those of the run's own flags,
which it keeps in WORKDIR/config.json.
"""

import argparse
import io
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from flaxcnn import predict
from flaxcnn.errors import InputError
from flaxcnn.pictures import printable
from flaxcnn.predict import Classifier
from train import data, metrics, report_page, steps
from train.config import load_dataset
from train.datasets import Source
from train.errors import UsageError
from train.folders import FolderSource
from train.kept_config import config_of
from train.report_page import Findings, Mistake

_THUMBNAIL = 96  # pixels, of the longer side
_BATCH_SIZE = 64


class Answers(NamedTuple):
    """What the network says of each test image."""

    labels: np.ndarray  # [N]
    guesses: np.ndarray  # [N], the likeliest class
    confidence: np.ndarray  # [N], the probability of the guess


# ----------------------------------------------------------------------------------- what it finds
def findings(workdir: pathlib.Path, worst: int) -> Findings:
    """All that the report says, with the `worst` mistakes as pictures.

    Raises:
        UsageError: for a directory that is no run, or test images that are others now.
        WeightsError: an InputError, for a model folder that cannot be used.
    """
    config = config_of(workdir)
    classifier = predict.classifier_of_run(workdir / "model")
    dataset = load_dataset(config)
    if list(dataset.class_names) != list(classifier.class_names):
        raise UsageError(f"{workdir}: the classes of {config.dataset} are others than the run's")
    records = metrics.read_records(workdir / "metrics.jsonl")
    tested = [record for record in records if record["split"] == "test"]
    if tested and tested[-1]["n"] != len(dataset.test):
        raise UsageError(
            f"{workdir}: {len(dataset.test)} test images; the run had {tested[-1]['n']}"
        )
    answers = answered(classifier, dataset.test, config.read_threads)
    wrong = np.flatnonzero(answers.guesses != answers.labels)
    order = wrong[np.argsort(-answers.confidence[wrong], kind="stable")][:worst]
    return Findings(
        title=f"{config.arch} on {config.dataset}",
        class_names=dataset.class_names,
        records=records,
        confusion=confusion(answers, len(dataset.class_names)),
        mistakes=[_mistake(dataset.test, answers, int(i)) for i in order],
    )


def answered(classifier: Classifier, source: Source, read_threads: int) -> Answers:
    """The network's answers to all images, in order."""
    transform = classifier.transform

    @jax.jit
    def probabilities(variables: Any, images: jax.Array) -> jax.Array:
        seen = steps.normalised(images, (transform.mean, transform.std))
        logits: Any = classifier.model.apply(variables, seen, train=False)
        return jax.nn.softmax(logits)

    labels, found = [], []
    batches = data.all_batches(source, transform.view, _BATCH_SIZE, read_threads)
    count = -(len(source) // -_BATCH_SIZE)
    for batch in tqdm(batches, "test", total=count, disable=not sys.stderr.isatty()):
        kept = batch["mask"]
        found.append(np.asarray(probabilities(classifier.variables, batch["image"]))[kept])
        labels.append(batch["label"][kept])
    rows = np.concatenate(found)
    return Answers(np.concatenate(labels), rows.argmax(-1), rows.max(-1))


def confusion(answers: Answers, classes: int) -> np.ndarray:
    """Counts [true class, guess]."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (answers.labels, answers.guesses), 1)
    return counts


def _mistake(source: Source, answers: Answers, index: int) -> Mistake:
    image = np.asarray(source[index][0])
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    scale = _THUMBNAIL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resample = Image.Resampling.BILINEAR if scale < 1 else Image.Resampling.NEAREST
    file = io.BytesIO()
    picture.resize(size, resample).save(file, "PNG")
    return Mistake(
        name=_name(source, index),
        png=file.getvalue(),
        label=int(answers.labels[index]),
        guess=int(answers.guesses[index]),
        confidence=float(answers.confidence[index]),
    )


def _name(source: Source, index: int) -> str:
    return printable(source.files[index]) if isinstance(source, FolderSource) else f"image {index}"


# -------------------------------------------------------------------------------- the command line
def command(arguments: Sequence[str] | None = None) -> int:
    """Writes the report; what is wrong is told in one line."""
    parser = argparse.ArgumentParser(prog="python -m train.report", description=__doc__)
    parser.add_argument("workdir", help="--workdir of a run of train.main")
    parser.add_argument("--output", help="the file to write (WORKDIR/report.html)")
    parser.add_argument("--worst", type=int, default=24, help="mistakes to show as pictures (24)")
    options = parser.parse_args(arguments)
    workdir = pathlib.Path(options.workdir)
    output = pathlib.Path(options.output or workdir / "report.html")
    try:
        if options.worst < 0:
            raise UsageError("--worst must be at least 0")
        if not output.parent.is_dir():
            raise UsageError(f"--output={output}: no such directory {output.parent}")
        found = findings(workdir, options.worst)
        output.write_text(report_page.page(found), encoding="utf-8")
    except (InputError, UsageError) as error:
        print(f"python -m train.report: {error}", file=sys.stderr)
        return 2
    right, count = int(np.trace(found.confusion)), int(found.confusion.sum())
    print(f"{output}: {right} of {count} test images right, {right / count:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(command())
