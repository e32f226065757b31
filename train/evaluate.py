"""Accuracy of a CLIP under attack, white box, with the checks that make the figure believable.

    python -m train.evaluate runs/fashion --data fashion-mnist --eps 8/255 --out result.json

Attacks see images in [0, 1] at the encoder's input size and change them within eps; a purified model
is attacked through every gradient of --gradient. The worst case counts an image as right only if it
stays right under every attack. Then ten checks look for ways in which the attacks may have failed.
The result file is rewritten all the time: the same command goes on where a killed one stopped, and
one with a larger -n adds to what is there.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from edgeclip.purify import from_dict
from train.errors import SettingsError
from train.models.weight_options import add_weight_options
from train.robustness.defence import GRADIENTS
from train.robustness.measurement import PURIFIER, Measurement
from train.robustness.protocols import Protocol, Radius, describe, find, missing
from train.robustness.threat import ATTACKS
from train.run.processes import choose_device, processes
from train.run.settings import Parser, check_eps, check_number, fraction, run

EPILOG = """examples:
  python -m train.evaluate runs/fashion --data fashion-mnist --eps 8/255 --out plain.json
  python -m train.evaluate ViT-B-32 --pretrained openai --data cifar10 --attack autoattack \\
      --eps 1/255 -n 1000 --out openai.json
  python -m train.evaluate bundles/vit --checkpoint runs/vit --data cifar10 --eps 4/255 \\
      --purify cos --gradient exact identity encoder released --out purified.json
  python -m train.evaluate ViT-L-14 --pretrained openai --visual fare_eps_2.pt --data imagenet \\
      --eps 2/255 --out fare.json
  python -m train.evaluate ViT-B-32 --pretrained openai --protocol tga-zsr-16 --out results/openai
  torchrun --nproc-per-node 4 -m train.evaluate runs/fashion --data fashion-mnist --eps 8/255 \\
      --attack autoattack --out plain.json

attacks: autoattack (apgd-ce, apgd-t with 9 targets, fab-t, square, each on what is left right by those
before it), these four alone, pgd and cw (PGD on the cross-entropy and on the margin), feature (PGD
towards the embedding of an image of another class). Square reads no gradient and runs once.

