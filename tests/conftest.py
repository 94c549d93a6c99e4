"""What all tests share: a quiet CPU, and no test that needs torch where there is none."""

import importlib.util
import os

import pytest

# Before JAX starts: the tests are about the CPU, wherever they run, and about several devices.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("torchvision"):
        return
    skip = pytest.mark.skip(reason="parity with torchvision: torch and torchvision not installed")
    for item in items:
        if "torch" in item.keywords:
            item.add_marker(skip)
