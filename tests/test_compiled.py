"""Where compiled programs are kept."""

import pathlib
from collections.abc import Iterator

import jax
import pytest

from train import compiled


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def kept_in(backend: str, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    compiled.keep_programs()
    found: str | None = jax.config.values["jax_compilation_cache_dir"]
    return found


def test_an_accelerators_programs_are_kept(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAXCNN_CACHE", str(tmp_path))
    assert kept_in("gpu", monkeypatch) == str(tmp_path / "compiled")


def test_a_cpus_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_in("cpu", monkeypatch) is None


def test_where_one_has_been_chosen_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    jax.config.update("jax_compilation_cache_dir", "/chosen")
    assert kept_in("tpu", monkeypatch) == "/chosen"
