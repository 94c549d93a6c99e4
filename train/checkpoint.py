"""Checkpoints: orbax writes them asynchronously and renames them when whole, so none is half-read.

WORKDIR/checkpoints/STEP holds the state, the plan it was made under and the number of devices. The
newest three and the best are kept.
"""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

from train import steps
from train.errors import DivergedError, UsageError
from train.plan import Plan
from train.state import AXIS, TrainState


def _top1(results: dict[str, float]) -> float:
    return results["top1"]


class Checkpoints:
    """The checkpoints of a working directory: `with Checkpoints(workdir, plan) as checkpoints`."""

    def __init__(self, workdir: str, plan: Plan) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of every file it touches
        self._plan = plan
        directory = pathlib.Path(workdir, "checkpoints").absolute()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--workdir={workdir}: {error.strerror}") from None
        best = checkpoint_managers.BestN(
            n=1, get_metric_fn=_top1, keep_checkpoints_without_metrics=False
        )
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [checkpoint_managers.LatestN(3), best]
                ),
                best_fn=_top1,  # without it orbax does not write the results
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()  # waits for what is being written

    @property
    def best_top1(self) -> float:
        """The best test top1 among the checkpoints, a share of one; -1 where none has any."""
        step = self._manager.best_step()
        return -1.0 if step is None else _top1(self._manager.metrics(step))

    def restore(self, shapes: TrainState) -> TrainState | None:
        """The newest checkpoint, on each local device; None where there is no checkpoint.

        Args:
            shapes: the state's shapes and types, from `jax.eval_shape`.

        Raises:
            UsageError: if it was made under another plan; it names the fields that differ.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        self._check_plan(run["plan"])
        if run["devices"] != jax.device_count():
            logging.getLogger("train").warning(
                "the checkpoint is from %d devices, this run has %d: results will differ in their "
                "last digits, and with --bn=local in more",
                run["devices"],
                jax.device_count(),
            )
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_everywhere()), shapes
        )
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
        )
        return _on(steps.replicated(), restored.state)

    def _check_plan(self, saved: dict[str, Any]) -> None:
        differing = self._plan.differences(saved)
        if differing:
            raise UsageError(
                f"the checkpoint in {self._manager.directory} does not fit: "
                f"{'; '.join(differing)}; "
                "give the same flags, or another --workdir"
            )

    def save(self, state: TrainState, test_results: dict[str, float] | None = None) -> None:
        """Starts to write the state; by `test_results` the best checkpoint is known.

        Raises:
            DivergedError: for a state that is not finite: nobody could go on from it.
        """
        step = int(state.step)
        require_finite(state)
        if step == self._manager.latest_step():
            return
        run = {"plan": dataclasses.asdict(self._plan), "devices": jax.device_count()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_on(_everywhere(), state)), run=ocp.args.JsonSave(run)
            ),
            metrics=test_results,
            force=True,
        )


def require_finite(state: TrainState) -> None:
    """Raises DivergedError for a state that nobody should keep."""
    if not bool(_all_finite(state)):
        step = int(state.step)
        raise DivergedError(f"the state after step {step} is not finite; it is not saved")


@jax.jit
def _all_finite(state: TrainState) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]).all()


# ---------------------------------------------------------------------------- several processes
# Each process holds the whole state on its own devices; orbax wants arrays that span all processes.
def _everywhere() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec())


def _on(sharding: NamedSharding, state: TrainState) -> TrainState:
    """The same buffers of this process's devices, seen as part of another replication."""

    def view(x: jax.Array) -> jax.Array:
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    return jax.tree.map(view, state)
