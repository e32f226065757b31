"""CLIP from an image classifier of timm and a sentence encoder of transformers.

    python -m train.align --image tf_efficientnet_lite0 --text sentence-transformers/all-MiniLM-L6-v2 \\
        --data folder:photos --out runs/everyday

The projections are set in closed form (train.models.alignment): no captions are needed. With
--epochs, the classifier is first tuned on the images: under attack (--eps), it is held to its own
probabilities on the clean images, and to the labels of images whose class it knows (--beta). The
result is a run folder that open_clip, `python -m train.tgazsr` and `python -m export` load.
"""

from __future__ import annotations

import copy
import math
import time
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from edgeclip.labels import check_templates
from train.attacks import pgd
from train.data import dataset
from train.data.augment import AUGMENTATIONS
from train.data.loader import Pictures, batches, draw, generators, split
from train.data.mixture import mix
from train.errors import SettingsError
from train.losses import divergence
from train.models import alignment
from train.models.alignment import ImageClassifier
from train.models.folding import folded
from train.models.transformers_text import save as save_text_files
from train.progress import say, step
from train.run.folder import Metrics, check_same_run, open_folder, save_checkpoint, save_model
from train.run.loop import check_finite, count_steps, epoch_keys, progress_bar
from train.run.optimizer import learning_rate, parameter_groups, set_learning_rate
from train.run.processes import all_sum, choose_device, main_first, processes
from train.run.settings import (
    check_eps,
    check_ranges,
    fraction,
    parse_settings,
    run,
    setting,
    to_record,
)
from train.tgazsr_settings import read_classes

EPILOG = """examples:
  python -m train.align --image tf_efficientnet_lite0 --text sentence-transformers/all-MiniLM-L6-v2 \\
      --hypernyms /usr/share/wordnet/data.noun --data folder:photos --out runs/everyday
  python -m train.align --image resnet50.a1_in1k --text models/minilm --data tiny-imagenet --out runs/resnet
  python -m train.align --image tf_efficientnet_lite0 --image-weights lite0.pth --text models/minilm \\
      --data tiny-imagenet --data folder:photos --epochs 1 --eps 1.2/255 --beta 1 --out runs/robust

The run is a folder: python -m export runs/everyday -o BUNDLE exports it. data.noun is WordNet's file, in
Debian's package wordnet-base.
"""


