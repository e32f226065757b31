"""Adversarial fine-tuning of a CLIP's image encoder: TGA-ZSR and its baselines.

    python -m train.tgazsr --model ViT-B-32 --pretrained openai --data tiny-imagenet --out runs/tga

Each step attacks the images by PGD, in [0, 1] and at the encoder's input size, and lowers the loss
of the variant on what the attack found. The text encoder stays as it is. Everything random follows
from the seed, the epoch and the index of an image: a run that was killed and resumed ends with the
weights of one that was not (on a CPU bit for bit; on a GPU up to the order of its sums), and so does,
up to rounding, one that torchrun spreads over several processes.
"""

from __future__ import annotations

import copy
import math
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

from train.data import dataset
from train.data.augment import AUGMENTATIONS
from train.data.loader import Pictures, batches, draw, seed_of, split
from train.errors import SettingsError
from train.losses import DISTANCES
from train.models.checkpoints import Source, load
from train.models.classifier import Classifier, class_embeddings, count_right
from train.run.folder import (
    Metrics,
    check_same_run,
    copy_tokenizer,
    open_folder,
    save_checkpoint,
    save_model,
)
from train.run.optimizer import learning_rate, parameter_groups, set_learning_rate
from train.run.processes import all_sum, choose_device, main_first, processes
from train.run.settings import check_eps, check_number, fraction, parse_settings, run, setting
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
NUMBERS = {  # the least that each may be
    "alpha": 0, "beta": 0, "attack_steps": 1, "epochs": 1, "batch_size": 1, "accumulate": 1,
    "learning_rate": 0, "weight_decay": 0, "warmup_steps": 0, "gradient_clip": 0, "validate": 0,
    "validate_steps": 0, "checkpoint_every": 1, "workers": 0, "threads": 0, "limit_batches": 0,
}  # fmt: skip
# What may differ between a run and its continuation: on one kind of device it changes no weight
# by more than rounding.
FREE = {"resume", "workers", "threads", "download", "checkpoint_every", "device", "out"}


@dataclass(frozen=True)
class Settings:
    data: str = setting(help="data set, as name[:path]; python -m train.data lists them", type=str)
    out: Path = setting(help="folder of the run", type=Path)
    model: str = setting("ViT-B-32", help="open_clip's name of a model, or the folder of a run")
    pretrained: str | None = setting(
        None, help="tag of open_clip's or a file of weights; a folder has its own", type=str
    )
    visual: str | None = setting(
        None,
        help="file with weights of the image tower alone, over those of --pretrained",
        type=str,
    )
    quickgelu: bool | None = setting(
        None, help="build with QuickGELU or GELU (default: as the weights were trained)", type=bool
    )
    variant: str = setting("tga", help="which loss", choices=WEIGHTS)
    alpha: float | None = setting(
        None, help="weight of the second term (default: as published; 1 for pmg)", type=float
    )
    beta: float | None = setting(
        None, help="weight of the third term (default: as published; 1 for pmg)", type=float
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
    learning_rate: float = setting(1e-4, help="highest learning rate; a cosine towards zero")
    momentum: float = setting(0.9, help="of SGD; beta 1 of AdamW")
    weight_decay: float = setting(0.0, help="of matrices; vectors and scalars have none")
    warmup_steps: int = setting(1000, help="steps of linear warm-up")
    gradient_clip: float = setting(0.0, help="largest norm of the gradient; 0 for no limit")
    precision: str = setting("fp32", help="of the encoder's arithmetic", choices=("fp32", "bf16"))
    augment: str = setting(
        "none", help="of the training images; garments is for Fashion-MNIST", choices=AUGMENTATIONS
    )
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


def checked(settings: Settings, world: int) -> Settings:
    """The settings with the variant's weights filled in. Raises SettingsError."""
    alpha, beta = WEIGHTS[settings.variant]
    settings = replace(
        settings,
        alpha=alpha if settings.alpha is None else settings.alpha,
        beta=beta if settings.beta is None else settings.beta,
    )
    for name, low in NUMBERS.items():
        check_number(name, getattr(settings, name), low)
    check_number("momentum", settings.momentum, 0, 0.9999)
    check_number("seed", settings.seed, 0, 2**63 - 1)
    for name in ("eps", "step_size"):
        check_eps(name, getattr(settings, name), settings.norm)
    if WEIGHTS[settings.variant] == (0, 0) and (settings.alpha, settings.beta) != (0, 0):
        raise SettingsError(f"--variant {settings.variant} has no terms for --alpha and --beta")
    if "{}" not in settings.template or "{}" not in settings.non_class_template:
        raise SettingsError("--template and --non-class-template need {} where the class goes")
    if settings.batch_size % (world * settings.accumulate):
        raise SettingsError(
            f"--batch-size {settings.batch_size} cannot be split over {world} processes and "
            f"--accumulate {settings.accumulate}"
        )
    return settings


def build_optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    groups = parameter_groups(parameters, settings.weight_decay)
    rate, momentum = settings.learning_rate, settings.momentum
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=momentum)
    return torch.optim.AdamW(groups, lr=rate, betas=(momentum, 0.98))


def steps_in_epoch(count: int, settings: Settings) -> int:
    steps = count // settings.batch_size
    return min(steps, settings.limit_batches) if settings.limit_batches else steps


