"""`python -m flaxcnn convert`: weights from one kind of file to another."""

import argparse
import dataclasses
import pathlib

from flaxcnn import convert, model_folder, predict, pretrained
from flaxcnn.commands import options
from flaxcnn.errors import InputError
from flaxcnn.state_dicts import write_state_dict


def add(commands: options.Commands) -> None:
    """The command and its flags."""
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
    told.add_argument(
        "--image-size", type=options.positive, help="pixels, of the square it is given"
    )
    told.add_argument("--mean", type=float, nargs="+", help="of each channel, from 0 to 1")
    told.add_argument("--std", type=float, nargs="+", help="of each channel")
    told.add_argument("--classes", metavar="FILE", help="names of the classes, one on each line")
    told.add_argument(
        "--no-transform-input",
        action="store_true",
        help="GoogLeNet's weights were trained from scratch, on images as they are normalised",
    )
    parser.set_defaults(run=run)


def run(asked: argparse.Namespace) -> int:
    """Writes OUT, and prints its name."""
    source, target = pathlib.Path(asked.source), pathlib.Path(asked.target)
    if target.exists():
        raise InputError(f"{target}: is there already; give another name, or remove it first")
    saved = model_folder.load(source) if model_folder.is_one(source) else None
    arch: str | None = asked.arch or (saved.arch if saved else None)
    if arch is None:
        raise InputError("--arch: which network the file is of, such as --arch=resnet50")
    if saved and arch != saved.arch:
        raise InputError(f"{source}: holds {saved.arch}, not {arch}")
    if not target.suffix:
        saved = saved or predict.classifier_with_weights(arch, str(source)).as_folder(arch)
        model_folder.save(target, _described(saved, asked))
    elif any((asked.image_size, asked.mean, asked.std, asked.classes)):
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
    saved: model_folder.ModelFolder, asked: argparse.Namespace
) -> model_folder.ModelFolder:
    """The same weights, with what the command line says of them."""
    names = saved.class_names
    if asked.classes:
        try:
            names = pathlib.Path(asked.classes).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--classes={asked.classes}: {error}") from error
        if len(names) != len(saved.class_names):
            raise InputError(
                f"--classes={asked.classes} has {len(names)} names, "
                f"the weights have {len(saved.class_names)} classes"
            )
    told = {
        "crop_size": asked.image_size,
        "resize_size": asked.image_size,
        "mean": asked.mean and tuple(asked.mean),
        "std": asked.std and tuple(asked.std),
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
    if asked.no_transform_input:
        arguments["transform_input"] = False
    return dataclasses.replace(saved, arguments=arguments, class_names=names, transform=transform)
