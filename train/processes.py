"""Several processes as one run, and signals that ask a run to stop."""

import signal
from types import FrameType

import jax

from train.errors import UsageError


def join_cluster(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the processes of this run, before any device is touched.

    With nothing given, JAX looks for a TPU pod, SLURM, Open MPI and the like; where there is no
    such cluster the run has one process.

    Raises:
        UsageError: where some of the three are given and some not, or the cluster cannot be joined.
    """
    given = [value is not None for value in (coordinator_address, num_processes, process_id)]
    if any(given) and not all(given):
        raise UsageError(
            "--coordinator_address, --num_processes and --process_id go together; give all or none"
        )
    host, _, port = (coordinator_address or "localhost:1").rpartition(":")
    if not (host and port.isdecimal()):
        raise UsageError(f"--coordinator_address={coordinator_address}: expected host:port")
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        if any(given):
            raise UsageError(f"cannot join {coordinator_address}: {_one_line(error)}") from None
        # JAX found no cluster; or, as in a notebook, it is at work and too late to join one.
        alone = ("coordinator_address should be defined", "must be called before any JAX calls")
        if not any(reason in str(error) for reason in alone):
            raise UsageError(
                f"cannot join the cluster that JAX found: {_one_line(error)}"
            ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class Interrupts:
    """SIGTERM and SIGINT, noted instead of obeyed: `with Interrupts() as interrupts`.

    The second signal of a kind is obeyed at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "Interrupts":
        kinds = (signal.SIGTERM, signal.SIGINT)
        self._previous = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def noted(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def told_alone(self) -> bool:
        """Whether a signal has come to a run of one process: it need not ask others to stop.

        Several agree in their steps and evaluations, where each takes part in the same ones.
        """
        return self.noted() and jax.process_count() == 1

    @property
    def exit_code(self) -> int:
        """As a shell's of a command that a signal ended: SIGTERM if another process was told."""
        return 128 + (self.signal or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, self._previous[self.signal])
