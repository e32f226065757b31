"""A diffusion prior for one CLIP, trained on its own image embeddings: what CLIPure-Diff needs.

    python -m train.diffusion_prior --bundle-checkpoint runs/fashion --data fashion-mnist --out runs/prior

The images are embedded once. Each step noises some of the embeddings, and the network of
train.models.prior learns to predict them, given a prompt of the image's class, the null text (which
is all that a purification knows), or no text at all. The run is a folder whose prior.safetensors, the
mean of the weights over the last steps, has the keys of dalle2-pytorch. It resumes at any step.
"""

from __future__ import annotations

import copy
import math
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeclip import storage
from train.data import dataset
from train.data.augment import AUGMENTATIONS
from train.data.loader import Pictures, batches, seed_of, split
from train.errors import SettingsError
from train.models.checkpoints import Source, load
from train.models.classifier import Classifier
from train.models.prior import Context, DiffusionPrior, Shape
from train.models.trained_prior import WEIGHTS, text_tokens
from train.models.wording import wording
from train.run.folder import Metrics, check_same_run, open_folder, save_checkpoint
from train.run.optimizer import learning_rate, parameter_groups, set_learning_rate
from train.run.processes import choose_device
from train.run.settings import check_number, parse_settings, run, setting

__all__ = ["DiffusionPrior", "Settings", "train"]

EPILOG = """examples:
  python -m train.diffusion_prior --bundle-checkpoint runs/fashion --data fashion-mnist --out runs/prior
  python -m train.diffusion_prior --bundle-checkpoint ViT-B-32 --pretrained openai \\
      --data imagenet:FOLDER --out runs/prior --depth 12 --heads 12
  python -m export runs/fashion -o bundles/fashion --prior runs/prior

Then: edgeclip classify photo.jpg --labels labels.txt --bundle bundles/fashion --purify diff
"""
EMBEDDINGS = "embeddings.safetensors"
NUMBERS = {
    "depth": 1, "heads": 1, "steps": 1, "batch_size": 1, "views": 1, "learning_rate": 0,
    "weight_decay": 0, "warmup_steps": 0, "validate": 0, "checkpoint_every": 1, "workers": 0,
    "threads": 0,
}  # fmt: skip
FREE = {"resume", "workers", "threads", "download", "checkpoint_every", "device", "out"}
ENCODED = 250  # images in one run of the encoder
SHOWN = 100  # steps between two rows of metrics
RANGES = ((0, 99), (450, 549), (900, 999))  # timesteps whose loss on test images is told


@dataclass(frozen=True)
class Settings:
    bundle_checkpoint: str = setting(
        help="the CLIP: folder of a run, or open_clip's name of a model", type=str
    )
    data: str = setting(help="data set, as name[:path]; python -m train.data lists them", type=str)
    out: Path = setting(help="folder of the run", type=Path)
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
    depth: int = setting(3, help="layers")
    heads: int = setting(2, help="attention heads, each 64 wide")
    steps: int = setting(1500, help="steps of training")
    batch_size: int = setting(256, help="embeddings per step")
    learning_rate: float = setting(1e-3, help="highest learning rate of AdamW; cosine to zero")
    weight_decay: float = setting(0.01, help="of matrices; vectors have none")
    warmup_steps: int = setting(200, help="steps of linear warm-up")
    decay: float = setting(0.999, help="of the mean over the weights of earlier steps")
    null_text: float = setting(0.5, help="share of embeddings shown with the null text")
    no_text: float = setting(0.1, help="share of embeddings shown without a text")
    augment: str = setting(
        "none", help="of the training images; garments is for Fashion-MNIST", choices=AUGMENTATIONS
    )
    views: int = setting(1, help="differently augmented versions of each image")
    validate: int = setting(1000, help="test images whose loss is told at the end; 0 for none")
    checkpoint_every: int = setting(1000, help="steps between checkpoints")
    seed: int = setting(0, help="of weights, order, augmentation and noise")
    workers: int = setting(0, help="processes that read images")
    threads: int = setting(0, help="threads of torch; 0 leaves its default")
    device: str = setting("auto", help="auto, cpu or cuda")
    resume: bool = setting(False, help="go on from the last checkpoint of --out")
    download: bool = setting(False, help="fetch the data set where it is missing")


@dataclass(frozen=True)
class Texts:
    """Prompts as the prior sees them: embeddings (P, D), tokens (P, n, D), null text first."""

    embeddings: Tensor
    tokens: Tensor
    classes: Tensor  # (P,): the class that each speaks of, -1 for the null text


