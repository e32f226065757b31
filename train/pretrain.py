"""Contrastive training of a small CLIP on Fashion-MNIST, the model of the embedded bundle.

    python -m train.pretrain --data fashion-mnist --out runs/fashion

The model is open_clip's CLIP with a small configuration. Each step pairs augmented images with newly
drawn prompts of every class. The loss is the symmetric contrastive loss with several positives:
every prompt of an image's class counts (UniCL, Yang et al., CVPR 2022, arXiv 2204.03610), because a
batch holds each of the ten classes many times. A killed run resumes with --resume.
"""

from __future__ import annotations

import math
import random
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from train.data import augment, fashion_mnist
from train.run.folder import (
    Metrics,
    check_same_run,
    open_folder,
    save_checkpoint,
    save_model,
    write_small_bpe,
)
from train.run.loop import check_finite, count_steps, progress_bar
from train.run.optimizer import learning_rate, parameter_groups, set_learning_rate
from train.run.settings import check_ranges, parse_settings, run, setting, to_record

EPILOG = """examples:
  python -m train.pretrain --data fashion-mnist --out runs/fashion
  python -m train.pretrain --data fashion-mnist:FOLDER --out runs/fashion --resume
  python -m train.pretrain --data fashion-mnist --out /tmp/try --epochs 1 --limit-batches 20
"""
CONTEXT_LENGTH = 32  # tokens of a prompt


@dataclass(frozen=True)
class Settings:
    """Settings of a pretraining run."""

    data: str = setting(help="data set, as name[:folder]", type=str)
    out: Path = setting(help="folder of the run", type=Path)
    epochs: int = setting(12, help="passes over the training images", low=1)
    batch_size: int = setting(128, help="images per step", low=1)
    learning_rate: float = setting(1e-3, help="highest learning rate of AdamW; cosine to zero")
    weight_decay: float = setting(
        0.05, help="weight decay of matrices; vectors and scalars have none"
    )
    warmup_steps: int = setting(500, help="steps of linear warm-up")
    gradient_clip: float = setting(1.0, help="largest norm of the gradient; 0 for no limit")
    prompts_per_class: int = setting(2, help="prompts drawn for each class in a step", low=1)
    bpe_merges: int = setting(2046, help="merges kept of CLIP's tokenizer; 2560 tokens in all")
    image_size: int = setting(28, help="input size in pixels", low=1)
    patch_size: int = setting(4, help="patch size in pixels", low=1)
    width: int = setting(128, help="width of both towers, and of the embedding", low=1)
    layers: int = setting(4, help="blocks of the image tower", low=1)
    text_layers: int = setting(2, help="blocks of the text tower", low=1)
    seed: int = setting(0, help="seed of weights, augmentation and prompts", high=2**63 - 1)
    threads: int = setting(0, help="threads of torch; 0 leaves its default")
    limit_batches: int = setting(0, help="stop each epoch after this many steps; 0 for all")
    resume: bool = setting(False, help="resume from the last checkpoint of --out")
    download: bool = setting(False, help="fetch the data set where it is missing")


def model_config(settings: Settings, vocab_size: int) -> dict[str, Any]:
    """Return the model's open_clip_config.json, with the bundle's templates and description."""
    return {
        "model_cfg": {
            "embed_dim": settings.width,
            "vision_cfg": {
                "image_size": settings.image_size,
                "layers": settings.layers,
                "width": settings.width,
                "head_width": 32,
                "patch_size": settings.patch_size,
            },
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": vocab_size,
                "width": settings.width,
                "heads": 4,
                "layers": settings.text_layers,
                "tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"},
            },
        },
        "preprocess_cfg": {
            "size": settings.image_size,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
        "edgeclip": {
            "description": "ten kinds of garments, shoes and bags; a demonstration model "
            "trained on Fashion-MNIST",
            "templates": ["a photo of a {}.", "a picture of a {}.", "a {}."],
        },
    }


def build_model(config: dict[str, Any]) -> CLIP:
    """Build the model of a configuration with random weights."""
    model = config["model_cfg"]
    text = {key: value for key, value in model["text_cfg"].items() if key != "tokenizer_kwargs"}
    return CLIP(model["embed_dim"], model["vision_cfg"], text)


def draw_prompts(rng: random.Random, per_class: int) -> tuple[list[str], Tensor]:
    """Draw `per_class` prompts of every class; return them and their classes, int64 (P,)."""
    prompts, classes = [], []
    for index, names in enumerate(fashion_mnist.FASHION_NAMES):
        for _ in range(per_class):
            # Half of the prompts have the canonical name, which most label files use.
            name = names[0] if rng.random() < 0.5 else rng.choice(names)
            prompts.append(rng.choice(fashion_mnist.FASHION_TEMPLATES).format(name))
            classes.append(index)
    return prompts, torch.tensor(classes)


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    labels: Tensor,
    text_labels: Tensor,
    scale: Tensor,
) -> Tensor:
    """Return the symmetric contrastive loss with several positives (UniCL, equations 2 to 4).

    images (B, D) and texts (P, D) are unit embeddings; labels (B,) and text_labels (P,) their
    classes; scale multiplies the cosines.
    """
    logits = scale * images @ texts.T
    positive = (labels[:, None] == text_labels[None, :]).float()
    to_text = -(F.log_softmax(logits, 1) * positive).sum(1) / positive.sum(1)
    present = positive.sum(0) > 0  # a class may have no image in the batch
    to_image = -(F.log_softmax(logits, 0) * positive).sum(0) / positive.sum(0).clamp(min=1)
    return (to_text.mean() + to_image[present].mean()) / 2


