"""`python -m flaxcnn predict`: what is on pictures."""

import argparse
import csv
import json
import sys

from flaxcnn import predict
from flaxcnn.commands import options
from flaxcnn.errors import InputError, PictureError
from flaxcnn.pictures import picture_files


def add(commands: options.Commands) -> None:
    """The command and its flags."""
    parser = commands.add_parser("predict", help="what is on pictures")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, or a folder of them")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--arch", help="network, such as resnet50")
    which.add_argument("--model", metavar="FOLDER", help="model folder of a run: WORKDIR/model")
    parser.add_argument(
        "--weights",
        help="of --arch: IMAGENET1K_V2 and so on, or a .pth or .safetensors file (DEFAULT)",
    )
    parser.add_argument(
        "--top", type=options.positive, default=5, help="classes shown of each picture (5)"
    )
    parser.add_argument(
        "--batch-size", type=options.positive, default=16, help="pictures computed at a time (16)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV")
    parser.set_defaults(run=run)


def run(asked: argparse.Namespace) -> int:
    """Prints the classes of each picture; 1 if some could not be read."""
    if asked.model is not None and asked.weights:
        raise InputError("--weights are those of --arch; a model folder has its own")
    files = picture_files(asked.images)
    if asked.model is not None:
        classifier = predict.classifier_of_run(asked.model)
    else:
        classifier = predict.classifier_with_weights(asked.arch, asked.weights or "DEFAULT")
    bad: list[PictureError] = []
    found = predict.predict(
        classifier,
        files,
        top=asked.top,
        batch_size=min(asked.batch_size, len(files)),
        skipped=bad.append,
    )
    if asked.json:
        records = [
            {"image": str(path), "classes": [guess._asdict() for guess in guesses]}
            for path, guesses in found
        ]
        print(json.dumps(records, indent=1))
    elif asked.csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(["image", "rank", "class_index", "class_name", "probability"])
        for path, guesses in found:
            for rank, guess in enumerate(guesses, start=1):
                writer.writerow([path, rank, *guess])
    else:
        for path, guesses in found:
            print(path)
            for guess in guesses:
                print(f"  {guess.probability:7.2%}  {guess.class_name}")
    for error in bad:
        print(f"python -m flaxcnn: {error}", file=sys.stderr)
    return 1 if bad else 0
