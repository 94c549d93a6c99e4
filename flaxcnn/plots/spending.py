"""Where networks spend memory, parameters and multiply-adds."""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from flaxcnn import tables
from flaxcnn.accounting import Layer, Summary
from flaxcnn.plots import drawing
from flaxcnn.plots.drawing import DARK, LIGHT, Theme
from flaxcnn.plots.summaries import summaries_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 40  # of layers; a network with more is drawn by its stages


class _Measure(NamedTuple):
    title: str
    unit: str  # a million of them
    of: Callable[[Layer], int]


class _Bar(NamedTuple):
    name: str
    layers: tuple[Layer, ...]


_MEASURES = (
    _Measure("activations", "MB", lambda layer: layer.activation_bytes),
    _Measure("parameters", "M", lambda layer: layer.params),
    _Measure("multiply-adds", "M", lambda layer: layer.macs),
)
_KINDS = ("convolution", "dense", "pool", "norm", "sum, product, concatenation")


@drawing.matplotlib_as_it_comes()
def layers(
    names: Sequence[str], *, image_size: int | tuple[int, int] | None = None, dark: bool = False
) -> "Figure":
    """Where networks spend memory, parameters and multiply-adds, in the order of execution.

    One column of panels a network, for one image in float32; bytes, parameters and MACs (one
    multiply-add is one) in millions. Bars are layers; they are stages, of all networks, as soon as
    one network has more than `MOST_BARS` layers: the panels of a row share their scale.

    Args:
        names: that `create_model` knows.
        image_size: pixels, of a square or (height, width); by default each network's own.
        dark: light on a dark background.

    Raises:
        InputError: a ValueError, for an unknown name, no name, a size that a network can't take,
            or without matplotlib.
    """
    theme = DARK if dark else LIGHT
    summaries = summaries_of(names, image_size)
    by_stage = any(len(summary.layers) > MOST_BARS for summary in summaries)
    columns = [_bars(summary, by_stage) for summary in summaries]
    widths = [max(2.6, 0.24 * len(bars)) for bars in columns]  # inches
    figure = drawing.figure_of(theme, max(sum(widths) + 1, 6.5), 9.5)
    panels = figure.subplots(
        3, len(names), sharex="col", sharey="row", squeeze=False, width_ratios=widths
    )
    for j, (summary, bars) in enumerate(zip(summaries, columns, strict=True)):
        for i, measure in enumerate(_MEASURES):
            axes = panels[i, j]
            drawing.style(axes, theme, "" if j else f"{measure.title}, {measure.unit}")
            axes.grid(visible=False, axis="x")
            _stack(axes, theme, bars, measure)
            axes.set_ylim(0, 1.06 * _highest(columns, measure))
            heading = f"{_titled(summary)}\n" if i == 0 else ""
            total = sum(map(measure.of, summary.layers))
            heading += f"{tables.millions(total)} {measure.unit} in all"
            axes.set_title(heading, loc="left", fontsize=9, color=theme.ink)
        axes.set_xticks(range(len(bars)), [bar.name for bar in bars], rotation=90, fontsize=8)
        axes.set_xlim(-0.7, len(bars) - 0.3)
        axes.set_xlabel(f"{'stage' if by_stage else 'layer'}, in order of execution")
    handles, titles = panels[0, 0].get_legend_handles_labels()
    there = {_kind(layer) for summary in summaries for layer in summary.layers}
    used = [k for k, kind in enumerate(_KINDS) if kind in there]
    drawing.legend(figure, theme, [handles[k] for k in used], [titles[k] for k in used])
    figure.align_labels()
    drawing.finish_layout(figure)
    return figure


def _titled(summary: Summary) -> str:
    _, height, width, _ = summary.images
    return f"{summary.model}, {height}x{width} pixels"


def _bars(summary: Summary, by_stage: bool) -> list[_Bar]:
    if not by_stage:
        return [_Bar(layer.name, (layer,)) for layer in summary.layers]
    stages = itertools.groupby(summary.layers, key=lambda layer: layer.stage)
    return [_Bar(stage, tuple(of_stage)) for stage, of_stage in stages]


def _kind(layer: Layer) -> str:
    """One of `_KINDS`: "depthwise conv" is a convolution."""
    last_word = layer.kind.split()[-1]
    known = {"conv": "convolution", "dense": "dense", "pool": "pool", "norm": "norm"}
    return known.get(last_word, _KINDS[-1])


def _highest(columns: Sequence[Sequence[_Bar]], measure: _Measure) -> float:
    bars = itertools.chain.from_iterable(columns)
    return max(sum(map(measure.of, bar.layers)) for bar in bars) / 1e6


def _stack(axes: "Axes", theme: Theme, bars: Sequence[_Bar], measure: _Measure) -> None:
    """Bars of which each kind of layers is a part."""
    below = [0.0] * len(bars)
    for kind, color in zip(_KINDS, theme.data, strict=True):
        heights = [
            sum(measure.of(layer) for layer in bar.layers if _kind(layer) == kind) / 1e6
            for bar in bars
        ]
        axes.bar(range(len(bars)), heights, bottom=below, width=0.76, color=color, label=kind)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.yaxis.set_major_formatter(lambda value, _: drawing.plain(value))
