"""Writes the README's tables: `python -m benchmarks.readme_tables README.md`.

Each stands between `<!-- NAME: by benchmarks.readme_tables -->` and `<!-- /NAME -->`.
"""

import argparse
import collections
import csv
import inspect
import pathlib
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

import flaxcnn
from benchmarks.workloads import TRAINING_FACTOR
from flaxcnn.registry import FAMILIES
from flaxcnn.tables import millions, significant
from flaxcnn.weights import best_accuracy

RESULTS = pathlib.Path(__file__).parent / "results"


# ---------------------------------------------------------------------------------------- models
def models() -> str:
    """One row per paper: its networks with their millions of parameters, their least image."""
    rows = ["| paper | networks (million parameters) | least image |", "|---|---|---|"]
    for module in FAMILIES.values():
        title = (inspect.getdoc(module) or "").splitlines()[0].rstrip(".")
        networks = ", ".join(
            f"`{name}` ({_parameters(name) / 1e6:.3g})" for name in module.VARIANTS
        )
        sizes = sorted({flaxcnn.create_model(name).min_size for name in module.VARIANTS})
        least = " or ".join(f"{size}x{size}" for size in sizes)
        rows.append(f"| {title} | {networks} | {least} |")
    return "\n".join(rows)


def _parameters(name: str) -> int:
    """Parameters for the classes that the network was published for; LeNet's of grey images."""
    model = flaxcnn.create_model(name)
    side, channels = max(32, model.min_size), 1 if name in FAMILIES["lenet"].VARIANTS else 3
    images = jnp.zeros((1, side, side, channels))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


# ------------------------------------------------------------------------------ beside torchvision
class Compared(NamedTuple):
    """Where a time of ours beside torch's belongs."""

    arch: str
    mode: str
    image_size: str
    batch_size: str
    precision: str


def versus_torchvision(device: str = "cpu") -> str:
    """How many times as long as the fastest torch: one row per network, one column per work."""
    compared = _compared(device)
    cases = {case: times for case, times in compared.items() if case.precision == "float32"}
    columns = sorted({_work(case) for case in cases}, key=_order_of_work)
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for arch in dict.fromkeys(case.arch for case in cases):
        cells = {_work(case): _cell(times) for case, times in cases.items() if case.arch == arch}
        lines.append(f"| {arch} | {' | '.join(cells.get(work, '') for work in columns)} |")
    return "\n".join(lines)


def versus_epyc() -> str:
    """As `versus_torchvision`, on another processor."""
    return versus_torchvision("epyc")


def versus_plain() -> str:
    """The cases in which linen as everybody writes it took part: medians of the step."""
    lines = ["| | flaxcnn, ms | plain linen, ms | fastest torch, ms |", "|---|---:|---:|---|"]
    for case, times in _compared().items():
        if "flaxcnn, plain" in times:
            torch = _fastest_torch(times)
            ours, plain, theirs = (
                f"{_median(times[name]):.0f}" for name in ("flaxcnn", "flaxcnn, plain", torch)
            )
            layout = torch.removeprefix("torch, ")
            lines.append(f"| {case.arch}, {_work(case)} | {ours} | {plain} | {theirs} ({layout}) |")
    return "\n".join(lines)


def versus_bfloat16() -> str:
    """The cases in bfloat16 whose float32 was measured too, and what that takes."""
    lines = [
        "| in bfloat16 | flaxcnn, ms | fastest torch, ms | ratio | flaxcnn in float32, ms |",
        "|---|---:|---:|---:|---:|",
    ]
    cases = _compared()
    for case, times in cases.items():
        single = cases.get(case._replace(precision="float32"))
        if case.precision == "bfloat16" and single:
            theirs = times[_fastest_torch(times)]
            cells = [_median(times["flaxcnn"]), _median(theirs), _median(single["flaxcnn"])]
            ours, torch, ours_single = (f"{cell:.0f}" for cell in cells)
            work = _work(case).removesuffix(", bfloat16")
            ratio = f"{_ratio(times['flaxcnn'], theirs):.2f}"
            lines.append(f"| {case.arch}, {work} | {ours} | {torch} | {ratio} | {ours_single} |")
    return "\n".join(lines)


