"""Pictures: what they show is what was counted, and nothing in them lies on anything else."""

import functools
import itertools
import math
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import flaxcnn
from flaxcnn import plots
from flaxcnn.accounting import costs
from flaxcnn.plots import drawing, label_places
from flaxcnn.plots.label_places import Box
from flaxcnn.weights import best_accuracy

matplotlib = pytest.importorskip(
    "matplotlib", reason='plots need matplotlib, an extra: pip install ".[plots]"'
)
agg = pytest.importorskip("matplotlib.backends.backend_agg", reason="comes with matplotlib")

THEMES = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
models = functools.cache(plots.models)  # drawn once a theme; no test changes them


def drawn(figure: Any) -> Any:
    """With its texts where they are in a file of PNG."""
    agg.FigureCanvasAgg(figure).draw()
    return figure


def box(artist: Any) -> Box:
    """In pixels."""
    return Box(*artist.get_window_extent().extents)


def meeting(texts: list[Any]) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), box(text)) for text in texts]
    return [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.meets(other)]


def outside(texts: list[Any], frame: Box) -> list[str]:
    return [text.get_text() for text in texts if not frame.holds(box(text))]


def markers(axes: Any) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for line in axes.lines
        if line.get_marker() not in ("None", "")
        for x, y in line.get_xydata()
    ]


# ---------------------------------------------------------------------------------------- models
@THEMES
def test_models_labels_lie_on_nothing(dark: bool) -> None:
    figure = drawn(models(dark=dark))
    published = flaxcnn.list_models(weights=True)
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == [
            name.removeprefix("efficientnet_") for name in published
        ]
        assert meeting(axes.texts) == []
        assert outside(axes.texts, box(axes)) == []
        # A marker is 7 points wide; the middle 5 are what must be seen.
        reach = 2.5 * figure.dpi / 72
        labels = [box(text) for text in axes.texts]
        for x, y in axes.transData.transform(markers(axes)):
            marker = Box(x - reach, y - reach, x + reach, y + reach)
            assert not any(label.meets(marker) for label in labels)


def test_models_points_are_the_published_numbers() -> None:
    left, right = models(dark=False).axes
    expected = {
        name: (costs.cost(name), best_accuracy(name)) for name in flaxcnn.list_models(weights=True)
    }
    assert len(expected) == 32
    assert sorted(markers(left)) == sorted((c.macs / 1e9, top1) for c, top1 in expected.values())
    assert sorted(markers(right)) == sorted((c.params / 1e6, top1) for c, top1 in expected.values())
    assert (4.089184256, 80.858) in markers(left)  # resnet50: the second weights are the better


def test_models_front_is_a_line_from_b0_to_b7() -> None:
    for axes in models(dark=False).axes:
        front = next(line for line in axes.lines if line.get_linestyle() == "-")
        assert list(front.get_ydata()) == [best_accuracy(f"efficientnet_b{i}") for i in range(8)]


# ---------------------------------------------------------------------------------------- layers
MEASURES = ("activation_bytes", "params", "macs")


def bar_heights(axes: Any) -> dict[float, float]:
    """By the bar's middle: its parts together, each of which stands on the last one."""
    heights: dict[float, float] = {}
    for part in axes.patches:
        middle = round(part.get_x() + part.get_width() / 2, 6)
        assert part.get_y() == pytest.approx(heights.get(middle, 0))
        heights[middle] = part.get_y() + part.get_height()
    return heights


def test_a_bar_a_layer() -> None:
    summary = flaxcnn.summarize("vgg16")
    panels = plots.layers(["vgg16"]).axes
    for axes, measure in zip(panels, MEASURES, strict=True):
        expected = [getattr(layer, measure) / 1e6 for layer in summary.layers]
        np.testing.assert_allclose(list(bar_heights(axes).values()), expected, rtol=1e-12)
        assert sum(expected) == pytest.approx(getattr(summary, measure) / 1e6)
    ticks = [tick.get_text() for tick in panels[-1].get_xticklabels()]
    assert ticks == [layer.name for layer in summary.layers]
    assert panels[-1].get_xlabel() == "layer, in order of execution"


def test_a_bar_a_stage_of_all_networks_where_one_has_many_layers() -> None:
    names = ["vgg16", "googlenet"]
    figure = plots.layers(names, image_size=192)
    panels = np.reshape(figure.axes, (3, 2))
    for name, column in zip(names, panels.T, strict=True):
        summary = flaxcnn.summarize(name, image_size=192)
        for axes, measure in zip(column, MEASURES, strict=True):
            expected = [getattr(stage, measure) / 1e6 for stage in summary.stages]
            np.testing.assert_allclose(list(bar_heights(axes).values()), expected, rtol=1e-12)
        assert column[-1].get_xlabel() == "stage, in order of execution"
        assert column[0].get_title("left").startswith(f"{name}, 192x192 pixels\n")
    for left, right in panels:
        assert left.get_ylim() == right.get_ylim()
        assert left.get_ylim()[1] > max(bar_heights(left).values())


