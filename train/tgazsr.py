"""Adversarial fine-tuning of a CLIP's image encoder: TGA-ZSR and its baselines.

    python -m train.tgazsr --model ViT-B-32 --pretrained openai --data tiny-imagenet --out runs/tga

Each step attacks the images by PGD, in [0, 1] and at the encoder's input size, and lowers the
variant's loss on the attacked images. The text encoder is not trained. All random numbers follow from
the seed, the epoch and the index of an image: a run that was killed and resumed has the weights of an
uninterrupted one (on a CPU bit for bit; on a GPU up to the order of sums). A run that torchrun
distributes over several processes has them up to rounding.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from train.data import dataset
from train.data.augment import AUGMENTATIONS
from train.data.loader import Pictures, batches, draw, split
from train.data.mixture import mix
from train.errors import DataError, SettingsError
from train.models.checkpoints import Source, load
from train.models.classifier import Classifier, class_embeddings, count_right
from train.progress import brief
from train.run.folder import (
    Metrics,
    check_same_run,
    copy_tokenizer,
    open_folder,
    save_checkpoint,
    save_model,
)
from train.run.loop import check_finite, count_steps, epoch_keys, progress_bar
from train.run.optimizer import learning_rate, parameter_groups, set_learning_rate
from train.run.processes import all_sum, choose_device, main_first, processes
from train.run.settings import parse_settings, run, to_record
from train.tgazsr_settings import Settings, checked, image_size, read_classes
from train.variants import Batch, attack, loss_terms, needs_labels

EPILOG = """examples:
  python -m train.tgazsr --model ViT-B-32 --pretrained openai --data tiny-imagenet --out runs/tga
  python -m train.tgazsr --model runs/fashion --data fashion-mnist --out runs/fashion-tga \\
      --eps 8/255 --step-size 5/255 --optimizer adamw --learning-rate 3e-4 --augment garments
  python -m train.tgazsr --model runs/fashion --data folder:photos --out runs/try --variant tecoa
  torchrun --nproc-per-node 4 -m train.tgazsr --pretrained openai --data imagenet:FOLDER --out runs/tga
  python -m train.tgazsr --model runs/everyday --data tiny-imagenet --data folder:photos \\
      --out runs/distilled --variant distil --classes names.txt --augment photographs \\
      --image-size 160 --eps 1.2/255 --step-size 1.5/255 --attack-steps 1

variants: tga (TGA-ZSR), comp (Comp-TGA), tecoa (cross-entropy alone), at (cross-entropy with trained
class weights: plain adversarial training), pmg (PMG-AFT), fare (unsupervised embedding matching),
distil (the original's clean probabilities are the target, without labels: adversarial distillation).
The run is a folder: python -m export runs/tga -o BUNDLE exports it.
"""


def build_optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Return SGD or AdamW, as the settings choose."""
    groups = parameter_groups(parameters, settings.weight_decay)
    rate, momentum = settings.learning_rate, settings.momentum
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=momentum)
    return torch.optim.AdamW(groups, lr=rate, betas=(momentum, 0.98))


def accumulate_gradients(
    settings: Settings,
    model: Classifier,
    parallel: nn.Module,
    original: Classifier,
    negations: Tensor,
    batch: list[Tensor],
) -> dict[str, float]:
    """Add the batch's gradient to the weights' .grad, chunk by chunk; return the mean loss terms.

    parallel is the model, or DistributedDataParallel around it, which averages over processes.
    """
    chunks = list(zip(*(x.chunk(settings.accumulate) for x in batch), strict=True))
    means: dict[str, float] = {}
    for i, tensors in enumerate(chunks):
        chunk = Batch(original, *tensors)
        attacked = attack(settings, model, chunk, settings.attack_steps)
        # The backward pass of the last chunk averages the gradients of all over the processes.
        context: AbstractContextManager[None] = nullcontext()
        if isinstance(parallel, DistributedDataParallel) and i + 1 < len(chunks):
            context = parallel.no_sync()
        with context:
            terms = loss_terms(settings, parallel, chunk, negations, attacked)
            loss = sum(terms.values(), torch.zeros((), device=attacked.device))
            torch.autograd.backward(loss / len(chunks))
        for name, term in terms.items():
            means[name] = means.get(name, 0.0) + term.item() / len(chunks)
    return means


