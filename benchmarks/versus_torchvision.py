"""One training step of the same network in flaxcnn, in plain linen and in PyTorch, on the CPU.

    python -m benchmarks.versus_torchvision --arch=resnet18 --image_size=32 --batch_size=128

Contestants: flaxcnn as it comes; flaxcnn with `FLAXCNN_PLAIN_CONVOLUTION=1`, which is linen as
everybody writes it; torchvision's network in eager mode, in NCHW and in channels_last. The step is
forward, cross entropy, backward and SGD with momentum 0.9 on one fixed float32 batch, dropout and
batch statistics included. They take turns (see `paired`), and the ratios are to the faster torch.
"""

import argparse
import csv
import importlib
import importlib.util
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.paired import Contestant, Timing, time_in_turns

Setup = tuple[Callable[[], object], dict[str, str]]

LEARNING_RATE = 1e-3  # small: the same batch again and again must not overflow
TORCH_LAYOUTS = ("NCHW", "channels_last")


def flax_train_step(arch: str, image_size: int, batch_size: int, num_classes: int) -> Setup:
    """A jitted, donating train step of `flaxcnn.create_model(arch)`."""
    import jax
    import jax.numpy as jnp
    import jaxlib
    import optax

    import flaxcnn

    model = flaxcnn.create_model(arch, num_classes=num_classes)
    images = jax.random.normal(jax.random.key(0), (batch_size, image_size, image_size, 3))
    labels = jnp.arange(batch_size) % num_classes
    optimizer = optax.sgd(LEARNING_RATE, momentum=0.9)
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(1))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})

    def train_step(state, step_number):  # type: ignore[no-untyped-def]
        params, batch_stats, momentum = state
        key = jax.random.fold_in(jax.random.key(2), step_number)

        def loss_function(params):  # type: ignore[no-untyped-def]
            output, updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            logits = getattr(output, "logits", output)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated.get("batch_stats", {})

        (loss, batch_stats), gradients = jax.value_and_grad(loss_function, has_aux=True)(params)
        updates, momentum = optimizer.update(gradients, momentum, params)
        return (optax.apply_updates(params, updates), batch_stats, momentum), loss

    compiled = jax.jit(train_step, donate_argnums=0)
    state = (params, batch_stats, optimizer.init(params))
    count = 0

    def step() -> None:
        nonlocal state, count
        state, loss = compiled(state, count)
        jax.block_until_ready((state, loss))
        count += 1

    device = jax.devices()[0].device_kind
    return step, {"versions": f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, {device}"}


def torch_train_step(
    arch: str, image_size: int, batch_size: int, num_classes: int, layout: str, threads: int
) -> Setup:
    """An eager train step of `torchvision.models.<arch>`."""
    import torch

    if importlib.util.find_spec("torchvision_cpu"):
        importlib.import_module("torchvision_cpu")  # lets torchvision load without its operators
    import torchvision

    torch.set_num_threads(threads)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    settings = {"init_weights": True} if arch == "googlenet" else {}
    model = torchvision.models.get_model(arch, num_classes=num_classes, **settings)
    model = model.to(memory_format=memory_format).train()
    images = torch.randn(batch_size, 3, image_size, image_size).to(memory_format=memory_format)
    labels = torch.arange(batch_size) % num_classes
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        output = model(images)
        logits = getattr(output, "logits", output)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()

    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    return step, {"versions": versions}


def contestants(options: argparse.Namespace) -> list[Contestant]:
    """Who takes part: further modes, types and compilers are further entries here."""
    work = {
        name: getattr(options, name) for name in ("arch", "image_size", "batch_size", "num_classes")
    }
    threads = str(options.threads)
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "JAX_PLATFORMS": "cpu"}
    plain = environment | {"FLAXCNN_PLAIN_CONVOLUTION": "1"}
    module = "benchmarks.versus_torchvision"
    entries = [
        Contestant("flaxcnn", module, "flax_train_step", work, environment),
        Contestant("flaxcnn, plain", module, "flax_train_step", work, plain),
    ]
    for layout in TORCH_LAYOUTS:
        arguments = work | {"layout": layout, "threads": options.threads}
        entries.append(
            Contestant(f"torch, {layout}", module, "torch_train_step", arguments, environment)
        )
    return entries


def fastest_torch(timings: Sequence[Timing]) -> Timing:
    """The layout to compare with."""
    return min(
        (t for t in timings if t.name.startswith("torch")), key=lambda timing: timing.median_ms
    )


def table(timings: Sequence[Timing]) -> str:
    """Milliseconds per step, median and range over the rounds, and ratios to the faster torch."""
    base = fastest_torch(timings)
    lines = [f"{'':22}{'median ms':>11}{'range ms':>19}{'  ratio to ' + base.name}"]
    for timing in timings:
        low, high = timing.range_ms
        ratio, least, greatest = timing.ratio_to(base)
        lines.append(
            f"{timing.name:22}{timing.median_ms:11.1f}{f'{low:.1f} .. {high:.1f}':>19}"
            f"  {ratio:.2f} ({least:.2f} .. {greatest:.2f})"
        )
    return "\n".join(lines)


def write_csv(path: Path, options: argparse.Namespace, timings: Sequence[Timing]) -> None:
    """One row for each contestant and round."""
    settings = ("arch", "mode", "image_size", "batch_size", "num_classes", "threads")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*settings, "contestant", "versions", "cpu", "round", "step_ms"])
        for timing in timings:
            for number, seconds in enumerate(timing.seconds):
                row = [getattr(options, name) for name in settings]
                facts = [timing.name, timing.facts["versions"], cpu_name()]
                writer.writerow([*row, *facts, number, f"{1e3 * seconds:.4f}"])


def cpu_name() -> str:
    """As the system names it, with the number of cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        pairs = [line.split(":", 1) for line in information.read_text().splitlines() if ":" in line]
        fields = {key.strip(): value.strip() for key, value in pairs}  # the last core's will do
        name = f"{fields.get('model name', name)} model {fields.get('model', '?')}"
    return f"{name}, {cores} cores"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, of this process if none is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet18", help="a name both libraries know")
    parser.add_argument("--mode", choices=["train"], default="train")
    parser.add_argument("--image_size", type=int, default=32, help="pixels")
    parser.add_argument("--batch_size", type=int, default=128, help="images per step")
    parser.add_argument("--num_classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9, help="at least 7 for a fair median")
    parser.add_argument("--round_seconds", type=float, default=1.0, help="per contestant and round")
    parser.add_argument("--threads", type=int, default=2, help="of torch; JAX takes all cores")
    parser.add_argument("--out", type=Path, help="write every round to this CSV file")
    return parser.parse_args(arguments)


def main() -> None:
    """Times, prints, writes."""
    options = parse_arguments()
    if options.out:  # before the minutes that it is to hold
        options.out.parent.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    timings = time_in_turns(
        contestants(options), rounds=options.rounds, round_seconds=options.round_seconds
    )
    print(
        f"{options.arch} {options.mode}, {options.image_size} px, batch {options.batch_size}, "
        f"float32, {options.rounds} rounds"
    )
    # Torch's threads wait for each other in busy loops: on a machine at work it loses far more.
    print(f"{cpu_name()}, load average before {load:.1f}")
    for versions in dict.fromkeys(timing.facts["versions"] for timing in timings):
        print(versions)
    print(table(timings))
    if options.out:
        write_csv(options.out, options, timings)


if __name__ == "__main__":
    main()
