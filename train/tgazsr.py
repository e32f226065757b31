"""Adversarial fine-tuning of a CLIP's image encoder: TGA-ZSR and its baselines.

    python -m train.tgazsr --model ViT-B-32 --pretrained openai --data tiny-imagenet --out runs/tga

Each step attacks the images by PGD, in [0, 1] and at the encoder's input size, and lowers the loss
of the variant on what the attack found. The text encoder stays as it is. Everything random follows
from the seed, the epoch and the index of an image: a run that was killed and resumed, or that is
spread over several processes by torchrun, ends with the weights of one that was not.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from export import ExportError
from export.checkpoints import Source, load
from train import data
from train.augment import AUGMENTATIONS
from train.distributed import DeviceError, all_sum, main_first, processes
from train.losses import DISTANCES
from train.model import Classifier, Pictures, batches, class_embeddings, draw, seed_of
from train.runs import (
    Metrics,
    copy_tokenizer,
    fraction,
    load_checkpoint,
    parse_settings,
    save_checkpoint,
    save_model,
    setting,
)
from train.variants import WEIGHTS, attack, loss_terms

EPILOG = """examples:
  python -m train.tgazsr --model ViT-B-32 --pretrained openai --data tiny-imagenet --out runs/tga
  python -m train.tgazsr --model runs/fashion --data fashion-mnist --out runs/fashion-tga \\
      --eps 8/255 --step-size 5/255 --optimizer adamw --learning-rate 3e-4 --augment garments
  python -m train.tgazsr --model runs/fashion --data folder:photos --out runs/try --variant tecoa
  torchrun --nproc-per-node 4 -m train.tgazsr --pretrained openai --data imagenet:FOLDER --out runs/tga

