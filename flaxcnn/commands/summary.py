"""`python -m flaxcnn summary`: what every layer of a network costs."""

import argparse
import json

from flaxcnn import tables
from flaxcnn.accounting import summarize
from flaxcnn.accounting.summary import STAGE_COLUMNS, markdown, stage_rows, stage_table
from flaxcnn.commands import options


def add(commands: options.Commands) -> None:
    """The command and its flags."""
    parser = commands.add_parser(
        "summary",
        help="what every layer of a network costs",
        description="Parameters, multiply-adds (one is one MAC, what papers call a FLOP), memory "
        "and receptive field of each layer, each stage and the whole network. A layer's field is "
        "the pixels that one unit of it can see, its jump the pixels from one unit's field to the "
        "next one's, its offset the pixels by which the first field begins before the image. "
        "Elementwise functions are part of the layer they follow.",
    )
    parser.add_argument("arch", help="network, such as vgg16")
    parser.add_argument(
        "--image-size", type=options.size, help="pixels (what it was published for)"
    )
    parser.add_argument("--batch-size", type=options.size, default=1, help="images (1)")
    parser.add_argument("--in-channels", type=options.size, help="of the images (3; of LeNet 1)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the computation (float32)",
    )
    parser.add_argument("--stages", action="store_true", help="stages and totals alone")
    options.add_format(parser)
    parser.set_defaults(run=run)


def run(asked: argparse.Namespace) -> int:
    """Prints the summary."""
    summary = summarize(
        asked.arch,
        image_size=asked.image_size,
        batch_size=asked.batch_size,
        in_channels=asked.in_channels,
        dtype=asked.dtype,
    )
    if asked.format == "json":
        found = summary.to_dict()
        if asked.stages:
            found = {key: value for key, value in found.items() if key not in ("layers", "apart")}
        print(json.dumps(found, indent=1))
    elif asked.format == "csv":
        rows = stage_rows(summary.stages)
        stages = tables.csv_lines(STAGE_COLUMNS, rows)
        print(stages if asked.stages else summary.to_csv())
    elif asked.format == "markdown":
        print(markdown(summary, stages_alone=asked.stages))
    else:
        print(stage_table(summary) if asked.stages else summary)
    return 0
