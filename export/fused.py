"""Image to answer as one ONNX graph, for runtimes other than edgeclip's: no PyTorch needed.

    python -m export.fused BUNDLE -o fused.onnx

Normalisation, the bundle's image encoder, CLIPure-Cos, class scores, softmax and top-k, of operators
that TensorRT, OpenVINO and ONNX Runtime all have. What is left to the caller is to resize and crop.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from PIL import Image

from edgeclip import LabelSet, Runtime, read_labels, storage
from edgeclip.backends.onnx_runtime import open_session
from edgeclip.bundle import Bundle
from edgeclip.cli.command import run_command
from edgeclip.cli.options import Parser, PurifierOptions, positive
from edgeclip.labels import read_templates
from edgeclip.precisions import PRECISIONS, REFERENCE
from edgeclip.purify import CosPurifier, DiffPurifier, Purifier
from export import ExportError
from export.graphs.fused import TOP_K, Head, fuse
from export.graphs.save import save
from export.output import check_graph_target, graph_draft
from train.progress import step

PURIFIER = PurifierOptions(methods=("auto", "none", "cos"))
INPUT_TYPES = ("uint8", "float32")
PROBES = 5  # images that are compared, the golden one among them
PROBE_CLASSES = 32
EPILOG = """examples:
  python -m export.fused vit-b-32 -o fused.onnx                        classes are an input
  python -m export.fused vit-b-32 --classes-for labels.txt -o classes.npy          what it takes
  python -m export.fused vit-b-32 -o fused.onnx --labels labels.txt    classes are built in
  python -m export.fused vit-b-32 -o ds.onnx --labels labels.txt --input-type float32 --top-k all

inputs: image uint8 (batch, H, W, 3), RGB of the encoder's size, or float32 (batch, 3, H, W) in 0 to
255; classes float32 (K, D), unit rows, K from top-k. outputs: probabilities float32 (batch, k), the
largest first, and indices int32 (batch, k); with --top-k all probabilities (batch, K) in the order of
the classes. docs/serving.md shows it in TensorRT, OpenVINO, DeepStream and Triton.
"""

Array = NDArray[Any]


def write_fused(
    runtime: Runtime, path: Path, head: Head, *, input_type: str = "uint8", shared: bool = False
) -> float:
    """Write the graph of the runtime's bundle in its precision to `path`, and compare the two.

    runtime: on the CPU, and purifying as head does. shared: the graph takes its weights from the
    encoder's file, beside which `path` lies. Returns the largest difference of a probability. Raises
    ExportError where that is too large.
    """
    bundle, precision = runtime.bundle, runtime.precision
    manifest = bundle.manifest
    encoder = ir.load(bundle.encoder("image_encoder", precision))
    scale = manifest.logit_scale
    model = fuse(encoder, manifest.image, bundle.null_text, scale, input_type, head)
    if shared:
        ir.save(model, path)
    else:
        save(model, path)
    difference = compare(runtime, path, head, input_type)
    limit = PRECISIONS[precision].fused_limit
    if not difference <= limit:
        raise ExportError(
            f"{path.name} does not answer as the runtime does: a probability differs by "
            f"{difference:.3g} (limit {limit:g})"
        )
    return difference


def compare(runtime: Runtime, path: Path, head: Head, input_type: str = "uint8") -> float:
    """The largest difference between a probability of the graph and of the runtime.

    Each is compared by its rank and by its class: so the classes are the same as well, but for those
    that are equally probable.
    """
    session = open_session(path, "cpu")
    labels = head.labels or LabelSet.random(
        max(head.answers or 0, PROBE_CLASSES), runtime.bundle.null_text, runtime.text_identity()
    )
    images = _probes(runtime.bundle)
    fixed = isinstance(session.get_inputs()[0].shape[0], int)
    worst = 0.0
    for batch in [images[i : i + 1] for i in range(PROBES)] if fixed else [images[:1], images]:
        given: dict[str, Array] = {"image": batch}
        if input_type == "float32":
            given["image"] = batch.transpose(0, 3, 1, 2).astype(np.float32)
        if head.labels is None:
            given["classes"] = labels.embeddings
        found = session.run(None, given)
        for row, scores in enumerate(runtime.scores(list(batch), labels)):
            ranked = np.sort(scores)[::-1]
            if head.answers is None:
                differences = [found[0][row] - scores]
            else:
                probabilities, indices = found[0][row], found[1][row]
                differences = [probabilities - ranked[: len(probabilities)]]
                differences.append(probabilities - scores[indices])
            worst = float(np.max(np.abs([worst, *np.concatenate(differences)])))  # keeps a NaN
    return worst


def _probes(bundle: Bundle) -> NDArray[np.uint8]:
    """The golden image and noise of several ranges, (PROBES, H, W, 3) of the encoder's size."""
    height, width = bundle.manifest.image.size
    golden = Image.fromarray(bundle.golden()["image"]).resize((width, height))
    random = np.random.default_rng(0)
    noise = [random.integers(0, 64 * i, (height, width, 3)) for i in range(1, PROBES)]
    return np.stack([np.asarray(golden), *noise]).astype(np.uint8)


