"""The convolutional classifiers of the ImageNet decade, in JAX and Flax."""

from flaxcnn.convert import from_torchvision
from flaxcnn.registry import create_model, list_models

__all__ = ["create_model", "from_torchvision", "list_models"]
