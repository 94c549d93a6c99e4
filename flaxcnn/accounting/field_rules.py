"""How each of JAX's operations changes what the units of a map see of the image.

Elementwise operations change nothing, convolutions and pools slide windows, sums over an axis see
all of it. Of an operation that is not known here, each output is taken to see all that the input
sees.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from flaxcnn.accounting import receptive_field
from flaxcnn.accounting.receptive_field import Field

# Same shape in and out, and yet not elementwise.
_MIXING = {
    *("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "fft", "rev"),
    *("cholesky", "triangular_solve"),
}


class Seen(NamedTuple):
    """What an array's elements see of the image, along its rows and along its columns.

    An axis is that of the array along which the units of the field follow each other; None where
    all elements see the same. Behind a flatten it is longer than there are units.
    """

    rows: Field
    columns: Field
    row_axis: int | None
    column_axis: int | None


def of_images(shape: Sequence[int]) -> Seen:
    """Of images [N, H, W, C]."""
    return Seen(receptive_field.of_image(shape[1]), receptive_field.of_image(shape[2]), 1, 2)


def united(values: Sequence[Seen]) -> Seen:
    """Of what is computed elementwise from several arrays."""
    result, *others = values
    for other in others:
        if not _fit(result, other):
            result, other = whole(result), whole(other)
        result = Seen(
            rows=receptive_field.united(result.rows, other.rows),
            columns=receptive_field.united(result.columns, other.columns),
            row_axis=other.row_axis if result.row_axis is None else result.row_axis,
            column_axis=other.column_axis if result.column_axis is None else result.column_axis,
        )
    return result


def _fit(a: Seen, b: Seen) -> bool:
    """Whether elements at the same place of two arrays are units at the same place of the image."""
    return all(
        None in (one, other) or (one == other and len(field.first) == len(their.first))
        for one, other, field, their in (
            (a.row_axis, b.row_axis, a.rows, b.rows),
            (a.column_axis, b.column_axis, a.columns, b.columns),
        )
    )


def whole(seen: Seen) -> Seen:
    """Of what sees all that the array's elements see."""
    return Seen(receptive_field.whole(seen.rows), receptive_field.whole(seen.columns), None, None)


def after(eqn: Any, inputs: Sequence[Seen | None], constant: Any) -> Seen:
    """Of the outputs of an operation; None stands for inputs that see nothing of the image.

    `constant` is the value of the input that is a known matrix, if one is.
    """
    known = [seen for seen in inputs if seen is not None]
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if name in _RULES and inputs[0] is not None:
        others = [whole(seen) for seen in inputs[1:] if seen is not None]
        return united([_RULES[name](inputs[0], eqn), *others])
    axes = eqn.params.get("axes", eqn.params.get("dimensions"))
    if name.startswith(("reduce", "arg")) and axes is not None:
        return _without_axes(united(known), axes)
    if name == "dot_general":
        return _dot_general(inputs, eqn, constant)
    if name == "concatenate":
        return _concatenate(known, eqn)
    shapes = [v.aval.shape for v in eqn.invars]
    if name not in _MIXING and all(_broadcasts(given, shape) for given in shapes):
        return united(
            [
                _repeated(seen, given, shape)
                for seen, given in zip(inputs, shapes, strict=True)
                if seen
            ]
        )
    return whole(united(known))


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    same = len(shape) == len(to)
    return not shape or (same and all(a in (1, b) for a, b in zip(shape, to, strict=True)))


def _repeated(seen: Seen, old: Sequence[int], new: Sequence[int]) -> Seen:
    """With axes of one element repeated: all elements there see the same."""
    gone = [axis for axis in range(len(old)) if old[axis] != new[axis]]
    return seen._replace(
        row_axis=None if seen.row_axis in gone else seen.row_axis,
        column_axis=None if seen.column_axis in gone else seen.column_axis,
    )


# ------------------------------------------------------------------------------------- along axes
Change = Callable[[Field], Field]


def _is_map(seen: Seen, shape: Sequence[int]) -> bool:
    """Whether each axis of the image is one of the array, with a unit at each place."""
    if seen.row_axis is not None and seen.row_axis == seen.column_axis:
        return False
    sides = ((seen.row_axis, seen.rows), (seen.column_axis, seen.columns))
    return all(axis is None or len(field.first) == shape[axis] for axis, field in sides)