def versus_gpu() -> str:
    """By network and work: medians, the ratio to the fastest torch, what share of the device."""
    lines = [
        "| | flaxcnn, ms | images a second | torch, ms | torch.compile, ms | ratio | utilisation |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case, times in _compared("h100").items():
        ours, product = times["flaxcnn"], times["matrix product"]
        eager, compiled = (times[f"torch, channels_last{how}"] for how in ("", ", compiled"))
        medians = [f"{_median(of):.1f}" for of in (ours, eager, compiled)]
        images = f"{1000 * int(case.batch_size) / _median(ours):,.0f}"
        ratio = f"{_ratio(ours, times[_fastest_torch(times)]):.2f}"
        share = _flops(case) / _product_flops("h100") * _ratio(product, ours)
        what = f"{case.arch}, {_work(case)}".removesuffix(f", {case.precision}")
        cells = [medians[0], images, *medians[1:], ratio, f"{share:.0%}"]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _flops(case: Compared) -> float:
    """Of a step: a training step counts three times its forward pass, as in `throughput`."""
    model = flaxcnn.create_model(case.arch)
    macs = flaxcnn.summarize(model, image_size=int(case.image_size)).macs
    return 2 * macs * int(case.batch_size) * (TRAINING_FACTOR if case.mode == "train" else 1)


def _product_flops(device: str) -> float:
    """Of what the matrix product does in a step."""
    (flops,) = {row["flops"] for row in _rows(_results_of(device)) if row["flops"]}
    return float(flops)


def _results_of(device: str) -> str:
    return f"versus_torchvision_{device}_*.csv"


def _compared(device: str = "cpu") -> dict[Compared, dict[str, list[float]]]:
    """Milliseconds of a step by case and contestant, a number for each round."""
    cases: dict[Compared, dict[str, list[float]]] = {}
    for row in _rows(_results_of(device)):
        times = cases.setdefault(Compared(*(row[key] for key in Compared._fields)), {})
        times.setdefault(row["contestant"], []).append(float(row["step_ms"]))
    return cases


def _work(case: Compared) -> str:
    how = "" if case.precision == "float32" else f", {case.precision}"
    return f"{case.mode}, {case.image_size} px, batch {case.batch_size}{how}"


def _order_of_work(work: str) -> tuple[str, int, int]:
    mode, size, batch, *_ = work.split(", ")
    return mode, -int(size.split()[0]), int(batch.split()[1])


def _cell(times: dict[str, list[float]]) -> str:
    """The median of the ratios within the rounds, and our own median."""
    ratio = _ratio(times["flaxcnn"], times[_fastest_torch(times)])
    return f"{ratio:.2f} ({_median(times['flaxcnn']):.0f} ms)"


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios within the rounds."""
    return _median([a / b for a, b in zip(ours, theirs, strict=True)])


def _fastest_torch(times: dict[str, list[float]]) -> str:
    return min(
        (name for name in times if name.startswith("torch")), key=lambda n: _median(times[n])
    )


# ------------------------------------------------------------------------------- loading of weights
def load_weights() -> str:
    """One row per format: medians of time and peak memory, and the ratios in pairs to torch."""
    rows = [
        "| file | flaxcnn | torch | ratio of times | ratio of memory | rounds |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("load_weights_*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            every = list(csv.DictReader(file))
        for form in dict.fromkeys(row["format"] for row in every):
            mine = [row for row in every if row["format"] == form]
            cells, pairs = [], {}
            for key in ("seconds", "peak_mb"):
                pairs[key] = [
                    [float(row[key]) for row in mine if row["contestant"] == name]
                    for name in ("flaxcnn", "torch")
                ]
            for seconds, peak in zip(pairs["seconds"], pairs["peak_mb"], strict=True):
                cells.append(f"{_median(seconds):.2f} s, {_median(peak):.0f} MB")
            cells += [f"{_ratio(ours, theirs):.2f}" for ours, theirs in pairs.values()]
            what = f"{mine[0]['arch']}, {form}, {mine[0]['file_mb']} MB"
            rows.append(f"| {what} | {' | '.join(cells)} | {len(pairs['seconds'][0])} |")
    return "\n".join(rows)


# ------------------------------------------------------------------------------ transfer learning
def transfer() -> str:
    """Test accuracy of each way to train, by images of a class: mean and spread of the seeds."""
    accuracies: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for row in _rows("transfer_fashion_mnist.csv"):
        accuracies[row["method"], row["images_per_class"]].append(float(row["top1"]))
    for row in _rows("transfer_torch.csv"):
        key = f"{row['method']}, by torch", row["images_per_class"]
        accuracies[key].append(float(row["top1"]))
    methods = sorted({method for method, _ in accuracies}, key=_ORDER_OF_METHODS.index)
    counts = sorted({count for _, count in accuracies}, key=int)
    rows = [
        f"| | {' | '.join(f'{count} a class' for count in counts)} |",
        f"|---|{'---:|' * len(counts)}",
    ]
    for method in methods:
        cells = [_mean_and_spread(accuracies.get((method, count), [])) for count in counts]
        rows.append(f"| {method} | {' | '.join(cells)} |")
    ahead = [
        100 * statistics.mean(accuracies["fine-tuning", count])
        - 100 * statistics.mean(accuracies["from scratch", count])
        for count in counts
    ]
    cells = [f"{points:.1f} points" for points in ahead]
    rows.append(f"| fine-tuning ahead of from scratch | {' | '.join(cells)} |")
    return "\n".join(rows)


_ORDER_OF_METHODS = (
    ("linear probe", "fine-tuning", "from scratch")
    + ("linear probe, by torch", "fine-tuning, by torch")
)  # fmt: skip


def _mean_and_spread(shares: list[float]) -> str:
    """As "80.1 % (79.5 to 80.6)"; one run has no spread."""
    if not shares:
        return ""
    if len(shares) == 1:
        return f"{100 * shares[0]:.1f} % (one run)"
    mean, least, greatest = (100 * f(shares) for f in (statistics.mean, min, max))
    return f"{mean:.1f} % ({least:.1f} to {greatest:.1f})"


def frozen_stages() -> str:
    """What a step takes with all stages trained and with the last ones alone."""
    every = list(_rows("frozen_stages_*.csv"))
    times: dict[str, list[float]] = collections.defaultdict(list)
    facts = {row["transfer"]: row for row in every}
    for row in every:
        times[row["transfer"]].append(float(row["step_ms"]))
    rows = [
        f"| {every[0]['arch']}, {every[0]['image_size']} px, batch {every[0]['batch_size']} "
        "| step, ms | ratio | memory, MB | ratio | trained parameters |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    base = next(iter(times))
    for how, of in times.items():
        ratio = _median([a / b for a, b in zip(of, times[base], strict=True)])
        planned, most = (int(facts[name]["planned_bytes"]) for name in (how, base))
        rows.append(
            f"| `--transfer={how}` | {_median(of):.0f} | {ratio:.2f} | {planned / 1e6:.0f} "
            f"| {planned / most:.2f} | {int(facts[how]['trained']):,} |"
        )
    return "\n".join(rows)


# ------------------------------------------------------------------------------ what networks cost
def costs_compared() -> str:
    """VGG-16 and GoogLeNet side by side, one image of 224x224 in float32."""
    names = ("vgg16", "googlenet")
    summaries = [flaxcnn.summarize(name) for name in names]
    dense = [[layer for layer in s.layers if layer.kind == "dense"] for s in summaries]
    facts = {
        "parameters": [f"{s.params:,}" for s in summaries],
        "of these in dense layers": [f"{sum(la.params for la in ls):,}" for ls in dense],
        "GMACs (one multiply-add is one)": [significant(s.macs / 1e9) for s in summaries],
        "outputs of all layers, MB": [millions(s.activation_bytes) for s in summaries],
        "of these of the first two stages": [
            millions(sum(stage.activation_bytes for stage in s.stages[:2])) for s in summaries
        ],
        "memory to predict, MB": [millions(s.forward_bytes) for s in summaries],
        "memory to train, MB": [millions(s.training_bytes) for s in summaries],
        "field of the last map, pixels": [str(s.stages[-2].receptive_field) for s in summaries],
        "depth": [str(s.layers[-1].depth) for s in summaries],
        "best published top-1, %": [f"{best_accuracy(name):.2f}" for name in names],
    }
    rows = [f"| | {' | '.join(f'`{name}`' for name in names)} |", "|---|---:|---:|"]
    rows += [f"| {fact} | {' | '.join(values)} |" for fact, values in facts.items()]
    return "\n".join(rows)


def memory() -> str:
    """XLA's plan by what is counted, with flaxcnn's path for the CPU and without."""
    plans = {}
    for kind in ("cpu", "cpu_plain"):
        plans[kind] = {row["network"]: row for row in _rows(f"memory_{kind}.csv")}
    rows = [
        "| network, batch 8 | to train, counted | XLA plans | XLA plans, plain convolutions |",
        "|---|---:|---:|---:|",
    ]
    for name, row in plans["cpu"].items():
        counted = int(row["training_bytes"])
        planned = [int(plans[kind][name]["training_planned_bytes"]) for kind in plans]
        shown = [f"{millions(n)} MB, {n / counted:.2f}" for n in planned]
        rows.append(f"| {name} | {millions(counted)} MB | {' | '.join(shown)} |")
    return "\n".join(rows)


# --------------------------------------------------------------------------- before the first step
def startup() -> str:
    """Whole processes: medians and ranges, and of the imports the ratio within the rounds."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for row in _rows("startup.csv"):
        times[row["what"]].append(float(row["seconds"]))
    rows = ["| | seconds | of | ratio |", "|---|---:|---:|---:|"]
    for what, seconds in times.items():
        pair = _PAIRS_OF_STARTS.get(what.rpartition(", ")[2])
        base = times[what.replace(*pair)] if pair else seconds
        ratio = _median([a / b for a, b in zip(seconds, base, strict=True)])
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        name = f"`{what}`" if what.startswith("import") else what
        rows.append(
            f"| {name} | {_median(seconds):.2f} ({spread}) | {len(seconds)} "
            f"| {f'{ratio:.2f}' if pair else ''} |"
        )
    return "\n".join(rows)


# The last word of what began -> the text that, replaced by the other, gives what to compare with.
_PAIRS_OF_STARTS = {"import flaxcnn": ("flaxcnn", "flax.linen"), "cached": ("cached", "cold")}


def loader() -> str:
    """Images a second by threads: medians and ranges."""
    rates: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for row in _rows("loader.csv"):
        rates[row["dataset"], row["read_threads"]].append(float(row["images_per_second"]))
    threads = sorted({count for _, count in rates}, key=int)
    rows = [
        f"| | {' | '.join(f'{n} threads' for n in threads)} |",
        f"|---|{'---:|' * len(threads)}",
    ]
    for dataset in dict.fromkeys(name for name, _ in rates):
        found = [rates[dataset, count] for count in threads]
        cells = [f"{_median(r):,.0f} ({min(r):,.0f} to {max(r):,.0f})" for r in found]
        rows.append(f"| {dataset} | {' | '.join(cells)} |")
    return "\n".join(rows)


# --------------------------------------------------------------------------------- oneDNN's share
def library_share() -> str:
    """One row per network: milliseconds of a training step, and of the library in it."""
    steps: dict[str, list[dict[str, str]]] = {}
    for row in _rows("library_share_*.csv"):
        what = f"{row['arch']}, {row['image_size']} px, batch {row['batch_size']}"
        steps.setdefault(what, []).append(row)
    columns = ("step_ms", "computing_ms", "reordering_ms")
    lines = [
        "| train | step, ms | oneDNN computes | and reorders kernels |",
        "|---|---:|---:|---:|",
    ]
    for what, rows in steps.items():
        cells = [f"{_median([float(row[name]) for row in rows]):.0f}" for name in columns]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ throughput
def throughput() -> str:
    """One row per network: images a second and utilisation, by work, batch and type."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in _rows("throughput_*.csv"):
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


# --------------------------------------------------------------------------------- what they share
def _rows(pattern: str) -> Iterator[dict[str, str]]:
    """Of all files of results with such names, one after the other.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = sorted(RESULTS.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no {pattern} in {RESULTS}")
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


def _median(values: list[float]) -> float:
    return statistics.median(values)


TABLES = {
    "models": models,
    "load_weights": load_weights,
    "transfer": transfer,
    "frozen_stages": frozen_stages,
    "costs_compared": costs_compared,
    "memory": memory,
    "versus_torchvision": versus_torchvision,
    "versus_epyc": versus_epyc,
    "versus_plain": versus_plain,
    "versus_bfloat16": versus_bfloat16,
    "versus_gpu": versus_gpu,
    "library_share": library_share,
    "throughput": throughput,
    "startup": startup,
    "loader": loader,
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