@torch.no_grad()
def accuracy(model: CLIP, images: Tensor, labels: Tensor, classes: Tensor) -> float:
    """Return the accuracy on images (N, 3, H, W) in [0, 1], with text embeddings `classes` (K, D)."""
    right = 0
    for batch, truth in zip(torch.split(images, 500), torch.split(labels, 500), strict=True):
        scores = model.encode_image(batch * 2 - 1, normalize=True) @ classes.T
        right += int((scores.argmax(1) == truth).sum())
    return right / len(labels)


@torch.no_grad()
def evaluate(
    model: CLIP, tokenizer: SimpleTokenizer, test: fashion_mnist.Split
) -> dict[str, float]:
    """Return the accuracy on the test images, as they are and recoloured on light backgrounds."""
    names, template = fashion_mnist.FASHION_CLASSES, fashion_mnist.FASHION_TEMPLATES[0]
    prompts = tokenizer([template.format(name) for name in names], CONTEXT_LENGTH)
    classes = model.encode_text(prompts, normalize=True)
    light = augment.recolour(test.images, torch.Generator().manual_seed(0))
    return {
        "test_accuracy": accuracy(model, augment.to_rgb(test.images), test.labels, classes),
        "light_accuracy": accuracy(model, light, test.labels, classes),
    }


def train(settings: Settings) -> None:
    """Train, or resume; after each epoch, write a checkpoint and the model."""
    check_ranges(settings)
    out = settings.out
    previous = open_folder(out, setting="bpe_merges", resume=settings.resume)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    train_split = fashion_mnist.load_split(settings.data, train=True, download=settings.download)
    test_split = fashion_mnist.load_split(settings.data, train=False, download=settings.download)
    steps = count_steps(len(train_split.labels), settings.batch_size, settings.limit_batches)
    training = to_record(settings) | {"images": len(train_split.labels)}
    if previous is not None:
        check_same_run(out, training, previous["training"])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = write_small_bpe(out / "bpe.txt.gz", settings.bpe_merges)
    config = model_config(settings, tokenizer.vocab_size) | {"training": training}

    torch.manual_seed(settings.seed)
    model = build_model(config)
    groups = parameter_groups(model.parameters(), settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
    image_rng = torch.Generator().manual_seed(settings.seed)
    prompt_rng = random.Random(settings.seed)
    step, total = 0, steps * settings.epochs
    if previous is not None:
        model.load_state_dict(previous["model"])
        optimizer.load_state_dict(previous["optimizer"])
        image_rng.set_state(previous["rng"])
        version, internal, gauss = previous["wording"]
        prompt_rng.setstate((version, tuple(internal), gauss))
        step = previous["epoch"] * steps
        save_model(out, model, config)  # a killed run may have left an older one

    with closing(Metrics(out, step)) as metrics, progress_bar() as bar:
        task = bar.add_task("steps", total=total, completed=step)
        for epoch in range(step // steps, settings.epochs):
            model.train()
            started, loss_sum = time.monotonic(), 0.0
            order = torch.randperm(len(train_split.labels), generator=image_rng)
            for chosen in torch.split(order, settings.batch_size)[:steps]:
                images = augment.augment(train_split.images[chosen], image_rng) * 2 - 1
                prompts, text_labels = draw_prompts(prompt_rng, settings.prompts_per_class)
                rate = learning_rate(step, total, settings.learning_rate, settings.warmup_steps)
                set_learning_rate(optimizer, rate)
                loss = contrastive_loss(
                    model.encode_image(images, normalize=True),
                    model.encode_text(tokenizer(prompts, CONTEXT_LENGTH), normalize=True),
                    train_split.labels[chosen],
                    text_labels,
                    model.logit_scale.exp(),
                )
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                norm = clip_grad_norm_(model.parameters(), settings.gradient_clip or math.inf)
                check_finite(step + 1, loss.item() + norm.item(), "lower --learning-rate")
                optimizer.step()
                with torch.no_grad():
                    model.logit_scale.clamp_(0, math.log(100))  # as CLIP does
                step += 1
                loss_sum += loss.item()
                bar.update(task, advance=1, description=f"epoch {epoch + 1} loss {loss.item():.3f}")

            model.eval()
            row = {"step": step, "epoch": epoch + 1, "loss": loss_sum / steps}
            row |= evaluate(model, tokenizer, test_split)
            row["seconds"] = time.monotonic() - started
            metrics.write(row)
            bar.console.print(row)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"rng": image_rng.get_state(), "wording": list(prompt_rng.getstate())}
            save_checkpoint(out, state | {"epoch": epoch + 1, "training": training})
            save_model(out, model, config)


def main() -> None:
    """Run the command line."""
    description = (__doc__ or "").split("\n\n")[0]
    chosen = parse_settings(Settings, "python -m train.pretrain", description, EPILOG)
    train(replace(chosen, out=chosen.out.expanduser()))


if __name__ == "__main__":
    run(main)
