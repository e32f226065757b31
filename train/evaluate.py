"""White-box evaluation of a CLIP: its accuracy under attack, and ten checks of that figure.

    python -m train.evaluate runs/fashion --data fashion-mnist --eps 8/255 --out result.json

Attacks see images in [0, 1] at the encoder's input size and change them within eps; a purified model
is attacked through every gradient of --gradient. The worst case counts an image as correct only if it
stays correct under every attack. Then ten checks look for ways in which the attacks may have failed.
The result file is updated after each batch: the same command resumes an interrupted run, and one
with a larger -n adds images to it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from train.errors import SettingsError
from train.models.weight_options import add_weight_options
from train.robustness.measurement import PURIFIER, Measurement
from train.robustness.protocols import PROTOCOLS, Protocol, Radius, describe, find, missing
from train.robustness.result_file import GRADIENTS, Result
from train.robustness.threat import ATTACKS
from train.run.processes import choose_device, processes
from train.run.settings import Parser, check_eps, check_number, fraction, run

EPILOG = """examples:
  python -m train.evaluate runs/fashion --data fashion-mnist --eps 8/255 --out plain.json
  python -m train.evaluate everyday --data folder:photos --eps 1/255 --out everyday.json
  python -m train.evaluate ViT-B-32 --pretrained openai --data cifar10 --attack autoattack \\
      --eps 1/255 -n 1000 --out openai.json
  python -m train.evaluate bundles/vit --checkpoint runs/vit --data cifar10 --eps 4/255 \\
      --purify cos --gradient exact identity encoder released --out purified.json
  python -m train.evaluate ViT-L-14 --pretrained openai --visual fare_eps_2.pt --data imagenet \\
      --eps 2/255 --out fare.json
  python -m train.evaluate ViT-B-32 --pretrained openai --protocol tga-zsr-16 --out results/openai
  torchrun --nproc-per-node 4 -m train.evaluate runs/fashion --data fashion-mnist --eps 8/255 \\
      --attack autoattack --out plain.json

attacks:
  autoattack       apgd-ce, apgd-t, fab-t and square, each on the images that the earlier ones left correct
  apgd-ce, apgd-t, fab-t, square
                   one of these alone; apgd-t has 9 targets; square uses no gradient and runs once
  pgd, cw          PGD on the cross-entropy and on the margin
  feature          PGD towards the embedding of an image of another class

gradients through a purification, all the same without one:
  exact            derivative of the purification
  identity         the purification is ignored in the backward pass
  encoder          the model is attacked without the purification, and evaluated with it
  released         derivative as the published code computes it: shows how much of a figure is masking
"""

ATTACK, STEPS, SAMPLES = ("apgd-ce", "apgd-t"), 100, 1000


def build_parser() -> argparse.ArgumentParser:
    description = __doc__.split("\n\n")[0]
    parser = Parser("python -m train.evaluate", "SUBJECT", description, EPILOG)
    add = parser.add_argument
    add(
        "subject",
        metavar="SUBJECT",
        help="bundle or its name, folder of a run or of a CLIP of transformers, or model name of open_clip",
    )
    add_weight_options(parser)
    add(
        "--checkpoint",
        metavar="RUN",
        help="weights of a bundle (default: beside it, else its own graph)",
    )
    add("--template", action="append", metavar="TEXT", help="prompt (default: as exported)")
    add("--attack", nargs="+", metavar="NAME", choices=("autoattack", *ATTACKS),
        help=f"attacks, listed below (default: {' '.join(ATTACK)})")  # fmt: skip
    add("--gradient", nargs="+", default=list(GRADIENTS), metavar="MODE", choices=GRADIENTS,
        help="gradients through a purification, listed below (default: all four)")  # fmt: skip
    PURIFIER.add(parser)
    add("--prior", metavar="RUN", help="of diff: run of train.diffusion_prior, or a checkpoint")
    add("--restarts", type=int, default=1, metavar="N", help="restarts of each attack (default: 1)")
    add("--step-size", type=fraction, metavar="F",
        help="step size of pgd, cw and feature, in units of [0, 1] (default: eps / 4)")  # fmt: skip
    add("--queries", type=int, default=5000, metavar="N",
        help="queries of square for each image (default: 5000)")  # fmt: skip
    add("--eot", type=int, default=1, metavar="N",
        help="gradients averaged in each step, for a random defence; above 1 the attack does not know "
        "the seed of diff (default: 1)")  # fmt: skip
    parser.add_measurement(steps=STEPS, samples=SAMPLES, required=False)
    parser.set_defaults(steps=None, samples=None)  # a protocol sets them
    add("--check-samples", type=int, default=100, metavar="N",
        help="images for the ten checks; 0 skips them, and reports mark the result (default: 100)")  # fmt: skip
    add(
        "--transfer-from",
        metavar="RUN",
        help="another model, whose attacks the third check transfers",
    )
    add("--protocol", metavar="NAME",
        help="evaluation of a paper, with its data sets, attacks, sizes and prompts: "
        f"{', '.join(PROTOCOLS)}")  # fmt: skip
    add(
        "--list",
        action="store_true",
        help="print the protocol and its available data sets, and exit",
    )
    add("--skip-missing", action="store_true", help="skip the protocol's unavailable data sets")
    add(
        "--out",
        type=Path,
        metavar="JSON",
        help="result file; with --protocol, folder of result files",
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Set defaults. Raises SettingsError for missing or contradictory settings."""
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


