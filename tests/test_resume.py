"""What a run ends in does not depend on being killed, nor on how its devices are spread.

Every run is a process of its own. resnet20 at the digits' own 8 pixels, where batch statistics,
momentum and shuffling are all in play; LeNet-5 for several processes, which compile it all anew.
"""

import pathlib
import random

import jax
import numpy as np
import pytest
import runs

pytestmark = pytest.mark.slow

# A run is killed behind its evaluation, when the checkpoint of step 3 at least is whole.
FLAGS = (
    "--arch=resnet20",
    "--image_size=8",
    "--batch_size=32",
    "--steps=12",
    "--log_every=1",
    "--eval_every=6",
    "--checkpoint_every=3",
    "--ema_decay=0.9",
)


def assert_same_run(first: pathlib.Path, second: pathlib.Path) -> None:
    """To the last bit: every log line, parameter, statistic, if there are any, and momentum."""
    assert runs.records(first) == runs.records(second)
    states = runs.final_state(first), runs.final_state(second)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    names = {path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(states[0])}
    assert names >= {"params", "opt_state", "step", "average"}
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("devices", [1, 8])
def test_killed_at_any_step_a_run_ends_the_same(devices: int, tmp_path: pathlib.Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # On one device each run compiles afresh.
    how = {"devices": devices, "cached": devices > 1}
    runs.run(*FLAGS, f"--workdir={whole}", **how)
    victim = runs.start(*FLAGS, f"--workdir={killed}", **how)
    runs.kill_after(victim, killed, step=random.randrange(7, 11))
    said = runs.run(*FLAGS, f"--workdir={killed}", **how)
    assert "resumed after step" in said
    assert runs.final_state(whole)["batch_stats"]
    assert_same_run(whole, killed)


def run_both(*flags: str) -> str:
    """Two processes of four devices each, to their end; what they print."""
    both = [runs.start(*flags, *member, devices=4) for member in runs.cluster(2)]
    said = [process.communicate(timeout=400) for process in both]
    for process, (out, err) in zip(both, said, strict=True):
        assert process.returncode == 0, out + err[-4000:]
    return "".join(out for out, _ in said)


def test_two_processes_log_what_one_logs_and_killed_end_the_same(tmp_path: pathlib.Path) -> None:
    """LeNet-5, whose training does not amplify the rounding of sums in another order."""
    flags = ("--arch=lenet5", *FLAGS[2:])
    one, whole, killed = (tmp_path / name for name in ("one", "whole", "killed"))
    runs.run(*flags, f"--workdir={one}", devices=8)
    run_both(*flags, f"--workdir={whole}")
    for theirs, ours in zip(runs.records(one), runs.records(whole), strict=True):
        assert theirs.pop("split") == ours.pop("split")
        assert ours == pytest.approx(theirs, rel=1e-5)

    first, second = (
        runs.start(*flags, *member, f"--workdir={killed}", devices=4) for member in runs.cluster(2)
    )
    runs.kill_after(first, killed, step=random.randrange(7, 11))
    second.kill()
    second.communicate()
    assert "resumed after step" in run_both(*flags, f"--workdir={killed}")
    assert_same_run(whole, killed)
