"""Subcommands for images: classify, embed and explain."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from edgeclip import storage
from edgeclip.bundle import EMBEDDED, Bundle
from edgeclip.cli.options import (
    BUNDLE_HELP,
    PRECISIONS,
    PurifierOptions,
    add_command,
    add_device,
    add_format,
    add_threads,
    check_stdin,
    positive,
    up_to,
)
from edgeclip.cli.output import WRITERS, Answer, show_report
from edgeclip.errors import EdgeclipError, ImageError
from edgeclip.images.decoding import ImageSource
from edgeclip.images.folders import expand
from edgeclip.json_output import show_json
from edgeclip.labels import STDIN, check_labels, read_labels, read_templates
from edgeclip.progress import show_progress, text_progress
from edgeclip.runtime import DECODINGS, MAX_BATCH, MAX_THREADS, Runtime

STDIN_FD, STDOUT_FD = 0, 1
PURIFIER = PurifierOptions()

CLASSIFY_EXAMPLES = r"""examples:
  edgeclip classify photo.jpg --label "a cat" --label "a dog"
  edgeclip classify photos/ --labels labels.txt --format csv > answers.csv
  edgeclip classify 'frames/*.png' --labels labels.txt --template "a sketch of a {}"
  cat photo.jpg | edgeclip classify - --labels labels.txt --bundle vit-b-32/
  printf 'cat\ndog\n' | edgeclip classify photo.jpg --labels -

