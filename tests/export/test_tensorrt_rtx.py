"""Exported graphs, compiled by TensorRT-RTX without a GPU.

`pytest -m slow tests/export/test_tensorrt_rtx.py` compiles models of full size and prints tables.
"""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeclip.backends import tensorrt_module
from edgeclip.backends.engine_cache import BuildOptions
from edgeclip.backends.tensorrt_builder import build_engine
from edgeclip.bundle import Bundle
from edgeclip.errors import DeviceError
from export.graphs.encoders import export_image_encoder, export_text_encoder
from export.graphs.fp16 import to_fp16
from export.graphs.prior import export_step
from export.to_tensorrt import NO_FP32, compile_graphs, main
from tests.support.gpu.tensorrt_surfaces.record import surface
from tests.support.models.export_models import CONFIGS, exported, source_of
from tests.support.models.prior_models import with_prior
from tests.support.paths import GARMENTS, TESTS
from train.models.prior import DiffusionPrior, Shape
from train.models.wording import image_spec

trt: Any = pytest.importorskip("tensorrt_rtx", reason="pip install 'edgeclip[tensorrt-rtx]'")

TURING = (7, 5)
GPUS = tensorrt_module.capabilities(trt)
FEW = (TURING, (8, 6), (12, 0))  # oldest, middle and newest family
HARMLESS = "TensorRT: ModelImporter.cpp:1071: Make sure input ids has Int64 binding."
SURFACES = TESTS / "support" / "gpu" / "tensorrt_surfaces"


@pytest.fixture(autouse=True)
def no_warnings(caplog: pytest.LogCaptureFixture) -> Any:
    """Fail on TensorRT's warnings: a profile that does not fit the graph is only warned of."""
    yield
    warnings = {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}
    assert warnings <= {HARMLESS}


def compile_for(path: Path, gpus: Any, context_length: int = 77) -> None:
    """Compile for each GPU; on Turing, TensorRT-RTX has no product of float32 matrices."""
    options = BuildOptions(context_length=context_length)
    for gpu in gpus:
        if gpu == TURING and "fp16" not in path.name:
            with pytest.raises(DeviceError, match=NO_FP32):
                build_engine(path, trt, options, capability=gpu)
        else:
            assert len(build_engine(path, trt, options, capability=gpu)) > 10_000


