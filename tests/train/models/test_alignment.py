"""CLIP from a classifier and a sentence encoder: the embedding against float64, WordNet, weights."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from scipy.special import erf

from tests.support.models.text_towers import write_bert
from train.errors import ModelError
from train.models import alignment
from train.models.alignment import Classes
from train.models.word_net import hypernyms, read_nouns

TOWER = "test_efficientnet"
NAMES = ("dog", "cats", "the photo", "two", "red", "quick")
CLASSES = Classes(tuple((name,) for name in NAMES), ((),) * 6)
TEMPLATES = ["a photo of a {}.", "{}"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    write_bert(folder)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(1)
    trunk = timm.create_model(TOWER, num_classes=len(NAMES))
    with torch.no_grad():
        trunk.get_classifier().weight.normal_()
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(trunk.state_dict(), file)
    torch.save(
        {f"x.{i}": v for i, v in enumerate(trunk.state_dict().values())}, file.with_suffix(".pt")
    )
    return file


def build(classifier, text, projection="mlp"):
    loaded = alignment.load_classifier(TOWER, str(classifier))
    model, tokenizer, config = alignment.build_clip(
        loaded.trunk, TOWER, str(text), pooling="mean", context_length=16, projection=projection
    )
    return loaded, model, tokenizer, config


def images(count, size=160):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_embedding_is_sum_of_class_texts_weighted_by_gelu(classifier, text):
    loaded, model, tokenizer, config = build(classifier, text)
    texts = alignment.set_text_projection(model, tokenizer, CLASSES, TEMPLATES)
    alignment.set_image_projection(model, loaded.trunk.get_classifier(), texts, 0.3, torch.empty(0))
    pixels = images(3)
    logits = 3 * (loaded(pixels).logits.double().numpy() - 0.3)
    weights = 0.5 * logits * (1 + erf(logits / np.sqrt(2)))
    settings = config["preprocess_cfg"]
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    embedding = model.encode_image((pixels - mean) / std).double().numpy()
    rows = texts.double().numpy()
    middle = rows.mean(0) / np.linalg.norm(rows.mean(0))
    floor = 0.5 * (1 + erf(1 / np.sqrt(2))) * middle
    np.testing.assert_allclose(embedding, weights @ rows + floor, rtol=1e-4, atol=1e-4)
    # Far below a threshold, where the sum is zero in float32, the mean class text is left.
    alignment.set_image_projection(model, loaded.trunk.get_classifier(), texts, 1e3, torch.empty(0))
    embedding = model.encode_image((pixels - mean) / std).double().numpy()
    np.testing.assert_allclose(embedding, np.tile(floor, (3, 1)), rtol=1e-4)


@torch.no_grad()
def test_text_projection_removes_the_mean_of_the_class_names(classifier, text):
    _, model, tokenizer, _ = build(classifier, text)
    tower = transformers.AutoModel.from_pretrained(text, add_pooling_layer=False).eval()
    hf = transformers.AutoTokenizer.from_pretrained(text)

    def reference(names):
        rows = []
        for name in names:
            both = []
            for template in TEMPLATES:
                ids = hf(template.replace("{}", name), return_tensors="pt")
                hidden = tower(**ids).last_hidden_state[0].double().numpy().mean(0)
                both.append(hidden)
            rows.append(both)
        return np.array(rows)  # (K, templates, width)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    plain = unit(unit(reference(NAMES)).mean(1))
    direction = unit(plain.mean(0))
    without = reference(NAMES)
    without = without - (without @ direction)[..., None] * direction
    expected = unit(unit(without).mean(1))
    texts = alignment.set_text_projection(model, tokenizer, CLASSES, TEMPLATES)
    np.testing.assert_allclose(texts[:, :32], expected, atol=1e-5)
    assert not texts[:, 32:].any()


@torch.no_grad()
def test_class_text_is_mean_of_synonyms_with_falling_weights_of_hypernyms(classifier, text):
    _, model, tokenizer, _ = build(classifier, text)
    synonyms = (("dog", "cats"), *CLASSES.synonyms[1:])
    chains = (("red", "two"), (), (), (), (), ())
    texts = alignment.set_text_projection(model, tokenizer, Classes(synonyms, chains), TEMPLATES)
    words = ("dog", "cats", "red", "two")
    prompts = tokenizer([t.replace("{}", word) for word in words for t in TEMPLATES])
    unit = torch.nn.functional.normalize
    rows = unit(model.encode_text(prompts, normalize=True).view(4, 2, -1).mean(1), dim=1)
    expected = unit(rows[0] + rows[1], dim=0)
    expected = expected + 0.3 * rows[2] + 0.3 * 0.8 * rows[3]
    torch.testing.assert_close(texts[0], expected / expected.norm(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_linear_projection_follows_the_mlp(classifier, text):
    loaded, mlp, tokenizer, _ = build(classifier, text)
    _, linear, _, config = build(classifier, text, "linear")
    pixels = images(60, 96)
    features = loaded(pixels).embedding
    for model in (mlp, linear):
        texts = alignment.set_text_projection(model, tokenizer, CLASSES, TEMPLATES)
        alignment.set_image_projection(model, loaded.trunk.get_classifier(), texts, 0.0, features)
    expected, actual = (model.visual.head(features) for model in (mlp, linear))
    gelu = torch.nn.functional.gelu(torch.tensor(1.0))
    expected -= gelu * torch.nn.functional.normalize(texts.mean(0), dim=0)  # it has no floor
    assert torch.cosine_similarity(expected, actual).mean() > 0.9
    assert config["model_cfg"]["vision_cfg"]["timm_proj"] == "linear"


def test_weights_are_taken_by_name_or_in_order(classifier, capsys):
    pixels = images(2)
    by_name = alignment.load_classifier(TOWER, str(classifier))
    in_order = alignment.load_classifier(TOWER, str(classifier.with_suffix(".pt")))
    assert torch.equal(by_name(pixels).logits, in_order(pixels).logits)
    assert "taken in order" in capsys.readouterr().err


def test_wrong_weights_are_refused(tmp_path):
    other = timm.create_model("test_convnext", num_classes=6)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="does not hold this image tower's weights"):
        alignment.load_classifier(TOWER, str(tmp_path / "other.safetensors"))


def test_unknown_towers_are_refused(text):
    with pytest.raises(ModelError, match="timm cannot make 'no_tower'"):
        alignment.load_classifier("no_tower", None)
    trunk = timm.create_model(TOWER, num_classes=6)
    with pytest.raises(ModelError, match="cannot be loaded"):
        alignment.build_clip(
            trunk, TOWER, "./missing", pooling="mean", context_length=16, projection="mlp"
        )


def test_class_names_must_fit_the_classifier():
    trunk = timm.create_model(TOWER, num_classes=6)
    with pytest.raises(ModelError, match="6 classes, --classes 2"):
        alignment.choose_classes(trunk, ["dog", "cat"], None)
    with pytest.raises(ModelError, match="leave out --classes"):
        alignment.choose_classes(trunk, NAMES, Path("data.noun"))


def test_imagenet_classes_have_open_clips_names():
    classes = alignment.choose_classes(timm.create_model(TOWER), None, None)
    assert len(set(classes.names)) == 1000
    assert classes.names[1] == open_clip.IMAGENET_CLASSNAMES[1]
    assert classes.synonyms[15] == ("American robin", "robin")


# Offsets, words and pointers as in WordNet 3.0's data.noun; the rest is invented.
NOUNS = """\
  1 This is a licence
