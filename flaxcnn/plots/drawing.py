"""What all figures share: colours, axes, labels that do not overlap; and matplotlib itself.

Figures are objects here: no pyplot, no backend, no style of the user's.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flaxcnn.errors import InputError
from flaxcnn.plots import label_places
from flaxcnn.plots.label_places import Box, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

DOTS_PER_INCH = 150

MARKER_POINTS = 7.0
_PIXELS_PER_POINT = DOTS_PER_INCH / 72  # typographic points, as sizes of fonts are told in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours.

    The five of the data are at least 3:1 against the background and stay apart, by 25 of CIELAB's
    units at the least, for the colour-blind of each kind (simulated by Machado, Oliveira and
    Fernandes, 2009); markers and dashes tell them apart as well.
    """

    background: str
    ink: str
    faint_ink: str
    grid: str
    data: tuple[str, ...]


LIGHT = Theme(
    background="#ffffff",
    ink="#1c2128",
    faint_ink="#5c6570",
    grid="#e3e6ea",
    data=("#3390e0", "#d95f02", "#0b5d38", "#4b1d73", "#b87aa2"),
)
DARK = Theme(
    background="#14171c",
    ink="#e8eaed",
    faint_ink="#a2aab4",
    grid="#2c323a",
    data=("#6f9dfb", "#ec682a", "#4be8a8", "#f5ec40", "#bb76a8"),
)


@contextlib.contextmanager
def matplotlib_as_it_comes() -> Iterator[None]:
    """Matplotlib as it comes, whatever a matplotlibrc says; afterwards it is as it was.

    Raises:
        InputError: a ValueError, where it is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise InputError("plots need matplotlib: pip install matplotlib") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Ids in a file of SVG are hashes with this salt, a random one by default.
        matplotlib.rcParams["svg.hashsalt"] = "flaxcnn"
        yield


def figure_of(theme: Theme, width: float, height: float) -> "Figure":
    """Of so many inches."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=DOTS_PER_INCH, facecolor=theme.background)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)  # inches
    return figure


def style(axes: "Axes", theme: Theme, y_label: str) -> None:
    """Colours, a faint grid, and a label with its unit."""
    axes.set_facecolor(theme.background)
    axes.set_axisbelow(True)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.faint_ink)
    axes.tick_params(colors=theme.faint_ink, labelcolor=theme.ink, labelsize=9)
    axes.xaxis.label.set_color(theme.ink)
    axes.set_ylabel(y_label, color=theme.ink)


def legend(figure: "Figure", theme: Theme, handles: Sequence[Any], titles: Sequence[str]) -> None:
    """In one line above the panels."""
    figure.legend(
        handles,
        titles,
        loc="outside upper left",
        ncols=len(titles),
        frameon=False,
        fontsize=9,
        labelcolor=theme.ink,
        handletextpad=0.5,
        columnspacing=1.6,
    )


def finish_layout(figure: "Figure") -> None:
    """Makes room for titles and ticks, and leaves it so: labels are placed in pixels next."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def label(
    axes: "Axes",
    theme: Theme,
    texts: Sequence[tuple[str, Point]],
    lines: Sequence[Sequence[Point]],
) -> None:
    """Writes texts beside their points, which are in units of the data, as the lines are."""
    from matplotlib.patheffects import withStroke

    labels = [axes.text(*point, text, fontsize=8, color=theme.ink) for text, point in texts]
    extents = [label.get_window_extent() for label in labels]
    marker = (MARKER_POINTS / 2 + 0.5) * _PIXELS_PER_POINT
    corners = [_transformed(axes.transData, line) for line in lines]
    segments = [segment for line in corners for segment in itertools.pairwise(line)]
    places = label_places.place(
        _transformed(axes.transData, [point for _, point in texts]),
        [(extent.width, extent.height) for extent in extents],
        Box(*map(float, axes.get_window_extent().extents)),
        marker=marker,
        gap=marker + 1.5 * _PIXELS_PER_POINT,
        lines=segments,
    )
    # Keeps a line off the letters. Not for all labels: each letter is drawn anew in SVG then.
    halo = withStroke(linewidth=2, foreground=theme.background)
    to_data = axes.transData.inverted()
    for label, (box, leader) in zip(labels, places, strict=True):
        label.set_verticalalignment("bottom")
        label.set_position(*_transformed(to_data, [box[:2]]))
        if any(box.crossed_by(segment) for segment in segments):
            label.set_path_effects([halo])
        if leader is not None:
            x, y = zip(*_transformed(to_data, leader), strict=True)
            axes.plot(x, y, color=theme.faint_ink, linewidth=0.6, zorder=1.5)


def _transformed(transform: "Transform", points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in transform.transform(points).tolist()]


def plain(value: float) -> str:
    """1000000.0 -> "1,000,000", never a power of ten."""
    return f"{value:,.10g}"
