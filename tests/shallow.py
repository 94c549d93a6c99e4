"""Networks with few blocks, of the same kinds: whole ones take minutes to compile."""

from typing import Any


def shallow(model: Any) -> Any:
    """The network with two blocks in its second stage and one in each other.

    That is one of every kind, with and without a change of shape; whole networks take minutes to
    compile.
    """
    if hasattr(model, "stage_sizes"):
        sizes = tuple(2 if i == 1 else 1 for i in range(len(model.stage_sizes)))
        return model.clone(stage_sizes=sizes)
    if hasattr(model, "table"):  # EfficientNet
        few = tuple(
            stage._replace(layers=2 if i == 1 else 1) for i, stage in enumerate(model.table)
        )
        return model.clone(table=few, depth=1.0)
    return model