def validate(
    settings: Settings, model: Classifier, pictures: Pictures, rank: int, world: int
) -> dict[str, float]:
    """Return clean and attacked accuracy on test images drawn by the seed, by PGD on the logits."""
    keys = draw(len(pictures.data), settings.validate, settings.seed)
    size = settings.batch_size // (world * settings.accumulate)  # fits in memory, as in training
    logits_attack = replace(settings, variant="tecoa")
    counts = count_right(
        model,
        batches(pictures, split(keys[rank::world], size), settings.workers),
        lambda *batch: attack(logits_attack, model, Batch(model, *batch), settings.validate_steps),
    )
    clean, robust = all_sum(torch.tensor(counts)).tolist()
    return {"clean_accuracy": clean / len(keys), "robust_accuracy": robust / len(keys)}


def run_config(
    settings: Settings, source: Source, sets: Sequence[dataset.DataSet], classes: Sequence[str]
) -> dict[str, Any]:
    """Return the run's open_clip_config.json: the source's, with the wording and the settings."""
    wording = dict(source.wording)
    title = wording.get("description") or source.title
    eps = f"{settings.eps * 255:.3g}/255" if settings.norm == "linf" else f"{settings.eps:.3g}"
    attack = f"{settings.norm} eps {eps}"
    wording.setdefault("templates", [settings.template])
    wording["description"] = f"{title}; fine-tuned by {settings.variant} against {attack}"
    counts = [len(data) for data in sets]
    training = {
        "weights_sha256": source.weights_sha256,
        "images": counts if len(counts) > 1 else counts[0],
    }
    # The names replace the path of their file: they are what a resumed run needs to be the same.
    training |= to_record(settings) | {"classes": list(classes)}
    return source.config | {"edgeclip": wording, "training": training}


def check_fit(settings: Settings, model: Classifier, name: str, steps: int) -> None:
    """Raise SettingsError where the variant does not fit the model, or the schedule the steps."""
    spec = model.token_spec
    if settings.variant in ("tga", "comp") and (spec is None or spec.grid[0] != spec.grid[1]):
        raise SettingsError(
            f"--variant {settings.variant} needs a square of patch tokens in the embedding's space, "
            f"and {name} has none: choose a plain ViT, SigLIP or "
            "a convolutional tower from timm, or --variant tecoa, pmg, fare or distil"
        )
    if settings.warmup_steps >= steps:
        raise SettingsError(
            f"the run has {steps} steps, and --warmup-steps {settings.warmup_steps} would never "
            f"end: give --warmup-steps {steps // 10}"
        )
    for size in settings.image_size or ():
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError, ValueError) as err:
            raise SettingsError(
                f"{name} takes no images of {size} pixels ({brief(err)}): leave out --image-size, or "
                "choose a convolutional image tower, whose size no position embedding fixes"
            ) from err


def load_test_set(settings: Settings) -> dataset.DataSet:
    """Load the test split of the first data set. Raises DataError."""
    try:
        return dataset.load(settings.data[0], train=False, download=settings.download)
    except DataError as err:
        raise DataError(f"{err}; or give --validate 0") from err


def prefer_channels_last(visual: nn.Module) -> None:
    """Store the weights of a convolutional tower in channels_last, the order of fast convolutions."""
    sizes = [(parameter.ndim, parameter.numel()) for parameter in visual.parameters()]
    if sum(n for ndim, n in sizes if ndim == 4) > sum(n for _, n in sizes) / 2:
        visual.to(memory_format=torch.channels_last)


def build_models(
    settings: Settings, source: Source, classes: Sequence[str]
) -> tuple[Classifier, Classifier, Tensor]:
    """Return the model to train, a copy with the original weights, and the negated text embeddings."""
    prefer_channels_last(source.model.visual)  # the copy below as well
    texts = class_embeddings(source, classes, [settings.template])
    negations = texts  # comp alone uses negated prompts
    if settings.variant == "comp":
        negations = class_embeddings(source, classes, [settings.non_class_template])
    model = Classifier(
        source,
        texts,
        train_classes=settings.variant == "at",
        bfloat16=settings.precision == "bf16",
    ).eval()  # always: batch statistics would depend on how a batch is split
    original = copy.deepcopy(model)
    source.model.visual.requires_grad_(True)
    return model, original, negations