def epoch_keys(count: int, epoch: int, settings: Settings, rank: int, world: int) -> list:
    """For each step of an epoch this process's part of the batch, as (index, seed) of each image."""
    rng = torch.Generator().manual_seed(seed_of(settings.seed, epoch))
    order = torch.randperm(count, generator=rng).tolist()
    share = settings.batch_size // world
    keys = []
    for step in range(steps_in_epoch(count, settings)):
        start = step * settings.batch_size + rank * share
        own = order[start : start + share]
        keys.append([(index, seed_of(settings.seed, epoch, index)) for index in own])
    return keys


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
    size = settings.batch_size // (world * settings.accumulate)  # what fits in training fits here
    plain = replace(settings, variant="tecoa")
    counts = count_right(
        model,
        batches(pictures, split(keys[rank::world], size), settings.workers),
        lambda *batch: attack(plain, model, original, *batch, settings.validate_steps),
    )
    clean, robust = all_sum(torch.tensor(counts)).tolist()
    return {"clean_accuracy": clean / len(keys), "robust_accuracy": robust / len(keys)}


def run_config(settings: Settings, source: Source, train_set: dataset.DataSet) -> dict[str, Any]:
    """The run's open_clip_config.json: the model's own, with what was done to it."""
    wording = dict(source.wording)
    told = wording.get("description") or source.title
    eps = f"{settings.eps * 255:.3g}/255" if settings.norm == "linf" else f"{settings.eps:.3g}"
    attack = f"{settings.norm} eps {eps}"
    wording.setdefault("templates", [settings.template])
    wording["description"] = f"{told}; fine-tuned by {settings.variant} against {attack}"
    training: dict[str, Any] = {
        "weights_sha256": source.weights_sha256,
        "images": len(train_set),
        "classes": list(train_set.classes),
    }
    for key, value in asdict(settings).items():
        training[key] = str(value) if isinstance(value, Path) else value
    return source.config | {"edgeclip": wording, "training": training}


def check_fit(settings: Settings, model: Classifier, name: str, steps: int) -> None:
    """Raises SettingsError where the variant does not fit the model, or the schedule the data."""
    spec = model.token_spec
    if settings.variant in ("tga", "comp") and (spec is None or spec.grid[0] != spec.grid[1]):
        raise SettingsError(
            f"--variant {settings.variant} reads a square of patch tokens in the embedding's space, "
            f"and {name} has none: choose a plain ViT or SigLIP, or --variant tecoa, pmg or fare"
        )
    if not steps:
        raise SettingsError(
            f"{settings.data} has fewer images than --batch-size {settings.batch_size}"
        )
    if settings.warmup_steps >= steps:
        raise SettingsError(
            f"the run has {steps} steps, and --warmup-steps {settings.warmup_steps} would never "
            f"end: give --warmup-steps {steps // 10}"
        )


def load_test_set(settings: Settings) -> dataset.DataSet:
    try:
        return dataset.load(settings.data, train=False, download=settings.download)
    except dataset.DataError as err:
        raise dataset.DataError(f"{err}; or give --validate 0") from err


def train(settings: Settings, rank: int, world: int, device: torch.device) -> None:
    out, previous = (
        settings.out,
        open_folder(settings.out, setting="variant", resume=settings.resume),
    )
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    with main_first(rank):  # what is not there yet is fetched once
        train_set = dataset.load(settings.data, train=True, download=settings.download)
        if settings.validate:
            test_set = load_test_set(settings)
        source = load(
            settings.model,
            settings.pretrained,
            visual=settings.visual,
            quick_gelu=settings.quickgelu,
        )
    texts = class_embeddings(source, train_set.classes, [settings.template])
    negations = texts  # only Comp-TGA has others
    if settings.variant == "comp":
        negations = class_embeddings(source, train_set.classes, [settings.non_class_template])
    model = Classifier(
        source,
        texts,
        train_classes=settings.variant == "at",
        bfloat16=settings.precision == "bf16",
    )
    steps_per_epoch = steps_in_epoch(len(train_set), settings)
    total = steps_per_epoch * settings.epochs
    check_fit(settings, model, source.name, total)
    # In evaluation mode throughout: statistics of batches would depend on how a batch is split.
    model, negations = model.to(device).eval(), negations.to(device)
    original = copy.deepcopy(model)
    source.model.visual.requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(parameters, settings)
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    pictures = Pictures(train_set, source.model.visual, AUGMENTATIONS[settings.augment])
    config = run_config(settings, source, train_set)

    step = 0
    if previous is not None:
        check_same_run(out, config["training"], previous["training"], may_change=FREE)
        model.load_state_dict(previous["model"], strict=False)
        optimizer.load_state_dict(previous["optimizer"])
        step = previous["step"]
        del previous
    if all_sum(torch.tensor(float(step))).item() != step * world:
        raise SettingsError(f"the processes see different checkpoints: {out} must be shared")
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
            started = time.monotonic()
            for batch in batches(pictures, keys, settings.workers):
                rate = learning_rate(step, total, settings.learning_rate, settings.warmup_steps)
                set_learning_rate(optimizer, rate)
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
                started = time.monotonic()
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


def main() -> None:
    chosen = parse_settings(Settings, "python -m train.tgazsr", __doc__.split("\n\n")[0], EPILOG)
    with processes(choose_device(chosen.device)) as (rank, world, device):
        settings = replace(checked(chosen, world), out=chosen.out.expanduser())
        train(settings, rank, world, device)


if __name__ == "__main__":
    run(main)
