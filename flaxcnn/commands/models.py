"""`python -m flaxcnn models`: the networks, what they cost, and which a budget allows."""

import argparse
import math

from flaxcnn import registry, tables
from flaxcnn.accounting import costs
from flaxcnn.commands import options
from flaxcnn.errors import InputError
from flaxcnn.tables import Column
from flaxcnn.weights import best_accuracy

COLUMNS = (
    Column("network", "network", to_the_right=False),
    Column("params", "parameters", tables.count),
    Column("gmacs", "GMACs", tables.significant),
    Column("image_size", "image, px"),
    Column("forward_mb", "to predict, MB", tables.significant),
    Column("training_mb", "to train, MB", tables.significant),
    Column("acc@1", "acc@1, %", lambda value: f"{value:.2f}"),
)


def add(commands: options.Commands) -> None:
    """The command and its flags."""
    parser = commands.add_parser(
        "models",
        help="the networks, what they cost, and which a budget allows",
        description="Each network with what one image costs it, in float32. One multiply-add is "
        "one MAC, what papers call a FLOP. Memory to predict: variables and the activations that "
        "are there at one time; to train: with SGD with momentum. 1 MB is 10^6 bytes. The accuracy "
        "is the best published top-1 on ImageNet.",
    )
    parser.add_argument("--family", choices=registry.FAMILIES, help="of one paper only")
    parser.add_argument(
        "--max-params", type=options.number, default=math.inf, help="parameters, such as 10M"
    )
    parser.add_argument(
        "--max-gmacs",
        type=options.number,
        default=math.inf,
        help="thousand million multiply-adds an image",
    )
    parser.add_argument(
        "--max-memory",
        type=options.bytes_number,
        default=math.inf,
        help="bytes to predict one image, such as 100MB",
    )
    parser.add_argument(
        "--sort",
        choices=("name", "params", "gmacs", "memory", "acc@1"),
        default="name",
        help="acc@1: the best first; all others: the least first (name)",
    )
    options.add_format(parser)
    parser.set_defaults(run=run)


def run(asked: argparse.Namespace) -> int:
    """Prints the networks within the budget."""
    rows = []
    for name in registry.list_models():
        cost = costs.cost(name)
        within = (
            cost.params <= asked.max_params
            and cost.macs <= asked.max_gmacs * 1e9
            and cost.forward_bytes <= asked.max_memory
        )
        if within and asked.family in (None, registry.family_of(name)):
            rows.append(
                {
                    "network": name,
                    "params": cost.params,
                    "gmacs": cost.macs / 1e9,
                    "image_size": cost.image_size,
                    "forward_mb": cost.forward_bytes / 1e6,
                    "training_mb": cost.training_bytes / 1e6,
                    "acc@1": best_accuracy(name),
                }
            )
    if not rows:
        raise InputError(
            "no network costs so little; raise --max-params, --max-gmacs or --max-memory"
        )
    keys = {
        "name": lambda row: row["network"],
        "params": lambda row: row["params"],
        "gmacs": lambda row: row["gmacs"],
        "memory": lambda row: row["forward_mb"],
        "acc@1": lambda row: -(row["acc@1"] or 0),
    }
    rows.sort(key=keys[asked.sort])
    print(tables.FORMATS[asked.format](COLUMNS, rows))
    return 0
