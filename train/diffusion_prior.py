"""Training of a diffusion prior on the image embeddings of one CLIP, for CLIPure-Diff.

    python -m train.diffusion_prior --bundle-checkpoint runs/fashion --data fashion-mnist --out runs/prior

The images are embedded once. Each step adds noise to some of the embeddings, and the network of
train.models.prior learns to predict the embeddings, given a prompt of the image's class, the null
text (the text of a purification) or no text. The run's prior.safetensors, the moving average of the
weights, has the keys of dalle2-pytorch. A killed run resumes with --resume.
"""

from __future__ import annotations

import copy
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

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
from train.run.loop import check_finite, progress_bar
from train.run.optimizer import learning_rate, parameter_groups, set_learning_rate
from train.run.processes import choose_device
from train.run.settings import (
    WeightSettings,
    check_ranges,
    parse_settings,
    run,
    setting,
    to_record,
)

__all__ = ["DiffusionPrior", "Settings", "train"]

EPILOG = """examples:
  python -m train.diffusion_prior --bundle-checkpoint runs/fashion --data fashion-mnist --out runs/prior
  python -m train.diffusion_prior --bundle-checkpoint ViT-B-32 --pretrained openai \\
      --data imagenet:FOLDER --out runs/prior --depth 12 --heads 12
  python -m export runs/fashion -o bundles/fashion --prior runs/prior

Then: edgeclip classify photo.jpg --labels labels.txt --bundle bundles/fashion --purify diff
"""
EMBEDDINGS = "embeddings.safetensors"
ENCODER_BATCH = 250  # images encoded at a time
METRICS_EVERY = 100  # steps between two rows of metrics
RANGES = ((0, 99), (450, 549), (900, 999))  # timesteps of the losses on test images


@dataclass(frozen=True)
class Settings(WeightSettings):
    """Settings of a prior's training run."""

    bundle_checkpoint: str = setting(
        help="CLIP to train for: folder of a run, or open_clip's name of a model", type=str
    )
    data: str = setting(help="data set, as name[:path]; python -m train.data lists them", type=str)
    out: Path = setting(help="folder of the run", type=Path)
    depth: int = setting(3, help="layers", low=1)
    heads: int = setting(2, help="attention heads, each 64 wide", low=1)
    steps: int = setting(1500, help="training steps", low=1)
    batch_size: int = setting(256, help="embeddings per step", low=1)
    learning_rate: float = setting(1e-3, help="highest learning rate of AdamW; cosine to zero")
    weight_decay: float = setting(0.01, help="weight decay of matrices; vectors have none")
    warmup_steps: int = setting(200, help="steps of linear warm-up")
    decay: float = setting(0.999, help="decay of the moving average of the weights", high=1)
    null_text: float = setting(0.5, help="share of embeddings given the null text", high=1)
    no_text: float = setting(0.1, help="share of embeddings given no text", high=1)
    augment: str = setting(
        "none",
        help="augmentation of training images; garments is for Fashion-MNIST",
        choices=AUGMENTATIONS,
    )
    views: int = setting(1, help="augmented versions of each image", low=1)
    validate: int = setting(1000, help="test images for the loss at the end; 0 for none")
    checkpoint_every: int = setting(1000, help="steps between checkpoints", low=1)
    seed: int = setting(0, help="seed of weights, order, augmentation and noise", high=2**63 - 1)
    workers: int = setting(0, help="processes that read images")
    threads: int = setting(0, help="threads of torch; 0 leaves its default")
    device: str = setting("auto", help="device of torch: auto, cpu or cuda")
    resume: bool = setting(False, help="resume from the last checkpoint of --out")
    download: bool = setting(False, help="fetch the data set where it is missing")


@dataclass(frozen=True)
class Texts:
    """Encoded prompts; the null text is the first."""

    embeddings: Tensor  # (P, D)
    tokens: Tensor  # (P, n, D)
    classes: Tensor  # (P,): the class of each, -1 for the null text


def check(settings: Settings) -> None:
    """Raise SettingsError for settings out of range, or that contradict each other."""
    check_ranges(settings)
    if settings.warmup_steps >= settings.steps:
        raise SettingsError(f"--warmup-steps must be below --steps {settings.steps}")
    if settings.null_text + settings.no_text > 1:
        raise SettingsError("--null-text and --no-text are shares, and together above 1")


