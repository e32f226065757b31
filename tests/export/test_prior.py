"""A prior as ONNX: what is loaded, what is computed, and what a bundle says of it."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from packaging import version
from safetensors.torch import load_file, save_file

from edgeclip import BundleError, DiffPurifier, Runtime
from edgeclip.bundle import Bundle
from edgeclip.manifest import Manifest, PriorSpec
from export import ExportError
from export.diffusion_prior import main
from export.graphs.prior import PRIOR_FILE, Step, export_step, verify_step
from export.graphs.prior import write_prior as write_step
from tests.support.export_models import exported, write_folder
from tests.support.prior_models import DIM, relative, with_prior, write_prior
from train.errors import ModelError
from train.models.checkpoints import load
from train.models.prior import DiffusionPrior, Shape
from train.models.trained_prior import TrainedPrior, load_prior, null_context
from train.models.wording import wording

BATCHES = (1, 3, 33)
PICTURE = np.zeros((16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior") / "a.safetensors", depth=1, heads=1)


@pytest.fixture(scope="module")
def state(weights: Path) -> dict[str, torch.Tensor]:
    return load_file(weights)


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def example(count: int, seed: int = 0, dim: int = DIM) -> tuple[torch.Tensor, ...]:
    """z, timesteps and noise: those of each embedding are its own."""
    rng = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(2, count, dim, generator=rng)
    times = torch.randint(0, 1000, (count,), generator=rng)
    return torch.nn.functional.normalize(z, dim=1), times, noise


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]


# Loading.


def assert_holds(found: TrainedPrior, state: dict[str, torch.Tensor], file: Path) -> None:
    assert found.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    for key, value in found.model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_safetensors_and_the_folder_of_a_run(weights: Path, state: dict, tmp_path: Path) -> None:
    assert_holds(load_prior(weights), state, weights)
    shutil.copy(weights, tmp_path / "prior.safetensors")
    assert_holds(load_prior(tmp_path), state, weights)


def released(state: dict[str, torch.Tensor], number: object) -> dict[str, Any]:
    """As dalle2-pytorch's trainer saves it."""
    worse = {key: value + 1 for key, value in state.items()}
    return {
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 1e-4}]},
        "model": worse, "version": number, "step": 7, "ema_model": state,
        "ema": {"initted": torch.ones(1), "step": torch.ones(1)},
    }  # fmt: skip


def test_released_checkpoint_loads(state: dict, tmp_path: Path) -> None:
    path = tmp_path / "best.pth"
    torch.save(released(state, version.parse("0.15.4")), path)
    assert_holds(load_prior(path), state, path)


def test_released_checkpoint_of_an_older_packaging_loads(
    state: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """packaging 21 to 25 kept a named tuple and a key with infinities in a version."""

    class Infinity:
        pass

    class Negative:
        pass

    class Parts(NamedTuple):
        epoch: int
        release: tuple[int, ...]

    class Version:
        pass

    structures = type(sys)("packaging._structures")
    for owner, name, kind in (
        (structures, "InfinityType", Infinity),
        (structures, "NegativeInfinityType", Negative),
        (version, "Version", Version),
        (version, "_Version", Parts),
    ):
        kind.__module__, kind.__qualname__, kind.__name__ = owner.__name__, name, name
        monkeypatch.setattr(owner, name, kind, raising=False)
    monkeypatch.setitem(sys.modules, structures.__name__, structures)
    number = Version()
    number._version = Parts(0, (0, 15, 4))
    number._key = (0, (0, 15, 4), Infinity(), Negative(), Infinity())
    path = tmp_path / "best.pth"
    torch.save(released(state, number), path)
    monkeypatch.undo()
    assert_holds(load_prior(path), state, path)


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def test_other_code_is_refused_and_not_run(
    state: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, mark = tmp_path / "best.pth", tmp_path / "ran"
    torch.save(released(state, Trap(mark)), path)
    with pytest.raises(ModelError, match=r"holds pickled code \(\w+\), which is not run"):
        load_prior(path)
    assert not mark.exists()
    assert main([str(path), "-o", str(tmp_path / "a.onnx")]) == 2
    line = last_line(capsys)
    assert line.startswith(f"error: {path} holds pickled code")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))  # and it would have worked
    assert mark.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "folder"])
def test_missing_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match=r"does not exist: name a run of train\.diffusion_prior"):
        load_prior(tmp_path / name)


