"""The accuracy of weights on a data set, every image once: `python -m train.evaluate`."""

import argparse
import re
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

from flaxcnn import predict
from flaxcnn.errors import InputError
from flaxcnn.inference import optimize_for_inference
from flaxcnn.predict import Classifier
from train import compiled, data, datasets, folders, steps
from train.datasets import Source
from train.errors import UsageError

_WORDNET = re.compile(r"n\d{8}")


def main(options: argparse.Namespace) -> int:
    """Prints top-1 and top-5; returns the exit code."""
    # ------------------------------------------------------------------------- weights, data
    compiled.keep_programs()
    steps.multiply_in("float32")
    if options.model is not None:
        classifier = predict.classifier_of_run(options.model)
    else:
        classifier = predict.classifier_with_weights(options.arch, options.weights or "DEFAULT")
    source, class_names = _images(options)
    _check_classes(classifier, class_names, named=options.model is not None)
    devices = jax.local_device_count()
    batch_size = -(options.batch_size // -devices) * devices
    transform = classifier.transform
    print(
        f"{len(source):,} images of {len(class_names)} classes: shorter side "
        f"{transform.resize_size}, middle {transform.crop_size}x{transform.crop_size}, "
        f"{transform.interpolation}"
    )

    # ---------------------------------------------------------------------------- evaluation
    sides, channels = 2 * (transform.crop_size,), len(transform.mean)
    like = jax.ShapeDtypeStruct((batch_size // devices, *sides, channels), np.float32)
    model, prepared = optimize_for_inference(classifier.model, classifier.variables, like)
    eval_step = steps.evaluate_over_devices(
        steps.make_eval_step(model, (transform.mean, transform.std))
    )
    batches = data.evaluation_batches(source, transform.view, batch_size, options.read_threads)
    count = -(len(source) // -batch_size)
    shown = tqdm(batches, total=count, unit="batch", disable=not sys.stderr.isatty())
    started = time.perf_counter()
    found = steps.evaluate(
        eval_step, jax.device_put(prepared, steps.replicated()), steps.on_devices(shown)
    )
    assert found is not None  # as nobody told it to stop
    seconds = time.perf_counter() - started
    print(
        f"top-1 {found['top1']:.3%}  top-5 {found['top5']:.3%}  on {found['n']} images  "
        f"({found['n'] / seconds:.0f} images/s, compilation included)"
    )
    return 0


def _images(options: argparse.Namespace) -> tuple[Source, Sequence[str]]:
    if options.dataset == "folder":
        if options.data_dir is None:
            raise UsageError("--dataset=folder needs --data_dir, which holds val/CLASS/*.jpg")
        # As pictures are read that accuracies are published of; a run's own as it read them.
        as_stored = options.model is None
        return folders.read_split(options.data_dir, options.split or "val", as_stored)
    return datasets.load_test(options.dataset, options.data_dir, options.split)


def _check_classes(classifier: Classifier, class_names: Sequence[str], named: bool) -> None:
    """Their number, and of a model folder their names, unless either side has none.

    ImageNet's folders are called after WordNet, and `convert` numbers what has no names.
    """
    ours = classifier.model.num_classes
    if ours != len(class_names):
        raise UsageError(
            f"the weights know {ours} classes, and the data set has {len(class_names)}"
        )
    for i, (know, have) in enumerate(zip(classifier.class_names, class_names, strict=True)):
        if named and know != have and not know.isdecimal() and not _WORDNET.fullmatch(have):
            raise UsageError(f"class {i} is {know!r} to the network, and {have!r} in the data set")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--arch", help="network, such as resnet50")
    which.add_argument("--model", metavar="FOLDER", help="model folder of a run: WORKDIR/model")
    parser.add_argument(
        "--weights", help="of --arch: IMAGENET1K_V2 and so on, or a .pth or .safetensors file"
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help="digits, fashion_mnist, folder (DATA_DIR/val/CLASS/*.jpg), or a TFDS name",
    )
    parser.add_argument("--data_dir", help="where the data set lies")
    parser.add_argument("--split", help="folder: val; TFDS: test, or validation")
    parser.add_argument("--batch_size", type=int, default=64, help="images, over all devices (64)")
    parser.add_argument("--read_threads", type=int, default=4, help="threads that read images (4)")
    options = parser.parse_args(arguments)
    if options.model is not None and options.weights:
        parser.error("--weights are those of --arch; a model folder has its own")
    for flag in ("batch_size", "read_threads"):
        if getattr(options, flag) < 1:
            parser.error(f"--{flag} must be at least 1")
    return options


def command(arguments: Sequence[str] | None = None) -> int:
    """What is wrong with the command line is told in one line."""
    try:
        return main(parse(arguments))
    except (InputError, UsageError) as error:
        print(f"python -m train.evaluate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(command())
