"""SGD with momentum as torch has it, and the schedules of its learning rate."""

import jax
import jax.numpy as jnp
import optax

from train.plan import Plan


def learning_rate_schedule(plan: Plan) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, then x0.1 after each third of the run, or a cosine.

    Step s of the warm-up, from 0, has (s + 1) / warmup_steps of the peak: no step is wasted.
    """
    warmup, total = plan.warmup_steps, plan.steps

    def schedule(step: jax.Array) -> jax.Array:
        if plan.schedule == "step":
            factor = 0.1 ** jnp.clip(jnp.floor(3 * step / total), 0, 2)
        else:
            progress = jnp.clip((step - warmup) / max(1, total - warmup), 0, 1)
            factor = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        rise = (step + 1) / warmup if warmup else 1.0
        return plan.learning_rate * jnp.where(step < warmup, rise, factor)

    return schedule


def optimiser(plan: Plan, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """torch.optim.SGD: decay added to the gradient, momentum undamped, learning rate outside it."""
    return optax.chain(
        optax.clip_by_global_norm(plan.clip_norm) if plan.clip_norm else optax.identity(),
        optax.add_decayed_weights(
            plan.weight_decay, mask=None if plan.decay_norm_and_bias else _kernels
        ),
        optax.sgd(learning_rate, plan.momentum, plan.nesterov),
    )


def _kernels(params: optax.Params) -> optax.Params:
    """True for what convolutions and dense layers multiply with, False for norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
