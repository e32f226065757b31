"""Accuracy of a CLIP under attack, on the PyTorch model, white box.

    python -m train.evaluate runs/fashion --data fashion-mnist --eps 8/255 -n 500 --out result.json

Attacks see images in [0, 1] at the encoder's input size and change them within eps. The worst case
counts an image as right only if it stays right under every attack. The result file is rewritten
after every batch: the same command goes on where a killed one stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchattacks
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import edgeclip
from export.bundle import wording
from export.checkpoints import load
from train import data
from train.attacks import pgd
from train.distributed import choose_device
from train.model import (
    Attack,
    Classifier,
    Pictures,
    batches,
    class_embeddings,
    draw,
    generators,
    split,
)
from train.runs import write_atomically
from train.settings import Parser, SettingsError, check_eps, check_number, run

EPILOG = """examples:
  python -m train.evaluate runs/fashion --data fashion-mnist --eps 8/255 -n 500 --out plain.json
  python -m train.evaluate ViT-B-32 --pretrained openai --data cifar10 --attack pgd apgd-ce apgd-t \\
      --eps 1/255 -n 1000 --out openai.json

attacks: apgd-ce and apgd-t (targeted, up to 9 classes) of AutoAttack by the library torchattacks; pgd
with the cross-entropy and cw with the margin by train.attacks, step size eps / 4.
"""
TARGETS = 9  # classes that the targeted attack tries, as in AutoAttack


class Logits(nn.Module):
    """A classifier as attack libraries want it: images in [0, 1] -> logits."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).logits


def build_attack(name: str, model: Classifier, args: argparse.Namespace) -> Attack:
    logits, classes = Logits(model).eval(), len(model.classes)
    norm = {"linf": "Linf", "l2": "L2"}[args.norm]
    shared = {"norm": norm, "eps": args.eps, "steps": args.steps, "n_restarts": args.restarts}
    if name == "apgd-ce":
        library = torchattacks.APGD(logits, **shared, seed=args.seed, loss="ce")
        return lambda images, labels, seeds: library(images, labels)
    if name == "apgd-t":
        if classes < 4:
            raise SettingsError(f"apgd-t needs 4 classes or more, {args.data} has {classes}")
        targets = min(classes, TARGETS + 1)
        library = torchattacks.APGDT(logits, **shared, seed=args.seed, n_classes=targets)
        return lambda images, labels, seeds: library(images, labels)
    return lambda images, labels, seeds: pgd(
        logits,
        images,
        labels,
        eps=args.eps,
        step_size=args.eps / 4,
        steps=args.steps,
        norm=args.norm,
        loss={"pgd": "ce", "cw": "cw"}[name],
        restarts=args.restarts,
        generator=generators(seeds, images.device),
    )


def build_parser() -> argparse.ArgumentParser:
    description = __doc__.split("\n\n")[0]
    parser = Parser("python -m train.evaluate", "SUBJECT", description, EPILOG)
    add = parser.add_argument
    add("subject", metavar="SUBJECT", help="folder of a run, or open_clip's name of a model")
    add("--pretrained", metavar="TAG", help="tag of open_clip's or a file of weights")
    add("--template", action="append", metavar="TEXT", help="prompt (default: as exported)")
    add("--attack", nargs="+", default=["apgd-ce", "apgd-t"], metavar="NAME",
        choices=("apgd-ce", "apgd-t", "pgd", "cw"), help="default: apgd-ce apgd-t")  # fmt: skip
    add("--restarts", type=int, default=1, help="of each attack (default: 1)")
    parser.add_measurement(steps=100, samples=1000, required=True)
    add("--out", type=Path, required=True, metavar="JSON", help="the result file")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises SettingsError."""
    check_eps("eps", args.eps, args.norm)
    for name in ("steps", "restarts", "samples", "batch_size"):
        check_number(name, getattr(args, name), 1)
    check_number("threads", args.threads, 0)
    check_number("seed", args.seed, 0, 2**63 - 1)
    if args.out.is_dir():
        raise SettingsError(f"{args.out} is a folder: --out names the result file")


def previous_samples(path: Path, settings: dict[str, Any]) -> dict[str, str]:
    """What a killed run of the same command found so far: for each attack, 1 or 0 per image."""
    if not path.is_file():
        return {}
    try:
        before = json.loads(path.read_text())
        if before["settings"] == settings:
            return before["samples"]
    except (ValueError, KeyError, TypeError) as err:
        raise SettingsError(f"{path} is not a result file: remove it, or name another") from err
    different = [key for key in settings if before["settings"].get(key) != settings[key]]
    raise SettingsError(
        f"{path} holds the results of other settings ({', '.join(different)}): name another file"
    )


def report(settings: dict[str, Any], samples: dict[str, str]) -> dict[str, Any]:
    """The result file's contents; figures only of what is finished."""
    done = {name: marks for name, marks in samples.items() if len(marks) == settings["samples"]}

    def share(marks: Sequence[str]) -> float:
        return sum(mark == "1" for mark in marks) / len(marks)

    found: dict[str, Any] = {"settings": settings}
    if "clean" in done:
        found["clean_accuracy"] = share(done["clean"])
    found["results"] = [
        {
            "attack": name,
            "norm": settings["norm"],
            "eps": settings["eps"],
            "gradient": "exact",  # there is no purification whose gradient could be replaced
            "robust_accuracy": share(done[name]),
        }
        for name in settings["attack"]
        if name in done
    ]
    if len(done) == 1 + len(settings["attack"]):
        worst = ["1" if set(marks) == {"1"} else "0" for marks in zip(*done.values(), strict=True)]
        found["worst_case_accuracy"] = share(worst)
    return found | {"samples": samples}


