"""The report of a run as one HTML file, which needs nothing beside itself."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_MOST_CLASSES = 40  # of a confusion matrix that can still be read
_MOST_PAIRS = 20
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --train: #3a76d8; --test: #d9652b; }
body { font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .5rem; text-align: right; }
th { font-weight: 600; } td.name, th.name { text-align: left; }
tr + tr { border-top: 1px solid var(--line); }
.scroll { overflow-x: auto; } .matrix td { min-width: 2rem; } .matrix .right { font-weight: 600; }
.matrix thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; }
.charts, .sheet { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; }
.sheet figure { width: 8rem; font-size: .8rem; overflow-wrap: anywhere; }
.sheet img { image-rendering: pixelated; display: block; margin-bottom: .2rem; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; } .note { opacity: .75; }
.train { stroke: var(--train); fill: none; } .test { stroke: var(--test); fill: none; }
i.train, i.test { display: inline-block; width: 1.2rem; margin: 0 .3rem .25rem; }
i.train, i.test { border-top: 2px solid; }
i.train { border-color: var(--train); } i.test { border-color: var(--test); }
"""


class Mistake(NamedTuple):
    """A test image that was taken for another class."""

    name: str  # of its file, or its number in the test, from 0
    png: bytes
    label: int
    guess: int
    confidence: float  # the probability of the guess


class Findings(NamedTuple):
    """What a run has learnt, and where it errs."""

    title: str
    class_names: Sequence[str]
    records: Sequence[Mapping[str, Any]]  # of metrics.jsonl
    confusion: np.ndarray  # counts [true class, guess]
    mistakes: Sequence[Mistake]  # the most confident first


def page(found: Findings) -> str:
    """The whole file."""
    right, count = int(np.trace(found.confusion)), int(found.confusion.sum())
    title = html.escape(found.title)
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{_STYLE}</style>
<h1>{title}</h1>
<p>{right:,} of {count:,} test images right: <b>{right / count:.2%}</b>, by the run's best network.
<h2>Learning curves</h2>
<p class="note"><i class="train"></i>training, as augmented <i class="test"></i>test, by step
<div class="charts">{_chart(found.records, "loss")}{_chart(found.records, "top1")}</div>
<h2>Accuracy of each class</h2>
{_classes(found)}
<h2>What is taken for what</h2>
{_pairs(found)}
{_matrix(found)}
<h2>The worst mistakes</h2>
{_sheet(found)}
</html>
"""


# ----------------------------------------------------------------------------------------- curves
def _chart(records: Sequence[Mapping[str, Any]], name: str) -> str:
    """One number of the log by step, of training and of the test."""
    width, height, left, top, bottom = 440, 240, 46, 22, 24
    curves = {
        split: [(r["step"], r[name]) for r in records if r["split"] == split]
        for split in ("train", "test")
    }
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return '<p class="note">Nothing was logged.'
    most_steps = max(step for step, _ in points)
    highest = 1.0 if name == "top1" else max(value for _, value in points)
    highest = highest or 1.0

    def x(step: float) -> float:
        return left + (width - left - 8) * step / most_steps

    def y(value: float) -> float:
        return height - bottom - (height - bottom - top) * value / highest

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = share * highest
        label = f"{value:.0%}" if name == "top1" else f"{value:.3g}"
        parts.append(
            f'<path d="M{left} {y(value):.1f}H{width - 8}" stroke="var(--line)"/>'
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for split, curve in curves.items():
        line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve)
        parts.append(f'<polyline class="{split}" stroke-width="1.5" points="{line}"/>')
        if split == "test":
            parts += [
                f'<circle class="test" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5"/>'
                for step, value in curve
            ]
    title = {"loss": "loss", "top1": "top-1 accuracy"}[name]
    return (
        f'<figure><svg width="{width}" height="{height}" role="img" aria-label="{title} by step">'
        f'<text x="{left}" y="14">{title}</text>{"".join(parts)}'
        f'<text x="{left}" y="{height - 8}">0</text>'
        f'<text x="{width - 8}" y="{height - 8}" text-anchor="end">step {most_steps:,}</text>'
        "</svg></figure>"
    )


# ----------------------------------------------------------------------------------------- tables
def _classes(found: Findings) -> str:
    """The least accurate first."""
    counts, right = found.confusion.sum(1), found.confusion.diagonal()
    guessed = found.confusion.sum(0)
    recall = np.divide(right, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    rows = [
        (
            found.class_names[i],
            f"{counts[i]:,}",
            f"{right[i]:,}",
            _share(right[i], counts[i]),
            _share(right[i], guessed[i]),
        )
        for i in np.argsort(recall, kind="stable")
    ]
    return _table(("class", "images", "right", "accuracy", "right where guessed"), rows)


def _pairs(found: Findings) -> str:
    wrong = found.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
    places = [np.unravel_index(i, wrong.shape) for i in order if wrong.flat[i]]
    if not places:
        return "<p>Nothing is mistaken."
    names = found.class_names
    rows = [
        (
            f"{names[label]}, taken for {names[guess]}",
            f"{wrong[label, guess]:,}",
            _share(int(wrong[label, guess]), int(found.confusion[label].sum())),
        )
        for label, guess in places
    ]
    return _table(("class", "images", "of the class"), rows)


def _matrix(found: Findings) -> str:
    """Rows are true classes, columns what they are taken for; darker is more of the row."""
    if len(found.class_names) > _MOST_CLASSES:
        return ""
    names = [html.escape(name) for name in found.class_names]
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = []
    for i, counts in enumerate(found.confusion):
        total = max(1, counts.sum())
        cells = "".join(
            f'<td class="{"right" if i == j else ""}" '
            f'style="background:rgb({"60 140 90" if i == j else "217 101 43"} / '
            f'{0.7 * count / total:.3f})">{count or ""}</td>'
            for j, count in enumerate(counts)
        )
        rows.append(f'<tr><th class="name">{names[i]}</th>{cells}</tr>')
    return (
        '<p class="note">Rows: what it is. Columns: what it is taken for.'
        '<div class="scroll"><table class="matrix">'
        f"<thead><tr><th></th>{head}</tr></thead>{''.join(rows)}</table></div>"
    )


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column has names."""

    def line(cells: Sequence[str], tag: str) -> str:
        first, *others = map(html.escape, cells)
        rest = "".join(f"<{tag}>{cell}</{tag}>" for cell in others)
        return f'<tr><{tag} class="name">{first}</{tag}>{rest}</tr>'

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{line(titles, "th")}{body}</table></div>'


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


# --------------------------------------------------------------------------------------- mistakes
def _sheet(found: Findings) -> str:
    if not found.mistakes:
        return "<p>None."
    names = [html.escape(name) for name in found.class_names]
    figures = [
        f'<figure><img alt="{html.escape(m.name)}" '
        f'src="data:image/png;base64,{base64.b64encode(m.png).decode()}">'
        f"<figcaption>{names[m.label]}, taken for {names[m.guess]}: {m.confidence:.1%}"
        f'<br><span class="note">{html.escape(m.name)}</span></figcaption></figure>'
        for m in found.mistakes
    ]
    return (
        f'<p class="note">Those that it was surest of.<div class="sheet">{"".join(figures)}</div>'
    )
