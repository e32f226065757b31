"""Triton models: their configuration, against the server's own schema, and their answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import edgeclip
from edgeclip.purify import CosPurifier
from export import ExportError, triton
from export.triton import main
from tests.support.paths import EXAMPLES, GARMENTS

LABELS = EXAMPLES / "labels.txt"
SOURCE = str(GARMENTS)


def schema() -> ModuleType:
    """Import tritonclient's model_config.proto alone, because the rest of the client imports grpc."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or package.origin is None:
        pytest.skip("tritonclient is not installed")
    path = Path(package.origin).parent / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("triton_model_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_config(model: Path) -> Any:
    text_format = pytest.importorskip("google.protobuf.text_format")
    return text_format.Parse((model / "config.pbtxt").read_text(), schema().ModelConfig())


def sizes(values: Any) -> dict[str, tuple[str, list[int]]]:
    """Return type and dimensions without the batch, by name, of a graph's inputs or outputs."""
    kinds = {onnx.TensorProto.UINT8: "TYPE_UINT8", onnx.TensorProto.FLOAT: "TYPE_FP32"}
    sizes = {}
    for value in values:
        tensor = value.type.tensor_type
        batch, *dims = tensor.shape.dim
        assert batch.dim_param  # Triton requires it
        sizes[value.name] = kinds[tensor.elem_type], [dim.dim_value for dim in dims]
    return sizes


@pytest.mark.parametrize(
    ("options", "max_batch"),
    [
        ([], 8),
        (["--max-batch", "1"], 1),
        (["--max-batch", "32", "--accelerator", "tensorrt", "--name", "edge.clip-2"], 32),
    ],
)
def test_the_configuration_is_the_graphs(
    tmp_path: Path, options: list[str], max_batch: int
) -> None:
    assert main([SOURCE, "-o", str(tmp_path), "--labels", str(LABELS), *options]) == 0
    (model,) = tmp_path.iterdir()
    config = read_config(model)
    assert config.name == model.name == ("edge.clip-2" if "--name" in options else "edgeclip")
    assert (config.backend, config.max_batch_size) == ("onnxruntime", max_batch)
    graph = onnx.load(model / "1" / "model.onnx").graph
    enum = schema().DataType
    for entries, values in ((config.input, graph.input), (config.output, graph.output)):
        assert {v.name: (enum.Name(v.data_type), list(v.dims)) for v in entries} == sizes(values)
    assert [i.name for i in config.input] == ["image"]
    assert list(config.input[0].dims) == [28, 28, 3]
    (output,) = config.output
    # The server finds a label by its class's index in the output: all classes, in order.
    assert output.name == "probabilities"
    labels = [label.name for label in edgeclip.read_labels(LABELS)]
    assert (model / output.label_filename).read_text().splitlines() == labels
    assert list(output.dims) == [len(labels)]
    assert [group.kind for group in config.instance_group] == [
        schema().ModelInstanceGroup.KIND_AUTO
    ]
    assert config.HasField("dynamic_batching") == (max_batch > 1)
    if max_batch > 1:
        assert 0 < config.dynamic_batching.max_queue_delay_microseconds <= 5000
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [accelerator.name for accelerator in accelerators] == (
        ["tensorrt"] if "--accelerator" in options else []
    )
    for accelerator in accelerators:
        assert accelerator.parameters["precision_mode"] == "FP32"
        assert accelerator.parameters["trt_engine_cache_enable"] == "1"
        assert Path(accelerator.parameters["trt_engine_cache_path"]).is_absolute()


def test_the_model_answers_as_the_runtime(
    tmp_path: Path, fashion: tuple[np.ndarray, np.ndarray]
) -> None:
    purify = ["--purify", "cos", "--steps", "3", "--step-size", "0.1", "--template", "some {}"]
    assert (
        main([SOURCE, "-o", str(tmp_path / "deep" / "repo"), "--labels", str(LABELS), *purify]) == 0
    )
    model = tmp_path / "deep" / "repo" / "edgeclip"
    purifier = CosPurifier(3, 0.1)
    runtime = edgeclip.Runtime(GARMENTS, device="cpu", precision="fp32", purify=purifier)
    labels = runtime.labels(edgeclip.read_labels(LABELS), ["some {}"])
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
    for batch in (1, 8):
        images = fashion[0][:batch]
        (actual,) = session.run(None, {"image": images})
        for row, answer in zip(
            actual, runtime.classify(list(images), labels, top_k=10), strict=True
        ):
            expected = {prediction.index: prediction.score for prediction in answer}
            np.testing.assert_allclose(row, [expected[i] for i in range(10)], atol=1e-5)


def test_a_model_is_replaced_only_with_force_and_only_when_it_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("one\ntwo | a pair\n")
    command = [SOURCE, "-o", str(tmp_path / "repo"), "--labels", str(labels)]
    assert main(command) == 0
    written = tmp_path / "repo" / "edgeclip" / "labels.txt"
    assert written.read_text() == "one\ntwo\n"
    usual = labels.stat().st_mode & 0o777
    assert all(p.stat().st_mode & 0o777 == usual for p in written.parent.rglob("*") if p.is_file())

    labels.write_text("three\n")
    assert main(command) == 2
    assert "exists: add --force to replace it" in capsys.readouterr().err

    def failing(*_: object, **__: object) -> float:
        raise ExportError("not the same")

    with monkeypatch.context() as patch:
        patch.setattr(triton, "write_fused", failing)
        assert main([*command, "--force"]) == 2
    assert written.read_text() == "one\ntwo\n"
    assert main([*command, "--force"]) == 0
    assert written.read_text() == "three\n"
    assert [path.name for path in (tmp_path / "repo").iterdir()] == ["edgeclip"]

    thesis = tmp_path / "repo" / "other" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    assert main([*command, "--name", "other", "--force"]) == 2
    assert "is not empty and not a Triton model" in capsys.readouterr().err
    assert thesis.exists()


def test_inputs_are_not_destroyed_and_links_and_modes_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [SOURCE, "-o", str(tmp_path), "--force", "--labels"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "edgeclip").symlink_to("elsewhere")
    assert main([*command, str(LABELS)]) == 0
    assert (tmp_path / "edgeclip").is_symlink()
    assert (tmp_path / "elsewhere" / "config.pbtxt").is_file()

    labels = tmp_path / "edgeclip" / "mine.txt"
    labels.write_text("one\ntwo\n")
    assert main([*command, str(labels)]) == 2
    assert f"that would destroy the input {labels}" in capsys.readouterr().err
    assert labels.read_text() == "one\ntwo\n"

    (tmp_path / "elsewhere").chmod(0o750)
    assert main([*command, str(LABELS)]) == 0
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o750
    assert {path.name for path in tmp_path.iterdir()} == {"edgeclip", "elsewhere"}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--name", "../up"], "--name '../up': use letters, digits, and . _ - between them"),
        (["--name", ""], "--name '': use letters"),
        (["--precision", "int8"], "this int8 image encoder takes one image at a time"),
        (["--precision", "fp16"], "has no fp16 encoders; it has fp32"),
        (["--precision", "fp16", "--accelerator", "tensorrt"], "needs --precision fp32"),
        (["--labels", "none.txt"], "none.txt: No such file or directory"),
        (["--step-size", "3"], "--step-size needs --purify cos"),
    ],
)
def test_wrong_usage_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    line: str,
) -> None:
    assert main([SOURCE, "-o", str(tmp_path / "r"), "--labels", str(LABELS), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert line in error
    assert not list(tmp_path.iterdir())
