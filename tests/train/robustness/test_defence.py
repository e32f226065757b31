"""Defences answer as the core does, and show attacks the gradient of each mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgeclip import _core
from edgeclip.purify import CosPurifier, Purifier
from tests.support.models.export_models import write_folder
from tests.support.models.toy_models import toy, toy_images
from train.models.checkpoints import Source, load
from train.models.classifier import Classifier, class_embeddings
from train.models.wording import null_text
from train.robustness.defence import Defence, LogitsModel, correct
from train.robustness.result_file import GRADIENTS

SMALL = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 4}
NAMES = ("trousers", "dress", "boot", "bag", "coat")
PURIFIERS = [CosPurifier(10, 30.0), CosPurifier(9, 30.0), CosPurifier(3, 0.2), CosPurifier(0, 1.0)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return load(str(write_folder(tmp_path_factory.mktemp("subject"), "vit", **SMALL)), None)


@pytest.fixture(scope="module")
def model(source: Source) -> Classifier:
    return Classifier(source, class_embeddings(source, NAMES, ["a {}."]), tokens=False).eval()


@pytest.fixture(scope="module")
def null(source: Source) -> torch.Tensor:
    return torch.from_numpy(null_text(source, ["a {}."]))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(33, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def core_logits(embeddings: np.ndarray, defence: Defence) -> tuple[np.ndarray, ...]:
    """Return the core's classes, most probable first, their probabilities, and the logits."""
    classes = F.normalize(defence.model.classes, dim=1).numpy()
    null, purifier = defence.null_text.numpy(), defence.purifier
    purified = (
        {}
        if purifier is None
        else {
            "null_text": null,
            "null_scores": (classes.astype(float) @ null).astype(np.float32),
            "steps": purifier.steps,
            "step_size": purifier.step_size,
        }
    )
    return _core.classify(
        embeddings,
        classes,
        logit_scale=defence.model.logit_scale.item(),
        top_k=len(classes),
        return_logits=True,
        **purified,
    )


@pytest.mark.parametrize("count", [1, 33])
@pytest.mark.parametrize("purifier", [None, *PURIFIERS], ids=str)
def test_answers_are_the_cores(
    model: Classifier, null: torch.Tensor, images: torch.Tensor, purifier: Purifier, count: int
) -> None:
    defence = Defence(model, null, purifier)
    with torch.no_grad():
        embeddings = model(images[:count]).embedding.numpy()
        logits = defence(images[:count])
    indices, probabilities, expected = core_logits(embeddings, defence)
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(logits.argmax(1).numpy(), indices[:, 0])
    likeliest = np.take_along_axis(logits.softmax(1).numpy(), indices.astype(int), axis=1)
    np.testing.assert_allclose(likeliest, probabilities, rtol=0, atol=1e-4)


@pytest.mark.parametrize("classes", [1, 33, 2049])
def test_answers_are_the_cores_for_any_number_of_classes(classes: int) -> None:
    for purifier in (None, CosPurifier(9, 30.0)):
        defence = toy(classes, purifier=purifier)
        images, _ = toy_images(defence, 5)
        with torch.no_grad():
            embeddings, logits = defence.model(images).embedding, defence(images)
        indices, _, expected = core_logits(embeddings.numpy(), defence)
        np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=5e-5)
        np.testing.assert_array_equal(logits.argmax(1).numpy(), indices[:, 0])


@pytest.mark.parametrize("purifier", PURIFIERS, ids=str)
def test_every_mode_answers_the_same(
    model: Classifier, null: torch.Tensor, images: torch.Tensor, purifier: CosPurifier
) -> None:
    defence = Defence(model, null, purifier)
    assert defence.gradients == GRADIENTS == ("exact", "identity", "encoder", "released")
    with torch.no_grad():
        plain, expected = model(images), defence(images)
        views = {mode: defence.view(images, mode) for mode in GRADIENTS}
    for mode, view in views.items():
        torch.testing.assert_close(view.answer, expected, rtol=0, atol=1e-3)
        if mode != "encoder":
            assert view.logits is view.answer
            torch.testing.assert_close(model.scores(view.embedding), view.logits, rtol=0, atol=1e-5)
            # the encoder's norms
            torch.testing.assert_close(view.embedding.norm(dim=1), plain.embedding.norm(dim=1))
    torch.testing.assert_close(views["encoder"].logits, plain.logits)
    torch.testing.assert_close(views["encoder"].embedding, plain.embedding)


