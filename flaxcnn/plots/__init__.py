"""Pictures of what networks cost and of what they see: `python -m flaxcnn plot ...`.

They need matplotlib, which is imported only when one is drawn.
"""

from flaxcnn.plots.accuracy import models
from flaxcnn.plots.files import check_path, save
from flaxcnn.plots.growth import receptive_fields
from flaxcnn.plots.spending import layers

__all__ = ["check_path", "layers", "models", "receptive_fields", "save"]