def check_purifier(purifier: Purifier) -> CosPurifier | None:
    """Raises ExportError for one that no fused graph has."""
    if isinstance(purifier, DiffPurifier):
        raise ExportError(
            "the bundle recommends CLIPure-Diff, which no fused graph has: make one of the bundle by "
            "python -m export.fused with --purify none or cos"
        )
    return purifier


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `open_runtime` reads."""
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, help="a directory that python -m export made")
    text = "of the encoders (default: fp32)"
    add("--precision", choices=PRECISIONS, default=REFERENCE, help=text)
    PURIFIER.add(parser)
    text = "prompt with {} for the label, or a file of them (default: the bundle's)"
    add("--template", metavar="TEXT", action="append", default=[], help=text)
    add("--force", action="store_true", help="replace what is at -o")


def open_runtime(options: argparse.Namespace) -> tuple[Runtime, CosPurifier | None]:
    """Raises EdgeclipError."""
    bundle = Bundle(options.bundle)
    purifier = check_purifier(PURIFIER.purifier(options, bundle.manifest.purification))
    runtime = Runtime(bundle, device="cpu", precision=options.precision, purify=purifier)
    return runtime, purifier


def encode_labels(runtime: Runtime, path: Path, templates: list[str]) -> LabelSet:
    """Those of a label file. Raises LabelError."""
    names, worded = read_labels(path), read_templates(templates) or None
    with step(f"encoding {len(names)} labels"):
        return runtime.labels(names, worded)


def _write_classes(labels: LabelSet, path: Path) -> None:
    """As NumPy's file, or as the bytes alone, which trtexec --loadInputs takes."""
    file = io.BytesIO()  # np.save asks a pipe for its position
    if path.suffix == ".npy":
        np.save(file, labels.embeddings)
    else:
        file.write(labels.embeddings.astype("<f4").tobytes())
    storage.write(path, file.getvalue())


def _top_k(text: str) -> int | None:
    return None if text == "all" else positive(text)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m export.fused",
        description="Write image to answer as one ONNX graph, for other runtimes than edgeclip's.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_options(parser)
    add("-o", "--out", metavar="FILE", type=Path, required=True, help="graph or classes to write")
    text = "build these classes in, rather than take them as an input"
    add("--labels", metavar="FILE", type=Path, help=text)
    text = (
        "write what the input `classes` takes for these labels: .npy, or .bin for the bytes alone"
    )
    add("--classes-for", metavar="FILE", type=Path, help=text)
    text = f"classes in an answer, or all (default: {TOP_K}, or as many as there are labels)"
    add("--top-k", metavar="K", type=_top_k, default=TOP_K, help=text)
    text = "uint8 (batch, H, W, 3), the default, or float32 (batch, 3, H, W), both in 0 to 255"
    add("--input-type", choices=INPUT_TYPES, default="uint8", help=text)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    suffixes = (".npy", ".bin") if options.classes_for else (".onnx",)
    if options.out.suffix not in suffixes:
        raise ExportError(f"{options.out}: name a file that ends in {' or '.join(suffixes)}")
    if options.labels and options.classes_for:
        raise ExportError("--labels builds classes in, --classes-for writes them: name one of them")
    texts = [path for path in (options.labels, options.classes_for) if path]
    check_graph_target(options.out, options.force, [*texts, *options.template])
    if options.classes_for:
        options.purify = "none"  # whatever the bundle recommends: it is nothing to texts
    runtime, purifier = open_runtime(options)
    check_graph_target(options.out, True, runtime.bundle.paths())
    if options.classes_for:
        labels = encode_labels(runtime, options.classes_for, options.template)
        _write_classes(labels, options.out)
        print(f"{options.out}: float32 {labels.embeddings.shape}, unit rows")
        return
    labels = options.labels and encode_labels(runtime, options.labels, options.template)
    head = Head(purifier, options.top_k, labels)
    with graph_draft(options.out) as path, step("writing the graph, and comparing it"):
        difference = write_fused(runtime, path, head, input_type=options.input_type)
    print(
        f"{options.out}: purify {purifier or 'none'}, {difference:.1e} from the runtime's answers"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status, see `run_command`."""
    return run_command(lambda: run(_parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