def read_texts(source: Source, classes: tuple[str, ...]) -> Texts:
    """Encode the null text, and each class in each template of the model.

    Raises ModelError; SettingsError for a CLIP that no prior fits.
    """
    model_wording = wording(source)
    templates, null_templates = model_wording.templates, model_wording.null_templates
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    embeddings, tokens = text_tokens(source, prompts)
    null, null_tokens = text_tokens(source, [t.replace("{}", "") for t in null_templates])
    if tokens.shape[2] != embeddings.shape[1]:
        raise SettingsError(
            f"{source.name} has text tokens of {tokens.shape[2]} values and embeddings of "
            f"{embeddings.shape[1]}: a prior needs a CLIP in which these are the same"
        )
    indices = torch.arange(len(classes)).repeat_interleave(len(templates))
    return Texts(
        torch.cat([F.normalize(null.mean(0, keepdim=True), dim=1), embeddings]),
        torch.cat([null_tokens[:1], tokens]),
        torch.cat([torch.tensor([-1]), indices]),
    )


@torch.no_grad()
def embed(
    settings: Settings, source: Source, images: dataset.DataSet, device: torch.device, *, test: bool
) -> tuple[Tensor, Tensor]:
    """Return unit embeddings (M, D) of all views of all images, and their classes (M,)."""
    model = Classifier(source, torch.zeros(1, 1), tokens=False).to(device).eval()
    augment = None if test else AUGMENTATIONS[settings.augment]
    pictures = Pictures(images, source.model.visual, augment)
    count = min(len(images), settings.validate) if test else len(images)
    views = 1 if test else settings.views
    keys = [(i, seed_of(settings.seed, v, i)) for v in range(views) for i in range(count)]
    embeddings, labels = [], []
    loader = batches(pictures, split(keys, ENCODER_BATCH), settings.workers)
    for batch, classes, _ in track(loader, f"embedding {len(keys)} images", transient=True):
        normalized = (batch.to(device) - model.mean) / model.std
        embeddings.append(F.normalize(model.encoder(normalized)[0].float(), dim=1).cpu())
        labels.append(classes)
    return torch.cat(embeddings), torch.cat(labels)


def load_embeddings(
    settings: Settings, source: Source, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None, Texts]:
    """Return training embeddings, their classes, test embeddings, and the encoded prompts.

    The embeddings of images are computed once and kept in the run's folder.
    """
    train_set = dataset.load(settings.data, train=True, download=settings.download)
    texts = read_texts(source, train_set.classes)
    file = settings.out / EMBEDDINGS
    if not file.is_file():
        rows, labels = embed(settings, source, train_set, device, test=False)
        arrays = {"train": rows, "labels": labels}
        if settings.validate:
            test_set = dataset.load(settings.data, train=False, download=settings.download)
            arrays["test"] = embed(settings, source, test_set, device, test=True)[0]
        with storage.draft(file) as part:
            save_file(arrays, part)
    arrays = load_file(file)
    return arrays["train"], arrays["labels"], arrays.get("test"), texts


