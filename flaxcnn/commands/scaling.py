"""`python -m flaxcnn scaling`: EfficientNet's compound scaling, as published and by its formula."""

import argparse
import math
import statistics
from typing import Any

from flaxcnn import efficientnet, registry, tables
from flaxcnn.accounting import summarize
from flaxcnn.commands import options
from flaxcnn.tables import Column
from flaxcnn.weights import best_accuracy

NETWORKS = tuple(f"efficientnet_b{i}" for i in range(8))
COLUMNS = (
    Column("network", "network", to_the_right=False),
    Column("phi", "phi", lambda value: f"{value:.2f}"),
    Column("by_formula", "by formula"),
    Column("depth", "depth", lambda value: f"{value:.1f}"),
    Column("width", "width", lambda value: f"{value:.1f}"),
    Column("resolution", "resolution, px"),
    Column("params", "parameters, M", tables.millions),
    Column("gmacs", "GMACs", tables.significant),
    Column("growth", "MACs / B0's", lambda value: f"{value:.1f}"),
    Column("two_to_phi", "2^phi", lambda value: f"{value:.1f}"),
    Column("acc@1", "acc@1, %", lambda value: f"{value:.2f}"),
)


def add(commands: options.Commands) -> None:
    """The command and its flags."""
    parser = commands.add_parser(
        "scaling",
        help="EfficientNet's compound scaling, as published and by its formula",
        description="B0 to B7 as published (depth, width, resolution) beside the paper's formula: "
        "depth 1.2^phi, width 1.1^phi, resolution 1.15^phi, so that multiply-adds grow about as "
        "2^phi. 'by formula' says whether depth and width, rounded to 0.1, are those of this phi; "
        "where no phi gives them, phi is the mean of what depth, width and resolution say. MACs "
        "are those of one image of the published resolution; the accuracy is the best published "
        "top-1 on ImageNet, of B2 at 288 px.",
    )
    options.add_format(parser)
    parser.set_defaults(run=run)


def run(asked: argparse.Namespace) -> int:
    """Prints a row for each network."""
    rows = [_row(name) for name in NETWORKS]
    for row in rows:
        row["growth"] = row["gmacs"] / rows[0]["gmacs"]
    print(tables.FORMATS[asked.format](COLUMNS, rows))
    return 0


def _row(name: str) -> dict[str, Any]:
    model: Any = registry.create_model(name)
    resolution = model.published_image_size
    published = (model.depth, model.width, resolution)
    phi = formula_phi(*published)
    by_formula = phi is not None
    if phi is None:
        phi = statistics.mean(each_phi(*published))
    summary = summarize(name, image_size=resolution)
    return {
        "network": name,
        "phi": phi,
        "by_formula": "yes" if by_formula else "no",
        "depth": model.depth,
        "width": model.width,
        "resolution": resolution,
        "params": summary.params,
        "gmacs": summary.macs / 1e9,
        "two_to_phi": 2**phi,
        "acc@1": best_accuracy(name),
    }


def formula_phi(depth: float, width: float, resolution: int) -> float | None:
    """The multiple of 1/4 whose multipliers, rounded to 0.1, are these; None if none is.

    Of several the one that is nearest to what the resolution says.
    """
    found = []
    for phi in (quarters / 4 for quarters in range(40)):
        scaling = efficientnet.compound_scaling(phi)
        if (round(scaling.depth, 1), round(scaling.width, 1)) == (depth, width):
            found.append(phi)
    *_, of_resolution = each_phi(depth, width, resolution)
    return min(found, key=lambda phi: abs(phi - of_resolution), default=None)


def each_phi(depth: float, width: float, resolution: int) -> list[float]:
    """The phi that gives this depth, the one that gives this width, and this resolution."""
    base = efficientnet.compound_scaling(1)
    published = (depth, width, resolution / efficientnet.EfficientNet.published_image_size)
    return [math.log(value, growth) for value, growth in zip(published, base, strict=True)]
