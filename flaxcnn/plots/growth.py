"""How receptive fields grow with depth."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from flaxcnn.accounting import Sides, Summary
from flaxcnn.accounting.layers import HEAD
from flaxcnn.plots import drawing
from flaxcnn.plots.drawing import DARK, LIGHT
from flaxcnn.plots.label_places import Point
from flaxcnn.plots.summaries import summaries_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_DASHES = ("-", "--", "-.", ":")


class _Growth(NamedTuple):
    """How a network's receptive field grows."""

    name: str
    fields: list[int]  # pixels, by depth: 1 of the image itself at depth 0
    sides: set[int]  # pixels, of the image
    squeezed: bool  # units see the whole image before the head does

    @property
    def end(self) -> Point:
        """The last depth, and the field there."""
        return len(self.fields) - 1.0, float(self.fields[-1])

    @property
    def text(self) -> str:
        note = ", then the whole image (squeeze-excite)" if self.squeezed else ""
        return f"{self.name}: {self.fields[-1]:,}{note}"


@drawing.matplotlib_as_it_comes()
def receptive_fields(
    names: Sequence[str], *, image_size: int | tuple[int, int] | None = None, dark: bool = False
) -> "Figure":
    """What a unit can see of the image, against the depth it is at: a line a network.

    Depth counts convolutions and pools on the longest path from the image, and the field is the
    largest there is at that depth or before: a branch of 1x1 convolutions, which sees less than the
    branch beside it, makes no dent. A line ends where all units begin to see the whole image: at
    global pooling, at the first dense layer or, in EfficientNet except Lite, at the first
    squeeze-excite; the picture says so then.

    Args:
        names: that `create_model` knows.
        image_size: pixels, of a square or (height, width); by default each network's own.
        dark: light on a dark background.

    Raises:
        InputError: a ValueError, for an unknown name, no name, a size that a network can't take,
            or without matplotlib.
    """
    theme = DARK if dark else LIGHT
    growths = [_growth(summary) for summary in summaries_of(names, image_size)]
    figure = drawing.figure_of(theme, 10, 6.5)
    axes = figure.subplots()
    drawing.style(axes, theme, "receptive field, pixels")
    axes.set_xlabel("depth: convolutions and pools on the longest path")
    sides = sorted(set().union(*(growth.sides for growth in growths)))
    for side in sides:
        axes.axhline(side, color=theme.faint_ink, linewidth=1, linestyle=(0, (4, 3)))
    for growth, (dashes, color) in zip(
        growths, itertools.cycle(itertools.product(_DASHES, theme.data)), strict=False
    ):
        depth, field = growth.end
        axes.plot(growth.fields, linestyle=dashes, color=color, linewidth=1.8, label=growth.name)
        axes.plot(depth, field, "o", color=color, markersize=drawing.MARKER_POINTS - 1, zorder=3)
    right = _scale(axes, growths, sides)
    drawing.finish_layout(figure)
    texts = [(growth.text, growth.end) for growth in growths]
    texts += [(f"image: {side} pixels", (right, float(side))) for side in sides]
    lines: list[list[Point]] = [list(enumerate(growth.fields)) for growth in growths]
    lines += [[(0.0, float(side)), (right, float(side))] for side in sides]
    drawing.label(axes, theme, texts, lines)
    return figure


def _scale(axes: "Axes", growths: Sequence[_Growth], sides: Sequence[int]) -> float:
    """The limits and ticks of both axes; returns the depth where the picture ends."""
    deepest, squeezed = max((growth.end[0], growth.squeezed) for growth in growths)
    right = (1.6 if squeezed else 1.25) * deepest  # room for the label behind the longest line
    axes.set_xlim(-0.02 * deepest, right)
    axes.locator_params(axis="x", integer=True)
    axes.set_yscale("log", base=2)
    largest = max([*sides, *(growth.fields[-1] for growth in growths)])
    axes.set_ylim(0.9, 1.8 * largest)
    axes.set_yticks([2.0**i for i in range(largest.bit_length() + 1)])
    axes.yaxis.set_major_formatter(lambda value, _: drawing.plain(value))
    axes.minorticks_off()
    return right


def _growth(summary: Summary) -> _Growth:
    fields = [1]
    seen = [layer for layer in summary.layers if layer.kernel and layer.jump is not None]
    for layer in sorted(seen, key=lambda layer: layer.depth):
        field = max(_both(layer.receptive_field))
        fields += [fields[-1]] * (layer.depth + 1 - len(fields))
        fields[-1] = max(fields[-1], field)
    return _Growth(
        name=summary.model,
        fields=fields,
        sides=set(summary.images[1:3]),
        squeezed=any(layer.jump is None and layer.stage != HEAD for layer in summary.layers),
    )


def _both(sides: Sides) -> tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else sides
