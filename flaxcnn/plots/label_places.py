"""Where labels go beside the points they name, so that none lies on another, a marker or the edge.

A greedy choice among places around each point, the most crowded point first, and then each label
once more with all others placed, a few times over; where some find no free place, all over again
with those first. No chance is involved: the same points get the same places.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

Point = tuple[float, float]
Segment = tuple[Point, Point]

_ROUNDS = 4  # of placing each label again; nothing moves any more after two or three
_ATTEMPTS = 6  # each begins with the labels for which the last one found no free place
_DIRECTIONS = 24  # around a point
_DISTANCES = (1, 1.6, 2.6, 4, 6, 8, 11, 14, 18, 22, 27, 32)  # in gaps
_LEADER_GAPS = 2  # from so many gaps on, a line leads from the point to its label
# What a place costs beside its distance in gaps.
_COVERS = 1000.0  # it lies on a label, a marker or the edge, or a leader runs through one
_CROSSES = 12.0  # a line of the plot runs through it, or two leaders cross
_MISREAD = 6.0  # it is about as near to another point as to its own, and no leader tells
_AS_NEAR = 1.25
_ASIDE = 1.0  # it is not to the right of its point


class Box(NamedTuple):
    """A rectangle; the units are those of the points."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: "Box") -> bool:
        """Whether they share a point."""
        return (
            self.left <= other.right
            and other.left <= self.right
            and self.bottom <= other.top
            and other.bottom <= self.top
        )

    def holds(self, other: "Box") -> bool:
        """Whether the other lies within."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.bottom <= other.bottom
            and other.top <= self.top
        )

    def nearest(self, point: Point) -> Point:
        """The point of the rectangle that is nearest to another one."""
        x, y = point
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)

    def crossed_by(self, line: Segment) -> bool:
        """Whether the line has a point within: Liang and Barsky's clipping."""
        (x, y), (end_x, end_y) = line
        enters, leaves = 0.0, 1.0
        for start, step, low, high in (
            (x, end_x - x, self.left, self.right),
            (y, end_y - y, self.bottom, self.top),
        ):
            if step == 0:
                if not low <= start <= high:
                    return False
                continue
            first, last = sorted(((low - start) / step, (high - start) / step))
            enters, leaves = max(enters, first), min(leaves, last)
        return enters <= leaves


class Place(NamedTuple):
    """Of one label."""

    box: Box
    leader: Segment | None  # from the point to the label, where that is not beside it


def place(
    points: Sequence[Point],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    *,
    marker: float,
    gap: float,
    lines: Sequence[Segment] = (),
) -> list[Place]:
    """A place for each label, as near to its point as the others let it.

    Args:
        points: what the labels name; x to the right, y upwards, in any one unit.
        sizes: width and height of each label, in the same unit, as everything here.
        bounds: within which the labels stay.
        marker: half the side of the square around each point that no label lies on.
        gap: from a point to the label beside it, half of it between labels.
        lines: which the labels rather do not lie on.
    """
    search = _Search(points, sizes, bounds, marker, gap, lines)
    order = sorted(range(len(points)), key=lambda i: (-search.neighbours(i), i))
    best: dict[int, Place] = {}
    fewest = math.inf
    for _ in range(_ATTEMPTS):
        placed = search.places(order)
        covering = [i for i in order if search.cost(i, placed) >= _COVERS]
        if len(covering) < fewest:
            best, fewest = placed, len(covering)
        if not covering:
            break
        order = covering + [i for i in order if i not in covering]
    return [best[i] for i in range(len(points))]


