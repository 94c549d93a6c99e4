"""Writes tables: `python -m benchmarks.readme_tables README.md benchmarks/README.md`.

Each stands between `<!-- NAME: by benchmarks.readme_tables -->` and `<!-- /NAME -->`.
"""

import argparse
import pathlib
import re

from benchmarks.tables import comparisons, costs, times, transfer

TABLES = {
    "models": costs.models,
    "load_weights": times.load_weights,
    "transfer": transfer.transfer,
    "frozen_stages": transfer.frozen_stages,
    "costs_compared": costs.costs_compared,
    "memory": costs.memory,
    "versus_torchvision": comparisons.versus_torchvision,
    "versus_epyc": comparisons.versus_epyc,
    "versus_avx2": comparisons.versus_avx2,
    "versus_plain": comparisons.versus_plain,
    "versus_bfloat16_epyc": comparisons.versus_bfloat16_epyc,
    "versus_bfloat16": comparisons.versus_bfloat16,
    "versus_gpu": comparisons.versus_gpu,
    "library_share": times.library_share,
    "throughput": times.throughput,
    "startup": times.startup,
    "loader": times.loader,
}


_TABLE = re.compile(
    r"^(<!-- (\w+): by benchmarks\.readme_tables -->\n).*?^(<!-- /\2 -->)$",
    re.DOTALL | re.MULTILINE,
)


def written(text: str) -> str:
    """The text with its tables anew.

    Raises:
        KeyError: there is no such table.
    """
    return _TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def names(text: str) -> list[str]:
    """Of the tables in it, in order."""
    return [found[2] for found in _TABLE.finditer(text)]


def main() -> None:
    """Replaces what stands between the marks of the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=pathlib.Path, nargs="+", help="what holds the marks")
    for path in parser.parse_args().files:
        text = path.read_text(encoding="utf-8")
        if unknown := set(names(text)) - TABLES.keys():
            parser.error(f"{path} has the marks of {', '.join(sorted(unknown))}: no such table")
        path.write_text(written(text), encoding="utf-8")


if __name__ == "__main__":
    main()
