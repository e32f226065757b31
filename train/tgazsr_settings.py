"""Settings of adversarial fine-tuning, and their checks."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from edgeclip.labels import read_labels
from train.data.augment import AUGMENTATIONS
from train.errors import SettingsError
from train.losses import DISTANCES
from train.run.settings import WeightSettings, check_eps, check_ranges, fraction, setting
from train.variants import WEIGHTS, term_weights


def sizes(text: str) -> tuple[int, ...]:
    """Parse sizes in pixels, separated by commas: 160 or 128,160,192."""
    try:
        numbers = tuple(map(int, text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes such as 160 or 128,160, got {text!r}")
    return numbers


@dataclass(frozen=True)
class Settings(WeightSettings):
    """Settings of a fine-tuning run."""

    data: tuple[str, ...] = setting(
        help="data set, as name[:path]; python -m train.data lists them; several options mix their "
        "sets in equal parts, and the first is tested",
        type=str,
        repeat=True,
    )
    out: Path = setting(help="folder of the run", type=Path)
    model: str = setting("ViT-B-32", help="open_clip's name of a model, or the folder of a run")
    variant: str = setting("tga", help="loss, see below", choices=WEIGHTS)
    alpha: float | None = setting(
        None,
        help="weight of the second term (default: as published; 1 for pmg, 0 for distil)",
        type=float,
    )
    beta: float | None = setting(
        None,
        help="weight of the third term (default: as published; 1 for pmg, 0 for distil)",
        type=float,
    )
    distance: str = setting("l2", help="distance between attention maps", choices=DISTANCES)
    classes: Path | None = setting(
        None, help="file of class names, one per line (default: the classes of the data)", type=Path
    )
    template: str = setting("This is a photo of a {}", help="prompt with {} for the class")
    non_class_template: str = setting(
        "This is not a photo of a {}", help="negated prompt with {} for the class, for comp"
    )
    eps: float = setting(1 / 255, help="largest perturbation, in units of [0, 1]", type=fraction)
    step_size: float = setting(1 / 255, help="attack step size, in units of [0, 1]", type=fraction)
    attack_steps: int = setting(2, help="steps of the attack in training", low=1)
    norm: str = setting("linf", help="norm of the perturbation", choices=("linf", "l2"))
    epochs: int = setting(10, help="passes over the training images", low=1)
    batch_size: int = setting(128, help="images per step, over all processes", low=1)
    accumulate: int = setting(
        1, help="parts of a batch whose gradients are added, to save memory", low=1
    )
    optimizer: str = setting("sgd", help="optimizer", choices=("sgd", "adamw"))
    learning_rate: float = setting(1e-4, help="highest learning rate; cosine to zero")
    momentum: float = setting(0.9, help="momentum of SGD, beta 1 of AdamW", high=0.9999)
    weight_decay: float = setting(
        0.0, help="weight decay of matrices; vectors and scalars have none"
    )
    warmup_steps: int = setting(1000, help="steps of linear warm-up")
    gradient_clip: float = setting(0.0, help="largest norm of the gradient; 0 for no limit")
    precision: str = setting(
        "fp32", help="precision of the encoder's products", choices=("fp32", "bf16")
    )
    augment: str = setting(
        "none",
        help="augmentation of training images; garments is for Fashion-MNIST",
        choices=AUGMENTATIONS,
    )
    image_size: tuple[int, ...] | None = setting(
        None,
        help="input size in pixels, or sizes such as 128,160 for equal parts of the epochs; for "
        "convolutional towers (default: the model's)",
        type=sizes,
    )
    validate: int = setting(500, help="test images attacked after each epoch; 0 for none")
    validate_steps: int = setting(10, help="steps of the attack in validation")
    checkpoint_every: int = setting(200, help="steps between checkpoints", low=1)
    seed: int = setting(0, help="seed of order, augmentation and attacks", high=2**63 - 1)
    workers: int = setting(0, help="processes that read images, for each training process")
    threads: int = setting(0, help="threads of torch; 0 leaves its default")
    device: str = setting("auto", help="device of torch: auto, cpu or cuda")
    limit_batches: int = setting(0, help="stop each epoch after this many steps; 0 for all")
    resume: bool = setting(False, help="resume from the last checkpoint of --out")
    download: bool = setting(False, help="fetch the data set where it is missing")


def checked(settings: Settings, world: int) -> Settings:
    """Return the settings with the variant's alpha and beta filled in. Raises SettingsError."""
    alpha, beta = term_weights(settings)
    settings = replace(settings, alpha=alpha, beta=beta)
    check_ranges(settings)
    for name in ("eps", "step_size"):
        check_eps(name, getattr(settings, name), settings.norm)
    if WEIGHTS[settings.variant] is None and (alpha, beta) != (0, 0):
        raise SettingsError(f"--variant {settings.variant} has no terms for --alpha and --beta")
    if "{}" not in settings.template or "{}" not in settings.non_class_template:
        raise SettingsError("--template and --non-class-template need {} where the class goes")
    if settings.image_size and len(settings.image_size) > settings.epochs:
        raise SettingsError(
            f"--image-size names {len(settings.image_size)} sizes, one epoch or more for each: "
            f"give --epochs {len(settings.image_size)}"
        )
    if settings.batch_size % (world * settings.accumulate):
        raise SettingsError(
            f"--batch-size {settings.batch_size} cannot be split over {world} processes and "
            f"--accumulate {settings.accumulate}"
        )
    return settings


def image_size(settings: Settings, epoch: int) -> int | None:
    """Return the input size in an epoch, in pixels; None for the model's own."""
    if settings.image_size is None:
        return None
    return settings.image_size[epoch * len(settings.image_size) // settings.epochs]


def read_classes(file: Path) -> list[str]:
    """Return the class names of a label file.

    Raises LabelError, and SettingsError for a class with prompts of its own.
    """
    labels = read_labels(file)
    for label in labels:
        if label.prompts:
            raise SettingsError(
                f"{file} has prompts of {label.name!r}: leave the names alone, --template words them"
            )
    return [label.name for label in labels]
