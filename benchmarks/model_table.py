"""Writes the table of models into the README: `python -m benchmarks.model_table README.md`."""

import argparse
import inspect
import pathlib

import jax
import jax.numpy as jnp

import flaxcnn
from flaxcnn.registry import FAMILIES

_BEGIN = "<!-- models: written by `python -m benchmarks.model_table README.md` -->"
_END = "<!-- /models -->"


def table() -> str:
    """One row per paper: its networks with their millions of parameters, their least image."""
    rows = ["| paper | networks (million parameters) | least image |", "|---|---|---|"]
    for module in FAMILIES.values():
        title = (inspect.getdoc(module) or "").splitlines()[0].rstrip(".")
        networks = ", ".join(
            f"`{name}` ({_parameters(name, module.NETWORK.min_size) / 1e6:.3g})"
            for name in module.VARIANTS
        )
        least = module.NETWORK.min_size
        rows.append(f"| {title} | {networks} | {least}x{least} |")
    return "\n".join(rows)


def _parameters(name: str, least_size: int) -> int:
    """Parameters for 1000 classes of RGB images; LeNet: for its ten classes of grey ones."""
    model = flaxcnn.create_model(name)
    side, channels = max(32, least_size), 1 if name.startswith("lenet") else 3
    images = jnp.zeros((1, side, side, channels))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def main() -> None:
    """Replaces what stands between the two marks of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readme", type=pathlib.Path, help="the file that holds the marks")
    path = parser.parse_args().readme
    before, _, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
    _, found, after = rest.partition(_END)
    if not found:
        parser.error(f"{path} lacks the lines {_BEGIN} and {_END}")
    path.write_text(f"{before}{_BEGIN}\n{table()}\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
