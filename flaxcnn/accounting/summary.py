"""What a network costs, layer by layer, as numbers and as text."""

import dataclasses
from typing import Any

from flaxcnn import tables
from flaxcnn.tables import Column

Sides = int | tuple[int, int]  # along rows and along columns; one number where they are equal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a network, for the whole batch."""

    name: str  # path of its module, such as "layer1_0/conv1"
    kind: str  # "conv", "depthwise conv", "dense", "batch norm", "max pool", ...
    stage: str
    depth: int  # convolutions, pools and products on the longest path from the images to here
    kernel: tuple[int, ...] | None  # of a convolution or a pool
    strides: tuple[int, ...] | None  # of the same
    dilation: tuple[int, ...] | None  # of the same
    output_shape: tuple[int, ...]  # [N, H, W, C]
    params: int
    macs: int  # one multiply-add is one
    activation_bytes: int  # of its output
    receptive_field: Sides  # pixels of the image that one unit of its output can see
    jump: Sides | None  # pixels between the fields of neighbouring units; None: all see the same
    offset: Sides  # pixels by which the first unit's field begins before the image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What the layers of one stage cost together."""

    name: str
    layers: int
    output_shape: tuple[int, ...]
    params: int
    macs: int
    activation_bytes: int
    receptive_field: Sides


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a network costs; `str()` is a table. Bytes are of the whole batch, MACs as well.

    Layers that the output in evaluation does not depend on, GoogLeNet's auxiliary classifiers, are
    in `apart` and in no total.
    """

    model: str
    images: tuple[int, ...]  # [N, H, W, C]
    dtype: str  # of the computation
    layers: tuple[Layer, ...]  # in the order of their execution
    apart: tuple[Layer, ...]
    stages: tuple[Stage, ...]
    params: int
    macs: int
    flops: int  # twice the MACs
    activation_bytes: int  # of all outputs together
    peak_bytes: int  # of images and activations, the most at one time in evaluation
    forward_bytes: int
    kept_bytes: int  # of the activations that the backward pass needs
    training_bytes: int

    def __str__(self) -> str:
        return table(self)

    def to_markdown(self) -> str:
        """The layers and the totals as tables of Markdown."""
        return markdown(self)

    def to_csv(self) -> str:
        """A line of names, then one line a layer, those of `apart` last."""
        return csv_lines(self)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


# --------------------------------------------------------------------------------------- as text
LAYER_COLUMNS = (
    Column("name", "layer", to_the_right=False),
    Column("kind", "kind", to_the_right=False),
    Column("window", "kernel", to_the_right=False),
    Column("output_shape", "output", tables.sides),
    Column("params", "parameters", tables.count),
    Column("macs", "MACs, M", tables.millions),
    Column("activation_bytes", "activations, MB", tables.millions),
    Column("receptive_field", "field, px", tables.sides),
    Column("jump", "jump, px", tables.sides),
    Column("offset", "offset, px", tables.sides),
)
STAGE_COLUMNS = (
    Column("name", "stage", to_the_right=False),
    Column("layers", "layers"),
    *(
        column
        for column in LAYER_COLUMNS
        if column.key in ("output_shape", "params", "macs", "activation_bytes", "receptive_field")
    ),
)
CSV_COLUMNS = tuple(
    Column(key, key)
    for key in (
        *("name", "kind", "stage", "depth", "kernel", "strides", "dilation", "output_shape"),
        *("params", "macs", "activation_bytes", "receptive_field", "jump", "offset", "apart"),
    )
)


def table(summary: Summary) -> str:
    """For a terminal: layers, stages, totals."""
    parts = [
        heading(summary),
        tables.aligned(LAYER_COLUMNS, layer_rows(summary.layers)),
        tables.aligned(STAGE_COLUMNS, stage_rows(summary.stages)),
        "\n".join(totals(summary)),
    ]
    if summary.apart:
        parts[2:2] = [APART, tables.aligned(LAYER_COLUMNS, layer_rows(summary.apart))]
    return "\n\n".join(parts)


def stage_table(summary: Summary) -> str:
    """For a terminal: stages and totals alone."""
    stages = tables.aligned(STAGE_COLUMNS, stage_rows(summary.stages))
    return "\n\n".join([heading(summary), stages, "\n".join(totals(summary))])


def markdown(summary: Summary, *, stages_alone: bool = False) -> str:
    """The same as tables of Markdown."""
    parts = [heading(summary), tables.markdown(STAGE_COLUMNS, stage_rows(summary.stages))]
    if not stages_alone:
        parts.insert(1, tables.markdown(LAYER_COLUMNS, layer_rows(summary.layers)))
        if summary.apart:
            parts[2:2] = [APART, tables.markdown(LAYER_COLUMNS, layer_rows(summary.apart))]
    parts.append("\n".join(f"- {line}" for line in totals(summary)))
    return "\n\n".join(parts)


def csv_lines(summary: Summary) -> str:
    """One line a layer; `apart` says that it is in no total."""
    rows = [
        vars(layer) | {"apart": int(layer in summary.apart)}
        for layer in summary.layers + summary.apart
    ]
    return tables.csv_lines(CSV_COLUMNS, rows)


APART = "Apart, as the output in evaluation does not depend on them, and in no total:"


def heading(summary: Summary) -> str:
    """What was traced."""
    batch, height, width, channels = summary.images
    images = "1 image" if batch == 1 else f"{batch} images"
    return f"{summary.model}: {images} of {height}x{width}x{channels}, {summary.dtype}"


def totals(summary: Summary) -> list[str]:
    """A line each."""
    gmacs, gflops = (tables.significant(n / 1e9) for n in (summary.macs, summary.flops))
    forward, training, kept, activations, variables = (
        tables.millions(n)
        for n in (
            summary.forward_bytes,
            summary.training_bytes,
            summary.kept_bytes,
            summary.activation_bytes,
            summary.forward_bytes - summary.peak_bytes,
        )
    )
    peak = tables.millions(summary.peak_bytes)
    return [
        f"parameters: {summary.params:,}",
        f"work: {gmacs} GMACs, one multiply-add counted as one; {gflops} GFLOPs",
        f"outputs of all layers: {activations} MB (10^6 bytes)",
        f"memory to predict: {forward} MB, variables {variables} and activations {peak} at a time",
        f"memory to train: {training} MB, with SGD with momentum; kept for the backward pass: "
        f"{kept} MB",
    ]


def layer_rows(layers: tuple[Layer, ...]) -> list[dict[str, Any]]:
    """The values of the columns."""
    return [vars(layer) | {"window": _window(layer)} for layer in layers]


def stage_rows(stages: tuple[Stage, ...]) -> list[dict[str, Any]]:
    """The values of the columns."""
    return [dict(vars(stage)) for stage in stages]


def _window(layer: Layer) -> str:
    """ "3x3/2@2": kernel, stride and dilation, as far as they are not 1."""
    if layer.kernel is None or layer.strides is None or layer.dilation is None:
        return ""
    text = "x".join(map(str, layer.kernel))
    for sign, values in (("/", layer.strides), ("@", layer.dilation)):
        if set(values) != {1}:
            text += sign + (str(values[0]) if len(set(values)) == 1 else tables.sides(values))
    return text