def sizes(path: Path) -> dict[str, list[int]]:
    """Return the shapes of inputs and outputs that TensorRT infers, -1 for symbolic sizes."""
    builder = trt.Builder(tensorrt_module.trt_logger(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, tensorrt_module.trt_logger(trt))
    assert parser.parse_from_file(str(path))
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    return {tensor.name: list(tensor.shape) for tensor in tensors}


def test_recorded_names_of_this_version_are_complete() -> None:
    path = SURFACES / f"tensorrt_rtx-{trt.__version__}.json"
    if not path.exists():
        pytest.skip(f"the names of TensorRT-RTX {trt.__version__} are not recorded")
    recorded = json.loads(path.read_text())
    assert surface(trt, "tensorrt_rtx", recorded["source"]) == recorded


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_encoders_of_every_family(family: str, precision: str, tmp_path: Path) -> None:
    bundle = exported(family).bundle
    manifest = bundle.manifest
    kinds = ["image_encoder", "text_encoder", *(["image_tokens"] if manifest.tokens else [])]
    paths = [bundle.encoder(kind, "fp32") for kind in kinds]
    if precision == "fp16":
        halves = [tmp_path / f"{kind}.fp16.onnx" for kind in kinds]
        for path, half in zip(paths, halves, strict=True):
            to_fp16(path, half)
        paths = halves
    image, text, *tokens = paths
    actual = sizes(image)
    assert actual["pixels"] == [-1, 3, *manifest.image.size]
    assert actual["embedding"] == [-1, manifest.embed_dim]
    length = -1 if manifest.text.dynamic_length else manifest.text.context_length
    assert sizes(text) == {"ids": [-1, length], "embedding": [-1, manifest.embed_dim]}
    for path in tokens:
        rows, columns = manifest.tokens.grid
        count = manifest.tokens.prefix + rows * columns
        assert sizes(path)["tokens"] == [-1, count, manifest.embed_dim]
    for path in paths:
        compile_for(path, GPUS if family == "vit" else FEW, manifest.text.context_length)


def test_the_step_of_a_prior() -> None:
    bundle = with_prior().bundle
    assert bundle.manifest.prior is not None
    path = bundle.graph(bundle.manifest.prior.file)
    row = [-1, bundle.manifest.embed_dim]
    rows = {"z": row, "timestep": [-1], "noise": row, "loss": [-1], "gradient": row}
    assert sizes(path) == rows
    compile_for(path, FEW)


def test_the_embedded_bundle(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "engines"
    assert main([str(GARMENTS), "--capability", "75", "86", "-o", str(out)]) == 0
    out_text, err = capsys.readouterr()
    assert err == ""
    assert out_text.count("no fp32") == 4  # three graphs, and the reason
    assert sorted(path.name for path in out.iterdir()) == [
        "image_encoder.fp32.sm86.engine",
        "image_tokens.fp32.sm86.engine",
        "text_encoder.fp32.sm86.engine",
    ]


@pytest.mark.parametrize("kind", ["image_encoder", "text_encoder"])
def test_int8_graphs_are_not_for_tensorrt(kind: str) -> None:
    with pytest.raises(DeviceError, match=r"cannot read .*QuantizeLinear: "):
        build_engine(Bundle(GARMENTS).encoder(kind, "int8"), trt, BuildOptions())


def test_a_profile_that_the_graph_cannot_take_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = Bundle(GARMENTS).encoder("text_encoder", "fp32")
    build_engine(text, trt, BuildOptions(context_length=33), capability=(8, 6))
    assert "kMAX values are not self-consistent" in caplog.text
    caplog.clear()


def test_progress_and_cancelling() -> None:
    path, calls = GARMENTS / "image_encoder.fp32.onnx", []
    options = BuildOptions()
    build_engine(path, trt, options, progress=lambda *step: calls.append(step), capability=(8, 6))
    phases = {phase for phase, _, _ in calls}
    assert "Building engine" in phases
    assert any(phase.startswith("Building engine > ") for phase in phases)
    assert all(0 <= done <= steps for _, done, steps in calls)

    def fail(phase: str, done: int, steps: int) -> None:
        raise ZeroDivisionError("of the caller")

    with pytest.raises(ZeroDivisionError, match="of the caller"):
        build_engine(path, trt, options, progress=fail, capability=(8, 6))

    def interrupt(phase: str, done: int, steps: int) -> None:
        if done == 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_engine(path, trt, options, progress=interrupt, capability=(8, 6))
    assert build_engine(path, trt, options, capability=(8, 6))


def compile_and_print(graphs: dict[str, Path], context_length: int, name: str, capsys: Any) -> None:
    options = BuildOptions(context_length=context_length)
    with capsys.disabled():
        print(f"\n{name}")
        assert compile_graphs(graphs, trt, GPUS, options) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "ViT-B-16-SigLIP"])
def test_models_of_full_size(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = source_of(name, tmp_path)
    length = int(source.tokenizer.context_length)
    graphs = {
        f"{kind}.{precision}": tmp_path / f"{kind}.{precision}.onnx"
        for precision in ("fp32", "fp16")
        for kind in ("image_encoder", "text_encoder")
    }
    size = image_spec(source.model).size
    export_image_encoder(source.model, size, graphs["image_encoder.fp32"])
    export_text_encoder(source.model, length, 0, graphs["text_encoder.fp32"])
    del source
    for kind in ("image_encoder", "text_encoder"):
        to_fp16(graphs[f"{kind}.fp32"], graphs[f"{kind}.fp16"])
    compile_and_print(graphs, length, name, capsys)


@pytest.mark.slow
def test_the_step_of_a_prior_of_full_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compile CLIPure-Diff's prior for ViT-L-14: 24 layers of 32 heads."""
    torch.manual_seed(0)
    prior = DiffusionPrior(Shape(768, depth=24, heads=32)).eval().requires_grad_(False)
    text = torch.randn(1, 78, 768)
    context = prior.context(torch.nn.functional.normalize(text[:, 0], dim=1), text[:, 1:])
    path = tmp_path / "prior.onnx"
    export_step(prior, path, context, "exact")
    del prior
    compile_and_print({"prior": path}, 77, "prior of 24 layers", capsys)
