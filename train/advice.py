"""What transfer suits a data set: the field's advice, for this one, as commands.

The more images there are of each class, and the farther they are from ImageNet's photos, the more
layers are worth training (Yosinski et al. 2014, arXiv:1411.1792; Kornblith et al. 2019,
arXiv:1805.08974).
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flaxcnn
from flaxcnn.weights import COSTS
from train.config import Config, Domain, make_plan
from train.datasets import Dataset
from train.errors import UsageError

Amount = Literal["few", "some", "many"]

# Images of a class: near to ImageNet's photos, from the first number on more than a probe is worth
# its time, from the second on training all layers. Far from them fine-tuning was ahead of a probe
# with as few as 10 (Fashion-MNIST, `benchmarks.transfer`).
_SOME, _MANY = 100, 1000

PROBE, TOP, ALL, SCRATCH = "linear probe", "tune the top", "tune all", "from scratch"
_WHY = {
    PROBE: "trains the last layer alone: seconds, and nothing to overfit",
    TOP: "keeps the early layers, whose edges and textures suit most images",
    ALL: "adapts every layer; wants more images and more time",
    SCRATCH: "uses nothing of ImageNet; what the others have to beat",
}
# The best first.
_ORDER: dict[tuple[Domain, Amount], Sequence[str]] = {
    ("near", "few"): (PROBE, TOP, ALL, SCRATCH),
    ("near", "some"): (TOP, PROBE, ALL, SCRATCH),
    ("near", "many"): (ALL, TOP, PROBE, SCRATCH),
    ("far", "few"): (ALL, TOP, PROBE, SCRATCH),
    ("far", "some"): (ALL, TOP, PROBE, SCRATCH),
    ("far", "many"): (ALL, SCRATCH, TOP, PROBE),
}


class Candidate(NamedTuple):
    """One way to train on the data set."""

    name: str
    config: Config

    @property
    def command(self) -> str:
        """The command line that runs it."""
        default = Config()
        values = dataclasses.asdict(self.config)
        given = {name: value for name, value in values.items() if value != getattr(default, name)}
        # Though it is the default: whoever reads the command wants to see it.
        flags = [f"--{name}={value}" for name, value in {"arch": values["arch"], **given}.items()]
        return shlex.join(["python", "-m", "train.main", *flags])


# ------------------------------------------------------------------------------------ the advice
def candidates(config: Config, dataset: Dataset, devices: int) -> list[Candidate]:
    """Ways to train, the advised one first, all of them for the same passes over the images.

    Raises:
        UsageError: for a network without weights, flags that say what is trained, or where nobody
            can be asked how near the images are.
    """
    for flag in ("transfer", "recipe"):
        if getattr(config, flag) is not None:
            raise UsageError(f"--{flag} says what is trained; --suggest and --compare find it out")
    if config.weights is None and config.arch not in COSTS:
        flaxcnn.create_model(config.arch)  # an unknown name is told first
        raise UsageError(
            f"--arch={config.arch} has no published weights; give --weights=FILE, or a network of "
            f"`python -m flaxcnn models`"
        )
    plain = dataclasses.replace(config, suggest=False, compare=False, domain=None)
    with_weights = dataclasses.replace(plain, weights=config.weights or "DEFAULT")
    plan = make_plan(
        dataclasses.replace(with_weights, transfer="finetune"), dataset, devices, False
    )
    budget: dict[str, Any] = {"image_size": plan.image_size, "batch_size": plan.batch_size}
    if config.steps is None and config.epochs is None:
        budget["epochs"] = round(plan.epochs)
    domain = config.domain or _ask()
    stages = flaxcnn.create_model(config.arch).stages
    # The last quarter of the stages, or the last half.
    top = stages[-max(1, len(stages) // (4 if domain == "near" else 2))]
    changes: dict[str, dict[str, Any]] = {
        PROBE: {"weights": with_weights.weights, "transfer": "linear_probe"},
        TOP: {"weights": with_weights.weights, "transfer": f"from:{top}"},
        ALL: {"weights": with_weights.weights, "transfer": "finetune"},
        SCRATCH: {"weights": None},
    }
    order = _ORDER[domain, _amount(_images_per_class(dataset))]
    return [
        Candidate(name, dataclasses.replace(plain, **budget, **changes[name])) for name in order
    ]


def text(ways: Sequence[Candidate], dataset: Dataset) -> str:
    """The advice to read."""
    each = _images_per_class(dataset)
    lines = [
        f"{dataset.name}: {len(dataset.train)} images to train on, {len(dataset.class_names)} "
        f"classes, about {each:.0f} of each; that is {_amount(each)}",
        f"advice: {ways[0].name}. In the order to try them:",
    ]
    for number, way in enumerate(ways, 1):
        lines += [f"{number}. {way.name}: {_WHY[way.name]}", f"   {way.command}"]
    return "\n".join(lines)


def _images_per_class(dataset: Dataset) -> float:
    return len(dataset.train) / len(dataset.class_names)


def _amount(images_per_class: float) -> Amount:
    if images_per_class < _SOME:
        return "few"
    return "some" if images_per_class < _MANY else "many"


def _ask() -> Domain:
    if not sys.stdin.isatty():
        raise UsageError(
            "say --domain=near for photos such as ImageNet's, of things, animals and places, or "
            "--domain=far for scans, satellite images, drawings, tiny or grey images"
        )
    while True:
        answer = input("Are the images near to ImageNet's photos, or far from them? [near/far] ")
        if answer == "near":
            return "near"
        if answer == "far":
            return "far"