gradients through a purification: exact (of the function that it is), identity (as if it were none),
encoder (attack the model without it, evaluate with it), released (as the published code computes
it: shows how much of a figure is masking). Without a purification they are all the same.
"""


ATTACK, STEPS, SAMPLES = ("apgd-ce", "apgd-t"), 100, 1000


def build_parser() -> argparse.ArgumentParser:
    description = __doc__.split("\n\n")[0]
    parser = Parser("python -m train.evaluate", "SUBJECT", description, EPILOG)
    add = parser.add_argument
    add(
        "subject",
        metavar="SUBJECT",
        help="bundle, folder of a run or of transformers' CLIP, or open_clip's name of a model",
    )
    add_weight_options(parser)
    add("--checkpoint", metavar="RUN", help="of a bundle: its weights (default: beside it)")
    add("--template", action="append", metavar="TEXT", help="prompt (default: as exported)")
    add("--attack", nargs="+", metavar="NAME", choices=("autoattack", *ATTACKS),
        help=f"default: {' '.join(ATTACK)}")  # fmt: skip
    add("--gradient", nargs="+", default=list(GRADIENTS), metavar="MODE", choices=GRADIENTS,
        help="through the purification (default: all four)")  # fmt: skip
    PURIFIER.add(parser)
    add("--prior", metavar="RUN", help="of diff: run of train.diffusion_prior, or a checkpoint")
    add("--restarts", type=int, default=1, metavar="N", help="of each attack (default: 1)")
    add("--step-size", type=fraction, metavar="F", help="of pgd, cw and feature (default: eps / 4)")
    add("--queries", type=int, default=5000, metavar="N", help="of square (default: 5000)")
    add("--eot", type=int, default=1, metavar="N",
        help="draws per step against a random defence, or of diff's seed, which is then not known to "
        "the attack (default: 1)")  # fmt: skip
    parser.add_measurement(steps=STEPS, samples=SAMPLES, required=False)
    parser.set_defaults(steps=None, samples=None)  # a protocol has its own
    add("--check-samples", type=int, default=100, metavar="N",
        help="images of the ten checks; 0: none, and the report says so (default: 100)")  # fmt: skip
    add("--transfer-from", metavar="RUN", help="another model, whose attacks the third check tries")
    add("--protocol", metavar="NAME", help="a paper's data sets, attacks, sizes and prompts")
    add("--list", action="store_true", help="tell what the protocol is, and what of it is here")
    add("--skip-missing", action="store_true", help="measure the protocol's other data sets")
    add("--out", type=Path, metavar="JSON", help="the result file; of a protocol, their folder")
    return parser


def check(args: argparse.Namespace) -> None:
    """Fill in what was not given. Raises SettingsError."""
    for name in ("data", "eps", "out"):
        if getattr(args, name) is None:
            raise SettingsError(f"--{name} is missing (or --protocol; see --help)")
    for name, default in (("attack", ATTACK), ("steps", STEPS), ("samples", SAMPLES)):
        if getattr(args, name) is None:
            setattr(args, name, default)
    check_eps("eps", args.eps, args.norm)
    for name in ("steps", "restarts", "samples", "batch_size", "queries", "eot"):
        check_number(name, getattr(args, name), 1)
    check_number("check_samples", args.check_samples, 0)
    check_number("threads", args.threads, 0)
    check_number("seed", args.seed, 0, 2**63 - 1)
    if args.step_size is not None:
        check_eps("step-size", args.step_size, args.norm)
    if args.out.is_dir():
        raise SettingsError(f"{args.out} is a folder: --out names the result file")


def purification_text(settings: dict[str, Any]) -> str:
    return str(from_dict(settings["purification"]) or "none")


def show(found: dict[str, Any]) -> None:
    settings = found["settings"]
    eps = settings["eps"]
    size = f"{eps * 255:g}/255" if settings["norm"] == "linf" else f"{eps:g}"
    title = (
        f"{settings['subject']} on {settings['data']}, {found['finished']} images, "
        f"{settings['norm']} eps {size}, {settings['steps']} steps, "
        f"purification {purification_text(settings)}"
    )
    table = Table("attack", "gradient", "accuracy")
    table.add_row("none", "", f"{found['clean_accuracy']:.2%}")
    for row in found["results"]:
        for name, accuracy in row.get("stages", {}).items():
            table.add_row(f"  after {name}", row["gradient"], f"{accuracy:.2%}")
        table.add_row(row["attack"], row["gradient"], f"{row['robust_accuracy']:.2%}")
    table.add_row("worst case", "", f"{found['worst_case_accuracy']:.2%}")
    if found["masking"] is not None:
        table.add_row("masking", "", f"{100 * found['masking']:+.2f} points")
    checks = Table("check", "", "figure")
    words = {True: "pass", False: "[bold red]FAIL[/]", None: "-"}
    for i, row in enumerate(found["checks"], 1):
        checks.add_row(f"{i} {row['name']}", words[row["passed"]], row["figure"])
    console = Console()
    console.print(title, soft_wrap=True)
    console.print(table)
    console.print(checks)
    failed = [str(i) for i, row in enumerate(found["checks"], 1) if row["passed"] is False]
    if failed or not found["checks"]:
        why = f"checks {', '.join(failed)} FAILED" if failed else "NO CHECK WAS RUN"
        console.print(f"[bold red]DO NOT BELIEVE THESE FIGURES: {why}[/]", soft_wrap=True)


def measure(args: argparse.Namespace) -> None:
    """One data set, one size: attack, check, show."""
    check(args)
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[cost]}"),
    )
    with processes(choose_device(args.device)) as (rank, world, device):
        work = Measurement(args, rank, world, device)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        work.resume()
        if rank == 0:
            work.agree()
        with Progress(*columns, console=Console(stderr=True), disable=rank > 0) as progress:
            work.attack(progress)
            work.gather()
            if rank == 0:
                work.check(progress)
                work.results.write(args.out)
                show(work.results.figures())


def prescribed(
    args: argparse.Namespace, protocol: Protocol, name: str, radius: Radius
) -> argparse.Namespace:
    """The settings of one of a protocol's measurements; what was given on the command line goes
    before the protocol's own."""
    size = f"{radius.norm}-{radius.eps * 255:g}" if radius.norm == "linf" else str(radius)
    fixed = {
        "data": name,
        "norm": radius.norm,
        "eps": radius.eps,
        "out": args.out / f"{name}-{size.replace(' ', '-')}.json",
    }
    own = {
        "attack": protocol.attacks,
        "steps": protocol.steps,
        "step_size": protocol.step_size,
        "samples": protocol.samples or sys.maxsize,  # as many as there are
        "template": protocol.templates,
    }
    own = {key: value for key, value in own.items() if getattr(args, key) is None}
    if args.purify == "auto":
        own["purify"] = protocol.purify or "none"
    return argparse.Namespace(**vars(args) | own | fixed)


def follow(args: argparse.Namespace) -> None:
    """Every measurement of a protocol, into a folder. Raises SettingsError."""
    protocol = find(args.protocol)
    if args.list:
        print(describe(protocol))
        return
    if args.data or args.eps:
        raise SettingsError("--protocol has its own data and eps: leave --data and --eps out")
    if args.out is None or args.out.is_file():
        raise SettingsError("--protocol needs --out FOLDER, for a result file of each data set")
    if args.download and "RANK" in os.environ:
        raise SettingsError("--download a protocol's data sets in one process first")
    absent = missing(protocol, args.download)
    for line in absent.values():
        print(line, file=sys.stderr)
    if absent and not args.skip_missing:
        raise SettingsError(
            f"{len(absent)} of the {len(protocol.data)} data sets of {args.protocol} are not "
            "here: get them, or measure the others with --skip-missing"
        )
    for name in protocol.data:
        for radius in protocol.radii if name not in absent else ():
            measure(prescribed(args, protocol, name, radius))


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    (follow if args.protocol else measure)(args)


if __name__ == "__main__":
    run(lambda: main(build_parser().parse_args()))
