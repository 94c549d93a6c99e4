"""States and batches where `pmap` of some devices leaves them, so that a step is compiled once."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.steps import AXIS


def on_devices(state: Any, batch: Any, devices: int) -> tuple[Any, Any]:
    """The state whole on each of so many devices, the batch's leading axis spread over them."""
    mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,))
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.device_put(state, whole), jax.device_put(batch, split)
