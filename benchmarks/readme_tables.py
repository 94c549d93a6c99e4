"""Writes tables: `python -m benchmarks.readme_tables README.md benchmarks/README.md`.

Each stands between `<!-- NAME: by benchmarks.readme_tables -->` and `<!-- /NAME -->`.
"""

import argparse
import pathlib
import re
from collections.abc import Callable
from functools import partial

from benchmarks.tables import comparisons, costs, times, transfer

TABLES: dict[str, Callable[[], str]] = {
    "models": costs.models,
    "load_weights": times.load_weights,
    "transfer": transfer.transfer,
    "frozen_stages": transfer.frozen_stages,
    "costs_compared": costs.costs_compared,
    "memory": costs.memory,
    "versus_epyc": partial(comparisons.versus_torchvision, "epyc_17"),
    "versus_xeon": partial(comparisons.versus_torchvision, "xeon_167"),
    "versus_avx2": partial(comparisons.versus_torchvision, "epyc_1"),
    "versus_plain": partial(comparisons.versus_plain, "epyc_1"),
    "versus_plain_xeon": partial(comparisons.versus_plain, "xeon_167"),
    "versus_bfloat16_epyc": partial(comparisons.versus_bfloat16, "epyc_17"),
    "versus_bfloat16_xeon": partial(comparisons.versus_bfloat16, "xeon_167"),
    "versus_gpu": partial(comparisons.versus_gpu, "h100"),
    "library_share": times.library_share,
    "throughput": times.throughput,
    "startup": times.startup,
    "loader": times.loader,
}

_BEGIN = r"<!-- (\w+): by benchmarks\.readme_tables -->"
_TABLE = re.compile(rf"^({_BEGIN}\n).*?^(<!-- /\2 -->)$", re.DOTALL | re.MULTILINE)


def names(text: str) -> list[str]:
    """Of the tables in it, in order.

    Raises:
        ValueError: it has none, or marks that are not those of a table.
    """
    begun = re.findall(_BEGIN, text)
    found = [table[2] for table in _TABLE.finditer(text)]
    if not begun:
        raise ValueError("no marks of a table")
    for name in begun:
        if name not in TABLES:
            raise ValueError(f"no table {name}; there are {', '.join(TABLES)}")
        if name not in found:
            raise ValueError(f"the table {name} lacks the line <!-- /{name} -->")
    return found


def main() -> None:
    """Replaces what stands between the marks of the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=pathlib.Path, nargs="+", help="what holds the marks")
    texts = {path: path.read_text(encoding="utf-8") for path in parser.parse_args().files}
    for path, text in texts.items():
        try:
            names(text)
        except ValueError as error:
            parser.error(f"{path}: {error}")
    for path, text in texts.items():
        anew = _TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)
        path.write_text(anew, encoding="utf-8")


if __name__ == "__main__":
    main()
