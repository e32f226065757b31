"""Export of a bundle and a label file as a model of Triton Inference Server; without PyTorch.

    python -m export.triton BUNDLE -o models --labels labels.txt

writes, for the server's ONNX Runtime backend,

    models/edgeclip/config.pbtxt    inputs, outputs and dynamic batching
    models/edgeclip/labels.txt      class names, one per line, for the server's answers
    models/edgeclip/1/model.onnx    fused graph (export.fused) with the classes built in

The graph returns the probability of every class in order: a client asks for the `class_count` best
classes, and the server finds their labels by their index in the output.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import onnx

from edgeclip import Runtime, storage
from edgeclip.backends.onnx_runtime import open_session
from edgeclip.cli.command import run_command
from edgeclip.cli.options import Parser, up_to
from edgeclip.precisions import REFERENCE
from export import ExportError
from export.fused import add_options, encode_labels, open_runtime, write_fused
from export.graphs.fused import Head
from export.output import check_target, publish, staging_directory
from train.progress import step

CONFIG = "config.pbtxt"
LABELS = "labels.txt"
MODEL = Path("1", "model.onnx")
MAX_BATCH = 8
QUEUE_DELAY = 1000  # microseconds to wait for more requests; short beside an encoder's run
ENGINES = "/tmp/edgeclip-engines"  # the server's cache of TensorRT engines
TYPES = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}
EPILOG = """examples:
  python -m export.triton vit-b-32 -o models --labels labels.txt
  python -m export.triton vit-b-32 -o models --labels labels.txt --name fp16 --precision fp16
  python -m export.triton vit-b-32 -o models --labels labels.txt --accelerator tensorrt --force

input: image uint8 (batch, H, W, 3), RGB at the encoder's input size. output: probabilities float32
(batch, K). docs/serving.md shows the server's command and a client.
"""


def config(name: str, graph: Path, max_batch: int, accelerator: str | None = None) -> str:
    """Return config.pbtxt for a graph with fixed sizes, except for the batch."""
    session = open_session(graph, "cpu")
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', f"max_batch_size: {max_batch}"]
    for kind, nodes in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for node in nodes:
            dims = ", ".join(map(str, node.shape[1:]))
            entry = f'name: "{node.name}" data_type: {TYPES[node.type]} dims: [ {dims} ]'
            label = f' label_filename: "{LABELS}"' if kind == "output" else ""
            lines.append(f"{kind} [ {{ {entry}{label} }} ]")
    lines.append("instance_group [ { kind: KIND_AUTO } ]")  # a GPU where there is one
    if max_batch > 1:
        # No preferred batch sizes: they are for engines built for a few sizes only.
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_DELAY} }}")
    if accelerator == "tensorrt":
        lines.append(_tensorrt())
    return "\n".join(lines) + "\n"


def _tensorrt() -> str:
    """Return the entry of ONNX Runtime's TensorRT provider, as Triton documents it."""
    parameters = {
        "precision_mode": "FP32",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": ENGINES,
    }
    entries = [f'parameters {{ key: "{k}" value: "{v}" }}' for k, v in parameters.items()]
    inner = "\n".join(f"    {line}" for line in ('name: "tensorrt"', *entries))
    return f"optimization {{ execution_accelerators {{\n  gpu_execution_accelerator [ {{\n{inner}\n  }} ]\n}} }}"


def _check(options: argparse.Namespace) -> None:
    """Raise ExportError for options that Triton or its backend cannot serve."""
    if not re.fullmatch(r"\w[\w.-]*", options.name, re.ASCII):
        raise ExportError(f"--name {options.name!r}: use letters, digits, and . _ - between them")
    if options.accelerator == "tensorrt" and options.precision != REFERENCE:
        raise ExportError(
            "--accelerator tensorrt needs --precision fp32: with fp16, TensorRT also computes layer "
            "norms and softmax in fp16, where some models lose their accuracy"
        )


def _check_batch(runtime: Runtime) -> None:
    """Raise ExportError if the image encoder's batch size is fixed, as a transformer's is in int8."""
    path = runtime.bundle.encoder("image_encoder", runtime.precision)
    (pixels,) = onnx.load(path, load_external_data=False).graph.input
    if pixels.type.tensor_type.shape.dim[0].HasField("dim_value"):
        raise ExportError(
            f"this {runtime.precision} image encoder takes one image at a time, and Triton makes "
            "batches: --precision fp32 or fp16"
        )


def run(options: argparse.Namespace) -> None:
    _check(options)
    out = (options.out / options.name).resolve()
    check_target(out, CONFIG, "Triton model", options.force)
    runtime, purifier = open_runtime(options)
    _check_batch(runtime)
    inputs = [options.labels, *options.template, *runtime.bundle.paths()]
    storage.check_output(out, inputs)
    labels = encode_labels(runtime, options.labels, options.template)
    with staging_directory(out) as staging:
        (staging / MODEL).parent.mkdir()
        with step("writing and verifying the graph"):
            difference = write_fused(runtime, staging / MODEL, Head(purifier, None, labels))
        text = config(options.name, staging / MODEL, options.max_batch, options.accelerator)
        (staging / CONFIG).write_text(text, encoding="utf-8")
        (staging / LABELS).write_text(
            "".join(f"{name}\n" for name in labels.names), encoding="utf-8"
        )
        publish(staging, out)
    print(
        f"{options.out / options.name}: {len(labels)} labels, purify {purifier or 'none'}, largest "
        f"difference from the runtime's probabilities {difference:.1e}"
    )
    print(f"serve it: tritonserver --model-repository {options.out.resolve()}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m export.triton",
        description="Write a bundle as a model repository for Triton Inference Server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_options(parser)
    add(
        "-o",
        "--out",
        metavar="REPO",
        type=Path,
        required=True,
        help="model repository to write into",
    )
    add("--labels", metavar="FILE", type=Path, required=True, help="label file, one class per line")
    add("--name", default="edgeclip", help="name of the model (default: edgeclip)")
    text = f"largest batch (default: {MAX_BATCH})"
    add("--max-batch", type=up_to(4096), metavar="N", default=MAX_BATCH, help=text)
    text = (
        "tensorrt: the server builds an engine when it loads the model, for minutes, and caches it"
    )
    add("--accelerator", choices=("tensorrt",), help=text)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status, see `run_command`."""
    return run_command(lambda: run(_parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
