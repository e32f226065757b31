"""train.align on a tiny tower: the run folder, tuning under attack, resuming, errors."""

import json
import sys
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.models.text_towers import write_bert
from train import align
from train.errors import ModelError, SettingsError
from train.models.checkpoints import load
from train.run.settings import run

STEM_EPS = 1e-5  # of the first batch norm
CPU = torch.device("cpu")
NAMES = ("dog", "cats", "red")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("align")
    write_bert(folder / "bert")
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder / "bert")
    tower = transformers.AutoModel.from_config(config, add_pooling_layer=False)
    tower.save_pretrained(folder / "bert")
    trunk = timm.create_model("test_efficientnet", num_classes=len(NAMES))
    with torch.no_grad():
        trunk.get_classifier().weight.normal_()
    save_file(trunk.state_dict(), folder / "weights.safetensors")
    (folder / "names.txt").write_text("\n".join(NAMES))
    rng = np.random.default_rng(0)
    for name in ("dog", "red", "other"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    return align.Settings(
        image="test_efficientnet",
        text=str(folder / "bert"),
        data=(f"folder:{folder / 'photos'}",),
        out=folder / "run",
        image_weights=str(folder / "weights.safetensors"),
        classes=folder / "names.txt",
        template=("a photo of a {}.",),
        context_length=16,
        images=8,
        eps=4 / 255,
        step_size=5 / 255,
        image_size=64,
        batch_size=4,
        learning_rate=1e-3,
        warmup_steps=0,
        device="cpu",
        threads=1,
    )


def tower(folder):
    return load_file(folder / "open_clip_model.safetensors")


def test_run_folder_loads_here_and_in_open_clip(settings, tmp_path, monkeypatch, capsys):
    settings = replace(settings, out=tmp_path / "run")
    align.align(settings, 0, 1, CPU)
    assert "is ready" in capsys.readouterr().out
    source = load(str(settings.out), None)
    assert source.wording["templates"] == ["a photo of a {}."]
    monkeypatch.chdir(settings.out)
    model, _ = open_clip.create_model_from_pretrained("local-dir:.")
    pixels = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        both = [m.eval().encode_image(pixels) for m in (source.model, model)]
    assert torch.equal(*both)
    assert both[0].shape == (2, 32)


def embed(folder, pixels):
    """Embed images by the model of a run."""
    with torch.no_grad():
        return load(str(folder), None).model.eval().encode_image(pixels, normalize=True)


def test_tuning_changes_the_function_of_a_folder_of_the_same_tensors(settings, tmp_path):
    plain, tuned = (replace(settings, out=tmp_path / name) for name in ("plain", "tuned"))
    align.align(plain, 0, 1, CPU)
    align.align(replace(tuned, epochs=2), 0, 1, CPU)
    before, after = tower(plain.out), tower(tuned.out)
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    pixels = torch.rand(2, 3, 160, 160)
    assert (embed(plain.out, pixels) - embed(tuned.out, pixels)).abs().max() > 1e-3
    rows = [json.loads(line) for line in (tuned.out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["divergence"] > 0 and row["ce"] > 0 for row in rows)


def _stem(state):
    """Return the first convolution with its batch norm: a product for each output channel."""
    parts = (state[f"visual.trunk.bn1.{name}"].double() for name in ("weight", "running_var"))
    weight, variance = parts
    factor = weight / (variance + STEM_EPS).sqrt()
    return state["visual.trunk.conv_stem.weight"].double() * factor[:, None, None, None]


def test_alpha_mixes_the_weights_of_a_finished_run(settings, tmp_path):
    plain, tuned = (replace(settings, out=tmp_path / name) for name in ("plain", "tuned"))
    align.align(plain, 0, 1, CPU)
    tuned = replace(tuned, epochs=1)
    align.align(tuned, 0, 1, CPU)
    rows = (tuned.out / "metrics.jsonl").read_text()
    first, last = _stem(tower(plain.out)), _stem(tower(tuned.out))
    align.align(replace(tuned, resume=True, alpha=0.25, input_size=96, rank=2), 0, 1, CPU)
    torch.testing.assert_close(_stem(tower(tuned.out)), 0.75 * first + 0.25 * last)
    assert (tuned.out / "metrics.jsonl").read_text() == rows
    assert load(str(tuned.out), None).model.visual.image_size == (96, 96)


def test_interrupted_tuning_ends_with_the_same_weights(settings, tmp_path, monkeypatch):
    whole, killed = (
        replace(settings, out=tmp_path / name, epochs=2, checkpoint_every=2) for name in "ab"
    )
    align.align(whole, 0, 1, CPU)
    real, calls = align.save_checkpoint, []

    def stop_after_two(folder, state):
        real(folder, state)
        calls.append(state["step"])
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(align, "save_checkpoint", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            align.align(killed, 0, 1, CPU)
    with pytest.raises(SettingsError, match="holds a run already"):
        align.align(killed, 0, 1, CPU)
    align.align(replace(killed, resume=True), 0, 1, CPU)
    expected, actual = tower(whole.out), tower(killed.out)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_target_size_shrinks_the_attacked_images(settings, tmp_path, monkeypatch):
    sizes = []
    real = align.attack

    def note(settings, model, images, target, *rest):
        sizes.append(images.shape[-1])
        return real(settings, model, images, target, *rest)

    monkeypatch.setattr(align, "attack", note)
    settings = replace(settings, out=tmp_path / "run", epochs=1, image_size=32, target_size=64)
    align.align(settings, 0, 1, CPU)
    assert sizes == [32] * 3
    images = torch.rand(2, 3, 64, 64)
    blurred = align.shrink(images, 32)
    assert blurred.shape == (2, 3, 32, 32)
    assert blurred.mean().item() == pytest.approx(images.mean().item(), abs=1e-2)
    assert align.shrink(images, 64) is images


def test_attack_raises_the_divergence_within_its_growing_size(settings):
    torch.manual_seed(1)
    linear = torch.nn.Linear(12, 3)

    def model(x):
        return align.alignment.Output(linear(x.flatten(1)), x, None)

    images = torch.rand(5, 3, 2, 2)
    target, seeds = model(images).logits.detach(), torch.arange(5)
    for done, share in ((0.0, 0.2), (0.175, 0.6), (0.5, 1.0)):
        attacked = align.attack(settings, model, images, target, None, seeds, done)
        size = (attacked - images).abs().max().item()
        assert size == pytest.approx(share * settings.eps, rel=1e-4)
        divergence = align.divergence(model(attacked).logits, target)
        assert (divergence > 0).all()
    plain = replace(settings, eps=0.0)
    assert align.attack(plain, model, images, target, None, seeds, 0.0) is images


def test_images_of_other_classes_have_no_label(settings):
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.5, 0.0, 1.0]])

    def model(x):
        return align.alignment.Output(logits, x, None)

    terms = align.loss_terms(
        settings, model, logits, None, torch.zeros(2, 3, 2, 2), torch.tensor([1, -1])
    )
    assert terms["divergence"].item() == pytest.approx(0, abs=1e-6)
    row = logits[0].double()
    expected = (row.exp().sum().log() - row[1]).item() / 2
    assert terms["ce"].item() == pytest.approx(expected, abs=1e-6)


def test_wrong_settings_are_one_line(settings, tmp_path, monkeypatch, capsys):
    with pytest.raises(SettingsError, match="give --eps 4/255"):
        align.checked(replace(settings, eps=4.0), 1)
    with pytest.raises(SettingsError, match="--batch-size 4 cannot be split over 3 processes"):
        align.checked(settings, 3)
    names = tmp_path / "two.txt"
    names.write_text("dog\ncats\n")
    with pytest.raises(ModelError, match="3 classes, --classes 2"):
        align.align(replace(settings, classes=names, out=tmp_path / "x"), 0, 1, CPU)
    words = ["--image", "no_tower", "--text", "./missing", "--data", "folder:x", "--out", "y"]
    monkeypatch.setattr(sys, "argv", ["align", *words])
    with pytest.raises(SystemExit):
        run(align.main)
    assert "timm cannot make 'no_tower'" in capsys.readouterr().err