def _along(seen: Seen, changes: Mapping[int, Change]) -> Seen:
    """With the fields of these axes changed, which stay where they are."""
    rows, columns = seen.rows, seen.columns
    if seen.row_axis is not None and seen.row_axis in changes:
        rows = changes[seen.row_axis](rows)
    if seen.column_axis is not None and seen.column_axis in changes:
        columns = changes[seen.column_axis](columns)
    return seen._replace(rows=rows, columns=columns)


def _moved(seen: Seen, places: Mapping[int, int]) -> Seen:
    """With its axes elsewhere: old place -> new place."""
    return seen._replace(
        row_axis=None if seen.row_axis is None else places[seen.row_axis],
        column_axis=None if seen.column_axis is None else places[seen.column_axis],
    )


def _without_axes(seen: Seen, axes: Sequence[int]) -> Seen:
    """Summed, or otherwise reduced, over these axes."""
    rows, columns = seen.rows, seen.columns
    row_axis, column_axis = seen.row_axis, seen.column_axis
    if row_axis in axes:
        rows, row_axis = receptive_field.whole(rows), None
    if column_axis in axes:
        columns, column_axis = receptive_field.whole(columns), None
    below = {axis: sum(other < axis for other in axes) for axis in (row_axis, column_axis) if axis}
    return Seen(
        rows,
        columns,
        row_axis - below[row_axis] if row_axis else row_axis,
        column_axis - below[column_axis] if column_axis else column_axis,
    )


# ---------------------------------------------------------------------------------------- windows
def _conv(seen: Seen, eqn: Any) -> Seen:
    params, (lhs, rhs) = eqn.params, eqn.invars
    numbers = params["dimension_numbers"]
    transposed = any(d != 1 for d in params["lhs_dilation"])
    if transposed or not _is_map(seen, lhs.aval.shape):
        return whole(seen)
    changes = {}
    for i, axis in enumerate(numbers.lhs_spec[2:]):
        changes[axis] = _windows(
            eqn.outvars[0].aval.shape[numbers.out_spec[2 + i]],
            rhs.aval.shape[numbers.rhs_spec[2 + i]],
            params["window_strides"][i],
            params["rhs_dilation"][i],
            params["padding"][i][0],
        )
    if seen.row_axis == numbers.lhs_spec[1] or seen.column_axis == numbers.lhs_spec[1]:
        return whole(seen)  # sums over an axis of the image
    places = dict(zip(numbers.lhs_spec, numbers.out_spec, strict=True))
    return _moved(_along(seen, changes), places)


def _reduce_window(seen: Seen, eqn: Any) -> Seen:
    params = eqn.params
    dilated = any(d != 1 for d in params["base_dilation"])
    if dilated or not _is_map(seen, eqn.invars[0].aval.shape):
        return whole(seen)
    return _along(
        seen,
        {
            axis: _windows(
                eqn.outvars[0].aval.shape[axis],
                params["window_dimensions"][axis],
                params["window_strides"][axis],
                params["window_dilation"][axis],
                params["padding"][axis][0],
            )
            for axis in range(len(params["window_dimensions"]))
        },
    )


def _windows(outputs: int, window: int, stride: int, dilation: int, before: int) -> Change:
    return partial(
        receptive_field.through_windows,
        outputs=outputs,
        window=window,
        stride=stride,
        dilation=dilation,
        before=before,
    )


# --------------------------------------------------------------------------------------- products
def _dot_general(inputs: Sequence[Seen | None], eqn: Any, constant: Any) -> Seen:
    (contracting, batch) = eqn.params["dimension_numbers"]
    found = []
    for side, seen in enumerate(inputs):
        if seen is None:
            continue
        ndims = [v.aval.ndim for v in eqn.invars]
        free = [
            [a for a in range(ndims[s]) if a not in contracting[s] and a not in batch[s]]
            for s in (0, 1)
        ]
        places = {axis: i for i, axis in enumerate(batch[side])}
        start = len(batch[0]) + (len(free[0]) if side == 1 else 0)
        places |= {axis: start + i for i, axis in enumerate(free[side])}
        matrix = constant if len(contracting[side]) == 1 and np.ndim(constant) == 2 else None
        if matrix is not None and contracting[side][0] in (seen.row_axis, seen.column_axis):
            # A matrix [outputs, units], whose outputs take the place of the units.
            if contracting[1 - side][0] == 0:
                matrix = matrix.T
            axis = contracting[side][0]
            seen = _along(seen, {axis: partial(_matrix, matrix)})
            places[axis] = len(batch[0]) + (0 if side == 1 else len(free[0]))
            found.append(_moved(seen, places))
            continue
        rows, columns = seen.rows, seen.columns
        row_axis, column_axis = seen.row_axis, seen.column_axis
        if row_axis in contracting[side]:
            rows, row_axis = receptive_field.whole(rows), None
        if column_axis in contracting[side]:
            columns, column_axis = receptive_field.whole(columns), None
        found.append(_moved(Seen(rows, columns, row_axis, column_axis), places))
    return united(found)


