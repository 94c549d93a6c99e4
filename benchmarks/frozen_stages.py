"""What freezing stages saves: the trainer's step with all trained and with the last stages alone.

    python -m benchmarks.frozen_stages --csv frozen_stages.csv

`--transfer=finetune` and `--transfer=from:STAGE` for each `--stage` take turns on random images.
The memory is what XLA plans for the step besides the state and the batch.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from benchmarks.machine import cpu_name
from benchmarks.paired import Contestant, time_in_turns
from benchmarks.row_files import write_csv


def transfer_step(
    arch: str, image_size: int, batch_size: int, how: str
) -> tuple[Callable[[], None], Mapping[str, str]]:
    """A training step as `train.main` takes it, from random weights."""
    import jax
    import numpy as np

    import flaxcnn
    from train import datasets, optim, state, steps, transfer
    from train.config import make_plan, parse

    flags = [f"--arch={arch}", f"--image_size={image_size}", f"--batch_size={batch_size}"]
    config = parse([*flags, "--weights=DEFAULT", f"--transfer={how}", "--freeze_bn=False"])
    digits = datasets.load("digits", None, "train", None)
    plan = make_plan(config, digits, 1, False)
    model: flaxcnn.network.Network = state.create_model(plan, 1)
    split = transfer.split(model, plan)
    optimiser = split.scaled(optim.optimiser(plan, optim.learning_rate_schedule(plan)))
    current = steps.begin(lambda: state.create_state(model, plan, optimiser, split))
    step = steps.make_train_step(model, optimiser, plan, digits.mean_and_std, 1, split)
    rng = np.random.default_rng(0)
    shape = (batch_size, image_size, image_size, plan.channels)
    (batch,) = steps.on_devices(
        [
            {
                "image": rng.integers(0, 256, shape, np.uint8),
                "label": rng.integers(0, plan.num_classes, batch_size, np.int32),
            }
        ]
    )
    batch["stop"] = steps.told_to_stop(False)
    compiled = jax.jit(steps.train_over_devices(step), donate_argnums=0)
    program = compiled.lower(current, batch).compile()
    planned = program.memory_analysis()
    assert planned is not None  # a CPU, GPU or TPU has one

    def one_step() -> None:
        nonlocal current
        current, metrics = program(current, batch)
        jax.block_until_ready((current, metrics))

    trained = sum(leaf.size for leaf in jax.tree.leaves(split.trained(current.params)))
    return one_step, {
        "trained": str(trained),
        "planned_bytes": str(planned.temp_size_in_bytes),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the medians; writes one row for each round to `--csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="efficientnet_lite0", help="network (efficientnet_lite0)")
    parser.add_argument(
        "--stage", nargs="+", default=["features_5", "features_8"], help="first trained stage"
    )
    parser.add_argument("--image_size", type=int, default=96, help="pixels (96)")
    parser.add_argument("--batch_size", type=int, default=32, help="images (32)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (9)")
    parser.add_argument("--csv", type=Path, help="file to write the rounds to")
    options = parser.parse_args(arguments)
    shared = {name: getattr(options, name) for name in ("arch", "image_size", "batch_size")}
    ways = ["finetune", *(f"from:{stage}" for stage in options.stage)]
    timings = time_in_turns(
        [
            Contestant(how, "benchmarks.frozen_stages", "transfer_step", {**shared, "how": how})
            for how in ways
        ],
        rounds=options.rounds,
    )
    rows = []
    for timing in timings:
        ratio, _, _ = timing.ratio_to(timings[0])
        megabytes = int(timing.facts["planned_bytes"]) / 1e6
        print(
            f"{timing.name}: {timing.median_ms:.0f} ms, {ratio:.2f} of {ways[0]}; "
            f"{megabytes:.0f} MB; {int(timing.facts['trained']):,} parameters trained"
        )
        for number, seconds in enumerate(timing.seconds):
            rows.append(
                {
                    **shared,
                    "transfer": timing.name,
                    "round": number,
                    "step_ms": round(1e3 * seconds, 2),
                    **timing.facts,
                    "jax": metadata.version("jax"),
                    "cpu": cpu_name(),
                }
            )
    write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
