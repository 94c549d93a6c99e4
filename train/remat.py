"""Less memory for more time: of each block its input is kept, and the rest computed once more.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174. For
accelerators: XLA:CPU (jaxlib 0.10.2) undoes it, resnet50's step had the same 1,030 MB either way.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from flax import linen as nn

from flaxcnn import blocks

_LAYERS = (nn.Conv, nn.Dense, nn.Dropout, blocks.BatchNorm)


def has_blocks(params: Mapping[str, Any]) -> bool:
    """Whether a network with these parameters is made of more than single layers."""
    return any(isinstance(part, Mapping) for layer in params.values() for part in layer.values())


def blocks_computed_twice() -> AbstractContextManager[None]:
    """Of networks that are applied within, and then differentiated, blocks keep no more than that.

    What is no block is kept whole: the stem, the head, EfficientNet's last convolution.
    """
    within: list[nn.Module] = []  # the block that is being computed

    def intercept(
        method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        block = context.module
        is_block = len(block.path) == 1 and not isinstance(block, _LAYERS)
        if not is_block or context.method_name != "__call__" or within:
            return method(*args, **kwargs)

        def computed(block: nn.Module, *args: Any) -> Any:
            return type(block).__call__(block, *args, **kwargs)

        within.append(block)
        try:
            return nn.remat(computed)(block, *args)
        finally:
            within.pop()

    return nn.intercept_methods(intercept)