variants: tga (TGA-ZSR), comp (Comp-TGA), tecoa (cross-entropy alone), at (the same with trained class
weights: plain adversarial training), pmg (PMG-AFT), fare (unsupervised embedding matching).
The run is a folder: python -m export runs/tga -o BUNDLE makes a bundle of it.
"""
# What may differ between a run and its continuation: it changes no weight.
FREE = {"resume", "workers", "threads", "download", "checkpoint_every", "device", "out"}


@dataclass(frozen=True)
class Settings:
    data: str = setting(help="data set, as name[:path]; python -m train.data lists them", type=str)
    out: Path = setting(help="folder of the run", type=Path)
    model: str = setting("ViT-B-32", help="open_clip's name of a model, or the folder of a run")
    pretrained: str | None = setting(
        None, help="tag of open_clip's or a file of weights; a folder has its own", type=str
    )
    variant: str = setting("tga", help="which loss", choices=WEIGHTS)
    alpha: float | None = setting(
        None, help="weight of the second term (default: as published for the variant)", type=float
    )
    beta: float | None = setting(
        None, help="weight of the third term (default: as published for the variant)", type=float
    )
    distance: str = setting("l2", help="between attention maps", choices=DISTANCES)
    template: str = setting("This is a photo of a {}", help="prompt with {} for the class")
    non_class_template: str = setting(
        "This is not a photo of a {}", help="of comp: the prompt that denies the class"
    )
    eps: float = setting(1 / 255, help="largest perturbation, in units of [0, 1]", type=fraction)
    step_size: float = setting(1 / 255, help="of the attack, in units of [0, 1]", type=fraction)
    attack_steps: int = setting(2, help="of the attack that is trained on")
    norm: str = setting("linf", help="of the perturbation", choices=("linf", "l2"))
    epochs: int = setting(10, help="passes over the training images")
    batch_size: int = setting(128, help="images per step, over all processes")
    accumulate: int = setting(1, help="parts of a batch whose gradients are added, to save memory")
    optimizer: str = setting("sgd", help="optimiser", choices=("sgd", "adamw"))
    learning_rate: float = setting(1e-4, help="highest learning rate; cosine to zero")
    momentum: float = setting(0.9, help="of SGD; beta 1 of AdamW")
    weight_decay: float = setting(0.0, help="of matrices; vectors and scalars have none")
    warmup_steps: int = setting(1000, help="steps of linear warm-up")
    gradient_clip: float = setting(0.0, help="largest norm of the gradient; 0 for no limit")
    precision: str = setting("fp32", help="of the encoder's arithmetic", choices=("fp32", "bf16"))
    augment: str = setting("none", help="of the training images", choices=AUGMENTATIONS)
    validate: int = setting(500, help="test images attacked after each epoch; 0 for none")
    validate_steps: int = setting(10, help="of that attack")
    checkpoint_every: int = setting(200, help="steps between checkpoints")
    seed: int = setting(0, help="of order, augmentation and attacks")
    workers: int = setting(0, help="processes that read images, per process that trains")
    threads: int = setting(0, help="threads of torch; 0 leaves its default")
    device: str = setting("auto", help="auto, cpu or cuda")
    limit_batches: int = setting(0, help="stop each epoch after so many steps; 0 for all")
    resume: bool = setting(False, help="go on from the last checkpoint of --out")
    download: bool = setting(False, help="fetch the data set where it is missing")


class SettingsError(Exception):
    """Settings that make no sense, or do not fit the model, the data or the run."""


def checked(settings: Settings, world: int) -> Settings:
    """The settings with the variant's weights filled in. Raises SettingsError."""
    alpha, beta = WEIGHTS[settings.variant]
    settings = replace(
        settings,
        alpha=alpha if settings.alpha is None else settings.alpha,
        beta=beta if settings.beta is None else settings.beta,
    )
    if settings.alpha < 0 or settings.beta < 0:
        raise SettingsError(
            f"--alpha and --beta must be 0 or more, got {settings.alpha} and {settings.beta}"
        )
    if WEIGHTS[settings.variant] == (0, 0) and (settings.alpha, settings.beta) != (0, 0):
        raise SettingsError(f"--variant {settings.variant} has no terms for --alpha and --beta")
    for name in ("eps", "step_size"):
        value = getattr(settings, name)
        if value < 0 or (settings.norm == "linf" and value >= 1):
            option = name.replace("_", "-")
            raise SettingsError(
                f"--{option} is in units of [0, 1], got {value:g}: for {value:g} of 255 "
                f"give --{option} {value:g}/255"
            )
    for name in ("attack_steps", "epochs", "batch_size", "accumulate", "checkpoint_every"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"--{name.replace('_', '-')} must be 1 or more")
    if "{}" not in settings.template or "{}" not in settings.non_class_template:
        raise SettingsError("--template and --non-class-template need {} where the class goes")
    if settings.batch_size % (world * settings.accumulate):
        raise SettingsError(
            f"--batch-size {settings.batch_size} cannot be split over {world} processes and "
            f"--accumulate {settings.accumulate}"
        )
    return settings


def build_optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    rate, momentum = settings.learning_rate, settings.momentum
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=momentum)
    return torch.optim.AdamW(groups, lr=rate, betas=(momentum, 0.98))


def learning_rate(step: int, total: int, settings: Settings) -> float:
    """Linear warm-up from the first step, then a cosine to zero at the last."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def epoch_keys(count: int, epoch: int, settings: Settings, rank: int, world: int) -> list:
    """For each step of an epoch this process's part of the batch, as (index, seed) of each image."""
    rng = torch.Generator().manual_seed(seed_of(settings.seed, epoch))
    order = torch.randperm(count, generator=rng).tolist()
    share = settings.batch_size // world
    keys = []
    for start in range(0, count - settings.batch_size + 1, settings.batch_size):
        own = order[start + rank * share : start + (rank + 1) * share]
        keys.append([(index, seed_of(settings.seed, epoch, index)) for index in own])
    return keys[: settings.limit_batches or None]


