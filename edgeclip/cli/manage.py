"""The subcommands that look after an installation: its cache, bundles, devices and speed."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from edgeclip.backends import trials
from edgeclip.backends.engine_cache import EngineCache
from edgeclip.backends.select import MAX_GPU_BATCH
from edgeclip.bundle import Bundle
from edgeclip.cli.options import (
    DEVICES,
    PRECISIONS,
    PRECISIONS_OF_ENGINES,
    PURIFICATIONS,
    add_command,
    add_format,
    add_threads,
    check_stdin,
    positive,
    seconds,
    up_to,
)
from edgeclip.cli.output import report_format, show_report
from edgeclip.errors import EdgeclipError
from edgeclip.images.folders import expand
from edgeclip.json_output import show_json
from edgeclip.labels import check_labels, read_labels
from edgeclip.progress import phase_progress
from edgeclip.runtime import MAX_BATCH, MAX_THREADS
from edgeclip.text.cache import LabelCache

INFO_EXAMPLES = """examples:
  edgeclip info
  edgeclip info vit-b-32/ --format json
"""
DOCTOR_EXAMPLES = """examples:
  edgeclip doctor
  edgeclip doctor vit-b-32/ --device cuda
"""
CACHE_EXAMPLES = """examples:
  edgeclip cache
  edgeclip cache --format json
  edgeclip cache --clear

Embeddings of labels are kept in $EDGECLIP_CACHE, or ~/.cache/edgeclip; those that were not used for
longest make room where they are more than $EDGECLIP_CACHE_SIZE (256M; 0: none are kept). TensorRT
engines, and the trials of precisions on this machine, are kept beside them until --clear.
"""
BUILD_EXAMPLES = """examples:
  edgeclip build vit-b-32/
  edgeclip build vit-b-32/ --precision fp16 --max-batch 1 --workspace 512
  edgeclip build vit-b-32/ --images photos/ --labels labels.txt

Builds a TensorRT engine of the image encoder for the GPU of this machine, which may take minutes, and
keeps it in $EDGECLIP_CACHE/engines, or ~/.cache/edgeclip/engines. It is kept only if it gives the
bundle's golden embedding, and the CPU's answers; with --images and --labels on pictures of yours.
"""
BENCH_EXAMPLES = """examples:
  edgeclip bench
  edgeclip bench vit-b-32/ --device cpu --precision fp32 int8 --labels labels.txt
  edgeclip bench vit-b-32/ --image photo.jpg --batch-size 1 4 16 --format json > bench.json

