"""What is timed: a training step as `train.main` takes it, prediction, and a matrix product.

Each function is the `setup` of a `paired.Contestant`: it compiles, and returns (step, facts). A step
waits for its result. Nothing here needs the trainer's data or command line.
"""

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flaxcnn
from train import optim, state, steps
from train.plan import Plan

Setup = tuple[Callable[[], object], Mapping[str, str]]

CHANNELS = 3
MEAN_AND_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PRODUCT_SIZE = 4096  # rows and columns of the matrices whose product gives a device's peak
# Multiply-adds of a training step by those of its forward pass: with both gradients of each layer.
TRAINING_FACTOR = 3


def plan_for(arch: str, image_size: int, batch_size: int, num_classes: int, precision: str) -> Plan:
    """SGD with Nesterov's momentum and weight decay, at a rate that the same batch again bears."""
    return Plan(
        arch=arch,
        dataset="random",
        data_origin="",
        train_examples=batch_size,
        test_examples=0,
        num_classes=num_classes,
        channels=CHANNELS,
        image_size=image_size,
        recipe="classic",
        batch_size=batch_size,
        steps=1_000_000,
        learning_rate=1e-4,
        schedule="cosine",
        warmup_steps=0,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        decay_norm_and_bias=True,
        label_smoothing=0.0,
        dropout_rate=None,
        clip_norm=0.0,
        ema_decay=0.0,
        head_init="network",
        augmentation="none",
        flip=False,
        seed=0,
        precision=precision,  # type: ignore[arg-type]
        bn="local",
    )


def training(
    arch: str, image_size: int, batch_size: int, num_classes: int, precision: str, devices: int = 1
) -> Setup:
    """`train.main`'s step, over so many devices, on one random batch; `batch_size` is over all."""
    plan = plan_for(arch, image_size, batch_size, num_classes, precision)
    model = state.create_model(plan, devices)
    optimiser = optim.optimiser(plan, optim.learning_rate_schedule(plan))
    mesh = Mesh(np.array(jax.devices()[:devices]), (state.AXIS,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((state.AXIS,), ()))
    variables = random_variables(model, image_size)
    current = jax.device_put(
        state.state_of(variables, plan, optimiser, steps.EVERYTHING), whole
    )  # fmt: skip
    shape = (devices, batch_size // devices)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (*shape, image_size, image_size, CHANNELS), np.uint8),
        "label": rng.integers(0, num_classes, shape, np.int32),
        "stop": np.zeros(devices, bool),
    }
    batch = jax.device_put(batch, split)
    step = jax.pmap(
        steps.make_train_step(model, optimiser, plan, MEAN_AND_STD, 100),
        state.AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        donate_argnums=0,
        devices=jax.devices()[:devices],
    )
    program, seconds = compiled(jax.jit(step, donate_argnums=0), current, batch)

    def one_step() -> None:
        nonlocal current
        current, metrics = program(current, batch)
        jax.block_until_ready((current, metrics))

    one_step()
    return one_step, facts(program, seconds)


def prediction(
    arch: str,
    image_size: int,
    batch_size: int,
    num_classes: int,
    precision: str,
    devices: int = 1,
    fold: bool = True,
) -> Setup:
    """Logits of one batch of random images, batch norm folded, over so many devices."""
    model = flaxcnn.create_model(arch, num_classes=num_classes, dtype=jnp.dtype(precision))
    variables = random_variables(model, image_size)
    if fold:
        model, variables = flaxcnn.fold_batchnorm(model, variables)
    mesh = Mesh(np.array(jax.devices()[:devices]), (state.AXIS,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((state.AXIS,), ()))
    rng = np.random.default_rng(0)
    shape = (batch_size, image_size, image_size, CHANNELS)
    images = jax.device_put(rng.normal(size=shape).astype(np.float32), split)
    variables = jax.device_put(variables, whole)
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False), out_shardings=split)
    program, seconds = compiled(apply, variables, images)

    def one_step() -> None:
        jax.block_until_ready(program(variables, images))

    one_step()
    return one_step, facts(program, seconds)


def matrix_product(precision: str, repeats: int = 4) -> Setup:
    """Products of square matrices, summed in float32: what a device can do at best."""
    size, dtype = PRODUCT_SIZE, jnp.dtype(precision)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32).astype(dtype))
    program, seconds = compiled(product, a, b)

    def one_step() -> None:
        jax.block_until_ready([program(a, b) for _ in range(repeats)])

    return one_step, {**facts(program, seconds), "flops": str(repeats * 2 * size**3)}


# ------------------------------------------------------------------------------------ what they share
def random_variables(model: flaxcnn.network.Network, image_size: int) -> Any:
    """Seeded numbers, drawn on the host: to compile their making takes longer than a step's."""
    rng = np.random.default_rng(0)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, CHANNELS), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, leaf.dtype)
        if path[-1].key in ("bias", "mean"):
            return np.zeros(leaf.shape, leaf.dtype)
        fan_in = np.prod(leaf.shape[:-1])
        kernel = rng.standard_normal(leaf.shape, np.float32)
        return (kernel * np.float32(fan_in**-0.5)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def compiled(function: Any, *arguments: Any) -> tuple[Any, float]:
    """The program for these arguments, and the seconds that tracing and compiling took."""
    started = time.perf_counter()
    program = function.lower(*arguments).compile()
    return program, time.perf_counter() - started


def planned_bytes(program: Any) -> int:
    """Memory by XLA's plan: arguments, results that do not take their place, and between."""
    plan = program.memory_analysis()
    return int(
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes
    )


def facts(program: Any, compile_seconds: float) -> dict[str, str]:
    """What ran and where; the peak is the device's own count, on a CPU what the process took."""
    device = jax.devices()[0]
    of_device = (device.memory_stats() or {}).get("peak_bytes_in_use")
    peak = of_device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "versions": f"jax {jax.__version__}, jaxlib {jaxlib.__version__}",
        "device": device.device_kind,
        "compile_seconds": f"{compile_seconds:.2f}",
        "planned_bytes": str(planned_bytes(program)),
        "peak_bytes": str(peak),
    }
