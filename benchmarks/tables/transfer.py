"""Tables of transfer learning: the accuracy of each way, and the time of a step."""

import collections
from statistics import mean, median

from benchmarks.tables import results


def transfer() -> str:
    """Test accuracy of each way to train, by images of a class: mean and spread of the seeds."""
    accuracies: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for row in results.rows("transfer_fashion_mnist.csv"):
        accuracies[row["method"], row["images_per_class"]].append(float(row["top1"]))
    for row in results.rows("transfer_torch.csv"):
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
        100 * mean(accuracies["fine-tuning", count]) - 100 * mean(accuracies["from scratch", count])
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
    average, least, greatest = (100 * f(shares) for f in (mean, min, max))
    return f"{average:.1f} % ({least:.1f} to {greatest:.1f})"


def frozen_stages() -> str:
    """What a step takes with all stages trained and with the last ones alone."""
    every = list(results.rows("frozen_stages_*.csv"))
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
        ratio = results.ratio(of, times[base])
        planned, most = (int(facts[name]["planned_bytes"]) for name in (how, base))
        rows.append(
            f"| `--transfer={how}` | {median(of):.0f} | {ratio:.2f} | {planned / 1e6:.0f} "
            f"| {planned / most:.2f} | {int(facts[how]['trained']):,} |"
        )
    return "\n".join(rows)
