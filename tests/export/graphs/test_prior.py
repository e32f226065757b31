"""Graphs of a prior's step, compared with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export import ExportError
from export.diffusion_prior import main
from export.graphs.prior import PRIOR_FILE, Step, export_step, verify_step
from tests.support.models.prior_models import DIM, relative, with_prior, write_prior
from train.models.trained_prior import load_prior, null_context
from train.models.wording import wording

BATCHES = (1, 3, 33)
LENGTH = 9  # tokens of a text


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior") / "a.safetensors", depth=1, heads=1)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return with_prior()


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def example(count: int, seed: int = 0, dim: int = DIM) -> tuple[torch.Tensor, ...]:
    """Return z, timesteps and noise, different for each embedding."""
    rng = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(2, count, dim, generator=rng)
    times = torch.randint(0, 1000, (count,), generator=rng)
    return torch.nn.functional.normalize(z, dim=1), times, noise


@pytest.fixture(scope="module")
def step_file(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("step") / "step.onnx"
    assert main([str(weights), "-o", str(path), "--text-length", str(LENGTH)]) == 0
    return path


def own_context(tiny: Any) -> Any:
    return null_context(tiny.prior.model, tiny.source, wording(tiny.source).null_templates)


@pytest.mark.parametrize("shown", [1, 4, LENGTH])
@pytest.mark.parametrize("count", BATCHES)
def test_step_with_a_text_equals_pytorch(
    step_file: Path, weights: Path, count: int, shown: int
) -> None:
    prior = load_prior(weights).model
    z, times, noise = example(count)
    rng = torch.Generator().manual_seed(shown)
    embed, encodings = (
        torch.randn(1, DIM, generator=rng),
        torch.randn(1, LENGTH, DIM, generator=rng),
    )
    mask = torch.arange(LENGTH)[None] < shown
    expected = prior.score(z, times, noise, prior.context(embed, encodings, text_mask=mask))
    inputs = {
        "z": z, "timestep": times, "noise": noise, "text_embed": embed,
        "text_encodings": encodings, "text_mask": mask,
    }  # fmt: skip
    actual = session(step_file).run(
        ["loss", "gradient"], {name: value.numpy() for name, value in inputs.items()}
    )
    assert relative(actual[0], expected[0]) < 1e-4
    for actual_row, expected_row in zip(actual[1], expected[1], strict=True):
        assert relative(actual_row, expected_row) < 1e-4


def test_no_norm_has_more_outputs_than_tensorrt_takes(step_file: Path) -> None:
    graph = onnx.load(step_file).graph
    outputs = [len(node.output) for node in graph.node if node.op_type == "LayerNormalization"]
    assert outputs
    assert set(outputs) == {1}


def test_batch_is_symbolic_and_shapes_are_declared(step_file: Path) -> None:
    graph = onnx.load(step_file).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "z": ["batch", DIM], "timestep": ["batch"], "noise": ["batch", DIM],
        "text_embed": [1, DIM], "text_encodings": [1, LENGTH, DIM], "text_mask": [1, LENGTH],
        "loss": ["batch"], "gradient": ["batch", DIM],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["step", "bundle"])
def test_each_weight_is_stored_once(step_file: Path, weights: Path, kind: str) -> None:
    path = step_file if kind == "step" else with_prior().bundle.path / PRIOR_FILE
    matrices = {
        value.name: onnx.numpy_helper.to_array(value)
        for value in onnx.load(path).graph.initializer
        if len(value.dims) == 2 and min(value.dims) > 1
    }
    assert len(matrices) > 5
    names: dict[bytes, str] = {}
    for name, matrix in matrices.items():
        for turned in (matrix, matrix.T):
            content = np.ascontiguousarray(turned).tobytes()
            assert names.get(content, name) == name, f"{name} duplicates {names[content]}"
            names[content] = name


@pytest.mark.parametrize("count", BATCHES)
def test_bundles_step_equals_pytorch(tiny: Any, count: int) -> None:
    z, times, noise = example(count)
    expected = tiny.prior.model.score(z, times, noise, own_context(tiny))
    inputs = {"z": z.numpy(), "timestep": times.numpy(), "noise": noise.numpy()}
    actual = session(tiny.bundle.path / PRIOR_FILE).run(["loss", "gradient"], inputs)
    assert relative(actual[0], expected[0]) < 1e-4
    for actual_row, expected_row in zip(actual[1], expected[1], strict=True):
        assert relative(actual_row, expected_row) < 1e-4


def test_forward_gradient_is_the_graph_without_a_backward_pass(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "forward.onnx"
    context, model = own_context(tiny), tiny.prior.model
    export_step(model, path, context, "forward")
    parity = verify_step(model, path, context, "forward")
    assert parity["gradient_max_rel_diff"] < 1e-4
    z, times, noise = example(33)
    inputs = {"z": z.numpy(), "timestep": times.numpy(), "noise": noise.numpy()}
    loss, gradient = session(path).run(["loss", "gradient"], inputs)
    x0 = DIM**0.5 * z
    with torch.no_grad():
        predicted = model.denoise(model.noise_scheduler(x0, times, noise), times, context)
    assert relative(loss, (predicted - x0).square().mean(1)) < 1e-4
    assert relative(gradient, 2 / DIM**0.5 * (x0 - predicted)) < 1e-4
    # Verification tells a forward gradient from an exact one.
    with pytest.raises(
        ExportError, match="does not match PyTorch: its gradient has a relative difference"
    ):
        verify_step(model, path, context, "exact")
    small, exact = (len(onnx.load(p).graph.node) for p in (path, tiny.bundle.path / PRIOR_FILE))
    assert small < 0.7 * exact
    whole = Step(model, context, "exact")(z, times, noise)[1]
    cosines = torch.nn.functional.cosine_similarity(whole, torch.from_numpy(gradient))
    assert cosines.min() < 0.999
