"""What a run ends in does not depend on being killed, nor on how its devices are spread.

Every run is a process of its own. resnet18 at the digits' own 8 pixels: batch statistics, momentum,
augmentation and shuffling are all in play, and a run takes seconds.
"""

import pathlib
import random
from typing import Any

import jax
import numpy as np
import pytest
import runs

pytestmark = pytest.mark.slow

FLAGS = (
    "--arch=resnet18",
    "--image_size=8",
    "--batch_size=32",
    "--steps=24",
    "--log_every=3",
    "--eval_every=10",
    "--checkpoint_every=4",
)


def assert_same_run(first: pathlib.Path, second: pathlib.Path) -> None:
    """To the last bit: every log line, parameter, statistic and momentum."""
    assert runs.records(first) == runs.records(second)
    states = runs.final_state(first), runs.final_state(second)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    names = {path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(states[0])}
    assert names >= {"params", "batch_stats", "opt_state", "step"}
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("devices", [1, 8])
def test_killed_at_any_step_a_run_ends_the_same(devices: int, tmp_path: pathlib.Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.run(*FLAGS, f"--workdir={whole}", devices=devices)
    victim = runs.start(*FLAGS, f"--workdir={killed}", devices=devices)
    runs.kill_after(victim, killed, step=random.randrange(5, 22))
    runs.run(*FLAGS, f"--workdir={killed}", devices=devices)
    assert_same_run(whole, killed)


def test_two_processes_are_one_run_and_resume(tmp_path: pathlib.Path) -> None:
    """Two processes of four devices log what one process of eight logs, killed or not."""
    one, two = tmp_path / "one", tmp_path / "two"
    runs.run(*FLAGS, f"--workdir={one}", devices=8)

    def start_both() -> list[Any]:
        return [
            runs.start(*FLAGS, *member, f"--workdir={two}", devices=4) for member in runs.cluster(2)
        ]

    first, second = start_both()
    runs.kill_after(first, two, step=random.randrange(5, 22))
    second.kill()
    second.communicate()
    for process in start_both():
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err[-4000:]
    assert_same_run(one, two)


@pytest.mark.parametrize("arch", ["resnet18"])
def test_synchronous_batch_norm_makes_devices_one(arch: str, tmp_path: pathlib.Path) -> None:
    """Five steps on one device and on eight: sync agrees to float32's rounding, local does not."""
    flags = (f"--arch={arch}", *FLAGS[1:3], "--steps=5", "--learning_rate=0.01")
    for name, devices, bn in (("one", 1, "local"), ("sync", 8, "sync"), ("local", 8, "local")):
        runs.run(*flags, f"--bn={bn}", f"--workdir={tmp_path / name}", devices=devices)
    states = {name: runs.final_state(tmp_path / name) for name in ("one", "sync", "local")}

    def distance(a: Any, b: Any, part: str) -> float:
        pairs = zip(jax.tree.leaves(a[part]), jax.tree.leaves(b[part]), strict=True)
        return max(float(np.abs(x - y).max()) / float(np.abs(y).max()) for x, y in pairs)

    for part in ("params", "batch_stats"):
        assert distance(states["sync"], states["one"], part) < 1e-3, part
        assert distance(states["local"], states["one"], part) > 3e-2, part
