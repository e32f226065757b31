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


def test_tuning_moves_weights_and_leaves_statistics(settings, tmp_path):
    plain, tuned = (replace(settings, out=tmp_path / name) for name in ("plain", "tuned"))
    align.align(plain, 0, 1, CPU)
    align.align(replace(tuned, epochs=2), 0, 1, CPU)
    before, after = tower(plain.out), tower(tuned.out)
    statistics = [name for name in before if "running_" in name]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    assert not torch.equal(
        before["visual.trunk.conv_stem.weight"], after["visual.trunk.conv_stem.weight"]
    )
    rows = [json.loads(line) for line in (tuned.out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["divergence"] > 0 and row["ce"] > 0 for row in rows)


def test_alpha_mixes_the_weights_of_a_finished_run(settings, tmp_path):
    plain, tuned = (replace(settings, out=tmp_path / name) for name in ("plain", "tuned"))
    align.align(plain, 0, 1, CPU)
    tuned = replace(tuned, epochs=1)
    align.align(tuned, 0, 1, CPU)
    name = "visual.trunk.conv_stem.weight"
    ends = tower(plain.out)[name], tower(tuned.out)[name]
    rows = (tuned.out / "metrics.jsonl").read_text()
    align.align(replace(tuned, resume=True, alpha=0.25), 0, 1, CPU)
    torch.testing.assert_close(tower(tuned.out)[name], 0.75 * ends[0] + 0.25 * ends[1])
    assert (tuned.out / "metrics.jsonl").read_text() == rows


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


def test_attack_raises_the_divergence_within_its_growing_size(settings):
    torch.manual_seed(1)
    linear = torch.nn.Linear(12, 3)

    def model(x):
        return align.alignment.Output(linear(x.flatten(1)), x, None)

    images = torch.rand(5, 3, 2, 2)
    target, seeds = model(images).logits.detach(), torch.arange(5)
    for done, share in ((0.0, 0.2), (0.175, 0.6), (0.5, 1.0)):
        attacked = align.attack(settings, model, images, target, seeds, done)
        size = (attacked - images).abs().max().item()
        assert size == pytest.approx(share * settings.eps, rel=1e-4)
        divergence = align.divergence(model(attacked).logits, target)
        assert (divergence > 0).all()
    assert align.attack(replace(settings, eps=0.0), model, images, target, seeds, 0.0) is images


def test_images_of_other_classes_have_no_label(settings):
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.5, 0.0, 1.0]])

    def model(x):
        return align.alignment.Output(logits, x, None)

    terms = align.loss_terms(
        settings, model, logits, torch.zeros(2, 3, 2, 2), torch.tensor([1, -1])
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
