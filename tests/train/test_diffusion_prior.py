"""Training and evaluation of a prior, on a tiny CLIP and a few images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgeclip import DiffPurifier, EdgeclipError
from edgeclip.purify import from_dict
from tests.support.models.export_models import write_folder
from tests.support.models.prior_models import DIM, VISION, Conditioned, with_prior, write_prior
from tests.support.robustness.evaluation import run as evaluate
from train import diffusion_prior
from train.data import dataset
from train.data.loader import Pictures, batches
from train.diffusion_prior import Settings, train
from train.errors import ModelError, SettingsError
from train.models.checkpoints import load
from train.models.prior import DiffusionPrior, Shape
from train.models.trained_prior import load_prior
from train.robustness.subjects import BundleClassifier, open_subject
from train.run.settings import run as run_command


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("clip") / "tiny", "vit", embed_dim=DIM, **VISION)


@pytest.fixture
def settings(clip: Path, fashion_folder: Path, tmp_path: Path) -> Settings:
    return Settings(
        bundle_checkpoint=str(clip),
        data=f"fashion-mnist:{fashion_folder}",
        out=tmp_path / "run",
        depth=1,
        heads=1,
        steps=8,
        batch_size=9,
        learning_rate=3e-3,
        warmup_steps=2,
        validate=20,
        checkpoint_every=3,
        threads=1,
        device="cpu",
    )


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def killed(settings: Settings, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the run is interrupted at a step."""
    batch_loss = diffusion_prior.batch_loss

    def interrupted(*args: Any) -> torch.Tensor:
        if args[-1] == step:
            raise KeyboardInterrupt
        return batch_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(diffusion_prior, "batch_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(settings)


def test_killed_and_resumed_run_equals_an_uninterrupted_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings)
    other = replace(settings, out=settings.out.with_name("parts"))
    killed(other, 5, monkeypatch)
    assert not (other.out / "prior.safetensors").exists()
    assert torch.load(other.out / "checkpoint.pt", weights_only=True)["step"] == 3
    embeddings = (other.out / "embeddings.safetensors").stat().st_mtime_ns
    killed(replace(other, resume=True), 7, monkeypatch)
    train(replace(other, resume=True, checkpoint_every=100))
    assert (other.out / "embeddings.safetensors").stat().st_mtime_ns == embeddings
    whole, resumed = (x.out / "prior.safetensors" for x in (settings, other))
    assert whole.read_bytes() == resumed.read_bytes()
    states = [torch.load(x.out / "checkpoint.pt", weights_only=True) for x in (settings, other)]
    for name in ("prior", "mean"):
        for key, value in states[0][name].items():
            assert torch.equal(value, states[1][name][key])
    assert rows(settings.out)[-1] == rows(other.out)[-1]


