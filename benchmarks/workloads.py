"""What is timed: a training step as `train.main` takes it, prediction, and a matrix product.

`training`, `prediction` and `matrix_product` are `setup` of a `paired.Contestant`: they compile,
and return (step, facts). A step waits for its result. Nothing here needs the trainer's data or
command line.
"""

import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import flaxcnn
from flaxcnn import convolution, pretrained
from flaxcnn.cpu import onednn
from train import cpu, optim, state, steps
from train.plan import Plan
from train.recipes import Precision

Setup = tuple[Callable[[], object], dict[str, str]]

CHANNELS = 3
IMAGES = "images.npy"  # beside the weights: those whose logits are compared
MEAN_AND_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Rows and columns of the matrices whose product gives a device's peak, and how many of them.
PRODUCT_ON_CPU, PRODUCT = (2048, 1), (8192, 8)
# Multiply-adds of a training step by those of its forward pass: with both gradients of each layer.
TRAINING_FACTOR = 3


def plan_for(
    arch: str, image_size: int, batch_size: int, num_classes: int, precision: Precision
) -> Plan:
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
        conv_init="network",
        head_init="network",
        augmentation="none",
        flip=False,
        seed=0,
        precision=precision,
        bn="local",
    )


def training(
    arch: str,
    image_size: int,
    batch_size: int,
    num_classes: int,
    precision: Precision,
    devices: int = 1,
    folder: str | None = None,
) -> Setup:
    """`train.main`'s step, over so many devices, on one random batch; `batch_size` is over all.

    From the weights of `torch_workloads.write_weights` in `folder`, if one is given.
    """
    _prepare(precision)
    plan = plan_for(arch, image_size, batch_size, num_classes, precision)
    model = state.create_model(plan, devices)
    optimiser = optim.optimiser(plan, optim.learning_rate_schedule(plan))
    whole, split = _shardings(devices)
    variables = _variables(model, arch, image_size, folder)
    shown = _logits(model, variables, np.load(Path(folder, IMAGES))) if folder else {}
    started = state.state_of(variables, plan, optimiser, steps.EVERYTHING)
    current = jax.device_put(started, whole)
    rng = np.random.default_rng(0)
    shape = (devices, batch_size // devices)
    images = rng.integers(0, 256, (*shape, image_size, image_size, CHANNELS), np.uint8)
    batch = jax.device_put(
        {
            "image": images,
            "label": rng.integers(0, num_classes, shape, np.int32),
            "stop": np.zeros(devices, bool),
        },
        split,
    )
    program, seconds = _compiled(
        _train_step(model, optimiser, plan, _devices(devices)), current, batch
    )

    def one_step() -> None:
        nonlocal current
        current, metrics = program(current, batch)
        jax.block_until_ready((current, metrics))

    return one_step, _facts(program, seconds, one_step) | shown


def training_program(
    arch: str,
    image_size: int,
    batch_size: int,
    num_classes: int,
    precision: Precision,
    device: jax.Device | None = None,
) -> Any:
    """The compiled step of `training` on one device, the first if none is given, from shapes."""
    step, *shapes = _training_shapes(arch, image_size, batch_size, num_classes, precision, device)
    return _compiled(step, *shapes)[0]


def seconds_to_trace(arch: str, image_size: int, batch_size: int) -> float:
    """What JAX takes to trace the step of `training`, in float32, before it compiles anything."""
    step, *shapes = _training_shapes(arch, image_size, batch_size, 1000, "float32", None)
    started = time.perf_counter()
    step.trace(*shapes)
    return time.perf_counter() - started


def _training_shapes(
    arch: str,
    image_size: int,
    batch_size: int,
    num_classes: int,
    precision: Precision,
    device: jax.Device | None,
) -> tuple[Any, Any, Any]:
    """The step of `training` on one device, and the shapes of its state and of its batch."""
    _prepare(precision)
    plan = plan_for(arch, image_size, batch_size, num_classes, precision)
    model = state.create_model(plan, 1)
    optimiser = optim.optimiser(plan, optim.learning_rate_schedule(plan))
    current = jax.eval_shape(lambda: state.create_state(model, plan, optimiser))
    shape = (1, batch_size)
    batch = {
        "image": jax.ShapeDtypeStruct((*shape, image_size, image_size, CHANNELS), jnp.uint8),
        "label": jax.ShapeDtypeStruct(shape, jnp.int32),
        "stop": jax.ShapeDtypeStruct((1,), jnp.bool_),
    }
    devices = [device] if device else _devices(1)
    return _train_step(model, optimiser, plan, devices), current, batch


def prediction(
    arch: str,
    image_size: int,
    batch_size: int,
    num_classes: int,
    precision: Precision,
    devices: int = 1,
    folder: str | None = None,
) -> Setup:
    """Logits of one batch of random images, over so many devices, as `predict` computes them.

    With the weights of `torch_workloads.write_weights` in `folder`, if one is given.
    """
    _prepare(precision)
    model = flaxcnn.create_model(arch, num_classes=num_classes, dtype=jnp.dtype(precision))
    whole, split = _shardings(devices)
    rng = np.random.default_rng(0)
    shape = (batch_size, image_size, image_size, CHANNELS)
    images = jax.device_put(rng.normal(size=shape).astype(np.float32), split)
    loaded = _variables(model, arch, image_size, folder)
    on_each = jax.ShapeDtypeStruct((batch_size // devices, *shape[1:]), images.dtype)
    fast, prepared = flaxcnn.optimize_for_inference(model, loaded, on_each)
    shown = {}
    if folder:
        to_show = np.load(Path(folder, IMAGES))
        shown = _logits(*flaxcnn.optimize_for_inference(model, loaded, to_show), to_show)
    variables = jax.device_put(prepared, whole)
    predict = jax.shard_map(
        partial(fast.apply, train=False),
        mesh=whole.mesh,
        in_specs=(whole.spec, split.spec),
        out_specs=split.spec,
        check_vma=False,  # the program was traced outside of it
    )
    program, seconds = _compiled(jax.jit(predict), variables, images)

    def one_step() -> None:
        jax.block_until_ready(program(variables, images))

    return one_step, _facts(program, seconds, one_step) | shown


def prediction_program(
    arch: str,
    image_size: int,
    batch_size: int,
    num_classes: int,
    precision: Precision,
    device: jax.Device | None = None,
) -> Any:
    """The compiled program of `prediction` on one device, the first if none is given."""
    _prepare(precision)
    model = flaxcnn.create_model(arch, num_classes=num_classes, dtype=jnp.dtype(precision))
    images = jax.ShapeDtypeStruct((batch_size, image_size, image_size, CHANNELS), jnp.float32)
    drawn = _random_variables(model, image_size)
    fast, variables = flaxcnn.optimize_for_inference(model, drawn, images)
    sharding = SingleDeviceSharding(device or _devices(1)[0])
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), (variables, images)
    )
    return _compiled(_predict(fast), *shapes)[0]


def matrix_product(precision: Precision) -> Setup:
    """Products of square matrices, summed in float32: what a device can do at best."""
    _prepare(precision)
    size, repeats = PRODUCT_ON_CPU if jax.default_backend() == "cpu" else PRODUCT
    dtype = jnp.dtype(precision)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32).astype(dtype))
    program, seconds = _compiled(product, a, b)

    def one_step() -> None:
        jax.block_until_ready([program(a, b) for _ in range(repeats)])

    return one_step, {**_facts(program, seconds, one_step), "flops": str(repeats * 2 * size**3)}


