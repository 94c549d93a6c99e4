"""`python -m flaxcnn models|predict|convert`: files in, answers out."""

import argparse
import csv
import dataclasses
import json
import math
import os
import pathlib
import sys
from collections.abc import Sequence

from flaxcnn import accounting, convert, model_folder, predict, pretrained, registry
from flaxcnn.errors import InputError, PictureError
from flaxcnn.pictures import picture_files
from flaxcnn.state_dicts import write_state_dict
from flaxcnn.weights import COSTS, get_model_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 2 for wrong input, told in one line."""
    parser = argparse.ArgumentParser(prog="python -m flaxcnn", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="models|predict|convert")
    _add_models(commands)
    _add_predict(commands)
    _add_convert(commands)
    options = parser.parse_args(arguments)
    try:
        code = int(options.run(options))
        sys.stdout.flush()
    except InputError as error:
        print(f"python -m flaxcnn: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        return 1
    return code


# ---------------------------------------------------------------------------------------- models
def _add_models(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("models", help="the networks, what they cost, and their weights")
    parser.add_argument("--family", choices=registry.FAMILIES, help="of one paper only")
    parser.add_argument(
        "--max-params", type=_number, default=math.inf, help="parameters, such as 10M"
    )
    parser.add_argument(
        "--max-gmacs", type=float, default=math.inf, help="thousand million multiply-adds an image"
    )
    parser.add_argument("--sort", choices=("name", "params", "gmacs", "acc@1"), default="name")
    parser.set_defaults(run=_models)


def _models(options: argparse.Namespace) -> int:
    """Multiply-adds count one each, as papers count FLOPs; the accuracy is the best published."""
    rows = []
    for name in registry.list_models():
        if options.family in (None, registry.family_of(name)):
            cost = accounting.cost(name)
            rows.append((name, cost.params, cost.macs / 1e9, cost.image_size, _accuracy(name)))
    rows = [row for row in rows if row[1] <= options.max_params and row[2] <= options.max_gmacs]
    rows.sort(
        key={
            "name": lambda row: row[0],
            "params": lambda row: row[1],
            "gmacs": lambda row: row[2],
            "acc@1": lambda row: -(row[4] or 0),
        }[options.sort]
    )
    if not rows:
        raise InputError("no network costs so little; raise --max-params or --max-gmacs")
    print(f"{'network':<20}{'params':>13}{'GMACs':>9}{'pixels':>8}{'acc@1':>8}")
    for name, params, gmacs, side, accuracy in rows:
        shown = "" if accuracy is None else f"{accuracy:.2f}"
        print(f"{name:<20}{params:>13,}{gmacs:>9.3g}{side:>8}{shown:>8}")
    return 0


def _accuracy(name: str) -> float | None:
    """The best published top-1 accuracy on ImageNet, per cent; None without weights."""
    if name not in COSTS:
        return None
    found = [weights.meta["acc@1"] for weights in get_model_weights(name)]
    return max(value for value in found if not math.isnan(value))


def _number(text: str) -> float:
    """ "10M" -> 10,000,000."""
    scale = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}.get(text[-1:].lower())
    try:
        return float(text[:-1]) * scale if scale else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 10M") from None


# --------------------------------------------------------------------------------------- predict
def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
        "--top", type=_positive, default=5, help="classes shown of each picture (5)"
    )
    parser.add_argument(
        "--batch-size", type=_positive, default=16, help="pictures computed at a time (16)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV")
    parser.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> int:
    if options.model is not None and options.weights:
        raise InputError("--weights are those of --arch; a model folder has its own")
    files = picture_files(options.images)
    if options.model is not None:
        classifier = predict.classifier_of_run(options.model)
    else:
        classifier = predict.classifier_with_weights(options.arch, options.weights or "DEFAULT")
    bad: list[PictureError] = []
    found = predict.predict(
        classifier,
        files,
        top=options.top,
        batch_size=min(options.batch_size, len(files)),
        skipped=bad.append,
    )
    if options.json:
        records = [
            {"image": str(path), "classes": [guess._asdict() for guess in guesses]}
            for path, guesses in found
        ]
        print(json.dumps(records, indent=1))
    elif options.csv:
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return int(text)


# --------------------------------------------------------------------------------------- convert
def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("convert", help="weights from one kind of file to another")
    parser.add_argument("source", metavar="IN", help=".pth or .safetensors file, or model folder")
    parser.add_argument(
        "target",
        metavar="OUT",
        help=".pth or .safetensors: torchvision's names, for PyTorch; no suffix: a model folder",
    )
    parser.add_argument("--arch", help="network; a model folder says itself which")
    told = parser.add_argument_group(
        "of a model folder, where it is not as for the network's default weights"
    )
    told.add_argument("--image-size", type=_positive, help="pixels, of the square it is given")
    told.add_argument("--mean", type=float, nargs="+", help="of each channel, from 0 to 1")
    told.add_argument("--std", type=float, nargs="+", help="of each channel")
    told.add_argument("--classes", metavar="FILE", help="names of the classes, one on each line")
    told.add_argument(
        "--no-transform-input",
        action="store_true",
        help="GoogLeNet's weights were trained from scratch, on images as they are normalised",
    )
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    source, target = pathlib.Path(options.source), pathlib.Path(options.target)
    if target.exists():
        raise InputError(f"{target}: is there already; give another name, or remove it first")
    saved = model_folder.load(source) if model_folder.is_one(source) else None
    arch: str | None = options.arch or (saved.arch if saved else None)
    if arch is None:
        raise InputError("--arch: which network the file is of, such as --arch=resnet50")
    if saved and arch != saved.arch:
        raise InputError(f"{source}: holds {saved.arch}, not {arch}")
    if not target.suffix:
        saved = saved or predict.classifier_with_weights(arch, str(source)).as_folder(arch)
        model_folder.save(target, _described(saved, options))
    elif any((options.image_size, options.mean, options.std, options.classes)):
        raise InputError(f"{target}: holds weights alone; give what is told of them to a folder")
    else:
        # From file to file nothing is left out, GoogLeNet's auxiliary heads neither.
        variables = saved.variables if saved else pretrained.read_variables(arch, source)
        in_channels = len(saved.transform.mean) if saved else None
        state_dict = convert.to_torchvision(arch, variables, in_channels=in_channels)
        write_state_dict(target, state_dict)
    print(f"{target}: {arch}")
    return 0


def _described(
    saved: model_folder.ModelFolder, options: argparse.Namespace
) -> model_folder.ModelFolder:
    """The same weights, with what the command line says of them."""
    names = saved.class_names
    if options.classes:
        try:
            names = pathlib.Path(options.classes).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--classes={options.classes}: {error}") from error
        if len(names) != len(saved.class_names):
            raise InputError(
                f"--classes={options.classes} has {len(names)} names, "
                f"the weights have {len(saved.class_names)} classes"
            )
    told = {
        "crop_size": options.image_size,
        "resize_size": options.image_size,
        "mean": options.mean and tuple(options.mean),
        "std": options.std and tuple(options.std),
    }
    try:
        transform = dataclasses.replace(
            saved.transform, **{k: v for k, v in told.items() if v is not None}
        )
    except ValueError as error:
        raise InputError(f"--image-size, --mean or --std: {error}") from error
    if len(transform.mean) != len(saved.transform.mean):
        raise InputError(
            f"--mean has {len(transform.mean)} values, "
            f"the weights are for {len(saved.transform.mean)} channels"
        )
    arguments = dict(saved.arguments)
    if options.no_transform_input:
        arguments["transform_input"] = False
    return dataclasses.replace(saved, arguments=arguments, class_names=names, transform=transform)


if __name__ == "__main__":
    sys.exit(main())