Each device and precision is measured in a process of its own, by the wall clock. Without an image, a
frame of 640x480 is made; without labels, 1,000 with random embeddings. Nothing else should run.
exit status: 0 done; 1 some devices or precisions failed; 2 wrong usage or bundle, or all failed.
"""


def add_upkeep(commands: Any) -> None:
    """Adds cache, info, doctor, build and bench."""
    cache = add_command(
        commands,
        "cache",
        "Show, or clear, the embeddings and engines that are kept.",
        CACHE_EXAMPLES,
    )
    cache.set_defaults(run=run_cache)
    cache.add_argument("--clear", action="store_true", help="delete them all")
    add_format(cache)

    info = add_command(commands, "info", "Show what a bundle is.", INFO_EXAMPLES)
    info.set_defaults(run=run_info)
    doctor = add_command(
        commands, "doctor", "Check this installation, its devices and a bundle.", DOCTOR_EXAMPLES
    )
    doctor.set_defaults(run=run_doctor)
    doctor.add_argument("--device", default="auto", choices=DEVICES)
    build = add_command(commands, "build", "Build a TensorRT engine for this GPU.", BUILD_EXAMPLES)
    _add_build_options(build)
    bench = add_command(commands, "bench", "Measure how fast a bundle is here.", BENCH_EXAMPLES)
    _add_bench_options(bench)
    for command in (info, doctor, build, bench):
        command.add_argument(
            "bundle", nargs="?", metavar="BUNDLE", help="default: the embedded demonstration"
        )
        add_format(command)


def _add_build_options(build: argparse.ArgumentParser) -> None:
    build.set_defaults(run=run_build)
    build.add_argument(
        "--precision",
        default="auto",
        choices=PRECISIONS_OF_ENGINES,
        help="default: fp16 where its answers are known to be the model's, else fp32",
    )
    build.add_argument(
        "--max-batch", type=up_to(MAX_GPU_BATCH), default=8, metavar="B", help="images at once (8)"
    )
    build.add_argument(
        "--workspace",
        type=positive,
        default=1024,
        metavar="MB",
        help="memory that TensorRT may use for trying kernels (default: 1024)",
    )
    build.add_argument(
        "--level",
        type=int,
        choices=range(6),
        help="optimization level: higher builds longer (default: TensorRT's, 3)",
    )
    build.add_argument("--images", nargs="+", metavar="IMAGE", help="to compare answers on")
    build.add_argument("--labels", metavar="FILE", help="with --images: label file, or -")
    build.add_argument("--force", action="store_true", help="build although it is there")


def _add_bench_options(bench: argparse.ArgumentParser) -> None:
    bench.set_defaults(run=run_bench)
    bench.add_argument("--image", metavar="FILE", help="default: a frame of 640x480 made here")
    bench.add_argument("--labels", metavar="FILE", help="label file, or - (default: 1,000)")
    bench.add_argument("--label", action="append", default=[], metavar="TEXT", help="a class")
    bench.add_argument(
        "--device", default="auto", choices=DEVICES, help="default: auto, all that are there"
    )
    bench.add_argument(
        "--precision",
        nargs="+",
        default=[],
        choices=PRECISIONS,
        help="default: all of the bundle's",
    )
    bench.add_argument("--purify", default="auto", choices=PURIFICATIONS)
    bench.add_argument(
        "--batch-size",
        nargs="+",
        type=up_to(MAX_BATCH),
        default=[1, 8],
        metavar="B",
        help="images in one call (default: 1 8)",
    )
    length = bench.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds",
        type=seconds,
        default=1.0,
        metavar="S",
        help="for each measurement (default: 1)",
    )
    length.add_argument("--repeats", type=positive, metavar="N", help="calls, in place of seconds")
    add_threads(bench, MAX_THREADS)


def run_build(args: argparse.Namespace) -> int:
    from edgeclip.backends.engine_cache import BuildOptions
    from edgeclip.tools import build_engine

    if (args.images is None) != (args.labels is None):
        raise EdgeclipError("--images and --labels go together: answers need both")
    check_stdin(*(args.images or ()), args.labels)
    options = BuildOptions(
        max_batch=args.max_batch,
        workspace_bytes=args.workspace << 20,
        optimization_level=args.level,
    )
    with phase_progress() as progress:
        built = build_engine.build(
            Bundle(args.bundle),
            precision=args.precision,
            options=options,
            force=args.force,
            pictures=None if args.images is None else expand(args.images),
            labels=None if args.labels is None else read_labels(args.labels),
            progress=progress,
        )
    show_report(build_engine.describe(built), args.format)
    return 0


def run_cache(args: argparse.Namespace) -> int:
    cache = LabelCache()
    report: dict[str, Any] = {"path": "" if cache.path is None else str(cache.path)}
    engines = EngineCache()
    if args.clear:
        report["freed bytes"] = cache.clear() + engines.remove() + trials.clear()
    else:
        shares = cache.shares()
        report["labels"] = sum(share.labels for share in shares)
        report |= {"bytes": cache.size(), "limit bytes": cache.limit}
        report["encoders"] = [asdict(share) for share in shares]
        report["engines"] = [str(entry.path) for entry in engines.entries()]
        report["trials"] = len(trials.files())
    show_report(report, args.format)
    return 0


def run_info(args: argparse.Namespace) -> int:
    from edgeclip.tools import doctor  # here, and not above: it slows the start of the others down

    show_report(doctor.describe(Bundle(args.bundle)), args.format)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    from edgeclip.tools import doctor

    report = doctor.examine(args.bundle, args.device)
    show_report(report, args.format)
    if report["problem"]:
        print(f"error: {report['problem']}", file=sys.stderr)
        return 2
    return 0


def run_bench(args: argparse.Namespace) -> int:
    from edgeclip.tools import bench

    check_stdin(args.image, args.labels)
    labels = [] if args.labels is None else read_labels(args.labels)
    settings = bench.Settings(
        image=bench.read_image(args.image),
        labels=tuple(check_labels([*labels, *args.label]) if labels or args.label else ()),
        purify=args.purify,
        batch_sizes=tuple(sorted(set(args.batch_size))),
        seconds=args.seconds,
        repeats=args.repeats,
        threads=args.threads,
    )
    report = bench.run(Bundle(args.bundle), settings, args.device, args.precision)
    for failed in report["failed"]:
        print(
            f"error: {failed['device']} {failed['precision']}: {failed['error']}", file=sys.stderr
        )
    if report_format(args.format) == "json":
        show_json(report, indent=2)
    else:
        print(bench.render(report))
    return (1 if report["failed"] else 0) if report["measured"] else 2
