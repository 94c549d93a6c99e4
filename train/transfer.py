"""Transfer learning: where a run starts from, what of it is trained, and how fast.

What is frozen stays as it was to the last bit: parameters are not differentiated, have no optimiser
state and no weight decay; batch normalisation there uses its running statistics and leaves them,
and nothing is dropped at random.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from flaxcnn import blocks, model_folder
from flaxcnn.accounting import Summary, summarize
from flaxcnn.accounting.layers import HEAD
from flaxcnn.network import Network
from flaxcnn.pretrained import load_to_train_on
from flaxcnn.transforms import ImageClassification
from flaxcnn.weights import COSTS, get_model_weights
from train.errors import UsageError
from train.plan import Plan

Path = tuple[str, ...]  # of a variable: its modules and its name
Leaves = dict[Path, Any]
Kind = Literal["linear_probe", "finetune", "layerwise", "from"]


# -------------------------------------------------------------------------------------- the start
@dataclasses.dataclass(frozen=True)
class Start:
    """A network with trained weights, and how its images are prepared."""

    model: Network
    variables: Mapping[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """What the network has otherwise than without weights: GoogLeNet's input and heads."""
        names = ("aux_logits", "transform_input")
        return {name: getattr(self.model, name) for name in names if hasattr(self.model, name)}


def load(plan: Plan) -> Start | None:
    """The weights that the plan starts from; None for a fresh start.

    Raises:
        UsageError: for a model folder of another network.
        WeightsError: an InputError, for weights that cannot be had or do not fit.
    """
    if plan.weights is None:
        return None
    wanted: dict[str, Any] = {
        "num_classes": plan.num_classes,
        "in_channels": plan.channels,
        "seed": plan.seed,
    }
    if model_folder.is_one(plan.weights):
        arch = model_folder.load(plan.weights).arch
        if arch != plan.arch:
            raise UsageError(f"--weights={plan.weights} holds {arch}, not --arch={plan.arch}")
        model, variables, fresh = load_to_train_on(plan.weights, **wanted)
    else:
        model, variables, fresh = load_to_train_on(plan.arch, plan.weights, **wanted)
    if plan.head_init == "zero":
        leaves = flax.traverse_util.flatten_dict(variables["params"])
        for path in last_layer(model, plan) & set(fresh):
            leaves[path] = jnp.zeros_like(leaves[path])
        variables = variables | {"params": flax.traverse_util.unflatten_dict(leaves)}
    return Start(model, variables)


def preparation(arch: str, weights: str) -> ImageClassification | None:
    """How the images of these weights are prepared; of a file as of the default weights, if any."""
    if model_folder.is_one(weights):
        return model_folder.load(weights).transform
    members = get_model_weights(arch).__members__ if arch in COSTS else {}
    found = members.get(weights) or members.get("DEFAULT")
    return found.transforms() if found else None