def checked(settings: Settings) -> Settings:
    """The settings themselves. Raises SettingsError."""
    for name, low in NUMBERS.items():
        check_number(name, getattr(settings, name), low)
    for name in ("decay", "null_text", "no_text"):
        check_number(name, getattr(settings, name), 0, 1)
    if settings.warmup_steps >= settings.steps:
        raise SettingsError(f"--warmup-steps must be below --steps {settings.steps}")
    if settings.null_text + settings.no_text > 1:
        raise SettingsError("--null-text and --no-text are shares, and together above 1")
    return settings


def read_texts(source: Source, classes: tuple[str, ...]) -> Texts:
    """The null text, and each class in each template of the model. Raises ModelError."""
    words = wording(source)
    prompts = [t.replace("{}", name) for name in classes for t in words.templates]
    embeddings, tokens = text_tokens(source, prompts)
    null, null_tokens = text_tokens(source, [t.replace("{}", "") for t in words.null_templates])
    if tokens.shape[2] != embeddings.shape[1]:
        raise SettingsError(
            f"{source.name} has text tokens of {tokens.shape[2]} values and embeddings of "
            f"{embeddings.shape[1]}: a prior needs a CLIP in which these are the same"
        )
    owners = torch.arange(len(classes)).repeat_interleave(len(words.templates))
    return Texts(
        torch.cat([F.normalize(null.mean(0, keepdim=True), dim=1), embeddings]),
        torch.cat([null_tokens[:1], tokens]),
        torch.cat([torch.tensor([-1]), owners]),
    )


@torch.no_grad()
def embed(
    settings: Settings, source: Source, images: dataset.DataSet, device: torch.device, *, test: bool
) -> tuple[Tensor, Tensor]:
    """Unit embeddings (M, D) of all views of all images, and their classes (M,)."""
    model = Classifier(source, torch.zeros(1, 1), tokens=False).to(device).eval()
    augment = None if test else AUGMENTATIONS[settings.augment]
    pictures = Pictures(images, source.model.visual, augment)
    count = min(len(images), settings.validate) if test else len(images)
    views = 1 if test else settings.views
    keys = [(i, seed_of(settings.seed, v, i)) for v in range(views) for i in range(count)]
    rows, labels = [], []
    loader = batches(pictures, split(keys, ENCODED), settings.workers)
    for shown, own, _ in track(loader, f"embedding {len(keys)} images", transient=True):
        normal = (shown.to(device) - model.mean) / model.std
        rows.append(F.normalize(model.encoder(normal)[0].float(), dim=1).cpu())
        labels.append(own)
    return torch.cat(rows), torch.cat(labels)


def embeddings(
    settings: Settings, source: Source, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None, Texts]:
    """Of training images, their classes, of test images, and texts; from the run's folder if there."""
    train_set = dataset.load(settings.data, train=True, download=settings.download)
    texts = read_texts(source, train_set.classes)
    file = settings.out / EMBEDDINGS
    if not file.is_file():
        rows, labels = embed(settings, source, train_set, device, test=False)
        found = {"train": rows, "labels": labels}
        if settings.validate:
            test_set = dataset.load(settings.data, train=False, download=settings.download)
            found["test"] = embed(settings, source, test_set, device, test=True)[0]
        with storage.draft(file) as part:
            save_file(found, part)
    found = load_file(file)
    return found["train"], found["labels"], found.get("test"), texts