def test_wrong_files(tmp_path: Path, state: dict) -> None:
    bad = {"a.safetensors": b"nothing", "a.pth": b"", "b.pth": b"\x80\x02"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=name):
            load_prior(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelError, match=r"list\.pth holds no state dict"):
        load_prior(tmp_path / "list.pth")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ModelError, match=r"other\.safetensors: not the weights of a diffusion prior"
    ):
        load_prior(tmp_path / "other.safetensors")
    save_file(
        {k: v for k, v in state.items() if "norm.gamma" not in k}, tmp_path / "less.safetensors"
    )
    with pytest.raises(ModelError, match=r"less.safetensors: .*missing: net.*norm.gamma"):
        load_prior(tmp_path / "less.safetensors")


# The step with a text as its input.

LENGTH = 9


@pytest.fixture(scope="module")
def step_file(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("step") / "step.onnx"
    assert main([str(weights), "-o", str(path), "--text-length", str(LENGTH)]) == 0
    return path


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
    wanted = prior.score(z, times, noise, prior.context(embed, encodings, text_mask=mask))
    given = {
        "z": z, "timestep": times, "noise": noise, "text_embed": embed,
        "text_encodings": encodings, "text_mask": mask,
    }  # fmt: skip
    found = session(step_file).run(
        ["loss", "gradient"], {name: value.numpy() for name, value in given.items()}
    )
    assert relative(found[0], wanted[0]) < 1e-4
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert relative(ours, theirs) < 1e-4


def test_no_norm_has_more_outputs_than_tensorrt_takes(step_file: Path) -> None:
    graph = onnx.load(step_file).graph
    outputs = [len(node.output) for node in graph.node if node.op_type == "LayerNormalization"]
    assert outputs
    assert set(outputs) == {1}


def test_batch_is_symbolic_and_shapes_are_told(step_file: Path) -> None:
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
    seen: dict[bytes, str] = {}
    for name, matrix in matrices.items():
        for turned in (matrix, matrix.T):
            content = np.ascontiguousarray(turned).tobytes()
            assert seen.get(content, name) == name, f"{name} is {seen.get(content)} again"
            seen[content] = name


def test_command_says_how_near_it_is(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("export.diffusion_prior.export_step", lambda *_: None)
    monkeypatch.setattr(
        "export.diffusion_prior.verify_step", lambda *_: {"loss_max_rel_diff": 1e-6}
    )
    assert main([str(weights), "-o", str(tmp_path / "a.onnx")]) == 0
    assert "loss_max_rel_diff        1e-06" in capsys.readouterr().out
    assert main([str(weights), "-o", str(tmp_path / "a.onnx"), "--text-length", "0"]) == 2
    assert last_line(capsys) == "error: --text-length must be 1 or more, got 0"


def test_command_destroys_nothing(
    weights: Path,
    tmp_path: Path,
    devices: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    def export(_: object, path: Path, *__: object) -> None:
        path.write_text("graph")

    monkeypatch.setattr("export.diffusion_prior.export_step", export)
    monkeypatch.setattr("export.diffusion_prior.verify_step", lambda *_: {})
    run = Path(shutil.copytree(weights.parent, tmp_path / "run"))
    (run / "prior.safetensors").write_bytes(weights.read_bytes())
    for given in (run / weights.name, run):
        file = given if given.is_file() else run / "prior.safetensors"
        assert main([str(given), "-o", str(file), "--force"]) == 2
        assert "that would destroy the input" in last_line(capsys)
        assert file.read_bytes() == weights.read_bytes()
    assert main([str(weights), "-o", str(devices["null"])]) == 0
    assert stat.S_ISCHR(devices["null"].stat().st_mode)
    (tmp_path / "link").symlink_to("target")
    assert main([str(weights), "-o", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "graph"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "link", "target"}


# The step of a bundle.


@pytest.fixture(scope="module")
def own() -> Any:
    return with_prior()


def own_context(made: Any) -> Any:
    return null_context(made.prior.model, made.source, wording(made.source).null_templates)


@pytest.mark.parametrize("count", BATCHES)
def test_bundles_step_equals_pytorch(own: Any, count: int) -> None:
    z, times, noise = example(count)
    wanted = own.prior.model.score(z, times, noise, own_context(own))
    given = {"z": z.numpy(), "timestep": times.numpy(), "noise": noise.numpy()}
    found = session(own.bundle.path / PRIOR_FILE).run(["loss", "gradient"], given)
    assert relative(found[0], wanted[0]) < 1e-4
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert relative(ours, theirs) < 1e-4


def test_null_text_is_the_prompts_without_a_class(own: Any) -> None:
    """Their mean embedding, and the tokens of the first up to its end mark, written out here."""
    model, tokenizer = own.source.model, own.source.tokenizer
    kept: list[torch.Tensor] = []
    handle = model.ln_final.register_forward_hook(lambda *x: kept.append(x[2]))
    ids = tokenizer(["a .", "the thing called ."])
    with torch.no_grad():
        embeddings = model.encode_text(ids)
    handle.remove()
    tokens = kept[0][:1].clone()
    end = ids[0].tolist().index(ids.max().item())
    tokens[:, end + 1 :] = 0
    unit = torch.nn.functional.normalize(embeddings, dim=1).mean(0, keepdim=True)
    unit = torch.nn.functional.normalize(unit, dim=1)
    with torch.no_grad():
        wanted = own.prior.model.context(unit, tokens)
    found = null_context(own.prior.model, own.source, ["a {}.", "the thing called {}."])
    torch.testing.assert_close(found.memory, wanted.memory, rtol=1e-5, atol=1e-5)
    assert found.mask.all()


def test_manifest_tells_of_the_prior(own: Any) -> None:
    spec = own.bundle.manifest.prior
    assert spec.file == PRIOR_FILE
    assert spec.file in own.bundle.manifest.files
    assert (spec.timesteps, spec.gradient) == (1000, "exact")
    assert spec.weights_sha256 == own.prior.weights_sha256
    parity = spec.parity
    assert parity.keys() == {"loss_max_rel_diff", "gradient_max_rel_diff", "forward_min_cosine"}
    assert parity["loss_max_rel_diff"] < 1e-4
    assert parity["gradient_max_rel_diff"] < 1e-4
    assert parity["forward_min_cosine"] < 1
    own.bundle.verify()


def test_comparison_runs_on_the_usable_cores(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's own default is the machine's cores, to which it pins threads."""
    threads: list[int] = []
    create = ort.InferenceSession

    def recorded(*arguments: Any, **options: Any) -> ort.InferenceSession:
        made = create(*arguments, **options)
        threads.append(made.get_session_options().intra_op_num_threads)
        return made

    monkeypatch.setattr(ort, "InferenceSession", recorded)
    monkeypatch.setattr("edgeclip.backends.onnx_runtime.cores", lambda: 2)
    arguments = ["--gradient", "forward", "--text-length", "2"]
    assert main([str(weights), "-o", str(tmp_path / "prior.onnx"), *arguments]) == 0
    assert threads == [2]


def test_forward_gradient_is_the_graph_without_a_backward_pass(own: Any, tmp_path: Path) -> None:
    path = tmp_path / "forward.onnx"
    context, model = own_context(own), own.prior.model
    export_step(model, path, context, "forward")
    parity = verify_step(model, path, context, "forward")
    assert parity["gradient_max_rel_diff"] < 1e-4
    z, times, noise = example(33)
    given = {"z": z.numpy(), "timestep": times.numpy(), "noise": noise.numpy()}
    loss, gradient = session(path).run(["loss", "gradient"], given)
    x0 = DIM**0.5 * z
    with torch.no_grad():
        predicted = model.denoise(model.noise_scheduler(x0, times, noise), times, context)
    assert relative(loss, (predicted - x0).square().mean(1)) < 1e-4
    assert relative(gradient, 2 / DIM**0.5 * (x0 - predicted)) < 1e-4
    # And what an exact one is told apart by.
    with pytest.raises(
        ExportError, match="does not match PyTorch: its gradient has a relative difference"
    ):
        verify_step(model, path, context, "exact")
    small, exact = (len(onnx.load(p).graph.node) for p in (path, own.bundle.path / PRIOR_FILE))
    assert small < 0.7 * exact
    whole = Step(model, context, "exact")(z, times, noise)[1]
    cosines = torch.nn.functional.cosine_similarity(whole, torch.from_numpy(gradient))
    assert cosines.min() < 0.999


def test_prior_of_another_width_is_refused(tmp_path: Path) -> None:
    other = exported("vit")  # 48 wide, its text tokens 32
    prior = TrainedPrior(DiffusionPrior(Shape(48, 1, 1)).eval(), "0" * 64)
    templates = wording(other.source).null_templates
    for found in (prior, with_prior().prior):
        with pytest.raises(ModelError, match="the prior is made for embeddings and text") as error:
            write_step(tmp_path, found, other.source, templates, "exact")
        assert "\n" not in str(error.value)
        assert "have 48 and 32" in str(error.value)
    assert list(tmp_path.iterdir()) == []


# Manifests.


def changed(own: Any, **entries: Any) -> str:
    data = json.loads(own.bundle.manifest.to_json())
    return json.dumps(data | entries)


def test_a_text_tower_that_pools_before_its_last_norm(own: Any, tmp_path: Path) -> None:
    source = load(str(write_folder(tmp_path / "coca", "coca")), None)
    with pytest.raises(ModelError, match="text tower of coca gives a prior no tokens"):
        null_context(own.prior.model, source, ["a {}."])


def test_manifest_round_trip(own: Any) -> None:
    recommended = {
        "method": "diff", "steps": 3, "step_size": 0.5, "timesteps": [10, 99], "seed": 7,
    }  # fmt: skip
    manifest = Manifest.from_json(changed(own, purification=recommended))
    assert manifest.purification == DiffPurifier(3, 0.5, (10, 99), 7)
    assert manifest.prior == own.bundle.manifest.prior
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert json.loads(manifest.to_json())["purification"] == recommended
    assert isinstance(hash(manifest.purification), int)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"prior": None}, "needs a bundle with a diffusion prior"),
        ({"purification": {"timesteps": [900, 1000]}}, "prior has the timesteps 0 to 999"),
        ({"purification": {"timesteps": [10, 9]}}, "timesteps must be the first and the last"),
        ({"purification": {"seed": -1}}, "seed must be 0 to"),
        ({"purification": {"method": "other"}}, "unknown purification 'other'"),
        ({"purification": {"timesteps": 3}}, "manifest"),
        ({"prior": {"gradient": "else"}}, "gradient must be one of"),
        ({"prior": {"timesteps": 0}}, "timesteps must be a number"),
        ({"prior": {"file": 3}}, "must be texts"),
        ({"prior": {"file": "../prior.onnx"}}, "no sha256 for"),
        ({"prior": {"parity": {"a": "b"}}}, "parity must be numbers by name"),
        ({"prior": {"weights_sha256": None}}, "must be texts"),
    ],
)
def test_manifests_that_make_no_sense(
    own: Any, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    data = json.loads(own.bundle.manifest.to_json())
    data["purification"] = {"method": "diff", "steps": 3, "step_size": 0.5, "timesteps": [1, 2],
                            "seed": 0}  # fmt: skip
    for name, change in entries.items():
        data[name] = change and data[name] | change
    bundle = shutil.copytree(own.bundle.path, tmp_path / "bundle")
    (bundle / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message) as error:
        Bundle(bundle)
    assert "\n" not in str(error.value)


def test_prior_spec_needs_its_entries() -> None:
    with pytest.raises(ValueError, match="timesteps must be a number"):
        PriorSpec("prior.onnx", "0", True, "exact")
    assert PriorSpec("prior.onnx", "0", 10, "forward").parity == {}


@pytest.mark.parametrize("how", ["altered", "missing", "no graph"])
def test_spoiled_steps(own: Any, tmp_path: Path, how: str) -> None:
    folder = shutil.copytree(own.bundle.path, tmp_path / "bundle")
    path = folder / PRIOR_FILE
    if how == "missing":
        path.unlink()
        with pytest.raises(BundleError, match=r"prior\.onnx is missing"):
            Bundle(folder)
        return
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    if how == "no graph":
        data = json.loads((folder / "manifest.json").read_text())
        path.write_bytes(b"nothing")
        data["files"][PRIOR_FILE] = hashlib.sha256(b"nothing").hexdigest()
        (folder / "manifest.json").write_text(json.dumps(data))
    Runtime(folder, purify="none", device="cpu")  # which does not need it
    message = "was altered" if how == "altered" else "is no ONNX file"
    with pytest.raises(BundleError, match=message) as error:
        Runtime(folder, purify="diff", device="cpu").embed_images([PICTURE])
    assert PRIOR_FILE in str(error.value)


def test_another_graph_in_its_place_is_refused(own: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(own.bundle.path, tmp_path / "bundle")
    data = json.loads((folder / "manifest.json").read_text())
    other = next(folder.glob("image_encoder*.onnx"))
    shutil.copy(other, folder / PRIOR_FILE)
    data["files"][PRIOR_FILE] = hashlib.sha256(other.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="which is not what the manifest says"):
        Runtime(folder, purify="diff", device="cpu").embed_images([PICTURE])
