"""Writes the README's tables: `python -m benchmarks.readme_tables README.md`.

Each stands between `<!-- NAME: by benchmarks.readme_tables -->` and `<!-- /NAME -->`.
"""

import argparse
import pathlib

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


def main() -> None:
    """Replaces what stands between the marks of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readme", type=pathlib.Path, help="the file that holds the marks")
    path = parser.parse_args().readme
    text = path.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: by benchmarks.readme_tables -->", f"<!-- /{name} -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            parser.error(f"{path} lacks the lines {begin} and {end}")
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