# ------------------------------------------------------------------------------- what they share
def _prepare(precision: Precision) -> None:
    """What `train.main` does before anything else."""
    cpu.prepare()
    steps.multiply_in(precision)


def _variables(
    model: flaxcnn.network.Network, arch: str, image_size: int, folder: str | None
) -> Any:
    if folder is None:
        return _random_variables(model, image_size)
    return pretrained.read_variables(arch, Path(folder, "weights.pth"))


def _logits(model: Any, variables: Any, images: np.ndarray) -> dict[str, str]:
    """In evaluation, as text."""
    logits = _predict(model)(variables, images)
    return {"logits": " ".join(f"{value:.9g}" for value in np.ravel(logits))}


def _random_variables(model: flaxcnn.network.Network, image_size: int) -> Any:
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


def _train_step(
    model: flaxcnn.network.Network,
    optimiser: optax.GradientTransformation,
    plan: Plan,
    devices: Sequence[jax.Device],
) -> Any:
    step = steps.make_train_step(model, optimiser, plan, MEAN_AND_STD, 100)
    return jax.jit(steps.train_over_devices(step, devices), donate_argnums=0)


def _predict(model: Any) -> Any:
    return jax.jit(partial(model.apply, train=False))


def _devices(count: int) -> list[jax.Device]:
    if jax.device_count() < count:
        raise RuntimeError(f"{count} devices are asked for, and there are {jax.device_count()}")
    return jax.devices()[:count]


def _shardings(devices: int) -> tuple[NamedSharding, NamedSharding]:
    """Whole on each device, and the leading axis spread over them."""
    mesh = Mesh(np.array(_devices(devices)), (state.AXIS,))
    whole, split = PartitionSpec(), PartitionSpec(state.AXIS)
    return NamedSharding(mesh, whole), NamedSharding(mesh, split)


def _compiled(function: Any, *arguments: Any) -> tuple[Any, float]:
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


def _facts(program: Any, compile_seconds: float, step: Callable[[], None]) -> dict[str, str]:
    """What runs and where, after a first step.

    The peak is the device's own count, on a CPU what the process took.
    """
    started = time.perf_counter()
    step()
    first = time.perf_counter() - started + compile_seconds
    device = jax.devices()[0]
    of_device = (device.memory_stats() or {}).get("peak_bytes_in_use")
    peak = of_device or _peak_of_process()
    return {
        "versions": f"jax {jax.__version__}, jaxlib {jaxlib.__version__}{_onednn()}",
        "device": device.device_kind,
        "compile_seconds": f"{compile_seconds:.2f}",
        "first_step_seconds": f"{first:.2f}",
        "planned_bytes": str(planned_bytes(program)),
        "peak_bytes": str(peak),
    }


def _onednn() -> str:
    version = onednn.version()
    return f", oneDNN {version}" if version and not convolution.PLAIN else ""


def _peak_of_process() -> int:
    """Resident bytes at most; where Linux tells, without those of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
