"""Export of a bundle as one ONNX graph from image to answer, for other runtimes; without PyTorch.

    python -m export.fused BUNDLE -o fused.onnx

The graph normalises the image, runs the bundle's image encoder, purifies by CLIPure-Cos, and
returns the top-k probabilities. TensorRT, OpenVINO and ONNX Runtime have all of its operators. The
caller resizes and crops images.
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
from export.output import check_graph_target, staged_graph
from train.progress import step

PURIFIER = PurifierOptions(methods=("auto", "none", "cos"))
INPUT_TYPES = ("uint8", "float32")
PROBES = 5  # images to compare, the golden one included
PROBE_CLASSES = 32
EPILOG = """examples:
  python -m export.fused vit-b-32 -o fused.onnx                            classes are an input
  python -m export.fused vit-b-32 --classes-for labels.txt -o classes.npy  embeddings for that input
  python -m export.fused vit-b-32 -o fused.onnx --labels labels.txt        classes are built in
  python -m export.fused vit-b-32 -o ds.onnx --labels labels.txt --input-type float32 --top-k all

inputs: image uint8 (batch, H, W, 3), RGB at the encoder's input size, or float32 (batch, 3, H, W)
in 0 to 255; classes float32 (K, D), unit rows, K at least the top-k. outputs: probabilities float32
(batch, k), largest first, and indices int32 (batch, k); with --top-k all, probabilities (batch, K)
in the order of the classes. docs/serving.md shows the graph in TensorRT, OpenVINO, DeepStream and
Triton.
"""

Array = NDArray[Any]


def write_fused(
    runtime: Runtime, path: Path, head: Head, *, input_type: str = "uint8", shared: bool = False
) -> float:
    """Write the graph of the runtime's bundle to `path`, and compare their answers.

    runtime: on the CPU, with the head's purification; the graph gets its precision. shared: refer
    to the weights in the encoder's file, which is in the same folder. Returns the largest
    difference of a probability. Raises ExportError if it is too large.
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
            f"{path.name} does not match the runtime: a probability differs by {difference:.3g} "
            f"(limit {limit:g})"
        )
    return difference


def compare(runtime: Runtime, path: Path, head: Head, input_type: str = "uint8") -> float:
    """Return the largest difference between a probability of the graph and of the runtime.

    Probabilities are compared by rank and by class. This covers the order of classes as well,
    except for classes of equal probability.
    """
    session = open_session(path, "cpu")
    labels = head.labels or LabelSet.random(
        max(head.answers or 0, PROBE_CLASSES), runtime.bundle.null_text, runtime.text_identity()
    )
    images = _probes(runtime.bundle)
    fixed = isinstance(session.get_inputs()[0].shape[0], int)
    largest = 0.0
    for batch in [images[i : i + 1] for i in range(PROBES)] if fixed else [images[:1], images]:
        inputs: dict[str, Array] = {"image": batch}
        if input_type == "float32":
            inputs["image"] = batch.transpose(0, 3, 1, 2).astype(np.float32)
        if head.labels is None:
            inputs["classes"] = labels.embeddings
        outputs = session.run(None, inputs)
        for row, scores in enumerate(runtime.scores(list(batch), labels)):
            ranked = np.sort(scores)[::-1]
            if head.answers is None:
                differences = [outputs[0][row] - scores]
            else:
                probabilities, indices = outputs[0][row], outputs[1][row]
                differences = [probabilities - ranked[: len(probabilities)]]
                differences.append(probabilities - scores[indices])
            largest = float(np.max(np.abs([largest, *np.concatenate(differences)])))  # keeps a NaN
    return largest


def _probes(bundle: Bundle) -> NDArray[np.uint8]:
    """Return the golden image and noise of several ranges, (PROBES, H, W, 3), at the input size."""
    height, width = bundle.manifest.image.size
    golden = Image.fromarray(bundle.golden()["image"]).resize((width, height))
    random = np.random.default_rng(0)
    noise = [random.integers(0, 64 * i, (height, width, 3)) for i in range(1, PROBES)]
    return np.stack([np.asarray(golden), *noise]).astype(np.uint8)