def choose_texts(
    settings: Settings, texts: Texts, labels: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw a prompt for each of the classes `labels` (B,), and whether the network sees it."""
    share = torch.rand(len(labels), generator=random)
    scores = torch.rand(len(labels), len(texts.classes), generator=random)
    prompts = scores.masked_fill(texts.classes[None] != labels[:, None], -1).argmax(1)
    return torch.where(share < settings.null_text, 0, prompts), share < 1 - settings.no_text


def batch_loss(
    settings: Settings, prior: DiffusionPrior, texts: Texts, rows: Tensor, labels: Tensor, step: int
) -> Tensor:
    """Return the mean loss of embeddings drawn for this step, independent of earlier draws."""
    random = torch.Generator().manual_seed(seed_of(settings.seed, 2, step))
    device = prior.net.learned_query.device
    chosen = torch.randint(len(rows), (settings.batch_size,), generator=random)
    prompts, visible = choose_texts(settings, texts, labels[chosen], random)
    times = torch.randint(prior.shape.timesteps, (len(chosen),), generator=random)
    noise = torch.randn(len(chosen), prior.shape.dim, generator=random)
    # The context of each distinct prompt is computed once; the mask hides a text that is not given.
    used, positions = torch.unique(prompts, return_inverse=True)
    distinct = prior.context(texts.embeddings[used].to(device), texts.tokens[used].to(device))
    positions = positions.to(device)
    mask = distinct.mask[positions] & visible.to(device)[:, None]
    context = Context(distinct.memory[:, :, positions], mask)
    x0 = rows[chosen].to(device) * prior.shape.dim**0.5
    return prior.losses(x0, times.to(device), noise.to(device), context).mean()


@torch.no_grad()
def validate(prior: DiffusionPrior, texts: Texts, rows: Tensor, seed: int) -> dict[str, float]:
    """Return the mean loss given the null text, by range of timesteps. A guess of zero has loss 1."""
    device = prior.net.learned_query.device
    context = prior.context(texts.embeddings[:1].to(device), texts.tokens[:1].to(device))
    random = torch.Generator().manual_seed(seed_of(seed, 3))
    noise = torch.randn(rows.shape, generator=random).to(device)
    x0 = rows.to(device) * prior.shape.dim**0.5
    losses = {}
    for first, last in RANGES:
        times = torch.randint(first, last + 1, (len(rows),), generator=random).to(device)
        loss = prior.losses(x0, times, noise, context).mean()
        losses[f"test_loss_{first}_{last}"] = loss.item()
    return losses


def train(settings: Settings) -> None:
    """Train, or resume; at the end the folder holds prior.safetensors."""
    check(settings)
    device = choose_device(settings.device)
    out = settings.out
    if settings.threads:
        torch.set_num_threads(settings.threads)
    source = load(
        settings.bundle_checkpoint,
        settings.pretrained,
        visual=settings.visual,
        quick_gelu=settings.quickgelu,
    )
    training = to_record(settings) | {"weights_sha256": source.weights_sha256}
    previous = open_folder(out, setting="bundle_checkpoint", resume=settings.resume)
    if previous is not None:
        check_same_run(out, training, previous["training"])
    if previous is not None and previous["step"] == settings.steps and (out / WEIGHTS).is_file():
        print(f"{out} is finished already")
        return
    if previous is None:  # embeddings of a run without a checkpoint may be of another model
        (out / EMBEDDINGS).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    rows, labels, test, texts = load_embeddings(settings, source, device)

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
        state |= {"optimizer": optimizer.state_dict(), "loss": total, "training": training}
        save_checkpoint(out, state)

    with closing(Metrics(out, step)) as metrics, progress_bar() as bar:
        task = bar.add_task("prior", total=settings.steps, completed=step)
        while step < settings.steps:
            rate = learning_rate(
                step, settings.steps, settings.learning_rate, settings.warmup_steps
            )
            set_learning_rate(optimizer, rate)
            loss = batch_loss(settings, prior, texts, rows, labels, step)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            norm = clip_grad_norm_(prior.parameters(), 1.0)
            check_finite(step + 1, loss.item() + norm.item(), "lower --learning-rate")
            optimizer.step()
            step += 1
            total += loss.item()
            # The average follows quickly at first, to forget the initial weights.
            decay = min(settings.decay, step / (step + 10))
            with torch.no_grad():
                for average, weight in zip(mean.parameters(), prior.parameters(), strict=True):
                    average.lerp_(weight, 1 - decay)
            bar.update(task, advance=1)
            if step % METRICS_EVERY == 0 or step == settings.steps:
                mean_loss = total / ((step - 1) % METRICS_EVERY + 1)
                metrics.write({"step": step, "loss": mean_loss})
                bar.update(task, description=f"prior loss {mean_loss:.4f}")
                total = 0.0
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                save()
        if test is not None:
            row = {"step": step} | validate(mean.eval(), texts, test, settings.seed)
            metrics.write(row)
            bar.console.print(row)
    weights = {key: value.cpu().clone() for key, value in mean.state_dict().items()}
    with storage.draft(out / WEIGHTS) as part:
        save_file(weights, part)
    print(f"{out} is ready: python -m export {settings.bundle_checkpoint} --prior {out} -o BUNDLE")


def main() -> None:
    """Run the command line."""
    description = (__doc__ or "").split("\n\n")[0]
    chosen = parse_settings(Settings, "python -m train.diffusion_prior", description, EPILOG)
    train(replace(chosen, out=chosen.out.expanduser()))


if __name__ == "__main__":
    run(main)