00000100 03 n 01 entity 0 000 | all
00000200 05 n 02 animal 0 creature a 001 @ 00000100 n 0000 | alive
00000300 05 n 01 domestic_dog 0 002 ~ 00000200 n 0000 @ 00000200 n 0000 | barks
00000400 18 n 01 Lassie 0 001 @i 00000300 n 0000 | a dog
"""


def test_hypernyms_are_read_nearest_first(tmp_path):
    file = tmp_path / "data.noun"
    file.write_text(NOUNS)
    nouns = read_nouns(file)
    assert hypernyms(nouns, "n00000400", 4) == ["domestic dog", "animal", "entity"]
    assert hypernyms(nouns, "n00000400", 1) == ["domestic dog"]
    assert hypernyms(nouns, "n00000100", 4) == []
    with pytest.raises(ModelError, match="n00000500 is not in"):
        hypernyms(nouns, "n00000500", 4)


@pytest.mark.parametrize("content", ["not a line of WordNet", "00000100 03 n 0x entity"])
def test_other_files_are_no_nouns(tmp_path, content):
    (tmp_path / "data.noun").write_text(content)
    with pytest.raises(ModelError, match=r"no data\.noun"):
        read_nouns(tmp_path / "data.noun")
    with pytest.raises(ModelError, match=r"no data\.noun"):
        read_nouns(tmp_path / "missing")


def test_scale_is_nearest_in_divergence():
    rng = torch.Generator().manual_seed(3)
    texts = torch.nn.functional.normalize(torch.randn(20, 8, generator=rng), dim=1)
    embeddings = torch.randn(50, 8, generator=rng)
    cosines = torch.nn.functional.normalize(embeddings, dim=1) @ texts.T
    assert alignment.fit_scale(embeddings, texts, 23 * cosines) == 23