A label file has one class per line; lines that start with # are comments. A line `class | prompt |
prompt` gives a class its own prompts, with {} for the class. Write \# and \| for # and | in a name.
A template file has one template per line. Scores compare the labels with each other: a single label
always scores 100 %.
exit status: 0 done; 1 some images failed, the others were classified; 2 wrong usage or an error.
"""
EMBED_EXAMPLES = """examples:
  edgeclip embed photos/ -o embeddings.npz
  edgeclip embed --text "a red shoe" --text "a blue shoe"
  edgeclip embed photos/ -o - | ssh host 'cat > embeddings.npz'

Texts are embedded as they are, without a template. The file has the arrays `embeddings`, float32 (N, D)
of norm 1, and `images` or `texts`, their names.
exit status: 0 done; 1 some images failed, the others were embedded; 2 wrong usage or an error.
"""
EXPLAIN_EXAMPLES = """examples:
  edgeclip explain photo.jpg --label "a red shoe" -o attention.png
  edgeclip explain clean.png attacked.png --label "ankle boot" -o pair.png
  cat photo.jpg | edgeclip explain - --label "a cat" -o cat.png --bundle vit-b-32/

The brighter a patch, the more it supports the label (attention map of TGA-ZSR, arXiv 2410.21802,
section 3.2). Numbers are cosines between the embeddings of image and label. With ATTACKED, the
picture shows both images, and l2 is the distance between their maps.
exit status: 0 done; 2 wrong usage or an error.
"""
DEMONSTRATION = (
    "note: this is the embedded demonstration bundle ({}); for anything else, name another bundle "
    "(see edgeclip info), or export a model: python -m export ViT-B-32 --pretrained openai -o vit-b-32"
)
ONE_LABEL = (
    "note: a single label always scores 100 %; add others to compare it with, such as "
    '--label "something else"'
)


def add_predict(commands: Any) -> None:
    """Add classify, embed and explain."""
    classify = add_command(
        commands, "classify", "Classify images against labels.", CLASSIFY_EXAMPLES
    )
    classify.set_defaults(run=run_classify)
    classify.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image file, directory, glob pattern, or - for stdin",
    )
    classify.add_argument("--labels", metavar="FILE", help="label file, or - for stdin")
    classify.add_argument(
        "--label", action="append", default=[], metavar="TEXT", help="label; repeat for more"
    )
    _add_template(classify)
    classify.add_argument(
        "--top-k", type=positive, default=5, metavar="K", help="labels shown per image (default: 5)"
    )
    classify.add_argument(
        "--format",
        choices=sorted(WRITERS),
        help="output format (default: table on a terminal, else jsonl)",
    )
    _add_runtime_options(classify)

    embed = add_command(commands, "embed", "Compute embeddings of images or texts.", EMBED_EXAMPLES)
    embed.set_defaults(run=run_embed)
    embed.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="image file, directory, glob pattern, or - for stdin",
    )
    embed.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="TEXT",
        help="text to embed instead of images; repeat for more",
    )
    embed.add_argument(
        "-o",
        "--output",
        metavar="NPZ",
        help=".npz file to write, or - for stdout (default: JSON lines on stdout)",
    )
    _add_runtime_options(embed)

    explain = add_command(
        commands, "explain", "Draw the image's attention to a label.", EXPLAIN_EXAMPLES
    )
    # No option: purification does not change the tokens, and there are two images at most.
    explain.set_defaults(run=run_explain, purify="none", batch_size=1, decode="exact")
    explain.add_argument("image", metavar="IMAGE", help="image file, or - for stdin")
    explain.add_argument(
        "attacked", nargs="?", metavar="ATTACKED", help="second image file, to compare with IMAGE"
    )
    explain.add_argument(
        "--label", action="append", required=True, metavar="TEXT", help="label to explain"
    )
    _add_template(explain)
    explain.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="picture to write, such as FILE.png, or - for a PNG on stdout",
    )
    add_format(explain)
    _add_device_options(explain)


def _add_template(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="prompt template with {} for the label, template file, or - for a file on stdin; "
        "repeat for more (default: the bundle's templates)",
    )


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    add_device(parser)
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", *PRECISIONS],
        help="precision of the encoders (default: auto, the fastest one verified against the original model)",
    )
    add_threads(parser, MAX_THREADS)


def _add_runtime_options(parser: argparse.ArgumentParser) -> None:
    _add_device_options(parser)
    PURIFIER.add(parser)
    parser.add_argument(
        "--decode",
        default="fast",
        choices=DECODINGS,
        help="fast decodes very large JPEGs at a reduced scale, exact never does (default: fast)",
    )
    parser.add_argument(
        "--batch-size",
        type=up_to(MAX_BATCH),
        default=8,
        metavar="B",
        help="images per batch (default: 8)",
    )


def run_classify(args: argparse.Namespace) -> int:
    """Classify images; return the exit status."""
    if args.labels is None and not args.label:
        raise EdgeclipError("no labels: add --labels FILE, or --label TEXT for each label")
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
    """Embed images or texts; return the exit status."""
    if bool(args.images) == bool(args.text):
        raise EdgeclipError("embed takes either images or --text TEXT: give one of them")
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
        with storage.writing(output) as file:  # fails before hours of work, not after
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
    """Draw the attention map of one image, or of two; return the exit status."""
    from edgeclip import explain  # late: it loads fonts, which the other commands do not need

    if len(args.label) > 1:
        raise EdgeclipError("explain takes one --label: draw a picture for each label")
    check_stdin(args.image, args.attacked, *(args.template or ()))
    kind = explain.picture_format(args.output)
    templates = None if args.template is None else read_templates(args.template)
    names = [name for name in (args.image, args.attacked) if name is not None]
    runtime = _open_runtime(args)
    output = _check_output(args, runtime.bundle, [*names, *(args.template or ())])
    sources, picture = _sources(names), io.BytesIO()
    with storage.writing(output) as file:
        maps = [runtime.explain(s, args.label[0], templates=templates) for s in sources]
        explain.render(maps).save(picture, kind, quality=95)  # a pipe cannot seek
        file.write(picture.getbuffer())
    report: dict[str, Any] = {"label": maps[0].label, "images": names}
    report["similarities"] = [round(one.similarity, 6) for one in maps]
    if len(maps) == 2:
        report["map_distance"] = round(explain.distance(*maps), 6)
    out = sys.stderr if storage.is_stdout(output) else None
    show_report(report | {"output": args.output}, args.format, out)
    return 0


def _open_runtime(args: argparse.Namespace) -> Runtime:
    bundle = Bundle(args.bundle)
    purifier = PURIFIER.purifier(args, bundle.manifest.purification)
    if bundle.path == EMBEDDED.get("garments"):
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
    """Return the sources of images; stdin is read here, since Python aborts if a thread reads it at exit."""
    return [sys.stdin.buffer.read() if name == "-" else name for name in names]


def _check_output(args: argparse.Namespace, bundle: Bundle, inputs: Iterable[str]) -> str | int:
    """Return the path of -o, or stdout's descriptor for -.

    Raises EdgeclipError if it is one of the inputs.
    """
    output: str | int = STDOUT_FD if args.output == "-" else args.output
    if output == STDOUT_FD and sys.stdout.isatty():
        raise EdgeclipError("-o - would write binary data to the terminal: redirect it")
    files = (STDIN_FD if name == STDIN else name for name in inputs)
    storage.check_output(output, [*files, *bundle.paths()])
    return output


class _Failures:
    """Exit status of a command: failed inputs are printed on stderr and make it 1."""

    def __init__(self) -> None:
        self.status = 0

    def watch(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """Yield the answers, and print the error of each failed one."""
        for answer in answers:
            if isinstance(answer.result, ImageError):
                self.status = 1
                print(f"error: {answer.result}", file=sys.stderr, flush=True)
            yield answer
