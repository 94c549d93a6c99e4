"""The model of a plan, and the state that training changes: all of it is in every checkpoint."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import flaxcnn
from flaxcnn.blocks import BatchNorm
from flaxcnn.network import Network
from train import remat
from train.errors import UsageError
from train.plan import Plan
from train.transfer import EVERYTHING, Split

AXIS = "batch"  # the mapped axis: all devices of all processes


class Totals(flax.struct.PyTreeNode):
    """Sums over the steps since the last log line; saved, so that a resumed run logs the same."""

    loss: jax.Array
    top1: jax.Array
    steps: jax.Array

    @classmethod
    def zeros(cls) -> "Totals":
        """No step yet."""
        return cls(loss=jnp.zeros(()), top1=jnp.zeros(()), steps=jnp.zeros((), jnp.int32))


class TrainState(flax.struct.PyTreeNode):
    """Training between two steps. No random key: randomness is a function of seed and step."""

    step: jax.Array  # int32, steps done
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    totals: Totals
    average: Any  # moving, of `variables`; {} without --ema_decay

    @property
    def variables(self) -> dict[str, Any]:
        """{'params', 'batch_stats'}, what the network is applied to in training."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def evaluated(self) -> dict[str, Any]:
        """{'params', 'batch_stats'}, what is evaluated and kept: their average, if there is one."""
        return self.average or self.variables


def create_model(plan: Plan, devices: int, **others: Any) -> Network:
    """The network of the plan, its batch normalisation spread over `devices` as `--bn` says.

    `others` are arguments of the network that its weights ask for.

    Raises:
        UsageError: where the plan asks for what the network does not have.
    """
    arguments: dict[str, Any] = {
        **others,
        "num_classes": plan.num_classes,
        "dtype": jnp.dtype(plan.precision),
    }
    if plan.dropout_rate is not None:
        arguments["dropout_rate"] = plan.dropout_rate
    group = plan.bn_group_size(devices)
    try:
        model = flaxcnn.create_model(plan.arch, **arguments)
        variables = jax.eval_shape(partial(_init, model, plan), jax.random.key(0))
        _check_training(model, plan, variables, images=plan.batch_size // devices * group)
    except TypeError as error:
        raise UsageError(f"--dropout_rate: {error}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    kernels = [leaf.ndim for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim > 1]
    if plan.conv_init == "he" and set(kernels) - {2, 4}:
        raise UsageError(f"--conv_init=he: {plan.arch} has convolutions of some maps, not of all")
    if plan.remat and not remat.has_blocks(variables["params"]):
        raise UsageError(f"--remat: {plan.arch} has no blocks, of which to keep the inputs alone")
    if plan.bn == "local":
        return model
    if "batch_stats" not in variables:
        raise UsageError(f"--bn={plan.bn}: {plan.arch} has no batch normalisation")
    groups = [list(range(i, i + group)) for i in range(0, devices, group)]
    return model.clone(norm=partial(BatchNorm, axis_name=AXIS, axis_index_groups=groups))


def _check_training(model: nn.Module, plan: Plan, variables: Any, images: int) -> None:
    """Traces training on as many images as share their batch statistics, which may be too few."""
    batch = jax.ShapeDtypeStruct(
        (images, plan.image_size, plan.image_size, plan.channels), jnp.float32
    )
    rngs = {"dropout": jax.random.key(0), "stochastic_depth": jax.random.key(0)}
    jax.eval_shape(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"], rngs=rngs),
        variables,
        batch,
    )


def create_state(
    model: nn.Module,
    plan: Plan,
    optimiser: optax.GradientTransformation,
    split: Split = EVERYTHING,
) -> TrainState:
    """The state before the first step, from the plan's seed."""
    return state_of(_init(model, plan, jax.random.key(plan.seed)), plan, optimiser, split)


def state_of(
    variables: Mapping[str, Any], plan: Plan, optimiser: optax.GradientTransformation, split: Split
) -> TrainState:
    """The state before the first step from these variables; the optimiser has what is trained."""
    variables = {"batch_stats": {}, **variables}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimiser.init(split.trained(variables["params"])),
        totals=Totals.zeros(),
        # Copies: a step is given all buffers of the state to write into.
        average=jax.tree.map(jnp.copy, variables) if plan.ema_decay else {},
    )


def _init(model: nn.Module, plan: Plan, key: jax.Array) -> Any:
    images = jnp.zeros((1, plan.image_size, plan.image_size, plan.channels))
    variables = model.init(key, images, train=False)
    params = variables["params"]
    if plan.conv_init == "he":
        params = _drawn_anew(params, 4, 2.0, key)
    if plan.head_init == "lecun":
        params = _drawn_anew(params, 2, 1.0, key)
    return {**variables, "params": params}


def _drawn_anew(params: Any, rank: int, scale: float, key: jax.Array) -> Any:
    """The kernels of that rank, [..., in, out], from N(0, scale / fan_in): dense have 2, conv 4."""
    leaves, tree = jax.tree.flatten(params)
    init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
    fresh = [
        init(jax.random.fold_in(key, i), leaf.shape, leaf.dtype) if leaf.ndim == rank else leaf
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, fresh)