def choose_texts(
    settings: Settings, texts: Texts, labels: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """For embeddings of classes `labels` (B,): the prompt of each, and whether it may be seen."""
    share = torch.rand(len(labels), generator=random)
    scores = torch.rand(len(labels), len(texts.classes), generator=random)
    own = scores.masked_fill(texts.classes[None] != labels[:, None], -1).argmax(1)
    chosen = torch.where(share < settings.null_text, 0, own)
    return chosen, share < 1 - settings.no_text


def batch_loss(
    settings: Settings, prior: DiffusionPrior, texts: Texts, rows: Tensor, labels: Tensor, step: int
) -> Tensor:
    """The mean loss of embeddings drawn for this step, whatever was drawn before."""
    random = torch.Generator().manual_seed(seed_of(settings.seed, 2, step))
    device = prior.net.learned_query.device
    chosen = torch.randint(len(rows), (settings.batch_size,), generator=random)
    prompts, seen = choose_texts(settings, texts, labels[chosen], random)
    times = torch.randint(prior.shape.timesteps, (len(chosen),), generator=random)
    noise = torch.randn(len(chosen), prior.shape.dim, generator=random)
    # Each prompt of the batch once; what is not seen of it is hidden from the image's tokens.
    used, places = prompts.unique(return_inverse=True)
    whole = prior.context(texts.embeddings[used].to(device), texts.tokens[used].to(device))
    places = places.to(device)
    mask = whole.mask[places] & seen.to(device)[:, None]
    context = Context(whole.memory[:, :, places], mask)
    x0 = rows[chosen].to(device) * prior.shape.dim**0.5
    return prior.losses(x0, times.to(device), noise.to(device), context).mean()


@torch.no_grad()
def validate(prior: DiffusionPrior, texts: Texts, rows: Tensor, seed: int) -> dict[str, float]:
    """The mean loss given the null text, by ranges of timesteps. One would be a guess of zero."""
    device = prior.net.learned_query.device
    context = prior.context(texts.embeddings[:1].to(device), texts.tokens[:1].to(device))
    random = torch.Generator().manual_seed(seed_of(seed, 3))
    noise = torch.randn(rows.shape, generator=random).to(device)
    x0 = rows.to(device) * prior.shape.dim**0.5
    found = {}
    for first, last in RANGES:
        times = torch.randint(first, last + 1, (len(rows),), generator=random).to(device)
        found[f"test_loss_{first}_{last}"] = prior.losses(x0, times, noise, context).mean().item()
    return found


def train(settings: Settings) -> None:
    """Train, or go on; prior.safetensors is there at the end."""
    settings, device = checked(settings), choose_device(settings.device)
    out = settings.out
    if settings.threads:
        torch.set_num_threads(settings.threads)
    source = load(
        settings.bundle_checkpoint,
        settings.pretrained,
        visual=settings.visual,
        quick_gelu=settings.quickgelu,
    )
    told = {key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(settings).items()}  # fmt: skip
    told["weights_sha256"] = source.weights_sha256
    previous = open_folder(out, setting="bundle_checkpoint", resume=settings.resume)
    if previous is not None:
        check_same_run(out, told, previous["training"], may_change=FREE)
    if previous is not None and previous["step"] == settings.steps and (out / WEIGHTS).is_file():
        print(f"{out} is finished already")
        return
    if previous is None:  # embeddings of another run say nothing about this one
        (settings.out / EMBEDDINGS).unlink(missing_ok=True)
    settings.out.mkdir(parents=True, exist_ok=True)
    rows, labels, test, texts = embeddings(settings, source, device)

    torch.manual_seed(settings.seed)
    prior = DiffusionPrior(Shape(rows.shape[1], settings.depth, settings.heads)).to(device)
    mean = copy.deepcopy(prior).requires_grad_(False)
    trained = [p for p in prior.parameters() if p.requires_grad]
    groups = parameter_groups(trained, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
    step, total = 0, 0.0  # the sum of the losses since the last row of metrics
    if previous is not None:
        prior.load_state_dict(previous["prior"])
        mean.load_state_dict(previous["mean"])
        optimizer.load_state_dict(previous["optimizer"])
        step, total = previous["step"], previous["loss"]

    def save() -> None:
        state = {"prior": prior.state_dict(), "mean": mean.state_dict(), "step": step}
        state |= {"optimizer": optimizer.state_dict(), "loss": total, "training": told}
        save_checkpoint(settings.out, state)

    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with closing(Metrics(settings.out, step)) as metrics, Progress(*columns) as bar:
        task = bar.add_task("prior", total=settings.steps, completed=step)
        while step < settings.steps:
            rate = learning_rate(
                step, settings.steps, settings.learning_rate, settings.warmup_steps
            )
            set_learning_rate(optimizer, rate)
            loss = batch_loss(settings, prior, texts, rows, labels, step)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
            optimizer.step()
            step += 1
            total += loss.item()
            # At first the mean follows quickly: what the first weights were is no matter.
            decay = min(settings.decay, step / (step + 10))
            with torch.no_grad():
                for ours, theirs in zip(mean.parameters(), prior.parameters(), strict=True):
                    ours.lerp_(theirs, 1 - decay)
            if not math.isfinite(total):
                raise SettingsError(f"step {step}: the loss is not finite: lower --learning-rate")
            bar.update(task, advance=1)
            if step % SHOWN == 0 or step == settings.steps:
                shown = total / ((step - 1) % SHOWN + 1)
                metrics.write({"step": step, "loss": shown})
                bar.update(task, description=f"prior loss {shown:.4f}")
                total = 0.0
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                save()
        if test is not None:
            row = {"step": step} | validate(mean.eval(), texts, test, settings.seed)
            metrics.write(row)
            bar.console.print(row)
    weights = {key: value.cpu().clone() for key, value in mean.state_dict().items()}
    with storage.draft(settings.out / WEIGHTS) as part:
        save_file(weights, part)
    print(
        f"{settings.out} is ready: python -m export {settings.bundle_checkpoint} "
        f"--prior {settings.out} -o BUNDLE"
    )


def main() -> None:
    description = __doc__.split("\n\n")[0]
    chosen = parse_settings(Settings, "python -m train.diffusion_prior", description, EPILOG)
    train(replace(chosen, out=chosen.out.expanduser()))


if __name__ == "__main__":
    run(main)
