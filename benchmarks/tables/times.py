"""Tables of other times: of steps and their parts, of starts, of reading images and weights."""

import collections
from statistics import median

from benchmarks.tables import results


def library_share() -> str:
    """One row per network: milliseconds of a training step, and of the library in it."""
    steps: dict[str, list[dict[str, str]]] = {}
    for row in results.rows("library_share_*.csv"):
        what = f"{row['arch']}, {row['image_size']} px, batch {row['batch_size']}"
        steps.setdefault(what, []).append(row)
    columns = ("step_ms", "computing_ms", "reordering_ms")
    lines = [
        "| train | step, ms | oneDNN computes | and reorders kernels |",
        "|---|---:|---:|---:|",
    ]
    for what, rows in steps.items():
        cells = [f"{median([float(row[name]) for row in rows]):.0f}" for name in columns]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def throughput() -> str:
    """One row per network: images a second and utilisation, by work, batch and type."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in results.rows("throughput_*.csv"):
        work = f"{row['mode']}, batch {row['batch_size']}, {row['precision']}"
        found.setdefault(f"{row['arch']}, {row['image_size']} px", {})[work] = row
    works = list(dict.fromkeys(work for rows in found.values() for work in rows))
    lines = [f"| images a second | {' | '.join(works)} |", f"|---|{'---:|' * len(works)}"]
    for network, rows in found.items():
        cells = [
            f"{float(rows[work]['images_per_second']):.3g} ({float(rows[work]['utilisation']):.0%})"
            if work in rows
            else ""
            for work in works
        ]
        lines.append(f"| {network} | {' | '.join(cells)} |")
    return "\n".join(lines)


def startup() -> str:
    """Whole processes: medians and ranges, and of the imports the ratio within the rounds."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for row in results.rows("startup_*.csv"):
        times[row["what"]].append(float(row["seconds"]))
    rows = ["| | seconds | of | ratio |", "|---|---:|---:|---:|"]
    for what, seconds in times.items():
        pair = _PAIRS_OF_STARTS.get(what.rpartition(", ")[2])
        base = times[what.replace(*pair)] if pair else seconds
        ratio = results.ratio(seconds, base)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        name = f"`{what}`" if what.startswith("import") else what
        rows.append(
            f"| {name} | {median(seconds):.2f} ({spread}) | {len(seconds)} "
            f"| {f'{ratio:.2f}' if pair else ''} |"
        )
    return "\n".join(rows)


# The last word of what began -> the text that, replaced by the other, gives what to compare with.
_PAIRS_OF_STARTS = {
    "import flaxcnn": ("flaxcnn", "flax.linen"),
    "cached": ("cached", "cold"),
    "tracing a step": ("a step", "a step, plain linen"),
}


def loader() -> str:
    """Images a second by threads: medians and ranges."""
    rates: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for row in results.rows("loader_*.csv"):
        rates[row["dataset"], row["read_threads"]].append(float(row["images_per_second"]))
    threads = sorted({count for _, count in rates}, key=int)
    rows = [
        f"| | {' | '.join(f'{n} threads' for n in threads)} |",
        f"|---|{'---:|' * len(threads)}",
    ]
    for dataset in dict.fromkeys(name for name, _ in rates):
        found = [rates[dataset, count] for count in threads]
        cells = [f"{median(r):,.0f} ({min(r):,.0f} to {max(r):,.0f})" for r in found]
        rows.append(f"| {dataset} | {' | '.join(cells)} |")
    return "\n".join(rows)


def load_weights() -> str:
    """One row per format: medians of time and peak memory, and the ratios in pairs to torch."""
    rows = [
        "| file | flaxcnn | torch | ratio of times | ratio of memory | rounds |",
        "|---|---|---|---|---|---|",
    ]
    files: dict[str, list[dict[str, str]]] = {}
    for row in results.rows("load_weights_*.csv"):
        what = f"{row['arch']}, {row['format']}, {row['file_mb']} MB"
        files.setdefault(what, []).append(row)
    for what, measured in files.items():
        pairs = [
            [
                [float(row[key]) for row in measured if row["contestant"] == name]
                for name in ("flaxcnn", "torch")
            ]
            for key in ("seconds", "peak_mb")
        ]
        cells = [
            f"{median(seconds):.2f} s, {median(peak):.0f} MB"
            for seconds, peak in zip(*pairs, strict=True)
        ]
        cells += [f"{results.ratio(ours, theirs):.2f}" for ours, theirs in pairs]
        rows.append(f"| {what} | {' | '.join(cells)} | {len(pairs[0][0])} |")
    return "\n".join(rows)
