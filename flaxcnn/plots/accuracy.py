"""Accuracy against work and against size."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from flaxcnn import registry
from flaxcnn.accounting import costs
from flaxcnn.plots import drawing
from flaxcnn.plots.drawing import DARK, LIGHT, Theme
from flaxcnn.weights import best_accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _Family(NamedTuple):
    title: str
    color: int
    marker: str


_FAMILIES: Mapping[str, _Family] = {
    "alexnet": _Family("AlexNet", 3, "D"),
    "vgg": _Family("VGG", 1, "^"),
    "googlenet": _Family("GoogLeNet", 4, "P"),
    "resnet": _Family("ResNet, ResNeXt, Wide ResNet", 0, "s"),
    "efficientnet": _Family("EfficientNet (b0 is efficientnet_b0; line: b0 to b7)", 2, "o"),
}


@drawing.matplotlib_as_it_comes()
def models(*, dark: bool = False) -> "Figure":
    """Accuracy against work and against size: all networks with published weights.

    A network's best published top-1 accuracy on ImageNet, at the image size of its weights; its
    multiply-adds are of one image of that size.

    Raises:
        InputError: a ValueError, without matplotlib.
    """
    theme = DARK if dark else LIGHT
    figure = drawing.figure_of(theme, 14, 8)
    left, right = figure.subplots(1, 2, sharey=True)
    published = ((name, best_accuracy(name)) for name in registry.list_models(weights=True))
    accuracies = {name: accuracy for name, accuracy in published if accuracy is not None}
    gmacs = {name: costs.cost(name).macs / 1e9 for name in accuracies}
    millions = {name: costs.cost(name).params / 1e6 for name in accuracies}
    drawing.style(left, theme, "ImageNet top-1, %")
    left.set_xlabel("multiply-adds per image, G (one multiply-add = 1 MAC)")
    drawing.style(right, theme, "ImageNet top-1, %")
    right.set_xlabel("parameters, M")
    for axes, values in ((left, gmacs), (right, millions)):
        _scatter(axes, theme, values, accuracies)
    right.tick_params(labelleft=True)
    handles, titles = left.get_legend_handles_labels()
    drawing.legend(figure, theme, handles, titles)
    drawing.finish_layout(figure)
    for axes, values in ((left, gmacs), (right, millions)):
        points = {name: (values[name], accuracies[name]) for name in accuracies}
        texts = [(name.removeprefix("efficientnet_"), point) for name, point in points.items()]
        drawing.label(axes, theme, texts, [[points[name] for name in _front(points)]])
    return figure


def _front(names: Iterable[str]) -> list[str]:
    """The networks that one rule scales up: EfficientNet's B0 to B7."""
    return [name for name in names if name.startswith("efficientnet_b")]


def _scatter(
    axes: "Axes", theme: Theme, values: Mapping[str, float], accuracies: Mapping[str, float]
) -> None:
    """One marker a network, on a logarithmic axis; a line through EfficientNet's front."""
    front = _front(values)
    axes.plot(
        [values[name] for name in front],
        [accuracies[name] for name in front],
        color=theme.data[_FAMILIES["efficientnet"].color],
        linewidth=1.2,
    )
    for family, (title, color, marker) in _FAMILIES.items():
        own = [name for name in values if registry.family_of(name) == family]
        axes.plot(
            [values[name] for name in own],
            [accuracies[name] for name in own],
            marker,
            color=theme.data[color],
            markeredgecolor=theme.background,
            markeredgewidth=0.6,
            markersize=drawing.MARKER_POINTS,
            label=title,
        )
    axes.set_xscale("log")
    low, high = min(values.values()) / 1.25, max(values.values()) * 1.5
    axes.set_xlim(low, high)
    ticks = [d * 10.0**e for e in range(-3, 5) for d in (1, 2, 5) if low < d * 10.0**e < high]
    axes.set_xticks(ticks, [drawing.plain(tick) for tick in ticks])
    axes.minorticks_off()