def test_encoder_logits_differ_from_the_answer(
    model: Classifier, null: torch.Tensor, images: torch.Tensor
) -> None:
    """Compare logits with the answer: only encoder differs, and its answer has no gradient."""
    defence = Defence(model, null, CosPurifier(9, 30.0))
    leaves = images.clone().requires_grad_()
    view = defence.view(leaves, "encoder")
    assert (view.logits - view.answer).abs().amax(1).min() > 0.01
    assert view.logits.requires_grad
    assert not view.answer.requires_grad
    plain = images.clone().requires_grad_()
    expected = torch.autograd.grad(model(plain).logits[:, 0].sum(), plain)[0]
    gradient = torch.autograd.grad(view.logits[:, 0].sum(), leaves)[0]
    torch.testing.assert_close(gradient, expected)


def image_gradients(defence: Defence, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of the first class's logit, (B, pixels), by mode."""
    gradients = {}
    for mode in GRADIENTS:
        leaves = images.clone().requires_grad_()
        gradients[mode] = torch.autograd.grad(
            defence.view(leaves, mode).logits[:, 0].sum(), leaves
        )[0]
    return {mode: gradient.flatten(1) for mode, gradient in gradients.items()}


def test_gradients_of_the_modes() -> None:
    """Compare each gradient with its definition; for even steps all but one are equal."""
    defence = toy(purifier=CosPurifier(9, 30.0)).double()
    images, _ = toy_images(defence, 7)
    images = images.double()
    gradients = image_gradients(defence, images)
    for mode, plain in (("exact", False), ("encoder", True)):
        bare = Defence(defence.model, defence.null_text) if plain else defence
        step = 1e-6
        for j in (0, 77, 191):
            moved = torch.zeros(192, dtype=torch.float64)
            moved[j] = step
            moved = moved.view(3, 8, 8)
            with torch.no_grad():
                slope = (bare(images + moved) - bare(images - moved))[:, 0] / (2 * step)
            torch.testing.assert_close(gradients[mode][:, j], slope, rtol=1e-6, atol=1e-7)
    # Identity: the logits' gradient at the purified embedding, through the encoder as it is.
    leaves = images.clone().requires_grad_()
    embedding = defence.model(leaves).embedding
    purified = defence.view(images, "exact").embedding.detach().requires_grad_()
    (incoming,) = torch.autograd.grad(defence.model.scores(purified)[:, 0].sum(), purified)
    (expected,) = torch.autograd.grad(embedding, leaves, incoming)
    torch.testing.assert_close(gradients["identity"], expected.flatten(1))
    assert gradients["released"].norm() < 1e-8 * gradients["exact"].norm()

    even = image_gradients(toy(purifier=CosPurifier(10, 30.0)), images.float())
    for mode in ("identity", "encoder"):
        torch.testing.assert_close(even[mode], even["exact"], rtol=1e-3, atol=1e-4)
    assert even["released"].norm() < 1e-4 * even["exact"].norm()


def test_without_purification_there_is_one_mode(
    model: Classifier, null: torch.Tensor, images: torch.Tensor
) -> None:
    defence = Defence(model, null)
    assert defence.purifier is None
    assert defence.gradients == ("exact",)
    with torch.no_grad():
        plain = model(images)
        for mode in GRADIENTS:
            view = defence.view(images, mode)
            assert view.logits is view.answer
            assert torch.equal(view.logits, plain.logits)
            assert torch.equal(view.embedding, plain.embedding)


@pytest.mark.parametrize("purifier", [None, CosPurifier()], ids=str)
@pytest.mark.parametrize("mode", ["bpda", "", "EXACT"])
def test_unknown_gradient(
    model: Classifier, null: torch.Tensor, images: torch.Tensor, purifier: Purifier, mode: str
) -> None:
    with pytest.raises(ValueError, match="gradient must be one of exact, identity, encoder, rel"):
        Defence(model, null, purifier).view(images[:1], mode)


@pytest.mark.parametrize("mode", GRADIENTS)
def test_logits_model_returns_the_modes_logits(mode: str) -> None:
    defence = toy(purifier=CosPurifier(9, 30.0))
    images, _ = toy_images(defence, 5)
    logits_model = LogitsModel(defence, mode)
    torch.testing.assert_close(logits_model(images), defence.view(images, mode).logits)
    assert next(logits_model.parameters()).device == images.device


def test_correct_marks() -> None:
    defence = toy()
    images, labels = toy_images(defence, 33)
    assert correct(defence, images, labels).all()
    wrong = labels.clone()
    wrong[::3] = (labels[::3] + 1) % 5
    marks = correct(defence, images, wrong)
    assert marks.dtype == torch.bool
    assert marks.tolist() == [i % 3 != 0 for i in range(33)]
    # Use the defence's answer: an odd number of published steps reverses the encoder's.
    assert not correct(toy(purifier=CosPurifier(9, 30.0)), images, labels).any()


def test_null_text_follows_the_defence_but_is_not_stored() -> None:
    defence = toy(purifier=CosPurifier())
    assert defence.double().null_text.dtype == torch.float64
    assert not [name for name in defence.state_dict() if "null" in name]