def describe(args: argparse.Namespace, weights_sha256: str, templates: Sequence[str], count: int):
    """Everything needed to run it again, and to tell whether a result file is of this run."""
    packages = ("torch", "torchattacks", "open_clip_torch")
    return {
        "subject": args.subject,
        "pretrained": args.pretrained,
        "weights_sha256": weights_sha256,
        "data": args.data,
        "templates": list(templates),
        "attack": list(dict.fromkeys(args.attack)),
        "norm": args.norm,
        "eps": args.eps,
        "steps": args.steps,
        "restarts": args.restarts,
        "samples": count,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "purification": "none",
        "versions": {name: version(name) for name in packages}
        | {"edgeclip": edgeclip.__version__, "python": platform.python_version()},
    }


def show(found: dict[str, Any]) -> None:
    settings = found["settings"]
    title = (
        f"{settings['subject']} on {settings['data']}, {settings['samples']} images, "
        f"{settings['norm']} eps {settings['eps'] * 255:g}/255, {settings['steps']} steps"
    )
    table = Table("attack", "accuracy")
    table.add_row("none", f"{found['clean_accuracy']:.2%}")
    for row in found["results"]:
        table.add_row(row["attack"], f"{row['robust_accuracy']:.2%}")
    table.add_row("worst case", f"{found['worst_case_accuracy']:.2%}")
    console = Console()
    console.print(title, soft_wrap=True)
    console.print(table)


def main(args: argparse.Namespace) -> None:
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    test_set = data.load(args.data, train=False, download=args.download)
    source = load(args.subject, args.pretrained)
    templates = wording(source, templates=args.template).templates
    classes = class_embeddings(source, test_set.classes, templates)
    model = Classifier(source, classes).to(device).eval()
    attacks = {name: build_attack(name, model, args) for name in dict.fromkeys(args.attack)}

    keys = draw(len(test_set), args.samples, args.seed)
    count = len(keys)
    settings = describe(args, source.weights_sha256, templates, count)
    samples = previous_samples(args.out, settings)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(test_set, source.model.visual)

    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name in ["clean", *attacks]:
            samples.setdefault(name, "")
            start = len(samples[name])  # a whole number of batches, or all of them
            bar = progress.add_task(name, total=count, completed=start)
            for batch in batches(pictures, split(keys[start:], args.batch_size), workers=0):
                images, labels, seeds = (x.to(device) for x in batch)
                shown = images if name == "clean" else attacks[name](images, labels, seeds)
                with torch.no_grad():
                    right = model(shown).logits.argmax(1) == labels
                samples[name] += "".join("1" if mark else "0" for mark in right.tolist())
                text = json.dumps(report(settings, samples), indent=2) + "\n"
                write_atomically(args.out, lambda part, text=text: part.write_text(text))
                progress.update(bar, completed=len(samples[name]))
    show(report(settings, samples))


if __name__ == "__main__":
    run(lambda: main(build_parser().parse_args()))
