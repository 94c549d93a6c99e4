"""What all tests share: a quiet CPU, and no test that needs torch where there is none."""

import importlib.util
import os
from collections.abc import Iterator

import pytest

# Before JAX starts: the tests are about the CPU, wherever they run, and about several devices.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)


@pytest.fixture(autouse=True)
def _forget_large_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Frees what a slow test compiled: of hundreds of networks it is gigabytes in many small maps,
    and with too many of those jaxlib 0.10.2 crashed in its compiler."""
    yield
    if "slow" in request.keywords:
        import jax  # not above: it reads the variables below

        jax.clear_caches()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("torchvision"):
        return
    skip = pytest.mark.skip(reason="parity with torchvision: torch and torchvision not installed")
    for item in items:
        if "torch" in item.keywords:
            item.add_marker(skip)
