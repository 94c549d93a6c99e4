"""What the user asks for, and how it becomes the plan of a run."""

import contextlib
import dataclasses
import io
import math
import re
from collections.abc import Sequence
from typing import Literal, TypeVar

import tyro

import flaxcnn.registry
from train import datasets
from train.datasets import Dataset
from train.errors import UsageError
from train.plan import Plan
from train.recipes import RECIPES, Augmentation, ConvInit, HeadInit, Precision, Recipe, Schedule
from train.transfer import preparation

T = TypeVar("T")
Domain = Literal["near", "far"]  # images like ImageNet's photos, or unlike
_TOO_MANY_STEPS = 2**31  # they are counted in int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train a classifier, evaluate it, resume it.

    What the flags and the recipe come to is printed before the first step.
    """

    # ------------------------------------------------------------------ what is trained on what

    # Network; a wrong name lists the nearest ones.
    arch: str = "vgg16"
    # digits (inside scikit-learn), fashion_mnist, folder (your own photos), or any TFDS name
    # prepared under --data_dir.
    dataset: str = "digits"
    # Directory of photos, train/CLASS/*.jpg and val/CLASS/*.jpg or CLASS/*.jpg; or of prepared TFDS
    # data sets. digits and fashion_mnist can do without.
    data_dir: str | None = None
    # Of photos that are not divided into train and val: share to test on, 0 to 1, by a hash of the
    # file names. None: they are divided.
    holdout: float | None = None
    # Number of photos that may be broken; they are left out. More are listed, and nothing is begun.
    max_bad: int = 0
    # Number of training images of each class, drawn by --seed. None: all.
    images_per_class: int | None = None
    # Split of a TFDS data set to train on, TFDS slices included.
    train_split: str = "train"
    # Split to evaluate on. None: test, or validation where test is missing or has no labels.
    test_split: str | None = None
    # Side of the square images, pixels. None: that of --weights; or 32 or the network's least size
    # for small images, what the network was published for (224, most of them) for others.
    image_size: int | None = None
    # classic (the network's ImageNet recipe), small, transfer or probe. None: with --weights probe
    # for a linear probe, else transfer; without small for images up to 64 pixels, else classic.
    recipe: Literal["classic", "small", "transfer", "probe"] | None = None

    # ---------------------------------------------------------------------- transfer learning

    # Trained weights to start from: DEFAULT, IMAGENET1K_V1 and so on, a .pth or .safetensors file,
    # or a model folder. Images are then prepared as theirs were. None: a fresh start.
    weights: str | None = None
    # What is trained from --weights: the last layer alone (linear_probe), all (finetune), all at
    # rates that fall from stage to stage towards the image (layerwise), or the stages from one on
    # (from:layer3). None: finetune.
    transfer: str | None = None
    # Whether batch normalisation stays as in the weights, statistics, scales and biases. None: as
    # the recipe says; the recipe transfer says yes.
    freeze_bn: bool | None = None
    # Learning rate of the last layer, as a multiple of the others'.
    head_lr_scale: float = 1.0
    # Of layerwise: learning rate of a stage, as a multiple of that of the next one, 0 to 1.
    lr_decay: float = 0.7
    # Print which transfer suits this data set, as commands, and train nothing.
    suggest: tyro.conf.FlagCreatePairsOff[bool] = False
    # Run what --suggest prints, each for the same --epochs, and print a table and a verdict.
    compare: tyro.conf.FlagCreatePairsOff[bool] = False
    # For --suggest: how near the images are to ImageNet's photos of things, animals and places;
    # scans, satellite images, drawings and tiny images are far. None: asked.
    domain: Domain | None = None

    # -------------------------------------------------------------------------- optimisation

    # Images per step, over all devices and processes. None: the recipe's.
    batch_size: int | None = None
    # Passes over the training images; may be fractional. None: the recipe's.
    epochs: float | None = None
    # Steps; overrules --epochs. None: as --epochs says.
    steps: int | None = None
    # Peak learning rate, as used at this batch size. None: the recipe's, which is per 256 images,
    # scaled to the batch.
    learning_rate: float | None = None
    # After the warm-up: x0.1 after each third of the run (step), or half a cosine to zero (cosine).
    # None: the recipe's.
    schedule: Schedule | None = None
    # Linear warm-up from zero, in epochs. None: the recipe's.
    warmup_epochs: float | None = None
    # Momentum of SGD, 0 to 1. None: the recipe's.
    momentum: float | None = None
    # Whether momentum is Nesterov's. None: as the recipe says.
    nesterov: bool | None = None
    # Weight decay, the factor of the parameters that is added to the gradient, as torch's SGD does.
    # None: the recipe's.
    weight_decay: float | None = None
    # Whether weight decay reaches norm parameters and biases. None: as the recipe says.
    decay_norm_and_bias: bool | None = None
    # Share of the target that is spread over all classes, 0 to 1. None: the recipe's.
    label_smoothing: float | None = None
    # Probability of dropping a unit, 0 to 1, for networks with dropout. None: the recipe's, or else
    # the network's own.
    dropout_rate: float | None = None
    # Decay per step of a moving average of parameters and statistics, 0 to 1: what is evaluated and
    # kept is the average. 0: none. None: the recipe's.
    ema_decay: float | None = None
    # Largest global norm of the gradient; 0: no limit. None: the recipe's.
    clip_norm: float | None = None
    # Start of the convolutions: the network's own, or N(0, 2 / fan_in) (he). None: the recipe's.
    conv_init: ConvInit | None = None
    # Start of the dense layers: the network's own, or N(0, 1 / fan_in) (lecun); with --weights, of
    # a new last layer, zero. None: the recipe's.
    head_init: HeadInit | None = None
    # Of training images: none, pad_crop (shifts by up to an eighth), resized_crop (ImageNet's).
    # None: the recipe's.
    augmentation: Augmentation | None = None
    # Mirror half of the training images. None: unless mirroring changes the class, as of digits, or
    # for a linear probe.
    flip: bool | None = None
    # Seed of the initial weights, the order of the data, augmentation and dropout.
    seed: int = 0

    # --------------------------------------------------------------------------- computation

    # Compute type; parameters stay float32. auto: bfloat16 on accelerators, float32 on a CPU.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # Batch normalisation over each device's images (local), all devices' (sync), or those of N
    # neighbouring devices (group:N).
    bn: str = "local"
    # Whether of each block only the input is kept for the gradient, and the rest computed a second
    # time: less memory and more time on an accelerator (XLA undoes it on a CPU). None: no.
    remat: bool | None = None
    # Number of threads that read and augment images, per process.
    read_threads: int = 4
    # host:port of process 0, for a run of several processes. None: as the cluster says, if any.
    coordinator_address: str | None = None
    # Number of processes. None: as the cluster says, or one.
    num_processes: int | None = None
    # Number of this process, from 0. None: as the cluster says.
    process_id: int | None = None

    # ------------------------------------------------------------------------ what is written

    # Directory of checkpoints and logs; given again, the run resumes. None: nothing is written.
    workdir: str | None = None
    # Steps between checkpoints; the best evaluated one and the last are saved besides.
    checkpoint_every: int = 1000
    # Steps between evaluations; the last step is always evaluated. None: an epoch, at least 100.
    eval_every: int | None = None
    # Steps between log lines. None: a tenth of an epoch, between 10 and 100.
    log_every: int | None = None


# ------------------------------------------------------------------------------ the command line
def parse(arguments: Sequence[str] | None = None) -> Config:
    """The command line as a `Config`.

    Raises:
        UsageError: for what the command line cannot mean.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(
                Config, prog="python -m train.main", args=arguments, use_underscores=True
            )
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        raise UsageError(_one_line(said.getvalue())) from None
    # As of an unset variable: it would be the current directory to some, and nothing to others.
    _require(config.workdir != "", "--workdir is empty; name a directory, or leave the flag out")
    return config


