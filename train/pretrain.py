"""Contrastive training of a small CLIP on Fashion-MNIST, the model of the embedded bundle.

    python -m train.pretrain --data fashion-mnist --out runs/fashion

The model is open_clip's CLIP with a small configuration. Each step pairs augmented images with
freshly worded prompts of every class; the loss is the symmetric contrastive one in which every
prompt of an image's class counts as positive (UniCL, Yang et al., CVPR 2022, arXiv 2204.03610),
since a batch holds each of ten classes many times. Stop it at any time: with --resume it goes on.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edgeclip.json_output import to_json
from train.data import augment, fashion_mnist
from train.errors import SettingsError
from train.models.architectures import CONFIG
from train.run.folder import load_checkpoint, save_checkpoint, save_model, write_small_bpe
from train.run.settings import parse_settings, run, setting

EPILOG = """examples:
  python -m train.pretrain --data fashion-mnist --out runs/fashion
  python -m train.pretrain --data fashion-mnist:FOLDER --out runs/fashion --resume
  python -m train.pretrain --data fashion-mnist --out /tmp/try --epochs 1 --limit-batches 20
"""


@dataclass(frozen=True)
class Settings:
    data: str = setting(help="data set, as name[:folder]", type=str)
    out: Path = setting(help="folder of the run", type=Path)
    epochs: int = setting(12, help="passes over the training images")
    batch_size: int = setting(128, help="images per step")
    learning_rate: float = setting(1e-3, help="highest learning rate of AdamW; cosine to zero")
    weight_decay: float = setting(0.05, help="of matrices; vectors and scalars have none")
    warmup_steps: int = setting(500, help="steps of linear warm-up")
    gradient_clip: float = setting(1.0, help="largest norm of the gradient")
    prompts_per_class: int = setting(2, help="differently worded prompts of each class in a step")
    bpe_merges: int = setting(2046, help="merges kept of CLIP's tokenizer; 2560 tokens in all")
    image_size: int = setting(28, help="input size in pixels")
    patch_size: int = setting(4, help="patch size in pixels")
    width: int = setting(128, help="width of both towers, and of the embedding")
    layers: int = setting(4, help="blocks of the image tower")
    text_layers: int = setting(2, help="blocks of the text tower")
    seed: int = setting(0, help="of weights, augmentation and wording")
    threads: int = setting(0, help="threads of torch; 0 leaves its default")
    limit_batches: int = setting(0, help="stop each epoch after so many steps; 0 for all")
    resume: bool = setting(False, help="go on from the last checkpoint of --out")
    download: bool = setting(False, help="fetch the data set where it is missing")


def model_config(settings: Settings, vocab_size: int) -> dict:
    """The run's configuration in open_clip's local-dir form, with the bundle's wording beside it."""
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
                "context_length": 32,
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
        "training": {key: str(value) for key, value in asdict(settings).items()},
    }


def build_model(config: dict) -> CLIP:
    model = config["model_cfg"]
    text = {key: value for key, value in model["text_cfg"].items() if key != "tokenizer_kwargs"}
    return CLIP(model["embed_dim"], model["vision_cfg"], text)


