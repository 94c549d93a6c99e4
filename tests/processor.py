"""What the processor that tests run on can do."""

from typing import Any

import numpy as np
import pytest

from flaxcnn.cpu import onednn


def skip_unless_computed(dtype: Any) -> None:
    """In bfloat16 oneDNN computes only where the processor has instructions for it."""
    if not onednn.computes(dtype):
        pytest.skip(f"oneDNN is not here, or the processor lacks instructions: {np.dtype(dtype)}")