def accumulate_gradients(
    settings: Settings,
    model: Classifier,
    parallel: nn.Module,
    original: Classifier,
    negations: torch.Tensor,
    batch: list[torch.Tensor],
) -> dict[str, float]:
    """Add the batch's gradient to the weights' .grad, part by part; the mean of each loss term.

    parallel is the model, or DistributedDataParallel around it, which averages over processes.
    """
    parts = list(zip(*(x.chunk(settings.accumulate) for x in batch), strict=True))
    means: dict[str, float] = {}
    for i, (images, labels, seeds) in enumerate(parts):
        found = attack(
            settings, model, original, images, labels, seeds, steps=settings.attack_steps
        )
        last = i + 1 == len(parts)
        with nullcontext() if last or parallel is model else parallel.no_sync():
            terms = loss_terms(settings, parallel, original, negations, images, found, labels)
            (sum(terms.values()) / len(parts)).backward()
        for name, term in terms.items():
            means[name] = means.get(name, 0.0) + term.item() / len(parts)
    return means


def validate(
    settings: Settings,
    model: Classifier,
    original: Classifier,
    pictures: Pictures,
    rank: int,
    world: int,
) -> dict[str, float]:
    """Clean and attacked accuracy on test images drawn by the seed, by PGD on the logits."""
    keys = draw(len(pictures.data), settings.validate, settings.seed)
    mine, right = keys[rank::world], torch.zeros(2)
    parts = [mine[i : i + settings.batch_size] for i in range(0, len(mine), settings.batch_size)]
    plain = replace(settings, variant="tecoa")
    for batch in batches(pictures, parts, settings.workers):
        images, labels, seeds = (x.to(model.mean.device) for x in batch)
        found = attack(plain, model, original, images, labels, seeds, settings.validate_steps)
        with torch.no_grad():
            for i, shown in enumerate((images, found)):
                right[i] += (model(shown).logits.argmax(1) == labels).sum().item()
    clean, robust = all_sum(right).tolist()
    return {"clean_accuracy": clean / len(keys), "robust_accuracy": robust / len(keys)}


def run_config(settings: Settings, source: Source) -> dict[str, Any]:
    """The run's open_clip_config.json: the model's own, with what was done to it."""
    wording = dict(source.wording)
    told = wording.get("description") or f"{source.name}, weights {source.pretrained}"
    attack = f"{settings.norm} eps {settings.eps * 255:.3g}/255"
    wording["description"] = f"{told}; fine-tuned by {settings.variant} against {attack}"
    training: dict[str, Any] = {"weights_sha256": source.weights_sha256}
    for key, value in asdict(settings).items():
        training[key] = str(value) if isinstance(value, Path) else value
    return source.config | {"edgeclip": wording, "training": training}


def refuse_other_run(settings: Settings, now: dict[str, Any], before: dict[str, Any]) -> None:
    """Raises SettingsError unless the checkpoint is an earlier state of this very run."""
    if not settings.resume:
        raise SettingsError(
            f"{settings.out} holds a run already: add --resume, or name another folder"
        )
    for name, value in now.items():
        if name not in FREE and before.get(name) != value:
            raise SettingsError(
                f"{settings.out} was begun with {name.replace('_', '-')} {before.get(name)}, "
                f"not {value}: resume it with the same, or name another folder"
            )


def check_fit(settings: Settings, model: Classifier, name: str, steps: int) -> None:
    """Raises SettingsError where the variant does not fit the model, or the schedule the data."""
    spec = model.token_spec
    if settings.variant in ("tga", "comp") and (spec is None or spec.grid[0] != spec.grid[1]):
        raise SettingsError(
            f"--variant {settings.variant} needs an image encoder with a square of patch tokens, "
            f"and {name} has none: choose a ViT, or --variant tecoa, pmg or fare"
        )
    if not steps:
        raise SettingsError(f"{settings.data} has fewer images than --batch-size needs")
    if settings.warmup_steps >= steps:
        raise SettingsError(
            f"the run has {steps} steps, and --warmup-steps {settings.warmup_steps} would never "
            f"end: give --warmup-steps {steps // 10}"
        )