def build_tested(
    settings: Settings,
    source: Source,
    model: Classifier,
    trained: Sequence[str],
    data: dataset.DataSet,
) -> Classifier:
    """Return the model to validate on the classes of `data`, with the encoder that is trained.

    model is of the classes `trained`, and is returned where the classes are the same.
    """
    if data.classes == trained:
        return model
    texts = class_embeddings(source, data.classes, [settings.template])
    return Classifier(source, texts, bfloat16=settings.precision == "bf16").eval()


def train(settings: Settings, rank: int, world: int, device: torch.device) -> None:
    """Train, or resume; at the end the folder holds the model."""
    out = settings.out
    previous = open_folder(out, setting="variant", resume=settings.resume)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    with main_first(rank):  # missing files are fetched once
        sets = [dataset.load(x, train=True, download=settings.download) for x in settings.data]
        test_set = load_test_set(settings) if settings.validate else None
        source = load(
            settings.model,
            settings.pretrained,
            visual=settings.visual,
            quick_gelu=settings.quickgelu,
        )
    classes = read_classes(settings.classes) if settings.classes else None
    train_set = mix(sets, classes, labelled=needs_labels(settings))
    model, original, negations = build_models(settings, source, train_set.classes)
    tested = model
    if test_set is not None:
        tested = build_tested(settings, source, model, train_set.classes, test_set)
    steps_per_epoch = count_steps(len(train_set), settings.batch_size, settings.limit_batches)
    total = steps_per_epoch * settings.epochs
    check_fit(settings, model, source.name, total)
    model, original, negations = model.to(device), original.to(device), negations.to(device)
    tested = tested.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(parameters, settings)
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    config = run_config(settings, source, sets, train_set.classes)

    step = 0
    if previous is not None:
        check_same_run(out, config["training"], previous["training"])
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

    with (
        closing(Metrics(out, step, enabled=rank == 0)) as metrics,
        progress_bar(disable=rank > 0) as bar,
    ):
        task = bar.add_task(settings.variant, total=total, completed=step)
        while step < total:
            epoch, done = divmod(step, steps_per_epoch)
            keys = epoch_keys(len(train_set), epoch, settings, rank, world)[done:]
            visual, size = source.model.visual, image_size(settings, epoch)
            pictures = Pictures(train_set, visual, AUGMENTATIONS[settings.augment], size)
            started = time.monotonic()
            for batch in batches(pictures, keys, settings.workers):
                rate = learning_rate(step, total, settings.learning_rate, settings.warmup_steps)
                set_learning_rate(optimizer, rate)
                optimizer.zero_grad()
                batch = [x.to(device) for x in batch]
                terms = accumulate_gradients(settings, model, parallel, original, negations, batch)
                norm = clip_grad_norm_(parameters, settings.gradient_clip or math.inf).item()
                means = (all_sum(torch.tensor(list(terms.values()))) / world).tolist()
                loss = sum(means)
                check_finite(
                    step + 1, loss + norm, "lower --learning-rate, or add --gradient-clip 1"
                )
                optimizer.step()
                step += 1
                row = {"step": step, "epoch": epoch + 1, "loss": loss}
                row |= dict(zip(terms, means, strict=True))
                row |= {"gradient_norm": norm, "learning_rate": rate}
                metrics.write(row | {"seconds": time.monotonic() - started})
                started = time.monotonic()
                bar.update(task, advance=1, description=f"epoch {epoch + 1} loss {loss:.3f}")
                if step % settings.checkpoint_every == 0 and step % steps_per_epoch:
                    save()  # at the end of an epoch, it follows the validation
            if test_set is not None:
                row = {"step": step, "epoch": epoch + 1}
                test_pictures = Pictures(test_set, visual, size=size)
                row |= validate(settings, tested, test_pictures, rank, world)
                metrics.write(row)
                bar.console.print(row)
            save()
    if rank == 0:
        source.model.to("cpu")
        save_model(out, source.model, config)
        print(f"{out} is ready: python -m export {out} -o BUNDLE")


def main() -> None:
    """Run the command line, in each process of torchrun."""
    description = (__doc__ or "").split("\n\n")[0]
    chosen = parse_settings(Settings, "python -m train.tgazsr", description, EPILOG)
    with processes(choose_device(chosen.device)) as (rank, world, device):
        settings = replace(checked(chosen, world), out=chosen.out.expanduser())
        train(settings, rank, world, device)


if __name__ == "__main__":
    run(main)
