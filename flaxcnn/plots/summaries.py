"""The networks that a figure was asked for, counted."""

from collections.abc import Sequence

from flaxcnn import registry
from flaxcnn.accounting import Summary, summarize
from flaxcnn.errors import InputError


def summaries_of(names: Sequence[str], image_size: int | tuple[int, int] | None) -> list[Summary]:
    """Of each network, at the same image size if one is given.

    Raises:
        InputError: a ValueError, for an unknown name, no name, or a size that one can't take.
    """
    if not names:
        raise InputError("name a network, such as vgg16")
    for name in names:
        registry.family_of(name)  # before the first is traced
    return [summarize(name, image_size=image_size) for name in names]
