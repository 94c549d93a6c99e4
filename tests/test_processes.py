"""Signals are noted, and the second is obeyed; before its first step a run stops at once."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from train import main, steps
from train.processes import Interrupts


@pytest.fixture(autouse=True)
def _python_obeys_signals() -> Iterator[None]:
    """Also where the tests run in a shell's background, which ignores Ctrl-C; none ends them."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, signal.default_int_handler) for kind in kinds}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


def test_the_first_signal_is_noted_and_the_second_obeyed() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert interrupts.signal is None
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("where", [(main, "load_dataset"), (steps, "begin")])
def test_a_run_told_before_its_first_step_trains_nothing(
    where: tuple[Any, str],
    kind: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, name = where
    right = getattr(module, name)

    def told(asked: Any) -> Any:
        os.kill(os.getpid(), kind)
        return right(asked)

    monkeypatch.setattr(module, name, told)
    assert main.command(["--arch=lenet5", "--batch_size=32", "--steps=2"]) == code
    said = capsys.readouterr().out
    assert said.endswith("stopped before a step was made; nothing was trained\n")
    assert "first step" not in said


def test_one_of_several_processes_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with Interrupts() as interrupts:
        assert not interrupts.told_alone()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.told_alone()
        monkeypatch.setattr("jax.process_count", lambda: 2)
        assert interrupts.noted()
        assert not interrupts.told_alone()
