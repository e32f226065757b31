"""Commands that answer about images: classify, embed and explain."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgeclip import storage
from edgeclip.bundle import EMBEDDED, Bundle
from edgeclip.cli.options import (
    DEVICES,
    PRECISIONS,
    PURIFICATIONS,
    add_command,
    add_format,
    add_threads,
    check_stdin,
    from_zero,
    positive,
    step_size,
    up_to,
)
from edgeclip.cli.output import WRITERS, Answer, show_report
from edgeclip.errors import EdgeclipError, ImageError
from edgeclip.images.decoding import ImageSource
from edgeclip.images.folders import expand
from edgeclip.json_output import show_json
from edgeclip.labels import STDIN, check_labels, read_labels, read_templates
from edgeclip.progress import show_progress, text_progress
from edgeclip.purify import MAX_SEED, MAX_STEPS, MAX_TIMESTEP, resolve
from edgeclip.runtime import DECODINGS, MAX_BATCH, MAX_THREADS, Runtime

STDIN_FD, STDOUT_FD = 0, 1

CLASSIFY_EXAMPLES = r"""examples:
  edgeclip classify photo.jpg --label "a cat" --label "a dog"
  edgeclip classify photos/ --labels labels.txt --format csv > answers.csv
  edgeclip classify 'frames/*.png' --labels labels.txt --template "a sketch of a {}"
  cat photo.jpg | edgeclip classify - --labels labels.txt --bundle vit-b-32/
  printf 'cat\ndog\n' | edgeclip classify photo.jpg --labels -

