"""What a run says: metrics.jsonl, TensorBoard events, and a progress bar or plain lines."""

import collections
import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from flaxcnn import tables
from train.errors import UsageError
from train.plan import Plan
from train.state import TrainState

Record = dict[str, Any]
_HEADS = {"lecun": "dense layers start lecun", "zero": "a new last layer from zero"}


# ------------------------------------------------------------------------------------ measuring
class Clock:
    """Steps and wall-clock time of training since the last lap, and the time without a batch."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins a lap without a step."""
        self._started, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @property
    def seconds(self) -> float:
        """Of the lap so far."""
        return time.perf_counter() - self._started

    def lap(self) -> tuple[float, float]:
        """Steps per second since the last lap, and the share of it spent waiting for data."""
        steps, waited, seconds = self._steps, self._waited, self.seconds
        self.restart()
        return steps / seconds, waited / seconds

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """A step begins: the time in here is spent without its batch."""
        entered = time.perf_counter()
        yield
        self._waited += time.perf_counter() - entered
        self._steps += 1

    @contextlib.contextmanager
    def paused(self, state: TrainState) -> Iterator[None]:
        """Time in here is not training's, which goes on until `state` is there."""
        jax.block_until_ready(state)
        entered = time.perf_counter()
        yield
        self._started += time.perf_counter() - entered


def train_record(state: TrainState, plan: Plan, learning_rate: float, clock: Clock) -> Record:
    """The log line of the steps since the last one, means of loss and top1; ends the lap."""
    totals, step = jax.device_get((state.totals, state.step))
    steps_per_second, data_wait = clock.lap()
    return {
        "split": "train",
        "step": int(step),
        "epoch": float(step * plan.batch_size / plan.train_examples),
        "loss": float(totals.loss / totals.steps),
        "top1": float(totals.top1 / totals.steps),
        "learning_rate": learning_rate,
        "images_per_second": steps_per_second * plan.batch_size,
        "data_wait": data_wait,
    }


# ---------------------------------------------------------------------------------------- files
@contextlib.contextmanager
def run_log(workdir: str | None, step: int) -> Iterator[Callable[[Record], None]]:
    """Gives the function that appends a record to WORKDIR/metrics.jsonl and WORKDIR/tensorboard.

    The run goes on from `step`: what was logged after it is cut off. Without a directory nothing is
    written. A record is {"split": ..., "step": ..., name: number}.
    """
    if workdir is None:
        yield lambda record: None
        return
    path = pathlib.Path(workdir) / "metrics.jsonl"
    with contextlib.ExitStack() as stack:
        try:
            cut_back(path, step)
            lines = stack.enter_context(path.open("a", encoding="utf-8"))
            events = stack.enter_context(
                SummaryWriter(f"{workdir}/tensorboard", purge_step=step + 1)
            )
        except OSError as error:
            raise UsageError(f"--workdir={workdir}: {error}") from None

        def write(record: Record) -> None:
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            for name, value in record.items():
                if name not in ("split", "step"):
                    events.add_scalar(f"{record['split']}/{name}", value, record["step"])
            events.flush()

        yield write


