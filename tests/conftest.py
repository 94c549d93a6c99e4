"""What all tests share: a quiet CPU, and no test that needs torch where there is none."""

import importlib.util
import os
import pathlib
from collections.abc import Iterator

import pytest

# Before JAX starts: the tests are about the CPU, wherever they run, and about several devices.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# One core for each worker of pytest-xdist: XLA's and torch's threads otherwise wait for each other.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if _worker and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Processes that tests start share what they compile; this one has read its settings."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if _worker else base) / "compiled"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)


@pytest.fixture(autouse=True)
def _forget_large_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Frees what tests compiled, before it is too much.

    Each program is held in memory maps of its own, thousands for a deep network; Linux allows a
    process 65,530, and jaxlib 0.10.2 crashed in its compiler when hundreds of networks were there.
    """
    yield
    if "slow" in request.keywords or _memory_maps() > 20_000:
        import jax  # not above: it reads the variables below

        jax.clear_caches()


def _memory_maps() -> int:
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("torchvision"):
        return
    skip = pytest.mark.skip(reason="parity with torchvision: torch and torchvision not installed")
    for item in items:
        if "torch" in item.keywords:
            item.add_marker(skip)
