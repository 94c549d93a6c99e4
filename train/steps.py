"""One step of training and of evaluation, and the one place that spreads them over devices.

The state is the same on every device and is not replicated by hand: `pmap` takes it whole and gives
it back whole. So whatever a step returns must be equal everywhere, which here `pmean` and `psum`
see to; `pmap` would not notice if it were not.
"""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxcnn import GoogLeNetOutput
from flaxcnn.inference import Evaluable
from train import remat
from train.plan import Plan
from train.state import AXIS, Totals, TrainState
from train.transfer import EVERYTHING, Split

Arrays = dict[str, Any]
TrainStep = Callable[[TrainState, Arrays], tuple[TrainState, Arrays]]
EvalStep = Callable[[Arrays, Arrays], Arrays]
MeanAndStd = tuple[Sequence[float], Sequence[float]]


class Applicable(Protocol):
    """A network, or what is applied as one is."""

    def apply(self, variables: Any, x: jax.Array, **how: Any) -> Any:
        """As `flax.linen.Module.apply`."""
        ...


# ------------------------------------------------------------------------------------- the steps
def make_train_step(
    model: Applicable,
    optimiser: optax.GradientTransformation,
    plan: Plan,
    mean_and_std: MeanAndStd | None,
    log_every: int,
    split: Split = EVERYTHING,
) -> TrainStep:
    """(state, batch) -> (state, metrics): one step of SGD, for `train_over_devices`.

    `split` says which parameters are trained; the optimiser's state is of those alone.

    batch: {"image": uint8 [b, S, S, C], "label": int32 [b], "stop": bool []}.
    metrics: the loss and top1 of the whole batch; `stop`, whether any process was told to stop, so
    that all of them stop after the same step.
    """
    seed = plan.seed

    def loss_fn(trained: Any, state: TrainState, batch: Arrays) -> tuple[jax.Array, Any]:
        # Folded once more than the keys of the initial weights, so that none is used twice.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), 0)
        variables = state.variables | {"params": split.merged(state.params, trained)}
        kept_or_not = remat.blocks_computed_twice() if plan.remat else contextlib.nullcontext()
        with kept_or_not, nn.intercept_methods(split.intercept):
            output, updates = model.apply(
                variables,
                normalised(batch["image"], mean_and_std),
                train=not split.evaluates,
                mutable=["batch_stats"],
                rngs=random_streams(jax.random.fold_in(key, jax.lax.axis_index(AXIS))),
            )
        loss = training_loss(output, batch["label"], plan.label_smoothing)
        logits = output.logits if isinstance(output, GoogLeNetOutput) else output
        top1 = jnp.mean(jnp.argmax(logits, -1) == batch["label"], dtype=jnp.float32)
        return loss, (updates.get("batch_stats", {}), top1)

    def train_step(state: TrainState, batch: Arrays) -> tuple[TrainState, Arrays]:
        trained = split.trained(state.params)
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (batch_stats, top1)), grads = gradient(trained, state, batch)
        results = (grads, batch_stats, loss, top1, batch["stop"].astype(jnp.float32))
        if jax.lax.axis_size(AXIS) > 1:  # of one device XLA copies them all
            results = jax.lax.pmean(results, AXIS)
        grads, batch_stats, loss, top1, stop = results
        updates, opt_state = optimiser.update(grads, state.opt_state, trained)
        fresh = state.step % log_every == 0  # the step before this one was logged
        old = jax.tree.map(lambda total: jnp.where(fresh, 0, total), state.totals)
        totals = Totals(loss=old.loss + loss, top1=old.top1 + top1, steps=old.steps + 1)
        step, average = state.step + 1, state.average
        variables = {
            "params": split.merged(state.params, optax.apply_updates(trained, updates)),
            "batch_stats": split.statistics(state.batch_stats, batch_stats),
        }
        if plan.ema_decay:
            average = moved(average, variables, plan.ema_decay, step)
        state = TrainState(
            step=step, opt_state=opt_state, totals=totals, average=average, **variables
        )
        return state, {"loss": loss, "top1": top1, "stop": stop > 0}

    return train_step


def moved(average: Arrays, variables: Arrays, decay: float, step: jax.Array) -> Arrays:
    """The moving average after a step, the first of which is 1.

    Its decay rises with the steps, so that the average of a short run has left its beginning. By
    differences, so that of what stays the same the average does, to the last bit.
    """
    share = 1 - jnp.minimum(decay, step / (9 + step))
    return jax.tree.map(lambda old, new: old + share * (new - old), average, variables)


def random_streams(key: jax.Array) -> dict[str, jax.Array]:
    """The keys of what is random in a network in training, by flax's names."""
    dropout, stochastic_depth = jax.random.split(key)
    return {"dropout": dropout, "stochastic_depth": stochastic_depth}


def training_loss(output: Any, labels: jax.Array, label_smoothing: float) -> jax.Array:
    """The mean cross entropy of what a network returns in training: logits, or a GoogLeNetOutput.

    The losses of GoogLeNet's auxiliary classifiers count 0.3 times (its paper's section 5).
    """
    if isinstance(output, GoogLeNetOutput):
        main, *aux = (
            training_loss(logits, labels, label_smoothing)
            for logits in output
            if logits is not None
        )
        return main + 0.3 * sum(aux)
    targets = jax.nn.one_hot(labels, output.shape[-1], dtype=output.dtype)
    targets = optax.smooth_labels(targets, label_smoothing)
    return optax.softmax_cross_entropy(output, targets).mean()