def _matrix(matrix: np.ndarray, field: Field) -> Field:
    if matrix.shape[1] != len(field.first):
        return receptive_field.whole(field)
    return receptive_field.through_matrix(field, matrix)


# ------------------------------------------------------------------------------------- rearranging
def _concatenate(values: Sequence[Seen], eqn: Any) -> Seen:
    axis, first = eqn.params["dimension"], values[0]
    if axis in (first.row_axis, first.column_axis):
        return whole(united([whole(seen) for seen in values]))
    return united(values)


def _reshape(seen: Seen, eqn: Any) -> Seen:
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    rows, row_axis = _reshaped(seen.rows, seen.row_axis, old, new)
    columns, column_axis = _reshaped(seen.columns, seen.column_axis, old, new)
    return Seen(rows, columns, row_axis, column_axis)


def _reshaped(
    field: Field, axis: int | None, old: Sequence[int], new: Sequence[int]
) -> tuple[Field, int | None]:
    """Where the axis is afterwards: the same, within a longer one, or split up."""
    if axis is None:
        return field, None
    before, size = math.prod(old[:axis]), old[axis]
    if size == 1:
        return field, None
    position = 1
    for place, length in enumerate(new):
        if position == before and size % length == 0 and length > 1:
            outer = size // length  # units in each of the outer axis' places
            if outer > 1 and len(field.first) == size:
                field = receptive_field.through_windows(field, length, outer, outer)
            return field, place
        if position < before * size and position * length > before:
            return field, place  # merged with its neighbours
        position *= length
    return receptive_field.whole(field), None


def _broadcast_in_dim(seen: Seen, eqn: Any) -> Seen:
    places = dict(enumerate(eqn.params["broadcast_dimensions"]))
    old, new = eqn.invars[0].aval.shape, eqn.params["shape"]
    return _moved(_repeated(seen, old, [new[places[axis]] for axis in range(len(old))]), places)


def _squeeze(seen: Seen, eqn: Any) -> Seen:
    gone = eqn.params["dimensions"]
    row_axis = None if seen.row_axis in gone else seen.row_axis
    column_axis = None if seen.column_axis in gone else seen.column_axis
    kept = [axis for axis in range(eqn.invars[0].aval.ndim) if axis not in gone]
    return _moved(
        seen._replace(row_axis=row_axis, column_axis=column_axis),
        {axis: i for i, axis in enumerate(kept)},
    )


def _transpose(seen: Seen, eqn: Any) -> Seen:
    return _moved(seen, {old: new for new, old in enumerate(eqn.params["permutation"])})


def _slice(seen: Seen, eqn: Any) -> Seen:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    sizes = eqn.invars[0].aval.shape

    def part(axis: int) -> Change:
        def change(field: Field) -> Field:
            if len(field.first) != sizes[axis]:  # behind a flatten
                return field
            return receptive_field.every(field, starts[axis], limits[axis], strides[axis])

        return change

    return _along(seen, {axis: part(axis) for axis in range(len(starts))})


def _split(seen: Seen, eqn: Any) -> Seen:
    along_the_map = eqn.params["axis"] in (seen.row_axis, seen.column_axis)
    return whole(seen) if along_the_map else seen


def _rev(seen: Seen, eqn: Any) -> Seen:
    mirrored = {seen.row_axis, seen.column_axis} & set(eqn.params["dimensions"])
    return whole(seen) if mirrored else seen


def _pad(seen: Seen, eqn: Any) -> Seen:
    config = eqn.params["padding_config"]
    axes = [axis for axis in (seen.row_axis, seen.column_axis) if axis is not None]
    if any(config[axis][2] for axis in axes):
        return whole(seen)
    if not _is_map(seen, eqn.invars[0].aval.shape):
        return seen
    return _along(
        seen,
        {
            axis: partial(receptive_field.padded, before=config[axis][0], after=config[axis][1])
            for axis in axes
        },
    )


_RULES: Mapping[str, Callable[[Seen, Any], Seen]] = {
    "conv_general_dilated": _conv,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "slice": _slice,
    "split": _split,
    "rev": _rev,
    "pad": _pad,
    **dict.fromkeys(
        ("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"),
        _reduce_window,
    ),
}