def test_a_bar_shows_its_parts() -> None:
    """GoogLeNet's stem: a convolution and a norm with outputs of one size."""
    handles, kinds = plots.layers(["googlenet"]).axes[0].get_legend_handles_labels()
    stem = {kind: bars[0].get_height() for kind, bars in zip(kinds, handles, strict=True)}
    assert stem.pop("convolution") == stem.pop("norm") == 112 * 112 * 64 * 4 / 1e6
    assert set(stem.values()) == {0}


@pytest.mark.parametrize("names", [["vgg19_bn"], ["lenet5", "googlenet"]], ids=" ".join)
def test_layers_texts_lie_on_nothing(names: list[str]) -> None:
    figure = drawn(plots.layers(names, dark=True))
    texts = list(figure.legends[0].get_texts())
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label, axes._left_title]
        texts += [*axes.get_xticklabels(), *axes.get_yticklabels()]
    shown = [text for text in texts if text.get_visible() and text.get_text()]
    assert meeting(shown) == []
    assert outside(shown, box(figure)) == []


# ------------------------------------------------------------------------------- receptive fields
def curve(axes: Any, name: str) -> list[int]:
    (line,) = [line for line in axes.lines if line.get_label() == name]
    depths, fields = line.get_data()
    assert list(depths) == list(range(len(fields)))
    return [int(field) for field in fields]


def test_receptive_fields_grow_as_published() -> None:
    names = ["vgg16", "resnet18", "googlenet"]
    (axes,) = plots.receptive_fields(names).axes
    vgg16, resnet18, googlenet = (curve(axes, name) for name in names)
    # By hand: a 3x3 convolution adds 2 jumps, a 2x2 pool one jump, and doubles it then.
    assert vgg16 == [
        *(1, 3, 5, 6, 10, 14, 16, 24, 32, 40, 44, 60, 76, 92, 100, 132, 164, 196, 212),
    ]
    # 7x7 at stride 2, a 3x3 pool, 16 convolutions; 1x1 ones in shortcuts do not make a dent.
    assert resnet18 == [
        *(1, 7, 11, 19, 27, 35, 43, 51, 67, 83, 99, 115, 147, 179, 211, 243, 307, 371, 435),
    ]
    assert len(googlenet) - 1 == 3 + 9 * 2 + 4  # stem, inceptions, pools between them
    assert googlenet == sorted(googlenet)
    assert [text.get_text() for text in axes.texts] == [
        "vgg16: 212",
        "resnet18: 435",
        f"googlenet: {googlenet[-1]}",
        "image: 224 pixels",
    ]


def test_squeeze_excite_ends_a_line() -> None:
    (axes,) = plots.receptive_fields(["efficientnet_b0", "efficientnet_lite0"], image_size=160).axes
    assert curve(axes, "efficientnet_b0") == [1, 3, 7]
    assert curve(axes, "efficientnet_lite0")[-1] == 851
    assert [text.get_text() for text in axes.texts] == [
        "efficientnet_b0: 7, then the whole image (squeeze-excite)",
        "efficientnet_lite0: 851",
        "image: 160 pixels",
    ]
    (image,) = [line for line in axes.lines if set(line.get_ydata()) == {160}]
    assert list(image.get_xdata()) == [0, 1]  # of the width of the axes


def test_receptive_fields_texts_lie_on_nothing() -> None:
    names = ["alexnet", "vgg16", "googlenet", "resnet18", "resnet34", "plain34", "resnet20"]
    figure = drawn(plots.receptive_fields(names, dark=True))
    (axes,) = figure.axes
    assert meeting(axes.texts) == []
    assert outside(axes.texts, box(axes)) == []
    ticks = [tick.get_text() for tick in axes.get_yticklabels()]
    assert ticks == ["1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1,024"]
    assert outside([*axes.get_yticklabels(), axes.xaxis.label, axes.yaxis.label], box(figure)) == []


# ---------------------------------------------------------------------------------- all figures
def test_axes_have_labels() -> None:
    fields = plots.receptive_fields(["alexnet"])
    for axes in models(dark=False).axes + fields.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    panels = np.reshape(plots.layers(["alexnet", "lenet5"]).axes, (3, 2))
    assert [axes.get_ylabel() for axes in panels[:, 0]] == [
        "activations, MB",
        "parameters, M",
        "multiply-adds, M",
    ]
    assert all(axes.get_xlabel() for axes in panels[-1])


@pytest.mark.parametrize("draw", [plots.layers, plots.receptive_fields])
def test_wrong_names(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(
            "flaxcnn.plots.summaries.summarize", None
        )  # told before any network is traced
        with pytest.raises(flaxcnn.InputError, match=r"unknown model 'vgg17'; did you mean vgg1"):
            draw(["vgg16", "vgg17"])
    with pytest.raises(flaxcnn.InputError, match="name a network"):
        draw([])
    with pytest.raises(flaxcnn.InputError):
        draw(["alexnet"], image_size=20)


def test_only_drawing_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, flaxcnn, flaxcnn.plots; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    for draw in (plots.models, lambda: plots.layers(["vgg16"])):
        with pytest.raises(flaxcnn.InputError, match="pip install matplotlib"):
            draw()


# --------------------------------------------------------------------------------------- colours
# Machado, Oliveira and Fernandes, 2009, table of severity 1, on linear RGB.
COLOUR_BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
# Linear RGB to XYZ, each relative to D65's white.
TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
) / np.array([[0.9505], [1.0], [1.089]])


