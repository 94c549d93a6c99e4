"""The layers of a trace as they are taken down: whose they are, their names and variables."""

import collections
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from flaxcnn.accounting.field_rules import Seen

IMAGES = -1  # what stands for the images where layers are named by their numbers
HEAD = "head"  # the stage behind the last feature map


class Window(NamedTuple):
    """Of a convolution or a pool, along rows and columns."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]


class Kept(NamedTuple):
    """An array that training keeps from the forward pass for the backward pass."""

    array: int  # the same number: the same array
    size_bytes: int


class TracedLayer(NamedTuple):
    """One layer; its number is its place in the trace."""

    name: str
    kind: str
    window: Window | None
    output_shape: tuple[int, ...]
    output_bytes: int
    params: int
    param_bytes: int
    state_bytes: int  # of variables that are no parameters: running statistics
    macs: int
    seen: Seen
    stage: str
    inputs: frozenset[int]  # the layers that it is computed from; IMAGES for the images
    in_place: bool  # elementwise: its output may lie where an input lay
    kept: tuple[Kept, ...]


class Own(NamedTuple):
    """The variables of one module that are none of its submodules'."""

    sizes: Mapping[str, int]  # of its parameters, by name
    param_bytes: int
    state_bytes: int


class _Noted(NamedTuple):
    """A layer before it is known whose variables it has."""

    path: str  # of its module
    layer: TracedLayer


class Layers:
    """Takes layers down, one after the other."""

    def __init__(self, variables: Any) -> None:
        self._own = _own_variables(variables)
        self._noted: list[_Noted] = []
        self._paths: set[str] = set()  # modules that have a layer
        self._stage_begins = 0

    def __len__(self) -> int:
        return len(self._noted)

    def kind(self, number: int) -> str:
        """Of a layer that has been taken down."""
        return self._noted[number].layer.kind

    def own_sizes(self, path: str) -> Mapping[str, int]:
        """Of the parameters that are a module's own, by name."""
        return self._own[path].sizes if path in self._own else {}

    def unclaimed(self, path: str) -> bool:
        """Whether the module has variables of its own, and no layer yet."""
        return path in self._own and path not in self._paths

    def add(
        self,
        path: str,
        kind: str,
        seen: Seen,
        out: Any,
        *,
        inputs: Collection[int],
        macs: int = 0,
        repeats: int = 1,
        kept: Sequence[Kept] = (),
        window: Window | None = None,
        in_place: bool = False,
    ) -> int:
        """A layer of the module at `path`, of a loop's body with `repeats`; returns its number."""
        self._paths.add(path)
        layer = TracedLayer(
            name=kind.replace(" ", "_"),
            kind=kind,
            window=window,
            output_shape=out.shape,
            output_bytes=size_bytes(out) * repeats,
            params=0,
            param_bytes=0,
            state_bytes=0,
            macs=macs * repeats,
            seen=seen,
            stage=path.partition("/")[0],
            inputs=frozenset(inputs),
            in_place=in_place,
            kept=tuple(array._replace(size_bytes=array.size_bytes * repeats) for array in kept),
        )
        self._noted.append(_Noted(path, layer))
        return len(self._noted) - 1

    def keep(self, number: int, kept: Kept) -> None:
        """One array more that the layer's gradient needs."""
        if number != IMAGES:
            path, layer = self._noted[number]
            self._noted[number] = _Noted(path, layer._replace(kept=(*layer.kept, kept)))

    def end_stage(self, name: str) -> None:
        """All since the last stage ended are of this one."""
        for i in range(self._stage_begins, len(self._noted)):
            path, layer = self._noted[i]
            self._noted[i] = _Noted(path, layer._replace(stage=name))
        self._stage_begins = len(self._noted)

    def finished(self, outputs: Collection[int], seen: Seen) -> tuple[list[TracedLayer], set[int]]:
        """The layers, each with a name that no other has, and the numbers of those that count.

        Those are what `outputs` depend on. The first of them in a module has the module's own
        variables and its name. Variables of no layer come last, as layers without output.
        """
        if self._stage_begins:
            self.end_stage(HEAD)
        used = self._reached(outputs)
        owners: dict[str, int] = {}
        for counts in (True, False):
            for number, (path, _) in enumerate(self._noted):
                if (number in used) == counts and path in self._own:
                    owners.setdefault(path, number)
        layers = []
        for number, (path, layer) in enumerate(self._noted):
            if owners.get(path) == number:
                layer = _with_own(layer._replace(name=path or layer.name), self._own[path])
            elif path:
                layer = layer._replace(name=f"{path}/{layer.name}")
            layers.append(layer)
        for path, own in self._own.items():
            if path not in owners:
                used.add(len(layers))
                layers.append(_with_own(_without_output(path, seen), own))
        return _renamed(layers), used

    def _reached(self, outputs: Collection[int]) -> set[int]:
        reached: set[int] = set()
        waiting = list(outputs)
        while waiting:
            number = waiting.pop()
            if number != IMAGES and number not in reached:
                reached.add(number)
                waiting.extend(self._noted[number].layer.inputs)
        return reached


def _with_own(layer: TracedLayer, own: Own) -> TracedLayer:
    return layer._replace(
        params=sum(own.sizes.values()), param_bytes=own.param_bytes, state_bytes=own.state_bytes
    )


def _without_output(path: str, seen: Seen) -> TracedLayer:
    """Variables that are part of no layer: of embedded positions, of weights made from others."""
    return TracedLayer(
        name=path or "variables",
        kind="variables",
        window=None,
        output_shape=(),
        output_bytes=0,
        params=0,
        param_bytes=0,
        state_bytes=0,
        macs=0,
        seen=seen,
        stage=path.partition("/")[0],
        inputs=frozenset(),
        in_place=False,
        kept=(),
    )


def _renamed(layers: Sequence[TracedLayer]) -> list[TracedLayer]:
    """With a number behind each name that several have."""
    times = collections.Counter(layer.name for layer in layers)
    taken = {name for name, n in times.items() if n == 1}
    found = []
    for layer in layers:
        name, number = layer.name, 0
        while times[layer.name] > 1 and (number == 0 or name in taken):
            number += 1
            name = f"{layer.name}_{number}"
        taken.add(name)
        found.append(layer._replace(name=name))
    return found


def size_bytes(array: Any) -> int:
    """Of an array, or of what has its shape and type."""
    return int(array.size) * int(array.dtype.itemsize)


def _own_variables(variables: Any) -> dict[str, Own]:
    """By the path of each module that has some."""
    own: dict[str, Own] = {}
    for (collection, *modules, name), leaf in _leaves(variables):
        path = "/".join(modules)
        sizes, param_bytes, state_bytes = own.get(path, Own({}, 0, 0))
        if collection == "params":
            own[path] = Own(
                {**sizes, name: leaf.size}, param_bytes + size_bytes(leaf), state_bytes
            )  # fmt: skip
        else:
            own[path] = Own(sizes, param_bytes, state_bytes + size_bytes(leaf))
    return own


def _leaves(variables: Any) -> Iterator[tuple[list[str], Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        yield [str(getattr(key, "key", key)) for key in path], leaf