def build_optimizer(model: CLIP, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def learning_rate(step: int, total: int, settings: Settings) -> float:
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def draw_prompts(rng: random.Random, per_class: int) -> tuple[list[str], torch.Tensor]:
    """`per_class` random wordings of every class, and the class of each, int64 (P,)."""
    prompts, classes = [], []
    for index, names in enumerate(fashion_mnist.FASHION_NAMES):
        for _ in range(per_class):
            # Half of the wordings are the canonical name, which most label files will use.
            name = names[0] if rng.random() < 0.5 else rng.choice(names)
            prompts.append(rng.choice(fashion_mnist.FASHION_TEMPLATES).format(name))
            classes.append(index)
    return prompts, torch.tensor(classes)


def contrastive_loss(
    images: torch.Tensor,
    texts: torch.Tensor,
    labels: torch.Tensor,
    text_labels: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """Symmetric contrastive loss with several positives (UniCL, equations 2 to 4).

    images (B, D) and texts (P, D) are unit rows; labels (B,) and text_labels (P,) their classes.
    """
    logits = scale * images @ texts.T
    positive = (labels[:, None] == text_labels[None, :]).float()
    to_text = -(F.log_softmax(logits, 1) * positive).sum(1) / positive.sum(1)
    present = positive.sum(0) > 0  # a class may have no image in the batch
    to_image = -(F.log_softmax(logits, 0) * positive).sum(0) / positive.sum(0).clamp(min=1)
    return (to_text.mean() + to_image[present].mean()) / 2


@torch.no_grad()
def class_embeddings(model: CLIP, tokenizer: SimpleTokenizer, length: int) -> torch.Tensor:
    """Unit embeddings (10, D) of the canonical class names in the first template."""
    prompts = [
        fashion_mnist.FASHION_TEMPLATES[0].format(name) for name in fashion_mnist.FASHION_CLASSES
    ]
    return model.encode_text(tokenizer(prompts, length), normalize=True)


@torch.no_grad()
def accuracy(
    model: CLIP, tokenizer: SimpleTokenizer, length: int, images: torch.Tensor, labels: torch.Tensor
) -> float:
    """Share of float (N, 3, H, W) images in [0, 1] that get their own class."""
    texts = class_embeddings(model, tokenizer, length)
    right = 0
    for batch, truth in zip(images.split(500), labels.split(500), strict=True):
        found = model.encode_image(batch * 2 - 1, normalize=True) @ texts.T
        right += int((found.argmax(1) == truth).sum())
    return right / len(labels)


def main(settings: Settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    train_split = fashion_mnist.load_split(settings.data, train=True, download=settings.download)
    test_split = fashion_mnist.load_split(settings.data, train=False, download=settings.download)
    previous = load_checkpoint(settings.out)
    if previous is not None and not settings.resume:
        raise SettingsError(
            f"{settings.out} holds a run already: add --resume, or name another folder"
        )
    if previous is None and (settings.out / CONFIG).is_file():
        raise SettingsError(f"{settings.out} holds a finished model: name another folder")
    settings.out.mkdir(parents=True, exist_ok=True)
    tokenizer = write_small_bpe(settings.out / "bpe.txt.gz", settings.bpe_merges)
    config = model_config(settings, tokenizer.vocab_size)
    length = config["model_cfg"]["text_cfg"]["context_length"]

    torch.manual_seed(settings.seed)
    model = build_model(config)
    optimizer = build_optimizer(model, settings)
    rng = torch.Generator().manual_seed(settings.seed)
    wording = random.Random(settings.seed)
    steps_per_epoch = len(train_split.labels) // settings.batch_size
    if settings.limit_batches:
        steps_per_epoch = min(steps_per_epoch, settings.limit_batches)
    total = steps_per_epoch * settings.epochs
    first_epoch = 0

    if previous is not None:
        model.load_state_dict(previous["model"])
        optimizer.load_state_dict(previous["optimizer"])
        rng.set_state(previous["rng"])
        version, internal, gauss = previous["wording"]
        wording.setstate((version, tuple(internal), gauss))
        first_epoch = previous["epoch"]

    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, open(settings.out / "metrics.jsonl", "a") as metrics:
        bar = progress.add_task("steps", total=total, completed=first_epoch * steps_per_epoch)
        for epoch in range(first_epoch, settings.epochs):
            model.train()
            started, loss_sum = time.monotonic(), 0.0
            order = torch.randperm(len(train_split.labels), generator=rng)
            for i in range(steps_per_epoch):
                chosen = order[i * settings.batch_size : (i + 1) * settings.batch_size]
                images = augment.augment(train_split.images[chosen], rng) * 2 - 1
                prompts, text_labels = draw_prompts(wording, settings.prompts_per_class)
                rate = learning_rate(epoch * steps_per_epoch + i, total, settings)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                image_rows = model.encode_image(images, normalize=True)
                text_rows = model.encode_text(tokenizer(prompts, length), normalize=True)
                loss = contrastive_loss(
                    image_rows,
                    text_rows,
                    train_split.labels[chosen],
                    text_labels,
                    model.logit_scale.exp(),
                )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
                optimizer.step()
                with torch.no_grad():
                    model.logit_scale.clamp_(0, math.log(100))  # as CLIP does
                loss_sum += loss.item()
                progress.update(
                    bar, advance=1, description=f"epoch {epoch + 1} loss {loss.item():.3f}"
                )

            model.eval()
            light = augment.recolour(test_split.images, torch.Generator().manual_seed(0))
            row = {
                "epoch": epoch + 1,
                "loss": loss_sum / steps_per_epoch,
                "test_accuracy": accuracy(
                    model,
                    tokenizer,
                    length,
                    augment.to_rgb(test_split.images),
                    test_split.labels,
                ),
                "light_accuracy": accuracy(model, tokenizer, length, light, test_split.labels),
                "seconds": time.monotonic() - started,
            }
            metrics.write(to_json(row) + "\n")
            metrics.flush()
            progress.console.print(row)
            save_checkpoint(
                settings.out,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rng": rng.get_state(),
                    "wording": list(wording.getstate()),
                    "epoch": epoch + 1,
                    "settings": config["training"],
                },
            )
            save_model(settings.out, model, config)


def command() -> None:
    chosen = parse_settings(Settings, "python -m train.pretrain", __doc__.split("\n\n")[0], EPILOG)
    main(replace(chosen, out=chosen.out.expanduser()))


if __name__ == "__main__":
    run(command)
