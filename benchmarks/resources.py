"""What every network of the registry costs: `python -m benchmarks.resources`.

It writes `benchmarks/results/resources.csv` and, with fewer columns, the table in the package from
which `python -m flaxcnn models` answers. With `--compiled` it compiles instead, for some networks,
prediction and a training step, and writes to `benchmarks/results/` how much memory XLA plans for
them beside what `flaxcnn.summarize` counts; with `FLAXCNN_PLAIN_CONVOLUTION=1` in the environment,
without flaxcnn's path for the CPU. Nothing is run: minutes of compilation on two cores.
"""

import argparse
import csv
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flaxcnn
from benchmarks.workloads import planned_bytes
from flaxcnn import convolution, registry, tables
from flaxcnn.accounting import costs
from flaxcnn.weights import best_accuracy
from train.steps import training_loss

COSTS = pathlib.Path(costs.__file__).with_name("costs.csv")
RESULTS = pathlib.Path(__file__).parent / "results"
COMPILED = ("alexnet", "vgg16", "resnet18", "resnet50", "googlenet", "efficientnet_b0")
BATCH_SIZE, IMAGE_SIZE = 8, 224


def main() -> None:
    """Writes one of the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiled", action="store_true", help="memory as XLA plans it")
    if not parser.parse_args().compiled:
        rows = [counted(name) for name in flaxcnn.list_models()]
        _write(RESULTS / "resources.csv", rows)
        columns = ("network", *costs.Cost._fields)
        _write(COSTS, [{column: row[column] for column in columns} for row in rows])
        return
    device = jax.devices()[0]
    plain = "_plain" if convolution.PLAIN else ""
    _write(RESULTS / f"memory_{device.platform}{plain}.csv", [planned(name) for name in COMPILED])


def counted(name: str) -> dict[str, Any]:
    """A row of both files, of one image in float32."""
    size = costs.image_size(name)
    summary = flaxcnn.summarize(name, image_size=size)
    found = {field: getattr(summary, field) for field in costs.Cost._fields[1:]}
    return {
        "network": name,
        "family": registry.family_of(name),
        "image_size": size,
        **found,
        "kept_bytes": summary.kept_bytes,  # for the backward pass
        "depth": summary.layers[-1].depth,
        "last_map_receptive_field": tables.sides(summary.stages[-2].receptive_field),
        "acc@1": best_accuracy(name),
    }


def planned(name: str) -> dict[str, Any]:
    """Memory by XLA's plan and as it is counted, in bytes."""
    model = flaxcnn.create_model(name)
    images = jax.ShapeDtypeStruct((BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((BATCH_SIZE,), jnp.int32)
    variables = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=False), images
    )  # fmt: skip
    optimiser = optax.sgd(0.1, momentum=0.9)

    def loss_of(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> Any:
        keys = {"dropout": jax.random.key(0), "stochastic_depth": jax.random.key(1)}
        output, updates = model.apply(
            {"params": params, "batch_stats": stats}, x, train=True, mutable=True, rngs=keys
        )
        return training_loss(output, y, 0.0), updates.get("batch_stats", {})

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        params, stats, momentum = state
        grads, stats = jax.grad(loss_of, has_aux=True)(params, stats, x, y)
        updates, momentum = optimiser.update(grads, momentum, params)
        return optax.apply_updates(params, updates), stats, momentum

    params = variables["params"]
    state = (params, variables.get("batch_stats", {}), jax.eval_shape(optimiser.init, params))
    forward = jax.jit(lambda v, x: model.apply(v, x, train=False)).lower(variables, images)
    training = jax.jit(step, donate_argnums=0).lower(state, images, labels)
    summary = flaxcnn.summarize(name, image_size=IMAGE_SIZE, batch_size=BATCH_SIZE)
    row: dict[str, Any] = {
        "network": name,
        "batch_size": BATCH_SIZE,
        "image_size": IMAGE_SIZE,
        "plain_convolution": int(convolution.PLAIN),
        "forward_bytes": summary.forward_bytes,
        "forward_planned_bytes": planned_bytes(forward.compile()),
        "training_bytes": summary.training_bytes,
        "training_planned_bytes": planned_bytes(training.compile()),
        "jax": jax.__version__,
    }
    print(
        f"{name}: planned / counted {row['forward_planned_bytes'] / summary.forward_bytes:.2f} "
        f"to predict, {row['training_planned_bytes'] / summary.training_bytes:.2f} to train"
    )
    return row


def _write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(path)


if __name__ == "__main__":
    main()