def test_resumed_run_records_the_same_losses(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resume from a checkpoint between two rows of metrics."""
    monkeypatch.setattr(diffusion_prior, "METRICS_EVERY", 4)
    train(settings)
    other = replace(settings, out=settings.out.with_name("parts"))
    killed(other, 7, monkeypatch)
    train(replace(other, resume=True))
    for actual, expected in zip(rows(other.out), rows(settings.out), strict=True):
        assert actual == pytest.approx(expected, rel=1e-6)


def test_finished_run_is_left_unchanged(settings: Settings) -> None:
    train(settings)
    before = (settings.out / "prior.safetensors").read_bytes(), rows(settings.out)
    train(replace(settings, resume=True))
    assert ((settings.out / "prior.safetensors").read_bytes(), rows(settings.out)) == before


def test_training_lowers_the_loss(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diffusion_prior, "METRICS_EVERY", 20)
    train(replace(settings, steps=80, batch_size=64, warmup_steps=5, checkpoint_every=100))
    *steps, last = rows(settings.out)
    assert [row["step"] for row in steps] == [20, 40, 60, 80]
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert last.keys() == {"step", *(f"test_loss_{a}_{b}" for a, b in diffusion_prior.RANGES)}
    assert 0 < last["test_loss_900_999"] < 1  # 1 is the loss of predicting zero
    assert f"--prior {settings.out} -o BUNDLE" in capsys.readouterr().out.replace("\n", " ")


def test_weights_load_under_the_released_keys(settings: Settings) -> None:
    train(replace(settings, steps=3, validate=0, depth=2, heads=3))
    prior = load_prior(settings.out)
    assert prior.model.shape == Shape(DIM, 2, 3)
    checkpoint = torch.load(settings.out / "checkpoint.pt", weights_only=True)
    for key, value in prior.model.state_dict().items():
        assert torch.equal(value, checkpoint["mean"][key])
    assert not torch.equal(
        checkpoint["mean"]["net.learned_query"], checkpoint["prior"]["net.learned_query"]
    )
    assert all(row.keys() == {"step", "loss"} for row in rows(settings.out))
    rest = {"checkpoint.pt", "embeddings.safetensors", "metrics.jsonl", "prior.safetensors"}
    assert {path.name for path in settings.out.iterdir()} == rest | {"tensorboard"}


def test_embeddings_equal_the_clips(settings: Settings, clip: Path) -> None:
    train(replace(settings, steps=3, validate=20))
    embeddings = load_file(settings.out / "embeddings.safetensors")
    assert embeddings["train"].shape == (150, DIM)
    assert embeddings["test"].shape == (20, DIM)
    source = load(str(clip), None)
    train_set = dataset.load(settings.data, train=True)
    assert embeddings["labels"].tolist() == [train_set[i][1] for i in range(150)]
    torch.testing.assert_close(embeddings["train"].norm(dim=1), torch.ones(150))
    ((images, _, _),) = batches(Pictures(train_set, source.model.visual), [[(3, 0), (149, 0)]], 0)
    cfg = source.model.visual.preprocess_cfg
    mean, std = (torch.tensor(cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        expected = source.model.encode_image((images - mean) / std, normalize=True)
    torch.testing.assert_close(embeddings["train"][[3, 149]], expected, rtol=1e-4, atol=1e-5)


def test_settings_change_the_weights(settings: Settings) -> None:
    short = replace(settings, steps=3, validate=0)
    train(short)
    first_weights = (settings.out / "prior.safetensors").read_bytes()
    for i, change in enumerate(({"seed": 1}, {"null_text": 0.0}, {"no_text": 0.5})):
        other = replace(short, out=settings.out.with_name(f"other{i}"), **change)
        train(other)
        assert (other.out / "prior.safetensors").read_bytes() != first_weights
    again = replace(short, out=settings.out.with_name("again"))
    train(again)
    assert (again.out / "prior.safetensors").read_bytes() == first_weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "--depth must be 1 or more, got 0"),
        ({"heads": 0}, "--heads must be 1 or more"),
        ({"batch_size": 0}, "--batch-size must be 1 or more"),
        ({"learning_rate": float("nan")}, "--learning-rate must be 0 or more"),
        ({"decay": 1.5}, "--decay must be from 0 to 1, got 1.5"),
        ({"null_text": -0.1}, "--null-text must be from 0 to 1"),
        ({"null_text": 0.6, "no_text": 0.5}, "together above 1"),
        ({"warmup_steps": 8}, "--warmup-steps must be below --steps 8"),
        ({"validate": -1}, "--validate must be 0 or more"),
        ({"views": 0}, "--views must be 1 or more"),
        ({"device": "tpu"}, "--device must be auto, cpu or cuda"),
    ],
)
def test_wrong_settings_are_one_line(
    settings: Settings, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as error:
        train(replace(settings, **change))
    assert "\n" not in str(error.value)
    assert not settings.out.exists()


def test_folders_of_other_runs_are_refused(settings: Settings, clip: Path, tmp_path: Path) -> None:
    short = replace(settings, steps=3, validate=0)
    train(short)
    with pytest.raises(SettingsError, match="holds a run already: add --resume"):
        train(short)
    with pytest.raises(SettingsError, match="begun with depth 1, not 2: resume it with the same"):
        train(replace(short, resume=True, depth=2))
    other = write_folder(tmp_path / "other", "vit", embed_dim=DIM, seed=2, **VISION)
    with pytest.raises(SettingsError, match="begun with bundle-checkpoint"):
        train(replace(short, resume=True, bundle_checkpoint=str(other)))
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="is a file: --out names a folder"):
        train(replace(short, out=tmp_path / "file"))
    torch.save({"model": {}, "step": 1}, other / "checkpoint.pt")
    with pytest.raises(SettingsError, match="holds a run of another kind"):
        train(replace(short, out=other))


@pytest.mark.parametrize("marker", ["manifest.json", "open_clip_config.json"])
def test_bundle_or_model_is_not_overwritten(settings: Settings, marker: str) -> None:
    settings.out.mkdir()
    for name in (marker, "embeddings.safetensors"):
        (settings.out / name).write_text("mine")
    with pytest.raises(SettingsError, match="holds a model or a bundle: name another folder"):
        train(settings)
    assert (settings.out / "embeddings.safetensors").read_text() == "mine"


def test_clip_with_text_tokens_of_another_width_is_refused(
    settings: Settings, tmp_path: Path
) -> None:
    other = write_folder(tmp_path / "other", "vit", **VISION)  # 48 wide, its text tokens 32
    with pytest.raises(SettingsError, match="a prior needs a CLIP in which these are the same"):
        train(replace(settings, bundle_checkpoint=str(other)))


def test_command_line(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train.diffusion_prior", "--bundle-checkpoint", settings.bundle_checkpoint, "--data",
             settings.data, "--out", str(settings.out)]  # fmt: skip
    for more, status in (
        (["--steps", "3", "--warmup-steps", "1", "--depth", "1", "--validate", "0"], 0),
        (["--null-text", "2"], 2),
        (["--bundle-checkpoint", "nothing-of-this-name"], 2),
        (["--steps", "few"], 2),
    ):
        monkeypatch.setattr("sys.argv", [*arguments, *more])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_command(diffusion_prior.main)
        assert end.value.code == status
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert len(lines) == (status != 0)
    assert (settings.out / "prior.safetensors").is_file()


@pytest.fixture(scope="module")
def conditioned() -> Conditioned:
    return with_prior()


@pytest.fixture
def arguments(conditioned: Conditioned, fashion_folder: Path, tmp_path: Path) -> list[str]:
    line = f"{conditioned.bundle.path} --data fashion-mnist:{fashion_folder} --eps 4/255 --steps 2 -n 6"
    line += " --batch-size 4 --queries 5 --check-samples 0 --device cpu --attack pgd"
    return [*line.split(), "--out", str(tmp_path / "result.json")]


DIFF = [
    "--purify",
    "diff",
    "--purify-steps",
    "2",
    "--purify-step-size",
    "0.5",
    "--purify-timesteps",
    "100",
    "999",
]
DIFF += ["--purify-seed", "3"]


def test_evaluation_of_diff(arguments: list[str], conditioned: Conditioned) -> None:
    result = evaluate(arguments, *DIFF, "--prior", str(conditioned.weights))
    purification = result["settings"]["purification"]
    assert purification == {
        "method": "diff", "steps": 2, "step_size": 0.5, "timesteps": [100, 999], "seed": 3,
        "prior_sha256": conditioned.prior.weights_sha256, "gradient": "exact",
    }  # fmt: skip
    assert from_dict(purification) == DiffPurifier(2, 0.5, (100, 999), 3)
    rows = [(row["attack"], row["gradient"]) for row in result["results"]]
    assert rows == [("pgd", mode) for mode in ("exact", "identity", "encoder", "released")]
    assert result["finished"] == 6
    assert result["agreement"] < 1e-2
    assert result["settings"]["eot"] == 1
    resumed = evaluate(arguments, *DIFF, "--prior", str(conditioned.weights))
    assert resumed["samples"] == result["samples"]
    assert resumed["settings"] == result["settings"]


def test_evaluation_with_an_unknown_seed(arguments: list[str], conditioned: Conditioned) -> None:
    more = [*DIFF, "--prior", str(conditioned.weights), "--eot", "2", "--gradient", "exact"]
    result = evaluate(arguments, *more, "-n", "4")
    assert result["settings"]["eot"] == 2
    assert list(result["samples"]) == ["clean", "pgd/exact"]


def test_evaluation_of_a_model_without_a_bundle(
    arguments: list[str], conditioned: Conditioned
) -> None:
    more = [*DIFF, "--prior", str(conditioned.weights), "--gradient", "exact", "-n", "4"]
    result = evaluate([str(conditioned.folder), *arguments[1:]], *more)
    purification = result["settings"]["purification"]
    assert (purification["gradient"], purification["prior_sha256"]) == (
        "exact",
        conditioned.prior.weights_sha256,
    )


def test_diff_as_published_is_the_default(arguments: list[str], conditioned: Conditioned) -> None:
    more = [
        "--purify",
        "diff",
        "--prior",
        str(conditioned.weights),
        "--gradient",
        "encoder",
        "-n",
        "2",
    ]
    result = evaluate(arguments, *more)
    assert from_dict(result["settings"]["purification"]) == DiffPurifier()


def test_wrong_options_of_diff_are_refused(
    arguments: list[str], conditioned: Conditioned, tmp_path: Path
) -> None:
    other = str(write_prior(tmp_path / "other.safetensors", seed=1))
    prior_options = ["--prior", str(conditioned.weights)]
    for more, message in (
        (DIFF, "--purify diff needs the weights of a prior: name its run with --prior"),
        (
            [*DIFF, "--prior", other],
            "does not contain the prior .*other.safetensors: export it with --prior",
        ),
        ([*prior_options, "--purify", "cos", "--purify-seed", "3"], "needs --purify diff"),
        (
            [*prior_options, "--purify", "cos", "--purify-timesteps", "0", "9"],
            "needs --purify diff",
        ),
        ([*prior_options, "--purify-seed", "3"], "needs --purify diff"),
        (
            [*prior_options, *DIFF, "--purify-timesteps", "9", "8"],
            "--purify-timesteps: 9 is after 8",
        ),
        (
            [*prior_options, *DIFF, "--purify-timesteps", "0", "1000"],
            "prior has the timesteps 0 to 999",
        ),
    ):
        with pytest.raises(EdgeclipError, match=message) as error:
            evaluate(arguments, *more)
        assert "\n" not in str(error.value)


def test_prior_of_another_clip_is_refused(conditioned: Conditioned, tmp_path: Path) -> None:
    model = write_folder(tmp_path / "model", "vit", **VISION)
    subject = open_subject(str(model), prior=str(conditioned.weights))
    with pytest.raises(ModelError, match="the prior is made for embeddings and text tokens of 32"):
        subject.defence(["a", "b"], DiffPurifier())


def test_attacked_model_equals_the_exported_one(conditioned: Conditioned) -> None:
    """Compare the defence in PyTorch with the bundle's runtime, with the published setting too."""
    subject = open_subject(str(conditioned.bundle.path), prior=str(conditioned.weights))
    assert subject.prior_gradient == "exact"
    names = ["cat", "dog", "house"]
    raw = list(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8))
    images = torch.stack([torch.from_numpy(x).permute(2, 0, 1) / 255 for x in raw])
    for purifier in (DiffPurifier(2, 0.5, (100, 999), 3), DiffPurifier(3, 30.0)):
        defence = subject.defence(names, purifier)
        runtime = BundleClassifier(subject, names, purifier, "fp32")
        with torch.no_grad():
            expected = defence(images).softmax(1).numpy()
        np.testing.assert_allclose(runtime.probabilities(raw), expected, atol=1e-3)


def test_network_is_importable_from_here() -> None:
    assert diffusion_prior.DiffusionPrior is DiffusionPrior
