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


class Layers:
    """Takes layers down, one after the other."""

    def __init__(self, variables: Any) -> None:
        self.found: list[TracedLayer] = []
        self._own = _own_variables(variables)
        self._claimed: set[str] = set()  # modules whose own variables a layer has
        self._names: collections.Counter[str] = collections.Counter()
        self._stage_begins = 0

    def own_size(self, path: str, name: str) -> int:
        """Of a parameter that is a module's own; 0 if it has none of that name."""
        return self._own[path].sizes.get(name, 0) if path in self._own else 0

    def unclaimed(self, path: str) -> bool:
        """Whether the module has variables of its own that no layer has yet."""
        return path in self._own and path not in self._claimed

    def add(
        self,
        path: str,
        kind: str,
        seen: Seen,
        out: Any,
        *,
        inputs: Collection[int],
        macs: int = 0,
        kept: Sequence[Kept] = (),
        window: Window | None = None,
        in_place: bool = False,
    ) -> int:
        """A layer of the module at `path`; returns its number.

        The first layer in a module is called as the module is, and has the module's own variables.
        """
        slug = kind.replace(" ", "_")
        if self.unclaimed(path):
            name, own = path or slug, self._own[path]
        else:
            name, own = f"{path}/{slug}" if path else slug, Own({}, 0, 0)
        self._claimed.add(path)
        self._names[name] += 1
        self.found.append(
            TracedLayer(
                name=name,
                kind=kind,
                window=window,
                output_shape=out.shape,
                output_bytes=size_bytes(out),
                params=sum(own.sizes.values()),
                param_bytes=own.param_bytes,
                state_bytes=own.state_bytes,
                macs=macs,
                seen=seen,
                stage=path.partition("/")[0],
                inputs=frozenset(inputs),
                in_place=in_place,
                kept=tuple(kept),
            )
        )
        return len(self.found) - 1

    def keep(self, number: int, kept: Kept) -> None:
        """One array more that the layer's gradient needs."""
        if number != IMAGES:
            layer = self.found[number]
            self.found[number] = layer._replace(kept=(*layer.kept, kept))

    def end_stage(self, name: str) -> None:
        """All since the last stage ended are of this one."""
        for i in range(self._stage_begins, len(self.found)):
            self.found[i] = self.found[i]._replace(stage=name)
        self._stage_begins = len(self.found)

    def finished(self) -> tuple[TracedLayer, ...]:
        """The layers, each with a name that no other has."""
        if self._stage_begins:
            self.end_stage(HEAD)
        so_far: collections.Counter[str] = collections.Counter()
        layers = []
        for layer in self.found:
            if self._names[layer.name] > 1:
                so_far[layer.name] += 1
                layer = layer._replace(name=f"{layer.name}_{so_far[layer.name]}")
            layers.append(layer)
        return tuple(layers)


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
