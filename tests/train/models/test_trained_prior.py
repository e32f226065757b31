"""Checkpoints of diffusion priors, and the context of a model's null text."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from packaging import version
from safetensors.torch import load_file, save_file

from export.diffusion_prior import main
from export.graphs.prior import write_prior as write_step
from tests.support.models.export_models import exported, write_folder
from tests.support.models.prior_models import with_prior, write_prior
from train.errors import ModelError
from train.models.checkpoints import load
from train.models.prior import DiffusionPrior, Shape
from train.models.trained_prior import TrainedPrior, load_prior, null_context
from train.models.wording import wording


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior") / "a.safetensors", depth=1, heads=1)


@pytest.fixture(scope="module")
def state(weights: Path) -> dict[str, torch.Tensor]:
    return load_file(weights)


def assert_holds(actual: TrainedPrior, state: dict[str, torch.Tensor], file: Path) -> None:
    assert actual.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    for key, value in actual.model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_safetensors_and_the_folder_of_a_run(weights: Path, state: dict, tmp_path: Path) -> None:
    assert_holds(load_prior(weights), state, weights)
    shutil.copy(weights, tmp_path / "prior.safetensors")
    assert_holds(load_prior(tmp_path), state, weights)


def released(state: dict[str, torch.Tensor], number: object) -> dict[str, Any]:
    """Return a checkpoint as dalle2-pytorch's trainer saves it."""
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
    """Load versions of packaging 21 to 25: a named tuple and a key with infinities."""

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
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {path} holds pickled code")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))  # the trap works
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


def test_null_text_is_the_prompts_without_a_class(tiny: Any) -> None:
    """Compare with the mean embedding, and the first prompt's tokens up to its end mark."""
    model, tokenizer = tiny.source.model, tiny.source.tokenizer
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
        expected = tiny.prior.model.context(unit, tokens)
    actual = null_context(tiny.prior.model, tiny.source, ["a {}.", "the thing called {}."])
    torch.testing.assert_close(actual.memory, expected.memory, rtol=1e-5, atol=1e-5)
    assert actual.mask.all()


def test_a_text_tower_that_pools_before_its_last_norm(tiny: Any, tmp_path: Path) -> None:
    source = load(str(write_folder(tmp_path / "coca", "coca")), None)
    with pytest.raises(ModelError, match="text tower of coca gives a prior no tokens"):
        null_context(tiny.prior.model, source, ["a {}."])


def test_prior_of_another_width_is_refused(tmp_path: Path) -> None:
    other = exported("vit")  # width 48, and 32 for its text tokens
    prior = TrainedPrior(DiffusionPrior(Shape(48, 1, 1)).eval(), "0" * 64)
    templates = wording(other.source).null_templates
    for actual in (prior, with_prior().prior):
        with pytest.raises(ModelError, match="the prior is made for embeddings and text") as error:
            write_step(tmp_path, actual, other.source, templates, "exact")
        assert "\n" not in str(error.value)
        assert "have 48 and 32" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def tiny() -> Any:
    return with_prior()
