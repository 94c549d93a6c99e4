"""Tables of the networks: what there are, what they cost, and what memory XLA plans for that."""

import inspect

import jax
import jax.numpy as jnp

import flaxcnn
from benchmarks.tables import results
from flaxcnn.registry import FAMILIES
from flaxcnn.tables import millions, significant
from flaxcnn.weights import best_accuracy


def models() -> str:
    """One row per paper: its networks with their millions of parameters, their least image."""
    rows = ["| paper | networks (million parameters) | least image |", "|---|---|---|"]
    for module in FAMILIES.values():
        title = (inspect.getdoc(module) or "").splitlines()[0].rstrip(".")
        networks = ", ".join(
            f"`{name}` ({_parameters(name) / 1e6:.3g})" for name in module.VARIANTS
        )
        sizes = sorted({flaxcnn.create_model(name).min_size for name in module.VARIANTS})
        least = " or ".join(f"{size}x{size}" for size in sizes)
        rows.append(f"| {title} | {networks} | {least} |")
    return "\n".join(rows)


def _parameters(name: str) -> int:
    """Parameters for the classes that the network was published for; LeNet's of grey images."""
    model = flaxcnn.create_model(name)
    side, channels = max(32, model.min_size), 1 if name in FAMILIES["lenet"].VARIANTS else 3
    images = jnp.zeros((1, side, side, channels))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def costs_compared() -> str:
    """VGG-16 and GoogLeNet side by side, one image of 224x224 in float32."""
    names = ("vgg16", "googlenet")
    summaries = [flaxcnn.summarize(name) for name in names]
    dense = [[layer for layer in s.layers if layer.kind == "dense"] for s in summaries]
    facts = {
        "parameters": [f"{s.params:,}" for s in summaries],
        "of these in dense layers": [f"{sum(la.params for la in ls):,}" for ls in dense],
        "GMACs (one multiply-add is one)": [significant(s.macs / 1e9) for s in summaries],
        "outputs of all layers, MB": [millions(s.activation_bytes) for s in summaries],
        "of these of the first two stages": [
            millions(sum(stage.activation_bytes for stage in s.stages[:2])) for s in summaries
        ],
        "memory to predict, MB": [millions(s.forward_bytes) for s in summaries],
        "memory to train, MB": [millions(s.training_bytes) for s in summaries],
        "field of the last map, pixels": [str(s.stages[-2].receptive_field) for s in summaries],
        "depth": [str(s.layers[-1].depth) for s in summaries],
        "best published top-1, %": [f"{best_accuracy(name):.2f}" for name in names],
    }
    rows = [f"| | {' | '.join(f'`{name}`' for name in names)} |", "|---|---:|---:|"]
    rows += [f"| {fact} | {' | '.join(values)} |" for fact, values in facts.items()]
    return "\n".join(rows)


def memory() -> str:
    """XLA's plan by what is counted, with flaxcnn's path for the CPU and without."""
    plans = {}
    for kind in ("cpu", "cpu_plain"):
        plans[kind] = {row["network"]: row for row in results.rows(f"memory_{kind}.csv")}
    rows = [
        "| network, batch 8 | to train, counted | XLA plans | XLA plans, plain convolutions |",
        "|---|---:|---:|---:|",
    ]
    for name, row in plans["cpu"].items():
        counted = int(row["training_bytes"])
        planned = [int(plans[kind][name]["training_planned_bytes"]) for kind in plans]
        shown = [f"{millions(n)} MB, {n / counted:.2f}" for n in planned]
        rows.append(f"| {name} | {millions(counted)} MB | {' | '.join(shown)} |")
    return "\n".join(rows)
