"""Subcommands for an installation: cache, info, doctor, build and bench."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from edgeclip.backends import trials
from edgeclip.backends.engine_cache import EngineCache
from edgeclip.backends.select import MAX_GPU_BATCH
from edgeclip.bundle import EMBEDDED, Bundle
from edgeclip.cli.options import (
    BUNDLE_HELP,
    PRECISIONS,
    PRECISIONS_OF_ENGINES,
    add_command,
    add_device,
    add_format,
    add_purify,
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
  edgeclip info garments
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

Label embeddings are cached in $EDGECLIP_CACHE (default: ~/.cache/edgeclip). Above
$EDGECLIP_CACHE_SIZE (default: 256M; 0 caches none), least recently used entries are evicted. The folder
also has TensorRT engines and the results of trials of precisions, until --clear.
"""
BUILD_EXAMPLES = """examples:
  edgeclip build vit-b-32/
  edgeclip build vit-b-32/ --precision fp16 --max-batch 1 --workspace 512
  edgeclip build vit-b-32/ --images photos/ --labels labels.txt

Builds a TensorRT engine of the image encoder for this machine's GPU, which may take minutes, and stores
it in $EDGECLIP_CACHE/engines (default: ~/.cache/edgeclip/engines). An engine is stored only if it
reproduces the bundle's golden embedding and the CPU's answers, on your images with --images and --labels.
"""
BENCH_EXAMPLES = """examples:
  edgeclip bench
  edgeclip bench vit-b-32/ --device cpu --precision fp32 int8 --labels labels.txt
  edgeclip bench vit-b-32/ --image photo.jpg --batch-size 1 4 16 --format json > bench.json

Each device and precision is measured in a new process, by wall clock. Nothing else should run on the
machine meanwhile.
exit status: 0 done; 1 some devices or precisions failed; 2 wrong usage or an error, or all failed.
"""


def add_upkeep(commands: Any) -> None:
    """Add cache, info, doctor, build and bench."""
    cache = add_command(
        commands, "cache", "Show or clear cached embeddings, engines and trials.", CACHE_EXAMPLES
    )
    cache.set_defaults(run=run_cache)
    cache.add_argument("--clear", action="store_true", help="delete everything cached")
    add_format(cache)

    info = add_command(
        commands, "info", "Show the contents and properties of a bundle.", INFO_EXAMPLES
    )
    info.set_defaults(run=run_info)
    doctor = add_command(
        commands, "doctor", "Check the installation, its devices and a bundle.", DOCTOR_EXAMPLES
    )
    doctor.set_defaults(run=run_doctor)
    add_device(doctor, "auto, all available ones")
    build = add_command(commands, "build", "Build a TensorRT engine for this GPU.", BUILD_EXAMPLES)
    _add_build_options(build)
    bench = add_command(
        commands, "bench", "Measure the speed of a bundle on this machine.", BENCH_EXAMPLES
    )
    _add_bench_options(bench)
    for command in (info, doctor, build, bench):
        command.add_argument(
            "bundle",
            nargs="?",
            metavar="BUNDLE",
            help=BUNDLE_HELP,
        )
        add_format(command)


def _add_build_options(build: argparse.ArgumentParser) -> None:
    build.set_defaults(run=run_build)
    build.add_argument(
        "--precision",
        default="auto",
        choices=PRECISIONS_OF_ENGINES,
        help="engine precision (default: auto, fp16 if its answers are known to be the model's, else "
        "fp32)",
    )
    build.add_argument(
        "--max-batch",
        type=up_to(MAX_GPU_BATCH),
        default=8,
        metavar="B",
        help="largest batch, in images (default: 8)",
    )
    build.add_argument(
        "--workspace",
        type=positive,
        default=1024,
        metavar="MIB",
        help="memory for TensorRT to try kernels in, in MiB (default: 1024)",
    )
    build.add_argument(
        "--level",
        type=int,
        choices=range(6),
        help="optimization level; higher levels build longer (default: TensorRT's, 3)",
    )
    build.add_argument("--images", nargs="+", metavar="IMAGE", help="images to compare answers on")
    build.add_argument("--labels", metavar="FILE", help="label file for --images, or - for stdin")
    build.add_argument("--force", action="store_true", help="build even if a stored engine exists")


def _add_bench_options(bench: argparse.ArgumentParser) -> None:
    bench.set_defaults(run=run_bench)
    bench.add_argument(
        "--image", metavar="FILE", help="image file (default: a drawn frame of 640x480 pixels)"
    )
    bench.add_argument(
        "--labels",
        metavar="FILE",
        help="label file, or - for stdin (default: 1,000 labels with random embeddings)",
    )
    bench.add_argument(
        "--label", action="append", default=[], metavar="TEXT", help="label; repeat for more"
    )
    add_device(bench, "auto, all available ones")
    bench.add_argument(
        "--precision",
        nargs="+",
        default=[],
        choices=PRECISIONS,
        help="precisions to measure (default: all that the bundle has)",
    )
    add_purify(bench)
    bench.add_argument(
        "--batch-size",
        nargs="+",
        type=up_to(MAX_BATCH),
        default=[1, 8],
        metavar="B",
        help="batch sizes to measure, in images (default: 1 8)",
    )
    duration = bench.add_mutually_exclusive_group()
    duration.add_argument(
        "--seconds",
        type=seconds,
        default=1.0,
        metavar="S",
        help="duration of each measurement, in seconds (default: 1)",
    )
    duration.add_argument(
        "--repeats", type=positive, metavar="N", help="calls per measurement, instead of --seconds"
    )
    add_threads(bench, MAX_THREADS)


def run_build(args: argparse.Namespace) -> int:
    """Build an engine; return the exit status."""
    from edgeclip.backends.engine_cache import BuildOptions
    from edgeclip.tools import build_engine

    if (args.images is None) != (args.labels is None):
        raise EdgeclipError("--images and --labels go together: give both or none")
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
    """Show or clear the cache; return the exit status."""
    cache = LabelCache()
    report: dict[str, Any] = {"path": "" if cache.path is None else str(cache.path)}
    engines = EngineCache()
    if args.clear:
        report["freed_bytes"] = cache.clear() + engines.remove() + trials.clear()
    else:
        shares = cache.shares()
        report["labels"] = sum(share.labels for share in shares)
        report |= {"bytes": cache.size(), "limit_bytes": cache.limit}
        report["encoders"] = [asdict(share) for share in shares]
        report["engines"] = [str(entry.path) for entry in engines.entries()]
        report["trials"] = len(trials.files())
    show_report(report, args.format)
    return 0


def run_info(args: argparse.Namespace) -> int:
    """Show a bundle; return the exit status."""
    from edgeclip.tools import doctor  # late: it would slow the start of the other commands

    report = doctor.describe(Bundle(args.bundle)) | {"embedded_bundles": list(EMBEDDED)}
    show_report(report, args.format)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """Check the installation; return the exit status."""
    from edgeclip.tools import doctor

    report = doctor.examine(args.bundle, args.device)
    show_report(report, args.format)
    if report["problem"]:
        print(f"error: {report['problem']}", file=sys.stderr)
        return 2
    return 0


def run_bench(args: argparse.Namespace) -> int:
    """Measure a bundle; return the exit status."""
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
    for failure in report["failed"]:
        target = f"{failure['device']} {failure['precision']}"
        print(f"error: {target}: {failure['error']}", file=sys.stderr)
    if report_format(args.format) == "json":
        show_json(report, indent=2)
    else:
        print(bench.render(report))
    return (1 if report["failed"] else 0) if report["measured"] else 2