def linear(color: str) -> np.ndarray:
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = TO_XYZ @ np.clip(rgb, 0, 1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(a: str, b: str) -> float:
    """WCAG's."""
    dark, light = sorted((TO_XYZ @ linear(color))[1] for color in (a, b))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [drawing.LIGHT, drawing.DARK], ids=["light", "dark"])
def test_colours_can_be_told_apart(theme: drawing.Theme) -> None:
    for color in theme.data:
        assert contrast(color, theme.background) >= 3
    for color in (theme.ink, theme.faint_ink):
        assert contrast(color, theme.background) >= 4.5  # WCAG's, for text
    for matrix in COLOUR_BLINDNESS.values():
        seen = [lab(matrix @ linear(color)) for color in theme.data]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) >= 25


# ------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize(("suffix", "begins"), [(".PNG", b"\x89PNG\r\n"), (".svg", b"<?xml")])
def test_the_same_picture_is_the_same_file(
    tmp_path: pathlib.Path, suffix: str, begins: bytes
) -> None:
    paths = [tmp_path / f"{i}{suffix}" for i in range(2)]
    plots.save(plots.layers(["lenet5"]), paths[0])
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 5, "savefig.dpi": 40}):
        plots.save(plots.layers(["lenet5"]), paths[1])  # whatever the user's own style
        assert matplotlib.rcParams["font.size"] == 20
    first, second = (path.read_bytes() for path in paths)
    assert first.startswith(begins)
    assert first == second
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, figure = tmp_path / "plot.svg", plots.layers(["lenet5"])
    path.write_text("before")

    def full(self: pathlib.Path, content: bytes) -> None:
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "write_bytes", full)
        with pytest.raises(flaxcnn.InputError, match=r"plot\.svg: .*No space left"):
            plots.save(figure, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    plots.save(figure, path)
    assert path.read_bytes().startswith(b"<?xml")


def test_paths_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    figure = plots.layers(["lenet5"])
    for name in ("plot.pdf", "plot", "plot.png.gz"):
        with pytest.raises(flaxcnn.InputError, match=r"a picture is a file of \.png or \.svg"):
            plots.save(figure, tmp_path / name)
    with pytest.raises(flaxcnn.InputError, match=f"there is no folder {tmp_path}/missing"):
        plots.save(figure, tmp_path / "missing" / "plot.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(flaxcnn.InputError, match=r"folder\.png: cannot be written"):
        plots.save(figure, tmp_path / "folder.png")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


# ------------------------------------------------------------------------------------ label places
def test_labels_of_one_point_get_places_of_their_own() -> None:
    """All apart, and those that are far off with a leader."""
    places = label_places.place(
        [(100.0, 100.0)] * 9, [(40.0, 10.0)] * 9, Box(0, 0, 200, 200), marker=3, gap=5
    )
    for a, b in itertools.combinations(places, 2):
        assert not a.box.meets(b.box)
    for found in places:
        assert Box(0, 0, 200, 200).holds(found.box)
        assert not found.box.meets(Box(97, 97, 103, 103))
        end = found.box.nearest((100, 100))
        far = math.dist(end, (100, 100)) > 2 * 5  # gaps
        assert found.leader == (((100, 100), end) if far else None)
    assert any(10 < math.dist(p.box.nearest((100, 100)), (100, 100)) < 20 for p in places)


def test_labels_keep_off_lines_and_edges() -> None:
    def at(point: tuple[float, float], *lines: label_places.Segment) -> Box:
        (found,) = label_places.place(
            [point], [(40.0, 10.0)], Box(0, 0, 200, 200), marker=3, gap=5, lines=lines
        )
        return found.box

    assert at((100, 100)) == (105, 95, 145, 105)  # to the right of its point, if it can
    assert at((198, 100)).right < 198  # not over the edge
    line = ((100.0, 100.0), (200.0, 100.0))
    assert not at((100, 100), line).crossed_by(line)


@pytest.mark.parametrize(
    ("line", "crosses"),
    [
        (((0, 0), (30, 30)), True),
        (((12, 12), (13, 13)), True),  # within
        (((0, 15), (30, 15)), True),
        (((0, 25), (30, 25)), False),
        (((0, 15), (5, 15)), False),  # ends before
        (((0, 12), (12, 30)), False),  # past a corner
    ],
)
def test_what_crosses_a_box(line: label_places.Segment, crosses: bool) -> None:
    assert Box(10, 10, 20, 20).crossed_by(line) == crosses
    assert Box(10, 10, 20, 20).crossed_by((line[1], line[0])) == crosses
