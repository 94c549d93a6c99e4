"""`python -m flaxcnn plot`: what networks cost, as pictures."""

import argparse
import pathlib

from flaxcnn.commands import options
from flaxcnn.errors import InputError

SEVERAL = ("vgg16", "googlenet")  # what is drawn of layers and fields unless told otherwise


def add(commands: options.Commands) -> None:
    """The command and its flags."""
    parser = commands.add_parser(
        "plot",
        help="what networks cost, as SVG or PNG",
        description="models: accuracy against multiply-adds and parameters, of all networks with "
        "published weights. layers: memory, parameters and multiply-adds along networks. "
        "receptive-field: how it grows with depth. They need matplotlib.",
    )
    parser.add_argument("what", choices=("models", "layers", "receptive-field"))
    parser.add_argument(
        "--arch",
        nargs="+",
        metavar="NETWORK",
        help=f"of layers and receptive-field: one or several ({' '.join(SEVERAL)})",
    )
    parser.add_argument(
        "--image-size", type=options.size, help="pixels (what each was published for)"
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, help="file: .svg or .png")
    parser.add_argument("--dark", action="store_true", help="for a dark page")
    parser.set_defaults(run=run)


def run(asked: argparse.Namespace) -> int:
    """Draws, and prints the file's name."""
    from flaxcnn import plots  # matplotlib is an extra, and slow to import

    plots.check_path(asked.out)
    if asked.what == "models":
        if asked.arch or asked.image_size:
            raise InputError(
                "plot models draws all networks; --arch and --image-size are of others"
            )
        figure = plots.models(dark=asked.dark)
    else:
        draw = plots.layers if asked.what == "layers" else plots.receptive_fields
        figure = draw(asked.arch or SEVERAL, dark=asked.dark, image_size=asked.image_size)
    plots.save(figure, asked.out)
    print(asked.out)
    return 0
