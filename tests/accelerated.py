"""What an accelerator computes beside what the CPU does, as JSON. Run by `test_accelerator`.

python tests/accelerated.py [network ...]
"""

import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flaxcnn
from benchmarks import workloads
from flaxcnn import pooling
from train import optim, state, steps

SIZE, BATCH, CLASSES = 96, 8, 10
POOLS = {"3/2 of 32": (32, 3, 2, 1), "2/2 of 31": (31, 2, 2, 0), "3/1 of 14": (14, 3, 1, 1)}


def three_steps(arch: str, device: jax.Device) -> tuple[np.ndarray, np.ndarray]:
    """The losses of three training steps in float64, and the momentum behind them.

    Float32 would not do: where the input of a ReLU is next to zero it lets through what it would
    not have, and of googlenet's momentum a fifth is another when sums come in another order. Nor
    would uint8 images, which a step normalises in float32, rounding as a device likes.
    """
    with jax.default_device(device), jax.enable_x64():
        plan = workloads.plan_for(arch, SIZE, BATCH, CLASSES, "float32")
        model = flaxcnn.create_model(arch, num_classes=CLASSES, dtype=jnp.float64)
        optimiser = optim.optimiser(plan, optim.learning_rate_schedule(plan))
        variables = jax.tree.map(np.float64, workloads._random_variables(model, SIZE))
        current = state.state_of(variables, plan, optimiser, steps.EVERYTHING)
        of_one = steps.make_train_step(model, optimiser, plan, None, 100)
        step = steps.train_over_devices(of_one, [device])
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.normal(size=(1, BATCH, SIZE, SIZE, 3)),
            "label": rng.integers(0, CLASSES, (1, BATCH), np.int32),
            "stop": np.zeros(1, bool),
        }
        losses = []
        for _ in range(3):
            current, metrics = step(current, batch)
            losses.append(float(metrics["loss"]))
        momentum = [np.ravel(leaf) for leaf in jax.tree.leaves(current.opt_state)]
        return np.array(losses), np.concatenate(momentum)


def logits(arch: str, device: jax.Device, dtype: Any) -> np.ndarray:
    """Of the network as `optimize_for_inference` has it for that device."""
    with jax.default_device(device):
        model = flaxcnn.create_model(arch, num_classes=CLASSES, dtype=dtype)
        variables = workloads._random_variables(model, SIZE)
        images = np.random.default_rng(1).normal(size=(BATCH, SIZE, SIZE, 3)).astype(np.float32)
        fast, prepared = flaxcnn.optimize_for_inference(model, variables, images)
        return np.asarray(jax.jit(partial(fast.apply, train=False))(prepared, images))


def pooled(geometry: tuple[int, int, int, int], device: jax.Device) -> list[np.ndarray]:
    """The maxima of an image of few values, many of them equal, and the gradient."""
    size, window, stride, padding = geometry
    with jax.default_device(device):
        rng = np.random.default_rng(2)
        x = jnp.asarray(rng.integers(0, 4, (2, size, size, 8)), jnp.float32)
        y, gradient = jax.vjp(lambda x: pooling.max_pool(x, window, stride, padding), x)
        dy = jnp.asarray(rng.integers(1, 5, y.shape), jnp.float32)  # whose sums are exact
        return [np.asarray(y), np.asarray(gradient(dy)[0])]


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The norm of the difference, relative to that of the values."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def main(archs: list[str]) -> None:
    """One line for each comparison: {"what", "device", "apart"}."""
    steps.multiply_in("float32")
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]

    def tell(what: str, difference: float) -> None:
        line = {"what": what, "device": device.device_kind, "apart": difference}
        print(json.dumps(line), flush=True)

    for name, geometry in POOLS.items():
        pairs = zip(pooled(geometry, device), pooled(geometry, cpu), strict=True)
        tell(f"max pool {name}", max(apart(*pair) for pair in pairs))
    for arch in archs:
        (losses, momentum), (expected, reference) = (three_steps(arch, d) for d in (device, cpu))
        tell(f"{arch} losses", apart(losses, expected))
        tell(f"{arch} momentum", apart(momentum, reference))
        exact = logits(arch, cpu, jnp.float32)
        tell(f"{arch} logits", apart(logits(arch, device, jnp.float32), exact))
        tell(f"{arch} logits in bfloat16", apart(logits(arch, device, jnp.bfloat16), exact))


if __name__ == "__main__":
    main(sys.argv[1:])