@dataclass(frozen=True)
class Settings:
    """Settings of an alignment."""

    image: str = setting(help="image classifier, by timm's name", type=str)
    text: str = setting(help="sentence encoder of transformers: a folder or a hub name", type=str)
    data: tuple[str, ...] = setting(
        help="images, as name[:path]; python -m train.data lists the sets; several options mix their "
        "sets in equal parts",
        type=str,
        repeat=True,
    )
    out: Path = setting(help="folder of the run", type=Path)
    image_weights: str | None = setting(
        None, help="file of the classifier's weights (default: timm's, downloaded)", type=str
    )
    classes: Path | None = setting(
        None,
        help="file with the names of the classifier's classes, one per line (default: ImageNet's)",
        type=Path,
    )
    hypernyms: Path | None = setting(
        None, help="WordNet's data.noun: classes also get the names of what they are", type=Path
    )
    template: tuple[str, ...] = setting(
        ("a photo of a {}.", "{}"), help="prompt with {} for the class", type=str, repeat=True
    )
    projection: str = setting("mlp", help="image projection", choices=("mlp", "linear"))
    pooling: str = setting("mean", help="pooling of the sentence encoder", choices=("mean", "cls"))
    context_length: int = setting(64, help="longest prompt, in tokens", low=3)
    input_size: int = setting(
        0, help="input size of the model, in pixels; 0 for the classifier's own"
    )
    rank: int = setting(
        4, help="rank of the logit, highest first, whose mean is the projection's threshold", low=1
    )
    images: int = setting(1000, help="images that the projection's threshold is measured on", low=1)
    epochs: int = setting(0, help="passes over the images in which the classifier is tuned")
    eps: float = setting(0.0, help="perturbation in tuning, in units of [0, 1]", type=fraction)
    step_size: float = setting(
        1.5 / 255, help="attack step size in tuning, in units of [0, 1]", type=fraction
    )
    attack_steps: int = setting(1, help="steps of the attack in tuning", low=1)
    eps_warmup: float = setting(
        0.35, help="share of the steps in which the perturbation grows, from a fifth of eps", high=1
    )
    norm: str = setting("linf", help="norm of the perturbation", choices=("linf", "l2"))
    beta: float = setting(1.0, help="weight of the cross-entropy against labels of known classes")
    alpha: float = setting(
        1.0,
        help="share of the tuned weights in the classifier; the rest are the original's",
        high=1,
    )
    similarity: float = setting(
        10.0,
        help="factor of the cosines between class texts, by which the divergence counts similar classes "
        "as partly equal; 0 counts every class alone",
    )
    image_size: int = setting(0, help="input size in tuning, in pixels; 0 for the model's")
    target_size: int = setting(
        0, help="size of the images whose clean logits are the target; 0 for that of tuning"
    )
    batch_size: int = setting(32, help="images per step, over all processes", low=1)
    learning_rate: float = setting(2e-4, help="highest learning rate of AdamW; cosine to zero")
    weight_decay: float = setting(0.0, help="weight decay of matrices")
    warmup_steps: int = setting(100, help="steps of linear warm-up")
    gradient_clip: float = setting(50.0, help="largest norm of the gradient; 0 for no limit")
    precision: str = setting(
        "fp32", help="precision of the classifier's products", choices=("fp32", "bf16")
    )
    augment: str = setting(
        "photographs", help="augmentation of images in tuning", choices=AUGMENTATIONS
    )
    checkpoint_every: int = setting(200, help="steps between checkpoints", low=1)
    seed: int = setting(0, help="seed of order, augmentation and attacks", high=2**63 - 1)
    workers: int = setting(0, help="processes that read images, for each training process")
    threads: int = setting(0, help="threads of torch; 0 leaves its default")
    device: str = setting("auto", help="device of torch: auto, cpu or cuda")
    limit_batches: int = setting(0, help="stop each epoch after this many steps; 0 for all")
    resume: bool = setting(False, help="resume from the last checkpoint of --out")
    download: bool = setting(False, help="fetch the data set where it is missing")


def checked(settings: Settings, world: int) -> Settings:
    """Return the settings with the user's folder resolved. Raises SettingsError or LabelError."""
    check_ranges(settings)
    if settings.batch_size % world:
        raise SettingsError(
            f"--batch-size {settings.batch_size} cannot be split over {world} processes"
        )
    check_eps("eps", settings.eps, settings.norm)
    check_eps("step_size", settings.step_size, settings.norm)
    check_templates(settings.template)
    return replace(settings, out=settings.out.expanduser())


def attack(
    settings: Settings,
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    similar: Tensor | None,
    seeds: Tensor,
    done: float,
) -> Tensor:
    """Return images (B, 3, S, S) that raise the divergence from the clean logits `target` (B, K).

    similar: see `losses.divergence`. done: share of the steps that are done. The attack grows with it: at full size from the start, it
    makes the classifier answer the same for all images.
    """
    if not settings.eps:
        return images
    share = min(1.0, 0.2 + 0.8 * done / settings.eps_warmup) if settings.eps_warmup else 1.0
    return pgd(
        lambda x: model(x).logits,
        images,
        target,
        eps=share * settings.eps,
        step_size=share * settings.step_size,
        steps=settings.attack_steps,
        norm=settings.norm,
        loss=partial(divergence, similar=similar),
        generator=generators(seeds, images.device),
    )


