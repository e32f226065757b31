"""Interpolation of an original and a robust image encoder, between clean and attacked accuracy.

    python -m train.interpolate runs/fashion runs/fashion-tga --sweep --data fashion-mnist \\
        --eps 8/255 --out runs/frontier
    python -m train.interpolate runs/fashion runs/fashion-tga --alpha 0.8 --out runs/fashion-tga-80

The weights are (1 - alpha) original + alpha robust: alpha 0 is the original encoder, 1 the robust one
(WiSE-FT, Wortsman et al., CVPR 2022, arXiv 2109.01903). Inference costs the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from edgeclip import storage
from edgeclip.json_output import to_json
from train.attacks import pgd
from train.data import dataset
from train.data.loader import Pictures, batches, draw, generators, split
from train.errors import SettingsError
from train.models.architectures import CONFIG
from train.models.checkpoints import Source, load
from train.models.classifier import Classifier, class_embeddings, count_right
from train.models.weight_files import StateDict
from train.models.weight_options import add_weight_options
from train.models.wording import wording
from train.run.folder import copy_tokenizer, save_model
from train.run.loop import progress_bar
from train.run.processes import choose_device
from train.run.settings import Parser, check_eps, check_number, fraction, run

EPILOG = """examples:
  python -m train.interpolate runs/fashion runs/fashion-tga --alpha 0.8 --out runs/fashion-tga-80
  python -m train.interpolate runs/fashion runs/fashion-tga --sweep --data fashion-mnist \\
      --eps 8/255 -n 500 --out runs/frontier
  python -m train.interpolate ViT-B-32 runs/tga --pretrained openai --alpha 0.5 --out runs/tga-50

