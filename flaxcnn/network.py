"""What every network of the registry is: a sequence of named stages, and a head that classifies."""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from flaxcnn.blocks import check_image_size

FeatureMaps = Mapping[str, jax.Array]
Variants = Mapping[str, partial[Any]]  # name -> a network with the arguments that make it that one


class Network(nn.Module):
    """The base of all networks: images [N, H, W, C] -> logits [N, num_classes].

    A subclass says what its stages are and how the head goes on from their feature maps:

    - `stages`: the names of its feature maps, in order;
    - `stage_maps(x, train)`: yields (name, feature map [N, H, W, C]) of one stage after the other,
      so that whoever asks for some computes no more than those;
    - `head(maps, train)`: feature maps by name -> logits; pooled features if `num_classes` is 0.

    Logits are in at least float32, whatever `dtype`; pooled features are in `dtype`.

    Raises:
        ValueError: for images that are not [N, H, W, C], or smaller than `min_size`.
    """

    num_classes: int = 1000
    dtype: DTypeLike = jnp.float32  # of the computation; parameters are at least float32

    min_size: ClassVar[int] = 1  # pixels, the least height and width of an image
    # The dense layers behind a flatten, and the (C, H, W) that torch flattens there.
    flattened: ClassVar[Mapping[str, tuple[int, int, int]]] = {}

    @property
    def default_image_size(self) -> int:
        """Pixels, of the images that the network was published for; it takes others as well."""
        return 224

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the feature maps, in the order in which they are computed."""
        raise NotImplementedError

    def stage_maps(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """(name, feature map) of each stage in turn; `x` is in `dtype`."""
        raise NotImplementedError

    def head(self, maps: FeatureMaps, train: bool) -> Any:
        """The logits, or the pooled features if `num_classes` is 0."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, only: Collection[str] | None = None) -> Any:
        """The logits; or, where `only` names some stages, their feature maps by name."""
        check_image_size(x, self.min_size, type(self).__name__)
        maps = {}
        for name, feature_map in self.stage_maps(x.astype(self.dtype), train):
            maps[name] = feature_map
            if only is not None and maps.keys() >= set(only):
                return {name: maps[name] for name in only}
        return self.head(maps, train)


def extract_features(
    model: nn.Module, variables: Mapping[str, Any], images: jax.Array, stages: Collection[str]
) -> dict[str, jax.Array]:
    """The feature maps [N, h, w, c] of the named stages, in evaluation mode.

    Args:
        model: of `create_model`; `model.stages` lists the names that it has.
        images: [N, H, W, C].
        stages: names; nothing behind the last of them is computed.

    Raises:
        TypeError: for a model that is none of flaxcnn's.
        ValueError: for no names, or a name that `model.stages` lacks; it lists those.
    """
    if not isinstance(model, Network):
        raise TypeError(f"a network of flaxcnn.create_model has stages; got {type(model).__name__}")
    unknown = [name for name in stages if name not in model.stages]
    if unknown or not stages:
        wrong = f"no stage {', '.join(unknown)}" if unknown else "no stages were asked for"
        raise ValueError(f"{type(model).__name__}: {wrong}; it has {', '.join(model.stages)}")
    maps = model.apply(variables, images, train=False, only=tuple(stages))
    return cast(dict[str, jax.Array], maps)