def train(settings: Settings, rank: int, world: int, device: torch.device) -> None:
    out = settings.out
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    with main_first(rank):  # what is not there yet is fetched once
        train_set = data.load(settings.data, train=True, download=settings.download)
        if settings.validate:
            test_set = data.load(settings.data, train=False, download=settings.download)
        source = load(settings.model, settings.pretrained)
    texts = class_embeddings(source, train_set.classes, [settings.template])
    negations = class_embeddings(source, train_set.classes, [settings.non_class_template])
    model = Classifier(
        source,
        texts,
        train_classes=settings.variant == "at",
        bfloat16=settings.precision == "bf16",
    )
    steps_per_epoch = len(epoch_keys(len(train_set), 0, settings, rank, world))
    total = steps_per_epoch * settings.epochs
    check_fit(settings, model, source.name, total)
    # In evaluation mode throughout: statistics of batches would depend on how a batch is split.
    model, negations = model.to(device).eval(), negations.to(device)
    original = copy.deepcopy(model)
    source.model.visual.requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(parameters, settings)
    parallel = DistributedDataParallel(model) if world > 1 else model
    pictures = Pictures(train_set, source.model.visual, AUGMENTATIONS[settings.augment])
    config = run_config(settings, source)

    step = 0
    previous = load_checkpoint(out)
    if previous is not None:
        refuse_other_run(settings, config["training"], previous["training"])
        model.load_state_dict(previous["model"], strict=False)
        optimizer.load_state_dict(previous["optimizer"])
        step = previous["step"]
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(source, out)

    def save() -> None:
        if rank == 0:
            weights = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
            state = {"model": weights, "optimizer": optimizer.state_dict(), "step": step}
            save_checkpoint(out, state | {"training": config["training"]})

    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        closing(Metrics(out, step, enabled=rank == 0)) as metrics,
        Progress(*columns, disable=rank > 0) as bar,
    ):
        task = bar.add_task(settings.variant, total=total, completed=step)
        while step < total:
            epoch, done = divmod(step, steps_per_epoch)
            keys = epoch_keys(len(train_set), epoch, settings, rank, world)[done:]
            for batch in batches(pictures, keys, settings.workers):
                started = time.monotonic()
                rate = learning_rate(step, total, settings)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad()
                batch = [x.to(device) for x in batch]
                means = accumulate_gradients(settings, model, parallel, original, negations, batch)
                norm = clip_grad_norm_(parameters, settings.gradient_clip or math.inf).item()
                values = (all_sum(torch.tensor(list(means.values()))) / world).tolist()
                if not math.isfinite(sum(values) + norm):
                    raise SettingsError(
                        f"step {step + 1}: the loss or its gradient is not finite: "
                        "lower --learning-rate, or add --gradient-clip 1"
                    )
                optimizer.step()
                step += 1
                row = {"step": step, "epoch": epoch + 1, "loss": sum(values)}
                row |= dict(zip(means, values, strict=True))
                row |= {"gradient_norm": norm, "learning_rate": rate}
                metrics.write(row | {"seconds": time.monotonic() - started})
                bar.update(task, advance=1, description=f"epoch {epoch + 1} loss {row['loss']:.3f}")
                if step % settings.checkpoint_every == 0 and step % steps_per_epoch:
                    save()  # at the end of an epoch it follows the validation
            if settings.validate:
                row = {"step": step, "epoch": epoch + 1}
                shown = Pictures(test_set, source.model.visual)
                row |= validate(settings, model, original, shown, rank, world)
                metrics.write(row)
                bar.console.print(row)
            save()
    if rank == 0:
        source.model.to("cpu")
        save_model(out, source.model, config)
        print(f"{out} is ready: python -m export {out} -o BUNDLE")


if __name__ == "__main__":
    chosen = parse_settings(Settings, __doc__.split("\n\n")[0], EPILOG)
    try:
        with processes(chosen.device) as (rank, world, device):
            folder = chosen.out.expanduser()
            train(replace(checked(chosen, world), out=folder), rank, world, device)
    except (data.DataError, DeviceError, ExportError, SettingsError) as err:
        sys.exit(f"error: {err}")
