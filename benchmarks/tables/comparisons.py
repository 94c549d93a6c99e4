"""Tables of steps timed in turns with torchvision's: on three processors, and on a GPU."""

from statistics import median
from typing import NamedTuple

import flaxcnn
from benchmarks.tables import results
from benchmarks.workloads import TRAINING_FACTOR


class Compared(NamedTuple):
    """Where a time of ours beside torch's belongs."""

    arch: str
    mode: str
    image_size: str
    batch_size: str
    precision: str


def versus_torchvision(device: str) -> str:
    """How many times as long as the fastest torch: one row per network, one column per work."""
    compared = _compared(device)
    cases = {case: times for case, times in compared.items() if case.precision == "float32"}
    columns = sorted({_work(case) for case in cases}, key=_order_of_work)
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for arch in dict.fromkeys(case.arch for case in cases):
        cells = {_work(case): _cell(times) for case, times in cases.items() if case.arch == arch}
        lines.append(f"| {arch} | {' | '.join(cells.get(work, '') for work in columns)} |")
    return "\n".join(lines)


def versus_plain(device: str) -> str:
    """The cases in which linen as everybody writes it took part: medians of the step."""
    lines = ["| | flaxcnn, ms | plain linen, ms | fastest torch, ms |", "|---|---:|---:|---|"]
    for case, times in _compared(device).items():
        if "flaxcnn, plain" in times:
            torch = _fastest_torch(times)
            ours, plain, theirs = (
                f"{median(times[name]):.0f}" for name in ("flaxcnn", "flaxcnn, plain", torch)
            )
            layout = torch.removeprefix("torch, ")
            lines.append(f"| {case.arch}, {_work(case)} | {ours} | {plain} | {theirs} ({layout}) |")
    return "\n".join(lines)


def versus_bfloat16(device: str) -> str:
    """The cases in bfloat16 whose float32 was measured too, and what that takes."""
    lines = [
        "| in bfloat16 | flaxcnn, ms | fastest torch, ms | ratio | flaxcnn in float32, ms |",
        "|---|---:|---:|---:|---:|",
    ]
    cases = _compared(device)
    for case, times in cases.items():
        single = cases.get(case._replace(precision="float32"))
        if case.precision == "bfloat16" and single:
            theirs = times[_fastest_torch(times)]
            cells = [
                median(times["flaxcnn"]),
                median(theirs),
                median(single["flaxcnn"]),
            ]
            ours, torch, ours_single = (f"{cell:.0f}" for cell in cells)
            work = _work(case).removesuffix(", bfloat16")
            ratio = f"{results.ratio(times['flaxcnn'], theirs):.2f}"
            lines.append(f"| {case.arch}, {work} | {ours} | {torch} | {ratio} | {ours_single} |")
    return "\n".join(lines)


def versus_gpu(device: str) -> str:
    """By network and work: medians, the ratio to the fastest torch, what share of the device."""
    lines = [
        "| | flaxcnn, ms | images a second | torch, ms | torch.compile, ms | ratio | utilisation |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case, times in _compared(device).items():
        ours, product = times["flaxcnn"], times["matrix product"]
        eager, compiled = (times[f"torch, channels_last{how}"] for how in ("", ", compiled"))
        medians = [f"{median(of):.1f}" for of in (ours, eager, compiled)]
        images = f"{1000 * int(case.batch_size) / median(ours):,.0f}"
        ratio = f"{results.ratio(ours, times[_fastest_torch(times)]):.2f}"
        share = _flops(case) / _product_flops(device) * results.ratio(product, ours)
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
    (flops,) = {row["flops"] for row in results.rows(_results_of(device)) if row["flops"]}
    return float(flops)


def _results_of(device: str) -> str:
    return f"versus_torchvision_{device}_*.csv"


def _compared(device: str) -> dict[Compared, dict[str, list[float]]]:
    """Milliseconds of a step by case and contestant, a number for each round."""
    cases: dict[Compared, dict[str, list[float]]] = {}
    for row in results.rows(_results_of(device)):
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
    ratio = results.ratio(times["flaxcnn"], times[_fastest_torch(times)])
    return f"{ratio:.2f} ({median(times['flaxcnn']):.0f} ms)"


def _fastest_torch(times: dict[str, list[float]]) -> str:
    return min((name for name in times if name.startswith("torch")), key=lambda n: median(times[n]))