def make_eval_step(model: Evaluable, mean_and_std: MeanAndStd | None) -> EvalStep:
    """(variables, batch) -> sums over the batch of all devices, for `evaluate_over_devices`.

    batch: {"image": uint8 [b, S, S, C], "label": int32 [b], "mask": bool [b], "stop": bool []};
    what is masked out counts for nothing. Returns loss, top1, top5 (the best five, or all where
    there are fewer), n, and stop, how many devices were told to stop.
    """

    def eval_step(variables: Arrays, batch: Arrays) -> Arrays:
        images = normalised(batch["image"], mean_and_std)
        logits = cast(jax.Array, model.apply(variables, images, train=False))
        labels, mask = batch["label"], batch["mask"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = best == labels[:, None]
        return jax.lax.psum(
            {
                "loss": jnp.sum(losses, where=mask),
                "top1": jnp.sum(hits[:, 0], where=mask),
                "top5": jnp.sum(hits.any(-1), where=mask),
                "n": jnp.sum(mask),
                "stop": batch["stop"].astype(jnp.int32),
            },
            AXIS,
        )

    return eval_step


def normalised(images: jax.Array, mean_and_std: MeanAndStd | None) -> jax.Array:
    """uint8 [..., C] -> float32, zero mean and unit deviation per channel.

    Features instead of images have no statistics and stay as they are.
    """
    if mean_and_std is None:
        return images
    mean, std = (jnp.asarray(statistic, jnp.float32) for statistic in mean_and_std)
    return (images.astype(jnp.float32) / 255 - mean) / std


# ------------------------------------------------------------------------------------- devices
def multiply_in(precision: str) -> None:
    """Float32 stays float32: accelerators by default round what they multiply."""
    if precision == "float32" and jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")


def train_over_devices(
    train_step: TrainStep, devices: Sequence[jax.Device] | None = None
) -> TrainStep:
    """The train step over all devices, or these: batches [devices, b, ...], state donated."""
    return jax.pmap(
        train_step,
        AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        donate_argnums=0,
        devices=devices,
    )


def evaluate_over_devices(eval_step: EvalStep) -> EvalStep:
    """The evaluation step over all devices: batches [local devices, b, ...]."""
    return jax.pmap(eval_step, AXIS, in_axes=(None, 0), out_axes=None)


def begin(create: Callable[[], TrainState]) -> TrainState:
    """The state that `create` makes, whole on each local device."""
    # XLA:CPU's default level compiles the random numbers of resnet20 in 20 s, this one in 3 s, to
    # the same bits.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(create, out_shardings=replicated(), compiler_options=options)()


def replicated() -> NamedSharding:
    """Whole on each local device: where the state has to be before the first step."""
    return NamedSharding(_local_mesh(), PartitionSpec())


def _split() -> NamedSharding:
    """The leading axis spread over the local devices: where batches have to be."""
    return NamedSharding(_local_mesh(), PartitionSpec(AXIS))


def _local_mesh() -> Mesh:
    return Mesh(np.array(jax.local_devices()), (AXIS,))


def on_devices(batches: Iterable[Mapping[str, np.ndarray]], ahead: int = 2) -> Iterator[Arrays]:
    """Batches [b, ...] as [local devices, b / devices, ...], sent `ahead` of their use."""
    devices = jax.local_device_count()
    sent: collections.deque[Arrays] = collections.deque()
    for batch in batches:
        by_device = {k: v.reshape(devices, -1, *v.shape[1:]) for k, v in batch.items()}
        sent.append(jax.device_put(by_device, _split()))
        if len(sent) > ahead:
            yield sent.popleft()
    yield from sent


def told_to_stop(stop: bool) -> jax.Array:
    """The batch's `stop` [local devices], from what this process was told."""
    return jax.device_put(np.full(jax.local_device_count(), stop), _split())


# ---------------------------------------------------------------------------------- evaluation
def evaluate(
    eval_step: EvalStep,
    variables: Arrays,
    batches: Iterable[Arrays],
    told: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Mean loss, top1 and top5 as shares of one, and n, how many examples were counted.

    None, on every process, as soon as one process is `told` to stop.
    """
    sums: collections.Counter[str] = collections.Counter()
    running: collections.deque[Arrays] = collections.deque()
    for batch in batches:
        running.append(eval_step(variables, {**batch, "stop": told_to_stop(told())}))
        if len(running) > 2:
            sums.update(_as_numbers(running.popleft()))
        if sums["stop"]:
            return None
    for result in running:
        sums.update(_as_numbers(result))
    n = sums["n"]
    if sums["stop"]:
        return None
    return {**{name: sums[name] / n for name in ("loss", "top1", "top5")}, "n": n}


def _as_numbers(sums: Arrays) -> dict[str, float]:
    return {name: value.item() for name, value in jax.device_get(sums).items()}
