"""`python -m flaxcnn stack 5x5 --vs 3x3 3x3`: stacks of convolutions side by side."""

import argparse
from collections.abc import Sequence
from typing import Any

from flaxcnn import tables
from flaxcnn.accounting import stacks
from flaxcnn.commands import options
from flaxcnn.tables import Column

COLUMNS = (
    Column("stack", "stack", to_the_right=False),
    Column("layers", "layers"),
    Column("receptive_field", "field, px", tables.sides),
    Column("params_formula", "parameters"),
    Column("params", "", tables.count),
    Column("macs_formula", "MACs"),
    Column("macs", "M", tables.millions),
    Column("output_formula", "outputs"),
    Column("output_bytes", "MB", tables.millions),
)


def add(commands: options.Commands) -> None:
    """The command and its flags."""
    parser = commands.add_parser(
        "stack",
        help="stacks of convolutions side by side, such as 5x5 --vs 3x3 3x3",
        description="What stacks of convolutions see and cost, C channels in and out of each on a "
        "map of HxW, in symbols and in numbers: without biases, padded so that stride 1 keeps the "
        "map's size, float32. One multiply-add is one MAC. A convolution is written 3x3, 3x3/2 "
        "with stride 2, 3x3@2 with dilation 2, 3x3/2@2 with both.",
    )
    parser.add_argument("stack", nargs="+", metavar="CONV", help="the first stack: 5x5")
    parser.add_argument(
        "--vs",
        nargs="+",
        action="append",
        default=[],
        metavar="CONV",
        help="another stack: 3x3 3x3; may be given again",
    )
    parser.add_argument("--channels", type=options.size, default=64, help="C (64)")
    parser.add_argument(
        "--size", type=options.size, default=56, help="H and W, pixels of the map (56)"
    )
    options.add_format(parser)
    parser.set_defaults(run=run)


def run(asked: argparse.Namespace) -> int:
    """Prints a row for each stack."""
    compared = [[stacks.parse(text) for text in stack] for stack in (asked.stack, *asked.vs)]
    rows = [_row(stack, asked.channels, asked.size) for stack in compared]
    if asked.format in ("table", "markdown"):
        print(f"C = {asked.channels} channels, H = W = {asked.size}\n")
    print(tables.FORMATS[asked.format](COLUMNS, rows))
    return 0


def _row(stack: Sequence[stacks.Conv], channels: int, size: int) -> dict[str, Any]:
    cost = stacks.cost(stack, channels, size)
    return cost._asdict() | {
        "stack": stacks.text(stack),
        "params_formula": stacks.symbolic(cost.params_per_c2, "C^2"),
        "macs_formula": stacks.symbolic(cost.macs_per_c2hw, "C^2 HW"),
        "output_formula": stacks.symbolic(cost.outputs_per_hwc, "HWC"),
    }
