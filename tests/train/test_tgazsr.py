"""Whole runs of adversarial fine-tuning, on a tiny CLIP and a few images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from edgeclip.storage import sha256
from tests.support.export_models import write_folder
from train import tgazsr
from train.attacks import pgd
from train.data import dataset
from train.data.loader import Pictures, draw, generators
from train.errors import DataError, ModelError, SettingsError
from train.models.checkpoints import load
from train.models.classifier import Classifier, class_embeddings
from train.models.weight_files import join_sha256
from train.run.settings import parse_settings
from train.run.settings import run as run_command
from train.tgazsr import Settings, checked, epoch_keys
from train.variants import WEIGHTS, attack, loss_terms

CPU = torch.device("cpu")
SMALL = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 4}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", "vit", **SMALL)


@pytest.fixture
def settings(model: Path, fashion_folder: Path, tmp_path: Path) -> Settings:
    return Settings(
        data=f"fashion-mnist:{fashion_folder}",
        out=tmp_path / "run",
        model=str(model),
        eps=8 / 255,
        step_size=4 / 255,
        epochs=2,
        batch_size=24,
        optimizer="adamw",
        learning_rate=1e-3,
        warmup_steps=2,
        validate=20,
        validate_steps=2,
        device="cpu",
        threads=1,
    )


def run(settings: Settings) -> list[dict[str, Any]]:
    """Train in this process; return the rows of metrics."""
    tgazsr.train(checked(settings, 1), 0, 1, CPU)
    return rows(settings.out)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def command(settings: Settings, *more: str) -> list[str]:
    words = [sys.executable, "-m", "train.tgazsr"]
    plain = Settings(data="", out=Path())
    for name, value in vars(settings).items():
        if value != getattr(plain, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return [*words, *more]


def assert_same(ours: Path, theirs: Path, **tolerance: float) -> None:
    found, wanted = weights(ours), weights(theirs)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, **tolerance)


@pytest.mark.parametrize("variant", WEIGHTS)
def test_every_variant_lowers_its_loss(settings: Settings, variant: str, model: Path) -> None:
    found = run(replace(settings, variant=variant, epochs=5, learning_rate=3e-3))
    steps = [row for row in found if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 31))
    first, last = (sum(row["loss"] for row in part) for part in (steps[:3], steps[-3:]))
    assert last < 0.9 * first
    terms = {"fare": ["fare"], "tecoa": ["ce"], "at": ["ce"], "pmg": ["ce", "general", "clean"]}
    for name in terms.get(variant, ["ce", "ar", "amc"]):
        assert steps[-1][name] > 0
    checks = [row for row in found if "robust_accuracy" in row]
    assert [row["epoch"] for row in checks] == [1, 2, 3, 4, 5]
    assert all(0 <= row["robust_accuracy"] <= row["clean_accuracy"] + 0.1 for row in checks)

    before, after = load(str(model), None), load(str(settings.out), None)
    for key, value in before.model.state_dict().items():
        moved = not torch.equal(after.model.state_dict()[key], value)
        assert moved == key.startswith("visual."), f"{key}: the image encoder alone is trained"
    assert after.wording["templates"] == before.wording["templates"]
    assert f"fine-tuned by {variant} against linf eps 8/255" in after.wording["description"]
    assert after.config["model_cfg"] == before.config["model_cfg"]
    assert after.config["preprocess_cfg"] == before.config["preprocess_cfg"]


def test_tecoa_is_tga_without_its_terms(settings: Settings) -> None:
    """SGD, whose steps are proportional to the gradient, keeps rounding errors small."""
    tecoa = replace(settings, variant="tecoa", optimizer="sgd", learning_rate=0.02)
    without = replace(tecoa, variant="tga", alpha=0.0, beta=0.0, out=settings.out.parent / "tga")
    run(tecoa)
    run(without)
    assert_same(without.out, tecoa.out, rtol=1e-4, atol=1e-5)


def test_attack_on_the_loss_is_stronger_than_noise(settings: Settings) -> None:
    source = load(settings.model, None)
    pairs = dataset.load(settings.data, train=True)
    classifier = Classifier(source, class_embeddings(source, pairs.classes, ["a {}"])).eval()
    images = torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels, seeds = torch.arange(30) % 10, torch.arange(30)
    chosen = checked(settings, 1)

    def loss(steps: int) -> float:
        found = attack(chosen, classifier, classifier, images, labels, seeds, steps)
        assert (found - images).abs().max() <= settings.eps + 1e-6
        return torch.nn.functional.cross_entropy(classifier(found).logits, labels).item()

    assert loss(0) < loss(2) < loss(10)
    assert all(p.grad is None for p in classifier.parameters())


@pytest.mark.parametrize("variant", ["tga", "comp"])
def test_terms_before_training(settings: Settings, variant: str) -> None:
    """Take one encoder as both: L_AMC is zero, L_AR comes from the attack, gradients are finite."""
    source = load(settings.model, None)
    texts = class_embeddings(source, ["cat", "dog", "bird"], ["a {}"])
    classifier = Classifier(source, texts).eval()
    source.model.visual.requires_grad_(True)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    chosen = checked(replace(settings, variant=variant), 1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    attacked = (images + 0.1 * noise).clamp(0, 1)
    terms = loss_terms(chosen, classifier, classifier, texts, images, attacked, labels)
    assert terms["amc"].item() == pytest.approx(0, abs=1e-4)
    assert terms["ar"].item() > 1e-3
    sum(terms.values()).backward()
    grads = [p.grad for p in classifier.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in grads)


# Without pmg: its reference sees the attacked images, but counts as a constant.
@pytest.mark.parametrize("variant", ["tga", "comp", "tecoa", "at", "fare"])
def test_image_gradients_equal_finite_differences(
    settings: Settings, variant: str, tmp_path: Path
) -> None:
    """Check in float64, through a tiny encoder that differs from the original one."""
    narrow = SMALL | {"image_size": 8, "layers": 1, "width": 16}
    folders = [write_folder(tmp_path / str(i), "vit", seed=i, **narrow) for i in range(2)]
    sources = [load(str(folder), None) for folder in folders]
    texts = class_embeddings(sources[0], ["cat", "dog", "bird"], ["a {}"]).double()
    negated = class_embeddings(sources[0], ["cat", "dog", "bird"], ["no {}"]).double()
    models = []
    for source in sources:
        source.model.visual.double()
        models.append(Classifier(source, texts.float()).double().eval())
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 8, generator=rng).double()
    noise = 0.05 * torch.randn(images.shape, generator=rng).double()
    chosen = checked(replace(settings, variant=variant), 1)

    def loss(attacked: torch.Tensor) -> torch.Tensor:
        labels = torch.tensor([0, 2])
        return sum(loss_terms(chosen, *models, negated, images, attacked, labels).values())

    attacked = (images + noise).requires_grad_()
    assert torch.autograd.gradcheck(loss, attacked, eps=1e-6, atol=1e-6, fast_mode=True)


def test_killed_and_resumed_run_equals_an_uninterrupted_one(settings: Settings) -> None:
    whole = replace(settings, epochs=8, checkpoint_every=2, augment="garments")
    parts = replace(whole, out=settings.out.parent / "parts")
    child = subprocess.Popen(command(parts), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while child.poll() is None and not (
        (parts.out / "checkpoint.pt").exists() and len(rows(parts.out)) > 5
    ):
        time.sleep(0.005)
    child.kill()
    text = child.communicate()[0].decode()
    done = torch.load(parts.out / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < done < 48, f"the run was to be killed half way: {text}"
    with (parts.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss')  # a killed writer leaves half a row
    run(replace(parts, resume=True))
    run(whole)
    assert_same(parts.out, whole.out, rtol=0, atol=0)

    def figures(out: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(out)]

    assert figures(parts.out) == figures(whole.out)
    board = EventAccumulator(str(whole.out / "tensorboard"))
    board.Reload()
    shown = [event.value for event in board.Scalars("loss")]
    wanted = [row["loss"] for row in rows(whole.out) if "loss" in row]
    np.testing.assert_allclose(shown, wanted, rtol=1e-6)


def test_finished_run_is_left_unchanged(settings: Settings) -> None:
    run(settings)
    before = weights(settings.out)
    found = run(replace(settings, resume=True, workers=1))
    assert len(found) == 14
    assert all(torch.equal(before[key], value) for key, value in weights(settings.out).items())


@pytest.mark.parametrize("variant", ["tga", pytest.param("at", marks=pytest.mark.slow)])
def test_two_processes_equal_one(settings: Settings, variant: str) -> None:
    one = replace(settings, variant=variant, optimizer="sgd", learning_rate=0.02, workers=1)
    two = replace(one, out=settings.out.parent / "two")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        words + command(two)[1:], capture_output=True, text=True, env=environment, check=False
    )
    assert found.returncode == 0, found.stderr
    run(one)
    ours, theirs = rows(two.out), rows(one.out)
    assert len(ours) == len(theirs) == 14
    for mine, other in zip(ours, theirs, strict=True):
        for key in other.keys() - {"seconds"}:
            assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
    assert_same(two.out, one.out, rtol=1e-4, atol=1e-5)


def test_accumulated_parts_equal_the_whole_batch(settings: Settings) -> None:
    whole = replace(settings, optimizer="sgd", learning_rate=0.02)
    parts = replace(whole, accumulate=3, out=settings.out.parent / "parts")
    run(whole)
    run(parts)
    assert_same(parts.out, whole.out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"norm": "l2", "eps": 1.0}])
def test_bf16_and_l2(settings: Settings, changes: dict[str, Any]) -> None:
    found = run(replace(settings, step_size=0.02, limit_batches=2, epochs=3, **changes))
    steps = [row for row in found if "loss" in row]
    assert len(steps) == 6
    assert all(np.isfinite(row["loss"]) and row["gradient_norm"] > 0 for row in steps)


@pytest.mark.parametrize("variant", ["tecoa", "fare"])
def test_baselines_train_a_tower_without_patch_tokens(
    settings: Settings, tmp_path: Path, variant: str
) -> None:
    resnet = write_folder(tmp_path / "resnet", "resnet")
    found = run(replace(settings, model=str(resnet), variant=variant, limit_batches=2))
    assert len([row for row in found if "loss" in row]) == 4


@pytest.mark.parametrize("variant", ["tga", "comp"])
def test_siglip_has_patch_tokens(settings: Settings, tmp_path: Path, variant: str) -> None:
    siglip = write_folder(tmp_path / "siglip", "siglip")  # its texts are eight tokens
    short = replace(settings, template="a {}", non_class_template="no {}")
    found = run(replace(short, model=str(siglip), variant=variant, limit_batches=2))
    assert all(row["ar"] > 0 for row in found if "loss" in row)
    again = load(str(settings.out), None)
    assert (
        again.tokenizer(["a cat"]).tolist() == load(str(siglip), None).tokenizer(["a cat"]).tolist()
    )


def test_every_epoch_takes_each_image_once_in_another_order(settings: Settings) -> None:
    chosen = replace(settings, batch_size=4)
    epochs = [epoch_keys(14, epoch, chosen, 0, 1) for epoch in range(2)]
    orders = [[index for batch in keys for index, _ in batch] for keys in epochs]
    assert all(len(set(order)) == len(order) == 12 for order in orders)
    assert orders[0] != orders[1]
    seeds = [seed for keys in epochs for batch in keys for _, seed in batch]
    assert len(set(seeds)) == 24
    halves = [epoch_keys(14, 0, chosen, rank, 2) for rank in range(2)]
    joined = [a + b for a, b in zip(*halves, strict=True)]
    assert joined == epochs[0]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"alpha": -0.1}, "--alpha must be 0 or more, got -0.1"),
    ({"beta": -1.0}, "--beta must be 0 or more"),
    ({"alpha": float("nan")}, "--alpha must be 0 or more, got nan"),
    ({"variant": "tecoa", "alpha": 0.1}, "has no terms"),
    ({"eps": 8.0}, "--eps is in units of [0, 1], got 8: for 8 of 255 give --eps 8/255"),
    ({"eps": 1.0}, "give --eps 1/255"),
    ({"eps": -0.1}, "--eps must be 0 or more"),
    ({"step_size": 2.0}, "give --step-size 2/255"),
    ({"attack_steps": 0}, "--attack-steps must be 1 or more"),
    ({"gradient_clip": -1.0}, "--gradient-clip must be 0 or more"),
    ({"learning_rate": float("inf")}, "--learning-rate must be 0 or more"),
    ({"momentum": 1.0}, "--momentum must be from 0 to 0.9999"),
    ({"limit_batches": -1}, "--limit-batches must be 0 or more"),
    ({"validate_steps": -1}, "--validate-steps must be 0 or more"),
    ({"template": "a photo"}, "need {}"),
    ({"accumulate": 5}, "cannot be split over 1 processes and --accumulate 5"),
    ({"batch_size": 1000}, "fewer images than --batch-size"),
    ({"warmup_steps": 12}, "--warmup-steps 12 would never end: give --warmup-steps 1"),
    ({"learning_rate": 1e30, "optimizer": "sgd"}, "is not finite: lower --learning-rate"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_settings(settings: Settings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        run(replace(settings, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tower_without_patch_tokens_is_refused(settings: Settings, tmp_path: Path) -> None:
    resnet = write_folder(tmp_path / "resnet", "resnet")
    with pytest.raises(
        SettingsError, match=r"patch tokens in the .* and resnet has none: choose a plain ViT"
    ):
        run(replace(settings, model=str(resnet)))


# Each of these settings must change the weights.
OTHERS: list[dict[str, Any]] = [
    {"gradient_clip": 1e-3}, {"weight_decay": 5.0}, {"momentum": 0.1}, {"learning_rate": 2e-3},
    {"warmup_steps": 1}, {"attack_steps": 6}, {"eps": 0.2}, {"step_size": 0.1}, {"norm": "l2"},
    {"augment": "flip"}, {"distance": "l1"}, {"template": "the {}"}, {"precision": "bf16"},
    {"seed": 1}, {"alpha": 0.5}, {"beta": 0.5}, {"variant": "comp"}, {"optimizer": "sgd"},
]  # fmt: skip


def test_every_setting_changes_the_weights(settings: Settings) -> None:
    base = replace(settings, limit_batches=2, validate=0, learning_rate=1e-3)

    def trained(name: str, **changes: Any) -> torch.Tensor:
        chosen = replace(base, out=settings.out.parent / name, **changes)
        run(chosen)
        return torch.cat([value.ravel() for value in weights(chosen.out).values()])

    wanted = trained("base")
    assert torch.equal(trained("again"), wanted)
    for i, changes in enumerate(OTHERS):
        assert not torch.allclose(trained(str(i), **changes), wanted, atol=1e-7), changes


def test_validation_is_an_attack(settings: Settings) -> None:
    """Count again image by image, with PGD on the logits."""
    source = load(settings.model, None)
    test_set = dataset.load(settings.data, train=False)
    classifier = Classifier(source, class_embeddings(source, test_set.classes, ["a {}"])).eval()
    pictures = Pictures(test_set, source.model.visual)
    chosen = checked(replace(settings, eps=0.03, step_size=0.01, validate_steps=5), 1)
    found = tgazsr.validate(chosen, classifier, classifier, pictures, 0, 1)
    right = [0, 0]
    for key in draw(len(test_set), 20, settings.seed):
        image, label, seed = pictures[key]
        images, labels = image[None], torch.tensor([label])
        attacked = pgd(
            lambda x: classifier(x).logits, images, labels, eps=0.03, step_size=0.01, steps=5,
            generator=generators(torch.tensor([seed]), CPU),
        )  # fmt: skip
        for i, shown in enumerate((images, attacked)):
            right[i] += int(classifier(shown).logits.argmax() == label)
    assert found == {"clean_accuracy": right[0] / 20, "robust_accuracy": right[1] / 20}


def test_model_and_file_are_not_overwritten(settings: Settings, model: Path) -> None:
    before = (model / "open_clip_model.safetensors").read_bytes()
    with pytest.raises(SettingsError, match="holds a model or a bundle"):
        run(replace(settings, out=model))
    assert (model / "open_clip_model.safetensors").read_bytes() == before
    with pytest.raises(SettingsError, match="is a file"):
        run(replace(settings, out=model / "bpe.txt.gz"))


def test_other_and_damaged_checkpoints_are_refused(settings: Settings) -> None:
    settings.out.mkdir()
    torch.save({"model": {}, "settings": {}}, settings.out / "checkpoint.pt")
    with pytest.raises(SettingsError, match="a run of another kind"):
        run(replace(settings, resume=True))
    (settings.out / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(SettingsError, match="cannot be read"):
        run(replace(settings, resume=True))


def test_changed_data_is_refused(settings: Settings, fashion_folder: Path) -> None:
    run(replace(settings, epochs=1, batch_size=12))
    for kind in ("images-idx3", "labels-idx1"):
        test, train = (fashion_folder / f"{n}-{kind}-ubyte.gz" for n in ("t10k", "train"))
        train.write_bytes(test.read_bytes())
    with pytest.raises(SettingsError, match="was begun with images 150, not 50"):
        run(replace(settings, epochs=1, resume=True, batch_size=12))


def test_broken_image_in_a_worker_is_one_line(
    tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(b"broken")
    chosen = replace(
        settings, data=f"folder:{tmp_path / 'photos'}", batch_size=2, workers=1, validate=0
    )
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: run(chosen))
    assert caught.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: image ")
    assert "photos" in line


def test_template_is_recorded_where_the_model_has_none(settings: Settings, model: Path) -> None:
    file = model / "open_clip_config.json"
    config = json.loads(file.read_text())
    del config["edgeclip"]
    file.write_text(json.dumps(config))
    run(replace(settings, limit_batches=2, validate=0, template="one {} here"))
    assert load(str(settings.out), None).wording["templates"] == ["one {} here"]


def test_run_is_not_overwritten_or_resumed_with_other_settings(
    settings: Settings, tmp_path: Path
) -> None:
    run(replace(settings, epochs=1, limit_batches=3))
    with pytest.raises(SettingsError, match="add --resume"):
        run(settings)
    with pytest.raises(SettingsError, match="was begun with epochs 1, not 2"):
        run(replace(settings, limit_batches=3, resume=True))
    folder = write_folder(tmp_path / "other", "vit", **SMALL | {"layers": 1})
    other = replace(settings, epochs=1, limit_batches=3, model=str(folder), resume=True)
    with pytest.raises(SettingsError, match=r"was begun with (weights|model)"):
        run(other)


def test_weights_of_another_architecture_are_refused(settings: Settings, tmp_path: Path) -> None:
    wide = write_folder(tmp_path / "wide", "vit", **SMALL | {"width": 64})
    file = wide / "open_clip_model.safetensors"
    with pytest.raises(ModelError, match="does not hold this model's weights"):
        run(replace(settings, pretrained=str(file)))


def test_folder_without_classes_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders in"):
        run(replace(settings, data=f"folder:{tmp_path / 'empty'}"))


def test_mistakes_on_the_command_line_are_one_line(settings: Settings) -> None:
    found = subprocess.run(
        command(settings, "--eps", "8"), capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    wanted = "error: --eps is in units of [0, 1], got 8: for 8 of 255 give --eps 8/255\n"
    assert found.stderr == wanted


def test_robust_image_tower_is_trained_further(
    settings: Settings, model: Path, tmp_path: Path
) -> None:
    base = load(str(model), None).model.state_dict()
    tower = {k.removeprefix("visual."): v / 2 for k, v in base.items() if "visual." in k}
    torch.save({"vision_encoder_state_dict": tower}, tmp_path / "tecoa.pt")
    changes = {"visual": str(tmp_path / "tecoa.pt"), "quickgelu": True, "learning_rate": 0.0}
    run(replace(settings, epochs=1, limit_batches=3, validate=0, **changes))
    made = load(str(settings.out), None)
    assert made.quick_gelu
    for key, value in made.model.state_dict().items():
        assert torch.equal(value, base[key] / 2 if key.startswith("visual.") else base[key])
    training = json.loads((settings.out / "open_clip_config.json").read_text())["training"]
    files = (model / "open_clip_model.safetensors", tmp_path / "tecoa.pt")
    assert training["weights_sha256"] == join_sha256([sha256(path) for path in files])


@pytest.mark.parametrize(
    ("words", "wanted"), [([], None), (["--quickgelu"], True), (["--no-quickgelu"], False)]
)
def test_activation_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, words: list[str], wanted: bool | None
) -> None:
    monkeypatch.setattr(sys, "argv", ["tgazsr", "--data", "x", "--out", "y", *words])
    assert parse_settings(Settings, "tgazsr", "", "").quickgelu is wanted
