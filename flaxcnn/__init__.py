"""The convolutional classifiers of the ImageNet decade, in JAX and Flax."""

from flaxcnn.convert import from_torchvision
from flaxcnn.googlenet import GoogLeNetOutput
from flaxcnn.network import extract_features
from flaxcnn.registry import create_model, list_models

__all__ = [
    "GoogLeNetOutput",
    "create_model",
    "extract_features",
    "from_torchvision",
    "list_models",
]