def _one_line(box: str) -> str:
    """tyro's first sentence: what it draws in a box down to the first rule, on one line."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        # A terminal gets each cell in a colour of its own.
        text = re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│╭╮╰╯|+ ")
        if text.startswith(("─", "---")):  # the second where the terminal has ASCII alone
            if words:
                break
            continue  # in ASCII there is a rule under the title, too
        words += text.split()
    return " ".join(words)


# -------------------------------------------------------------------------------------- the plan
def make_plan(config: Config, dataset: Dataset, devices: int, accelerated: bool) -> Plan:
    """Fills what the command line leaves open from the recipe and the data set, and checks it all.

    Args:
        devices: how many, over all processes.
        accelerated: whether they are something else than a CPU.

    Raises:
        UsageError: for a value that no run could use; it names what would work.
    """
    try:
        family = flaxcnn.registry.family_of(config.arch)
    except ValueError as error:
        raise UsageError(f"--arch: {error}") from None
    _check_transfer(config)
    recipe_name = config.recipe or _default_recipe(config, dataset)
    recipe = _with_flags(RECIPES[recipe_name, family], config)
    # A recipe's "zero" is for a layer that is new on trained weights, its "lecun" for fresh ones.
    if config.head_init is None and (recipe.head_init == "zero") != (config.weights is not None):
        recipe = dataclasses.replace(recipe, head_init="network")
    if config.conv_init is None and config.weights is not None:
        recipe = dataclasses.replace(recipe, conv_init="network")
    batch_size = recipe.batch_size
    _require(batch_size >= 1, "--batch_size must be at least 1")
    _require(
        batch_size % devices == 0,
        f"--batch_size={batch_size} cannot be shared equally by {devices} devices; "
        f"try {max(1, round(batch_size / devices)) * devices}",
    )
    for name, value in dataclasses.asdict(recipe).items():
        _require(not isinstance(value, float) or math.isfinite(value), f"--{name} must be finite")
    steps_per_epoch = len(dataset.train) / batch_size
    # Both are bounded where they are rounded, as infinity cannot be.
    steps = _given(config.steps, round(min(recipe.epochs * steps_per_epoch, _TOO_MANY_STEPS)))
    plan = Plan(
        arch=config.arch,
        dataset=dataset.name,
        data_origin=", ".join(filter(None, (dataset.origin, dataset.drawn))),
        train_examples=len(dataset.train),
        test_examples=len(dataset.test),
        num_classes=len(dataset.class_names),
        channels=dataset.channels,
        image_size=_image_size(config, dataset),
        recipe=recipe_name,
        batch_size=batch_size,
        steps=steps,
        learning_rate=_given(config.learning_rate, recipe.learning_rate_per_256 * batch_size / 256),
        schedule=recipe.schedule,
        warmup_steps=round(min(recipe.warmup_epochs * steps_per_epoch, steps // 2)),
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        decay_norm_and_bias=recipe.decay_norm_and_bias,
        label_smoothing=recipe.label_smoothing,
        dropout_rate=recipe.dropout_rate,
        clip_norm=recipe.clip_norm,
        ema_decay=recipe.ema_decay,
        conv_init=recipe.conv_init,
        head_init=recipe.head_init,
        augmentation=recipe.augmentation,
        # A probe's features are of each image once.
        flip=_given(config.flip, dataset.mirrors and config.transfer != "linear_probe"),
        seed=config.seed,
        precision=_precision(config, accelerated),
        bn=config.bn,
        remat=bool(config.remat),
        weights=config.weights,
        transfer=config.weights and (config.transfer or "finetune"),
        freeze_bn=recipe.freeze_bn and config.weights is not None,
        head_lr_scale=config.head_lr_scale,
        lr_decay=config.lr_decay,
    )
    _check_ranges(plan, config, devices)
    return plan


def _default_recipe(config: Config, dataset: Dataset) -> str:
    if config.weights is None:
        return "small" if dataset.small else "classic"
    return "probe" if config.transfer == "linear_probe" else "transfer"


def load_dataset(config: Config) -> Dataset:
    """The data set that the command line asks for.

    Raises:
        UsageError: where it is not, or what is asked of it cannot be.
    """
    photos = config.dataset == "folder"
    _require(photos or config.holdout is None, "--holdout is for --dataset=folder")
    _require(photos or config.max_bad == 0, "--max_bad is for --dataset=folder")
    _require(config.holdout is None or 0 < config.holdout < 1, "--holdout must be between 0 and 1")
    _require(config.max_bad >= 0, "--max_bad must be at least 0")
    _require(_given(config.images_per_class, 1) >= 1, "--images_per_class must be at least 1")
    if photos:
        _require(
            (config.train_split, config.test_split) == ("train", None),
            "--train_split and --test_split are for TFDS data sets; photos lie in folders",
        )
        dataset = datasets.load_photos(config.data_dir, config.holdout, config.max_bad)
    else:
        dataset = datasets.load(
            config.dataset, config.data_dir, config.train_split, config.test_split
        )
    if config.images_per_class is None:
        return dataset
    return datasets.with_images_per_class(dataset, config.images_per_class, config.seed)


def _with_flags(recipe: Recipe, config: Config) -> Recipe:
    """The recipe with every field overruled whose flag was given."""
    flags = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(recipe)}
    return dataclasses.replace(recipe, **{k: v for k, v in flags.items() if v is not None})


def _precision(config: Config, accelerated: bool) -> Precision:
    if config.precision == "auto":
        return "bfloat16" if accelerated else "float32"
    return config.precision


def _given(flag: T | None, otherwise: T) -> T:
    return otherwise if flag is None else flag


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)


def _check_transfer(config: Config) -> None:
    kinds = ("linear_probe", "finetune", "layerwise")
    known = config.transfer in (None, *kinds) or str(config.transfer).startswith("from:")
    _require(known, f"--transfer={config.transfer}: expected {', '.join(kinds)} or from:STAGE")
    for flag in ("transfer", "freeze_bn"):
        given = getattr(config, flag) not in (None, False)
        _require(
            config.weights is not None or not given,
            f"--{flag} is of what --weights start from; give them, such as --weights=DEFAULT",
        )
    _require(
        config.weights is None or config.conv_init in (None, "network"),
        f"--conv_init={config.conv_init} draws convolutions anew, and --weights has them",
    )
    _require(
        config.weights is None or config.head_init != "lecun",
        "--head_init=lecun draws dense layers anew, and --weights has them",
    )
    _require(
        config.weights is not None or config.head_init != "zero",
        "--head_init=zero is of a new last layer on --weights; a network cannot begin so",
    )
    _require(0 < config.head_lr_scale < math.inf, "--head_lr_scale must be above 0, and finite")
    _require(0 < config.lr_decay <= 1, "--lr_decay must be above 0 and at most 1")


def _image_size(config: Config, dataset: Dataset) -> int:
    network = flaxcnn.create_model(config.arch)
    least = network.min_size
    default = max(32, least) if dataset.small else network.default_image_size
    if config.weights is not None:
        prepared = preparation(config.arch, config.weights)
        default = prepared.crop_size if prepared else default
    size = _given(config.image_size, default)
    _require(
        size >= least,
        f"--image_size={size} is too small for {config.arch}; its least size is {least}",
    )
    return size


def _check_ranges(plan: Plan, config: Config, devices: int) -> None:
    """One line for each number that makes no sense."""
    _require(plan.steps >= 1, f"{plan.steps} steps: --epochs or --steps must give at least one")
    _require(
        plan.steps < _TOO_MANY_STEPS,
        f"--epochs and --steps must give fewer than {_TOO_MANY_STEPS:,} steps",
    )
    _require(0 < plan.learning_rate < math.inf, "--learning_rate must be above 0, and finite")
    _require(0 <= plan.momentum < 1, "--momentum must be at least 0 and below 1")
    _require(plan.weight_decay >= 0, "--weight_decay must be at least 0")
    _require(0 <= plan.label_smoothing < 1, "--label_smoothing must be at least 0 and below 1")
    _require(0 <= plan.ema_decay < 1, "--ema_decay must be at least 0 and below 1")
    _require(plan.clip_norm >= 0, "--clip_norm must be at least 0; 0 means no limit")
    _require(
        plan.dropout_rate is None or 0 <= plan.dropout_rate < 1,
        "--dropout_rate must be at least 0 and below 1",
    )
    _require(0 <= plan.seed < 2**31, f"--seed must be from 0 to {2**31 - 1}")
    _require(plan.warmup_steps >= 0, "--warmup_epochs must be at least 0")
    _require(config.read_threads >= 1, "--read_threads must be at least 1")
    for flag in ("checkpoint_every", "eval_every", "log_every"):
        value = getattr(config, flag)
        _require(value is None or value >= 1, f"--{flag} must be at least 1 step")
    plan.bn_group_size(devices)