def show(result: Result) -> None:
    """Print the accuracies and the checks of a measurement."""
    settings = result.settings
    console = Console()
    console.print(
        f"{settings['subject']} on {settings['data']}, {len(result.finished)} images, {result.radius}, "
        f"{settings['steps']} steps, purification {result.purifier or 'none'}",
        soft_wrap=True,
    )
    console.print(_accuracies(result))
    checks = Table("check", "", "figure")
    words = {True: "pass", False: "[bold red]FAIL[/]", None: "-"}
    for i, check in enumerate(result.checks, 1):
        checks.add_row(f"{i} {check['name']}", words[check["passed"]], check["figure"])
    console.print(checks)
    if result.failed_checks or not result.checks:
        numbers = ", ".join(map(str, result.failed_checks))
        reason = f"checks {numbers} FAILED" if numbers else "NO CHECK WAS RUN"
        console.print(f"[bold red]DO NOT TRUST THESE FIGURES: {reason}[/]", soft_wrap=True)


def _accuracies(result: Result) -> Table:
    table = Table("attack", "gradient", "accuracy")
    table.add_row("none", "", f"{result.clean.mean():.2%}")
    for (attack, gradient), stages in result.stages.items():
        for stage, marks in stages.items():
            if stage:
                table.add_row(f"  after {stage}", gradient, f"{marks.mean():.2%}")
        robust = result.by_attack[attack, gradient].mean()
        table.add_row(attack, gradient, f"{robust:.2%}")
    table.add_row("worst case", "", f"{result.worst.mean():.2%}")
    if result.masking is not None:
        table.add_row("masking", "", f"{100 * result.masking:+.2f} points")
    return table


def measure(args: argparse.Namespace) -> None:
    """Measure one data set at one eps: attack, check, and print."""
    check(args)
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[cost]}"),
    )
    with processes(choose_device(args.device)) as (rank, world, device):
        measurement = Measurement(args, rank, world, device)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        measurement.resume()
        if rank == 0:
            measurement.check_agreement()
        with Progress(*columns, console=Console(stderr=True), disable=rank > 0) as progress:
            measurement.attack(progress)
            measurement.gather()
            if rank == 0:
                measurement.check(progress)
                measurement.recorder.write(args.out)
                show(measurement.recorder.result())


def prescribed(
    args: argparse.Namespace, protocol: Protocol, name: str, radius: Radius
) -> argparse.Namespace:
    """Return the settings of one measurement of a protocol; the command line overrides its own."""
    size = f"{radius.norm}-{radius.eps * 255:g}" if radius.norm == "linf" else str(radius)
    fixed = {
        "data": name,
        "norm": radius.norm,
        "eps": radius.eps,
        "out": args.out / f"{name}-{size.replace(' ', '-')}.json",
    }
    defaults = {
        "attack": protocol.attacks,
        "steps": protocol.steps,
        "step_size": protocol.step_size,
        "samples": protocol.samples or sys.maxsize,  # all images
        "template": protocol.templates,
    }
    unset = {key: value for key, value in defaults.items() if getattr(args, key) is None}
    if args.purify == "auto":
        unset["purify"] = protocol.purify or "none"
    return argparse.Namespace(**vars(args) | unset | fixed)


def follow(args: argparse.Namespace) -> None:
    """Run every measurement of a protocol, into a folder. Raises SettingsError."""
    protocol = find(args.protocol)
    if args.list:
        print(describe(protocol))
        return
    if args.data or args.eps:
        raise SettingsError("--protocol sets the data and eps: omit --data and --eps")
    if args.out is None or args.out.is_file():
        raise SettingsError("--protocol needs --out FOLDER, for a result file per data set")
    if args.download and "RANK" in os.environ:
        raise SettingsError("run --download with a protocol in one process first")
    absent = missing(protocol, args.download)
    for line in absent.values():
        print(line, file=sys.stderr)
    if absent and not args.skip_missing:
        raise SettingsError(
            f"{len(absent)} of the {len(protocol.data)} data sets of {args.protocol} are missing: get "
            "them, or measure the others with --skip-missing"
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