labels.txt has one class per line; lines that start with # are comments. `class | prompt one | prompt
two` gives a class prompts of its own, with {} for the class. Write \# and \| for a # or | of a name.
A file of templates has one per line. Scores compare labels: one label alone always scores 100 %.
exit status: 0 done; 1 some images failed, the others were answered; 2 wrong usage or bundle.
"""
EMBED_EXAMPLES = """examples:
  edgeclip embed photos/ -o embeddings.npz
  edgeclip embed --text "a red shoe" --text "a blue shoe"
  edgeclip embed photos/ -o - | ssh host 'cat > embeddings.npz'
"""
EXPLAIN_EXAMPLES = """examples:
  edgeclip explain photo.jpg --label "a red shoe" -o attention.png
  edgeclip explain clean.png attacked.png --label "ankle boot" -o pair.png
  cat photo.jpg | edgeclip explain - --label "a cat" -o cat.png --bundle vit-b-32/

Bright patches speak for the label the most (TGA-ZSR, arXiv 2410.21802, section 3.2); the numbers
are cosines of embeddings. Two images are compared: l2 is the distance of their maps.
"""
DEMONSTRATION = (
    "note: this is the embedded demonstration bundle ({}); for anything else, "
    "export a model: python -m export ViT-B-32 --pretrained openai -o vit-b-32"
)
ONE_LABEL = (
    "note: one label alone always scores 100 %; add others to compare it with, such as "
    '--label "something else"'
)


def add_predict(commands: Any) -> None:
    """Add classify, embed and explain to the subcommands."""
    classify = add_command(commands, "classify", "Name what is in images.", CLASSIFY_EXAMPLES)
    classify.set_defaults(run=run_classify)
    classify.add_argument(
        "images", nargs="+", metavar="IMAGE", help="file, directory, glob pattern, or - for stdin"
    )
    classify.add_argument("--labels", metavar="FILE", help="label file, or - for stdin")
    classify.add_argument("--label", action="append", default=[], metavar="TEXT", help="a class")
    _add_template(classify)
    classify.add_argument(
        "--top-k", type=positive, default=5, metavar="K", help="labels per image (default: 5)"
    )
    classify.add_argument(
        "--format", choices=sorted(WRITERS), help="default: table on a terminal, else jsonl"
    )
    _add_runtime_options(classify)

    embed = add_command(
        commands, "embed", "Write the embeddings of images or texts.", EMBED_EXAMPLES
    )
    embed.set_defaults(run=run_embed)
    embed.add_argument("images", nargs="*", metavar="IMAGE", help="as for classify")
    embed.add_argument("--text", action="append", default=[], metavar="TEXT", help="embed a text")
    embed.add_argument(
        "-o", "--output", metavar="NPZ", help="a .npz file, or - for stdout; default: JSON lines"
    )
    _add_runtime_options(embed)

    explain = add_command(
        commands, "explain", "Draw where an image speaks for a label.", EXPLAIN_EXAMPLES
    )
    # Not offered: purification does not touch the tokens, and there are two images at most.
    explain.set_defaults(run=run_explain, purify="none", batch_size=1, decode="exact")
    explain.set_defaults(steps=None, step_size=None, timesteps=None, seed=None)
    explain.add_argument("image", metavar="IMAGE", help="file, or - for stdin")
    explain.add_argument("attacked", nargs="?", metavar="ATTACKED", help="to compare with IMAGE")
    explain.add_argument(
        "--label", action="append", required=True, metavar="TEXT", help="the class to look for"
    )
    _add_template(explain)
    explain.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="a .png or another kind of image, or - for a PNG on stdout",
    )
    add_format(explain)
    _add_device_options(explain)


def _add_template(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="prompt with {} for the class, or a file of them, - for stdin (default: the bundle's)",
    )


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", metavar="DIR", help="default: the embedded demonstration")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS])
    add_threads(parser, MAX_THREADS)


def _add_runtime_options(parser: argparse.ArgumentParser) -> None:
    _add_device_options(parser)
    parser.add_argument(
        "--purify",
        default="auto",
        choices=PURIFICATIONS,
        help="default: auto, what the bundle recommends",
    )
    parser.add_argument(
        "--steps", type=up_to(MAX_STEPS), metavar="N", help="of cos and diff (the bundle's, or 10)"
    )
    parser.add_argument(
        "--step-size", type=step_size, metavar="F", help="of cos and diff (the bundle's, or 30)"
    )
    parser.add_argument(
        "--timesteps",
        nargs=2,
        type=from_zero(MAX_TIMESTEP),
        metavar=("FIRST", "LAST"),
        help="that --purify diff draws from (default: 900 999)",
    )
    parser.add_argument(
        "--seed", type=from_zero(MAX_SEED), metavar="S", help="of --purify diff (default: 0)"
    )
    parser.add_argument(
        "--decode",
        default="fast",
        choices=DECODINGS,
        help="fast: JPEGs far larger than needed at a reduced scale (default)",
    )
    parser.add_argument(
        "--batch-size", type=up_to(MAX_BATCH), default=8, metavar="B", help="images at a time (8)"
    )


def run_classify(args: argparse.Namespace) -> int:
    if args.labels is None and not args.label:
        raise EdgeclipError("no labels: add --labels FILE, or --label TEXT for each class")
    check_stdin(*args.images, args.labels, *(args.template or ()))
    labels = [] if args.labels is None else read_labels(args.labels)
    labels = check_labels([*labels, *args.label])
    templates = None if args.template is None else read_templates(args.template)
    runtime = _open_runtime(args)
    label_set = runtime.labels(labels, templates, progress=text_progress())
    if len(label_set) == 1:
        print(ONE_LABEL, file=sys.stderr)
    names = expand(args.images)
    results = runtime.classify_each(_sources(names), label_set, top_k=args.top_k)
    answers = (Answer(name, result) for name, result in zip(names, results, strict=True))
    failures = _Failures()
    write = WRITERS[args.format or ("table" if sys.stdout.isatty() else "jsonl")]
    write(failures.watch(show_progress(answers, len(names), "image")), sys.stdout)
    return failures.status


def run_embed(args: argparse.Namespace) -> int:
    if bool(args.images) == bool(args.text):
        raise EdgeclipError("embed takes either images or --text TEXT")
    check_stdin(*args.images)
    runtime = _open_runtime(args)
    kind, names = ("text", args.text) if args.text else ("image", expand(args.images))
    if args.output is not None:
        output = _check_output(args, runtime.bundle, () if args.text else names)
    results: Iterable[Any] = (
        runtime.embed_texts(names) if args.text else runtime.embed_each(_sources(names))
    )
    failures = _Failures()
    answers = (Answer(name, result) for name, result in zip(names, results, strict=True))
    rows = failures.watch(show_progress(answers, len(names), kind))
    if args.output is not None:
        with storage.writing(output) as file:  # opened before the work, which may take hours
            good = [answer for answer in rows if not isinstance(answer.result, ImageError)]
            shape = (len(good), runtime.bundle.manifest.embed_dim)
            embeddings = np.array([answer.result for answer in good], np.float32).reshape(shape)
            names = [answer.name for answer in good]
            arrays: dict[str, Any] = {"embeddings": embeddings, f"{kind}s": np.array(names, str)}
            np.savez(file, **arrays)
        return failures.status
    for answer in rows:
        record: dict[str, Any] = {kind: answer.name}
        if isinstance(answer.result, ImageError):
            record["error"] = str(answer.result)
        else:
            record["embedding"] = answer.result.tolist()
        show_json(record)
    return failures.status


def run_explain(args: argparse.Namespace) -> int:
    from edgeclip import explain  # loads Pillow's fonts, which the other commands do not need

    if len(args.label) > 1:
        raise EdgeclipError("explain takes one --label; draw another picture for each of them")
    check_stdin(args.image, args.attacked, *(args.template or ()))
    kind = explain.picture_format(args.output)
    templates = None if args.template is None else read_templates(args.template)
    names = [name for name in (args.image, args.attacked) if name is not None]
    runtime = _open_runtime(args)
    output = _check_output(args, runtime.bundle, [*names, *(args.template or ())])
    sources, picture = _sources(names), io.BytesIO()
    with storage.writing(output) as file:
        found = [runtime.explain(s, args.label[0], templates=templates) for s in sources]
        explain.render(found).save(picture, kind, quality=95)  # some kinds seek, pipes do not
        file.write(picture.getbuffer())
    report: dict[str, Any] = {"label": found[0].label, "images": names}
    report["similarities"] = [round(one.similarity, 6) for one in found]
    if len(found) == 2:
        report["map distance"] = round(explain.distance(*found), 6)
    taken = storage.is_stdout(output)
    show_report(report | {"output": args.output}, args.format, sys.stderr if taken else None)
    return 0


def _open_runtime(args: argparse.Namespace) -> Runtime:
    bundle = Bundle(args.bundle)
    purifier = resolve(args.purify, bundle.manifest.purification)
    names = ("steps", "step_size", "timesteps", "seed")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if {"timesteps", "seed"} & given.keys() and args.purify != "diff":
        raise EdgeclipError("--timesteps and --seed need --purify diff")
    if given and args.purify not in ("cos", "diff"):
        raise EdgeclipError("--steps and --step-size need --purify cos or --purify diff")
    if given.get("timesteps"):
        first, last = given["timesteps"]
        if first > last:
            raise EdgeclipError(f"--timesteps: {first} is after {last}")
        given["timesteps"] = first, last
    if purifier is not None:
        purifier = replace(purifier, **given)
    if bundle.path == EMBEDDED:
        print(DEMONSTRATION.format(bundle.manifest.description), file=sys.stderr)
    return Runtime(
        bundle,
        device=args.device,
        precision=args.precision,
        purify=purifier,
        decode=args.decode,
        batch_size=args.batch_size,
        threads=args.threads,
    )


def _sources(names: Sequence[str]) -> list[ImageSource]:
    """Stdin is read here: Python aborts where a thread that still reads it outlives the rest."""
    return [sys.stdin.buffer.read() if name == "-" else name for name in names]


def _check_output(args: argparse.Namespace, bundle: Bundle, inputs: Iterable[str]) -> str | int:
    """Return where -o writes, stdout's descriptor for -. Raises EdgeclipError for an input."""
    output: str | int = STDOUT_FD if args.output == "-" else args.output
    if output == STDOUT_FD and sys.stdout.isatty():
        raise EdgeclipError("-o - would write binary data to the terminal: redirect it")
    given = (STDIN_FD if name == STDIN else name for name in inputs)
    storage.check_output(output, [*given, *bundle.paths()])
    return output


class _Failures:
    """Names each failed input on stderr as it passes, and remembers that there was one."""

    def __init__(self) -> None:
        self.status = 0

    def watch(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        for answer in answers:
            if isinstance(answer.result, ImageError):
                self.status = 1
                print(f"error: {answer.result}", file=sys.stderr, flush=True)
            yield answer
