"""Marks in a trace: where a module's call begins and ends, and which map ends a stage.

A mark is an operation that does nothing, `checkpoint_name`'s, on the arrays that come and go.
"""

from collections.abc import Iterator
from typing import Any

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

ENTER, LEAVE, STAGE = "enter", "leave", "stage"


class Marks:
    """Marks the calls of modules while `nn.intercept_methods(marks.intercept)` is on."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []  # by the number that their marks bear

    def intercept(self, next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """For `flax.linen.intercept_methods`."""
        if context.method_name == "stage_maps":  # of flaxcnn.network.Network
            return _stages(next_call(*args, **kwargs))
        if context.method_name != "__call__":
            return next_call(*args, **kwargs)
        number = len(self.modules)
        self.modules.append(context.module)
        args, kwargs = _marked((args, kwargs), ENTER, number)
        return _marked(next_call(*args, **kwargs), LEAVE, number)


def read(mark: str) -> tuple[str, str]:
    """What a mark says, and of which module, by number, or stage, by name."""
    what, _, which = mark.partition(":")
    return what, which


def _stages(maps: Iterator[tuple[str, jax.Array]]) -> Iterator[tuple[str, jax.Array]]:
    for name, feature_map in maps:
        yield name, _marked(feature_map, STAGE, name)


def _marked(tree: Any, what: str, which: int | str) -> Any:
    def mark(leaf: Any) -> Any:
        return checkpoint_name(leaf, f"{what}:{which}") if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(mark, tree)