A sweep prints a table and writes OUT/frontier.json and OUT/frontier.png.
"""
# Options that a sweep alone uses.
SWEEP = ("points", "data", "eps", "norm", "steps", "samples", "seed", "batch_size", "download")


def interpolate(original: StateDict, robust: StateDict, alpha: float) -> StateDict:
    """Return (1 - alpha) original + alpha robust, tensor by tensor; integers are the robust ones.

    Raises SettingsError for alpha outside 0 to 1, for states of different architectures, and for
    different text encoders.
    """
    check_number("alpha", alpha, 0, 1)
    shapes = [{key: value.shape for key, value in state.items()} for state in (original, robust)]
    if shapes[0] != shapes[1]:
        key = min(k for k in shapes[0] | shapes[1] if shapes[0].get(k) != shapes[1].get(k))
        raise SettingsError(f"the two models are of different architectures: see {key}")
    for key, value in robust.items():
        if not key.startswith("visual.") and not torch.equal(value, original[key]):
            raise SettingsError(
                f"the two text encoders differ, see {key}: name the model that ROBUST was "
                "fine-tuned from"
            )
    return {
        key: torch.lerp(original[key], value, alpha) if value.is_floating_point() else value
        for key, value in robust.items()
    }


def sweep(args: argparse.Namespace, original: Source, robust: Source) -> list[dict[str, float]]:
    """Return clean and attacked accuracy at each alpha; the robust source's model is changed."""
    test_set = dataset.load(args.data, train=False, download=args.download)
    classes = class_embeddings(original, test_set.classes, wording(original).templates)
    device = choose_device(args.device)
    ends = original.model.state_dict(), {k: v.clone() for k, v in robust.model.state_dict().items()}
    model = Classifier(robust, classes).to(device).eval()
    pictures = Pictures(test_set, robust.model.visual)
    keys = draw(len(test_set), args.samples, args.seed)
    key_batches = split(keys, args.batch_size)
    rows = []

    def attack(images: torch.Tensor, labels: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        return pgd(
            lambda x: model(x).logits,
            images,
            labels,
            eps=args.eps,
            step_size=args.eps / 4,
            steps=args.steps,
            norm=args.norm,
            generator=generators(seeds, device),
        )

    with progress_bar(console=Console(stderr=True)) as bar:
        task = bar.add_task("alpha", total=args.points * len(key_batches))
        for i in range(args.points):
            alpha = i / (args.points - 1)
            robust.model.load_state_dict(interpolate(*ends, alpha))

            def loader(alpha: float = alpha) -> Iterator[Any]:
                for batch in batches(pictures, key_batches, workers=0):
                    bar.update(task, description=f"alpha {alpha:.2f}")
                    yield batch
                    bar.advance(task)

            clean, attacked = count_right(model, loader(), attack)
            rows.append(
                {
                    "alpha": alpha,
                    "clean_accuracy": clean / len(keys),
                    "robust_accuracy": attacked / len(keys),
                }
            )
    return rows


def plot(rows: list[dict[str, float]], title: str, path: Path) -> None:
    """Plot the frontier: clean accuracy against attacked accuracy, alpha beside each point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    clean, attacked = ([100 * row[f"{k}_accuracy"] for row in rows] for k in ("clean", "robust"))
    axes.plot(attacked, clean, marker="o")
    for row, x, y in zip(rows, attacked, clean, strict=True):
        axes.annotate(f"{row['alpha']:.2g}", (x, y), textcoords="offset points", xytext=(6, 4))
    axes.set(xlabel="accuracy under attack, %", ylabel="clean accuracy, %", title=title)
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    with storage.writing(path) as file:
        figure.savefig(file, format="png", dpi=150)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    description = (__doc__ or "").split("\n\n")[0]
    parser = Parser("python -m train.interpolate", "ORIGINAL ROBUST", description, EPILOG)
    add = parser.add_argument
    add("original", metavar="ORIGINAL", help="folder of a run, or open_clip's name of a model")
    add("robust", metavar="ROBUST", help="folder of the run fine-tuned from ORIGINAL")
    add_weight_options(parser, "the original's ")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--alpha", type=fraction, help="write the run with this alpha, 0 to 1")
    mode.add_argument(
        "--sweep",
        action="store_true",
        help="measure alphas from 0 to 1 by PGD; needs --data and --eps",
    )
    add("--points", type=int, default=11, help="number of alphas in a sweep (default: 11)")
    parser.add_measurement(steps=20, samples=500, required=False)
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder of the new run, or of the sweep's results",
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise SettingsError for arguments out of range, or that do not fit together."""
    if args.out.exists() and not args.out.is_dir():
        raise SettingsError(f"{args.out} is a file: --out names a folder")
    check_number("threads", args.threads, 0)
    if not args.sweep:
        check_number("alpha", args.alpha, 0, 1)
        if (args.out / CONFIG).is_file():
            raise SettingsError(f"{args.out} holds a model already: name another folder")
        return
    if args.data is None or args.eps is None:
        raise SettingsError("--sweep needs --data and --eps")
    check_eps("eps", args.eps, args.norm)
    check_number("points", args.points, 2)
    check_number("seed", args.seed, 0, 2**63 - 1)
    for name in ("samples", "steps", "batch_size"):
        check_number(name, getattr(args, name), 1)


def describe(args: argparse.Namespace, original: Source, robust: Source) -> dict[str, Any]:
    """Return the arguments and weights that reproduce the run or the sweep."""
    unused = ("out", "alpha") if args.sweep else ("out", "sweep", *SWEEP)
    settings = {name: value for name, value in vars(args).items() if name not in unused}
    hashes = {"original": original.weights_sha256, "robust": robust.weights_sha256}
    return settings | {"weights_sha256": hashes}


def main(args: argparse.Namespace) -> None:
    """Write the interpolated run, or the sweep's results."""
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    original = load(args.original, args.pretrained, visual=args.visual, quick_gelu=args.quickgelu)
    robust = load(args.robust, None)
    if original.quick_gelu != robust.quick_gelu:
        raise SettingsError(
            "one of the two models has QuickGELU: give --quickgelu or --no-quickgelu, as the "
            "original was trained"
        )
    if args.sweep:
        rows = sweep(args, original, robust)
        args.out.mkdir(parents=True, exist_ok=True)
        result = {"settings": describe(args, original, robust), "results": rows}
        storage.write(args.out / "frontier.json", to_json(result, indent=2) + "\n")
        attack = f"{args.norm} eps {args.eps * 255:g}/255, PGD-{args.steps}, {args.samples} images"
        plot(rows, f"{args.data}, {attack}", args.out / "frontier.png")
        table = Table("alpha", "clean", "attacked")
        for row in rows:
            accuracies = (f"{row[k]:.1%}" for k in ("clean_accuracy", "robust_accuracy"))
            table.add_row(f"{row['alpha']:.2f}", *accuracies)
        console = Console()
        console.print(f"{args.data}, {attack}", soft_wrap=True)
        console.print(table)
        return
    state = interpolate(original.model.state_dict(), robust.model.state_dict(), args.alpha)
    robust.model.load_state_dict(state)
    text = dict(robust.wording)
    text["description"] = f"{text.get('description', robust.name)}; {args.alpha:.0%} of the way"
    config = robust.config | {"edgeclip": text, "interpolation": describe(args, original, robust)}
    args.out.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(robust, args.out)
    save_model(args.out, robust.model, config)
    print(f"{args.out}: {args.alpha:g} of the way from {args.original} to {args.robust}")


if __name__ == "__main__":
    run(lambda: main(build_parser().parse_args()))