class _Search(NamedTuple):
    """What `place` is given."""

    points: Sequence[Point]
    sizes: Sequence[tuple[float, float]]
    bounds: Box
    marker: float
    gap: float
    lines: Sequence[Segment]

    def neighbours(self, index: int) -> int:
        """How crowded it is around a point."""
        reach = 12 * self.gap
        return sum(math.dist(self.points[index], point) <= reach for point in self.points)

    def places(self, order: Sequence[int]) -> dict[int, Place]:
        """Labels placed one after the other, and each again until none moves."""
        placed: dict[int, Place] = {}
        for _ in range(_ROUNDS):
            before = dict(placed)
            for i in order:
                placed[i] = self._cheapest(i, placed)
            if placed == before:
                break
        return placed

    def _cheapest(self, index: int, placed: Mapping[int, Place]) -> Place:
        """The first of several."""
        best, lowest = None, math.inf
        for candidate, distance in self._candidates(index):
            if distance < lowest:
                cost = distance + self.cost(index, {**placed, index: candidate})
                if cost < lowest:
                    best, lowest = candidate, cost
        assert best is not None  # each cost is finite
        return best

    def _candidates(self, index: int) -> Iterator[tuple[Place, float]]:
        """Places around a point, with what their distance costs."""
        (x, y), (width, height) = self.points[index], self.sizes[index]
        for gaps in _DISTANCES:
            for step in range(_DIRECTIONS):
                angle = step * math.tau / _DIRECTIONS
                right, up = math.cos(angle), math.sin(angle)
                # Beside a point the label is centred on its height, above it on its width.
                left = x + gaps * self.gap * right + width / 2 * (_limited(1.5 * right) - 1)
                bottom = y + gaps * self.gap * up + height / 2 * (_limited(1.5 * up) - 1)
                box = Box(left, bottom, left + width, bottom + height)
                end = box.nearest((x, y))
                leads = math.dist((x, y), end) > _LEADER_GAPS * self.gap
                place = Place(box, ((x, y), end) if leads else None)
                yield place, gaps + _ASIDE * (1 - right) / 2

    def cost(self, index: int, placed: Mapping[int, Place]) -> float:
        """Of a label's place beside the other ones, its distance apart."""
        point, (box, leader) = self.points[index], placed[index]
        others = [other for j, other in placed.items() if j != index]
        leaders = [other.leader for other in others if other.leader]
        markers = [_around(other, self.marker) for other in self.points]
        roomy = Box(*_around(box[:2], self.gap / 2)[:2], *_around(box[2:], self.gap / 2)[2:])
        covers = [not self.bounds.holds(box)]
        covers += [box.meets(marker) for marker in markers]
        covers += [roomy.meets(other.box) for other in others]
        covers += [box.crossed_by(other) for other in leaders]
        crosses = [box.crossed_by(line) for line in self.lines]
        misread = 0
        if leader is not None:
            covers += [other.box.crossed_by(leader) for other in others]
            # Not the marker that it begins at, nor one that lies on its beginning.
            covers += [m.crossed_by(leader) for m in markers if m.nearest(point) != point]
            crosses += [_cross(leader, other) for other in leaders]
            crosses += [_cross(leader, line) for line in self.lines if point not in line]
        else:
            reach = _AS_NEAR * math.dist(point, box.nearest(point))
            near = [math.dist(other, box.nearest(other)) <= reach for other in self.points]
            misread = sum(near) - 1  # its own point is one of them
        return _COVERS * sum(covers) + _CROSSES * sum(crosses) + _MISREAD * misread


def _around(point: Sequence[float], margin: float) -> Box:
    x, y = point
    return Box(x - margin, y - margin, x + margin, y + margin)


def _limited(value: float) -> float:
    return min(max(value, -1.0), 1.0)


def _cross(one: Segment, other: Segment) -> bool:
    (a, b), (c, d) = one, other
    return _side(a, b, c) != _side(a, b, d) and _side(c, d, a) != _side(c, d, b)


def _side(a: Point, b: Point, c: Point) -> bool:
    """Whether `c` is to the left of the way from `a` to `b`."""
    return (b[0] - a[0]) * (c[1] - a[1]) > (b[1] - a[1]) * (c[0] - a[0])