def check_purifier(purifier: Purifier) -> CosPurifier | None:
    """Raise ExportError for a purifier that fused graphs do not support; return the others."""
    if isinstance(purifier, DiffPurifier):
        raise ExportError(
            "the bundle recommends CLIPure-Diff, which fused graphs do not support: run "
            "python -m export.fused with --purify none or cos"
        )
    return purifier


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `open_runtime` reads."""
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, help="bundle directory")
    text = f"precision of the encoders (default: {REFERENCE})"
    add("--precision", choices=PRECISIONS, default=REFERENCE, help=text)
    PURIFIER.add(parser)
    text = "prompt with {} for the label, or a file of prompts (default: the bundle's)"
    add("--template", metavar="TEXT", action="append", default=[], help=text)
    add("--force", action="store_true", help="replace an existing file or directory at -o")


def open_runtime(options: argparse.Namespace) -> tuple[Runtime, CosPurifier | None]:
    """Open the runtime that the options name, and its purifier. Raises EdgeclipError."""
    bundle = Bundle(options.bundle)
    purifier = check_purifier(PURIFIER.purifier(options, bundle.manifest.purification))
    runtime = Runtime(bundle, device="cpu", precision=options.precision, purify=purifier)
    return runtime, purifier


def encode_labels(runtime: Runtime, path: Path, templates: list[str]) -> LabelSet:
    """Return the labels of a file, encoded. Raises LabelError."""
    names, own_templates = read_labels(path), read_templates(templates) or None
    with step(f"encoding {len(names)} labels"):
        return runtime.labels(names, own_templates)


def _write_classes(labels: LabelSet, path: Path) -> None:
    """Write the classes in NumPy's format, or as raw bytes for trtexec --loadInputs."""
    file = io.BytesIO()  # np.save seeks, which a pipe cannot do
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
        description="Write a bundle as one ONNX graph from image to answer, for other runtimes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_options(parser)
    add(
        "-o",
        "--out",
        metavar="FILE",
        type=Path,
        required=True,
        help="graph or class embeddings to write",
    )
    text = "label file whose classes are built in (default: classes are an input)"
    add("--labels", metavar="FILE", type=Path, help=text)
    text = "write these labels' embeddings for the input `classes`: .npy, or .bin for raw bytes"
    add("--classes-for", metavar="FILE", type=Path, help=text)
    text = f"number of classes in an answer, or all (default: {TOP_K}, or fewer with fewer labels)"
    add("--top-k", metavar="K", type=_top_k, default=TOP_K, help=text)
    text = "uint8 (batch, H, W, 3) or float32 (batch, 3, H, W), both in 0 to 255 (default: uint8)"
    add("--input-type", choices=INPUT_TYPES, default="uint8", help=text)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    suffixes = (".npy", ".bin") if options.classes_for else (".onnx",)
    if options.out.suffix not in suffixes:
        raise ExportError(f"{options.out}: name a file that ends in {' or '.join(suffixes)}")
    if options.labels and options.classes_for:
        raise ExportError(
            "--labels builds classes in, --classes-for writes them: use one of the two"
        )
    texts = [path for path in (options.labels, options.classes_for) if path]
    check_graph_target(options.out, options.force, [*texts, *options.template])
    if options.classes_for:
        options.purify = "none"  # texts are not purified
    runtime, purifier = open_runtime(options)
    check_graph_target(options.out, True, runtime.bundle.paths())
    if options.classes_for:
        labels = encode_labels(runtime, options.classes_for, options.template)
        _write_classes(labels, options.out)
        print(f"{options.out}: float32 {labels.embeddings.shape}, unit rows")
        return
    labels = options.labels and encode_labels(runtime, options.labels, options.template)
    head = Head(purifier, options.top_k, labels)
    with staged_graph(options.out) as path, step("writing and verifying the graph"):
        difference = write_fused(runtime, path, head, input_type=options.input_type)
    print(
        f"{options.out}: purify {purifier or 'none'}, largest difference from the runtime's "
        f"probabilities {difference:.1e}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status, see `run_command`."""
    return run_command(lambda: run(_parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