def read_records(path: pathlib.Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line that was cut off in mid-write is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def results_at(step: int, workdir: str | None) -> dict[str, float] | None:
    """The results of the evaluation after that step; None if there was none."""
    if workdir is None:
        return None
    for record in read_records(pathlib.Path(workdir) / "metrics.jsonl"):
        if record["split"] == "test" and record["step"] == step:
            return {name: record[name] for name in ("loss", "top1", "top5", "n")}
    return None


def cut_back(path: pathlib.Path, step: int) -> None:
    """Removes the records after `step`, so that a resumed run does not log them twice."""
    if not path.exists():
        return
    kept = [record for record in read_records(path) if record["step"] <= step]
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    fresh.replace(path)


# ------------------------------------------------------------------------------------- terminal
def header(plan: Plan, parameters: int, trained: int, macs: int, workdir: str | None) -> list[str]:
    """What is about to be run, for people; `macs` of one image, a multiply-add being one."""
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    decay_of = "all parameters" if plan.decay_norm_and_bias else "kernels"
    augmentations = ("" if plan.augmentation == "none" else plan.augmentation, "flip" * plan.flip)
    extras = [
        f"nesterov {plan.momentum:g}" if plan.nesterov else f"momentum {plan.momentum:g}",
        f"weight decay {plan.weight_decay:g} on {decay_of}",
        f"label smoothing {plan.label_smoothing:g}" if plan.label_smoothing else "",
        f"dropout {plan.dropout_rate:g}" if plan.dropout_rate is not None else "",
        f"gradient norm at most {plan.clip_norm:g}" if plan.clip_norm else "",
        f"moving average {plan.ema_decay:g}" if plan.ema_decay else "",
        "convolutions start he" if plan.conv_init == "he" else "",
        _HEADS.get(plan.head_init, ""),
        "blocks computed twice" if plan.remat else "",
        " and ".join(filter(None, augmentations)) or "no augmentation",
    ]
    start = []
    if plan.weights is not None:
        norms = ", batch norm frozen" if plan.freeze_bn else ""
        start = [
            f"weights    {plan.weights}, {plan.transfer}{norms}: {trained:,} parameters trained"
        ]
    return [
        f"devices    {devices}{processes}, {plan.precision}, batch norm {plan.bn}",
        f"network    {plan.arch}, {parameters:,} parameters, "
        f"{tables.significant(macs / 1e9)} GMACs an image",
        *start,
        f"data       {plan.dataset}, {plan.train_examples:,} training and {plan.test_examples:,} "
        f"test images, {plan.num_classes} classes, {plan.image_size}x{plan.image_size}",
        f"recipe     {plan.recipe}: {plan.steps:,} steps of {plan.batch_size} ({plan.epochs:.1f} "
        f"epochs), learning rate {plan.learning_rate:g} {plan.schedule}, "
        f"{plan.warmup_steps} steps of warm-up",
        f"           {', '.join(extra for extra in extras if extra)}; seed {plan.seed}",
        f"workdir    {workdir or 'none: nothing is saved'}",
    ]


class Progress(contextlib.AbstractContextManager["Progress"]):
    """A bar on a terminal, plain lines elsewhere; nothing at all unless `shown`."""

    def __init__(self, first_step: int, steps: int, shown: bool) -> None:
        self._shown, self._bar_shown = shown, shown and sys.stdout.isatty()
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            # 80 columns have to do: what they may lack comes last, and what tqdm makes of a step's
            # time is left out. The images per second say it.
            bar_format="{n_fmt}/{total_fmt} ETA {remaining} {desc}{percentage:.0f}% {bar}",
            disable=not self._bar_shown,
            dynamic_ncols=True,
            file=sys.stdout,
        )
        self._first, self._steps = first_step, steps
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        """One step more."""
        self._bar.update()

    def train(self, record: Record) -> None:
        """Shows a log line of training."""
        if self._bar_shown:
            self._bar.set_description_str(
                f"epoch {record['epoch']:.1f} loss {record['loss']:#.3g} "
                f"top-1 {record['top1']:.1%} {record['images_per_second']:.0f} img/s "
                f"wait {record['data_wait']:.0%} "
            )
            return
        step = record["step"]
        elapsed = time.perf_counter() - self._started
        left = elapsed / max(1, step - self._first) * (self._steps - step)
        self.say(
            f"step {step}/{self._steps}  epoch {record['epoch']:.1f}  loss {record['loss']:.4f}  "
            f"top-1 {record['top1']:.1%}  {record['images_per_second']:.0f} images/s  "
            f"waiting for data {record['data_wait']:.0%}  ETA {tqdm.format_interval(left)}"
        )

    def test(self, record: Record) -> None:
        """Shows an evaluation."""
        self.say(
            f"step {record['step']}/{self._steps}  test loss {record['loss']:.4f}  "
            f"top-1 {record['top1']:.2%}  top-5 {record['top5']:.2%}  ({record['n']} images)"
        )

    def say(self, line: str) -> None:
        """Shows a line of its own, above the bar."""
        if self._shown:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