def loss_terms(
    settings: Settings,
    model: nn.Module,
    target: Tensor,
    similar: Tensor | None,
    attacked: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    """Return the terms of the loss: the divergence from the clean logits, and the labels' cross-entropy.

    labels: int64 (B,), -1 for an image of a class that the classifier does not know.
    """
    with torch.autocast(attacked.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        logits = model(attacked).logits.float()
    terms = {"divergence": divergence(logits, target, similar).mean()}
    if settings.beta:
        cross_entropy = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        terms["ce"] = settings.beta * cross_entropy / len(labels)
    return terms


def shrink(images: Tensor, size: int) -> Tensor:
    """Return images (B, 3, S, S) at a smaller size, by a bicubic filter with antialiasing."""
    if images.shape[-1] == size:
        return images
    small = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return small.contiguous(memory_format=torch.channels_last)


def tune(
    settings: Settings,
    model: ImageClassifier,
    pictures: Pictures,
    texts: Tensor,
    rank: int,
    world: int,
) -> None:
    """Tune the classifier, or resume; it is folded (train.models.folding). texts: of its classes, (K, D)."""
    out = settings.out
    device = model.mean.device
    previous = open_folder(out, setting="projection", resume=settings.resume)
    training = to_record(settings)
    for name in ("alpha", "input_size", "rank", "images"):  # of what comes after the training
        del training[name]
    training["images"] = len(pictures.data)
    steps = count_steps(len(pictures.data), settings.batch_size, settings.limit_batches)
    total, done = steps * settings.epochs, 0
    size = settings.image_size or pictures.size[0]
    similar = None
    if settings.similarity:
        similar = F.softmax(settings.similarity * texts @ texts.T, 1).to(device)
    original = copy.deepcopy(model).requires_grad_(False)
    model.requires_grad_(True)
    parameters = list(model.parameters())
    groups = parameter_groups(parameters, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    if previous is not None:
        check_same_run(out, training, previous["training"])
        model.load_state_dict(previous["model"])
        optimizer.load_state_dict(previous["optimizer"])
        done = previous["step"]
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
    with (
        closing(Metrics(out, done, enabled=rank == 0)) as metrics,
        progress_bar(disable=rank > 0) as bar,
    ):
        task = bar.add_task("tuning", total=total, completed=done)
        while done < total:
            epoch, start = divmod(done, steps)
            keys = epoch_keys(len(pictures.data), epoch, settings, rank, world)[start:]
            started = time.monotonic()
            for batch in batches(pictures, keys, settings.workers):
                rate = learning_rate(done, total, settings.learning_rate, settings.warmup_steps)
                set_learning_rate(optimizer, rate)
                images, labels, seeds = (x.to(device) for x in batch)
                images = images.contiguous(memory_format=torch.channels_last)
                with torch.no_grad():
                    target = original(images).logits
                    images = shrink(images, size)
                attacked = attack(settings, model, images, target, similar, seeds, done / total)
                optimizer.zero_grad()
                terms = loss_terms(settings, parallel, target, similar, attacked, labels)
                torch.autograd.backward(sum(terms.values(), torch.zeros((), device=device)))
                norm = clip_grad_norm_(parameters, settings.gradient_clip or math.inf).item()
                means = (all_sum(torch.tensor([t.item() for t in terms.values()])) / world).tolist()
                check_finite(done + 1, sum(means) + norm, "lower --learning-rate")
                optimizer.step()
                done += 1
                row = {"step": done, "epoch": epoch + 1, "loss": sum(means)}
                row |= dict(zip(terms, means, strict=True))
                row |= {"gradient_norm": norm, "learning_rate": rate}
                metrics.write(row | {"seconds": time.monotonic() - started})
                started = time.monotonic()
                bar.update(task, advance=1, description=f"epoch {epoch + 1} loss {sum(means):.3f}")
                if rank == 0 and (done % settings.checkpoint_every == 0 or done == total):
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    save_checkpoint(out, state | {"step": done, "training": training})
    model.requires_grad_(False)
    with torch.no_grad():
        for tuned, plain in zip(model.parameters(), original.parameters(), strict=True):
            tuned.copy_(torch.lerp(plain, tuned, settings.alpha))


@torch.no_grad()
def measure(
    settings: Settings, model: ImageClassifier, pictures: Pictures
) -> tuple[Tensor, Tensor]:
    """Return the logits (N, K) and features (N, F) of images drawn by the seed."""
    keys = draw(len(pictures.data), settings.images, settings.seed)
    outputs = [
        model(images.to(model.mean.device).contiguous(memory_format=torch.channels_last))
        for images, *_ in batches(pictures, split(keys, settings.batch_size), settings.workers)
    ]
    logits = torch.cat([output.logits for output in outputs]).cpu()
    return logits, torch.cat([output.embedding for output in outputs]).cpu()


def set_projections(
    settings: Settings,
    model: Any,
    classifier: ImageClassifier,
    texts: Tensor,
    pictures: Pictures,
) -> None:
    """Set the image projection and the logit scale from the classifier, class texts (K, D) and images."""
    with step("measuring the classifier's logits"):
        logits, features = measure(settings, classifier, pictures)
    threshold = logits.topk(min(settings.rank, logits.shape[1]), dim=1).values[:, -1].mean().item()
    linear = classifier.trunk.get_classifier().cpu()
    alignment.set_trunk(model, classifier.trunk)
    alignment.set_image_projection(model, linear, texts, threshold, features)
    scale = alignment.fit_scale(model.visual.head(features), texts, logits)
    model.logit_scale.data.fill_(math.log(scale))
    say(f"threshold {threshold:.2f}, logit scale {scale:g}")


def align(settings: Settings, rank: int, world: int, device: torch.device) -> None:
    """Tune the classifier where the settings ask for it, and write the model."""
    previous = open_folder(settings.out, setting="projection", resume=settings.resume)
    del previous  # checked before the work
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    classifier = alignment.load_classifier(settings.image, settings.image_weights)
    names = read_classes(settings.classes) if settings.classes else None
    classes = alignment.choose_classes(classifier.trunk, names, settings.hypernyms)
    with step("building the model"):
        model, tokenizer, config = alignment.build_clip(
            classifier.trunk,
            settings.image,
            settings.text,
            pooling=settings.pooling,
            context_length=settings.context_length,
            projection=settings.projection,
            size=settings.input_size or None,
        )
    with main_first(rank):
        sets = [
            dataset.load(name, train=True, download=settings.download) for name in settings.data
        ]
    data = mix(sets, classes.names, labelled=False)
    classifier = classifier.to(device).to(memory_format=torch.channels_last)
    with step("encoding the classes' names"):
        texts = alignment.set_text_projection(model, tokenizer, classes, settings.template)
    if settings.epochs:
        augment = AUGMENTATIONS[settings.augment]
        size = settings.target_size or settings.image_size or None
        pictures = Pictures(data, model.visual, augment, size)
        example = torch.zeros(1, 3, *pictures.size, device=device)
        with folded(classifier, example):
            tune(settings, classifier, pictures, texts, rank, world)
    if rank > 0:
        return
    set_projections(settings, model, classifier.cpu(), texts, Pictures(data, model.visual))
    wording = {
        "description": f"{settings.image} and {Path(settings.text).name}",
        "templates": list(settings.template),
    }
    config |= {"edgeclip": wording, "training": to_record(settings) | {"images": len(data)}}
    settings.out.mkdir(parents=True, exist_ok=True)
    save_text_files(settings.out, model.text.config, tokenizer)
    save_model(settings.out, model, config)
    print(f"{settings.out} is ready: python -m export {settings.out} -o BUNDLE")


def main() -> None:
    """Run the command line, in each process of torchrun."""
    description = (__doc__ or "").split("\n\n")[0]
    chosen = parse_settings(Settings, "python -m train.align", description, EPILOG)
    with processes(choose_device(chosen.device)) as (rank, world, device):
        align(checked(chosen, world), rank, world, device)


if __name__ == "__main__":
    run(main)