# ------------------------------------------------------------------------------- what is trained
@dataclasses.dataclass(frozen=True)
class Split:
    """Which parameters are trained, at what multiple of the learning rate, and what is frozen."""

    rates: Mapping[Path, float]  # of each parameter that is trained
    frozen_norms: frozenset[Path]  # modules, whose statistics stay
    frozen_modules: frozenset[str]  # at the top of the network, in which nothing is dropped
    evaluates: bool = False  # whether the whole network is applied as in evaluation

    def trained(self, params: Any) -> Any:
        """The parameters that are trained, as a tree of those alone."""
        leaves = flax.traverse_util.flatten_dict(params)
        chosen = {path: leaf for path, leaf in leaves.items() if path in self.rates}
        return flax.traverse_util.unflatten_dict(chosen)

    def merged(self, params: Any, trained: Any) -> Any:
        """All parameters, those that are trained from `trained`."""
        return _merged(params, trained, lambda path: path in self.rates)

    def statistics(self, old: Any, new: Any) -> Any:
        """Running statistics: the old ones of frozen norms, the new ones of others."""
        return _merged(old, new, lambda path: path[:-1] not in self.frozen_norms)

    def scaled(self, optimiser: optax.GradientTransformation) -> optax.GradientTransformation:
        """With each parameter's updates multiplied as its learning rate is."""

        def scale(updates: Any, _: Any) -> Any:
            leaves = flax.traverse_util.flatten_dict(updates)
            faster = {path: self.rates[path] * leaf for path, leaf in leaves.items()}
            return flax.traverse_util.unflatten_dict(faster)

        return optax.chain(optimiser, optax.stateless(scale))

    def intercept(self, next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """For `flax.linen.intercept_methods`: what is frozen computes as in evaluation."""
        module = context.module
        if context.method_name == "__call__":
            if isinstance(module, blocks.BatchNorm) and module.path in self.frozen_norms:
                return module.as_in_evaluation(*args, **kwargs)
            if isinstance(module, nn.Dropout) and module.path[0] in self.frozen_modules:
                return args[0]
        return next_call(*args, **kwargs)


class Everything(Split):
    """All is trained at the same rate; nothing is frozen."""

    def __init__(self) -> None:
        super().__init__({}, frozenset(), frozenset())

    def trained(self, params: Any) -> Any:
        return params

    def merged(self, params: Any, trained: Any) -> Any:
        return trained

    def statistics(self, old: Any, new: Any) -> Any:
        return new

    def scaled(self, optimiser: optax.GradientTransformation) -> optax.GradientTransformation:
        return optimiser


EVERYTHING = Everything()


def _merged(old: Any, new: Any, is_new: Callable[[Path], bool]) -> Any:
    old_leaves, new_leaves = map(flax.traverse_util.flatten_dict, (old, new))
    leaves = {path: new_leaves[path] if is_new(path) else leaf for path, leaf in old_leaves.items()}
    return flax.traverse_util.unflatten_dict(leaves)


def split(model: Network, plan: Plan) -> Split:
    """What the plan trains of the model.

    Raises:
        UsageError: for a stage that the network does not have.
    """
    if plan.transfer is None:
        return EVERYTHING
    leaves, stats = _shapes(model, plan)
    kind, _, first = plan.transfer.partition(":")
    order = [*model.stages, HEAD]
    summary = summarize(model, image_size=plan.image_size, in_channels=plan.channels)
    stage_of = _stages(summary)
    norms = frozenset(path[:-1] for path in stats)
    head = last_layer(model, plan)
    if kind == "linear_probe":
        apart = {layer.name.partition("/")[0] for layer in summary.apart}
        head = {path for path in head if path[0] not in apart}  # evaluation has no use for those
        return Split(dict.fromkeys(head, 1.0), norms, frozenset(stage_of), evaluates=True)
    begin = 0
    if kind == "from":
        if first not in order:
            raise UsageError(
                f"--transfer={plan.transfer}: {plan.arch} has no such stage but {', '.join(order)}"
            )
        begin = order.index(first)
    frozen_modules = frozenset(m for m, stage in stage_of.items() if order.index(stage) < begin)
    frozen_norms = norms if plan.freeze_bn else {p for p in norms if p[0] in frozen_modules}
    rates = {}
    for path in leaves:
        if path[0] in frozen_modules or path[:-1] in frozen_norms:
            continue
        behind = len(order) - 1 - order.index(stage_of[path[0]])  # stages between it and the head
        rates[path] = plan.lr_decay**behind if kind == "layerwise" else 1.0
        if path in head:
            rates[path] *= plan.head_lr_scale
    return Split(rates, frozenset(frozen_norms), frozen_modules)


def _shapes(model: Network, plan: Plan) -> tuple[Leaves, Leaves]:
    """Parameters and running statistics, by path."""
    images = jnp.zeros((1, plan.image_size, plan.image_size, plan.channels))
    found = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    params, stats = (
        flax.traverse_util.flatten_dict(found.get(name, {})) for name in ("params", "batch_stats")
    )
    return params, stats


def last_layer(model: Network, plan: Plan) -> set[Path]:
    """The parameters whose shapes go by the number of classes; auxiliary classifiers' too."""
    ours, _ = _shapes(model, plan)
    others, _ = _shapes(model.clone(num_classes=model.num_classes + 1), plan)
    return {path for path, leaf in ours.items() if leaf.shape != others[path].shape}


def _stages(summary: Summary) -> dict[str, str]:
    """Module at the top of the network -> the stage that it is in; auxiliary heads in the head."""
    layers = summary.layers + summary.apart
    return {layer.name.partition("/")[0]: layer.stage for layer in layers}
