"""CLIPure-Diff of a bundle, compared with a float64 loop around PyTorch's prior."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgeclip import BundleError, CosPurifier, DiffPurifier, Runtime
from edgeclip.backends.prior import Prior
from edgeclip.cli.main import main
from export.graphs.prior import PRIOR_FILE
from tests.support.models.clipure_reference import polar_by_vectors, relative_error
from tests.support.models.export_models import exported
from tests.support.models.prior_models import DIM, Conditioned, with_prior
from train.models.prior import Context
from train.models.trained_prior import null_context
from train.models.wording import wording
from train.robustness.purification import NullPrior, purify

GENTLE = DiffPurifier(4, 0.5, (100, 999), 3)
LABELS = ["cat", "dog", "house", "tree"]


@pytest.fixture(scope="module")
def conditioned() -> Conditioned:
    return with_prior()


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (33, 20, 24, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def null_prior(conditioned: Conditioned) -> NullPrior:
    context = null_context(
        conditioned.prior.model, conditioned.source, wording(conditioned.source).null_templates
    )
    return NullPrior(conditioned.prior.model, context)


def open_runtime(conditioned: Conditioned, purifier: Any = GENTLE, **options: Any) -> Runtime:
    options = {"device": "cpu", "batch_size": 33, "threads": 1} | options
    return Runtime(conditioned.bundle, purify=purifier, **options)


@pytest.fixture(scope="module")
def plain(conditioned: Conditioned, images: list[np.ndarray]) -> np.ndarray:
    return open_runtime(conditioned, None).embed_images(images)


def draw(purifier: DiffPurifier) -> tuple[np.ndarray, np.ndarray]:
    """Draw timesteps and noise from the Mersenne Twister, which is the same in every NumPy."""
    random = np.random.RandomState(purifier.seed)
    first, last = purifier.timesteps
    times = random.randint(first, last + 1, purifier.steps)
    return times, random.standard_normal((purifier.steps, DIM)).astype(np.float32)


def purify_by_loop(z: np.ndarray, prior: NullPrior, purifier: DiffPurifier) -> np.ndarray:
    """Run the published loop in float64, with the gradients of PyTorch's prior in float64."""
    wide = NullPrior(prior.prior, prior_context(prior)).double()
    try:
        u = z.astype(np.float64)
        for timestep, noise in zip(*draw(purifier), strict=True):
            gradient = wide.gradient(
                torch.from_numpy(u), int(timestep), torch.from_numpy(noise).double()
            )
            u = polar_by_vectors(u, gradient.numpy(), purifier.step_size)
        return u
    finally:
        prior.prior.float()  # other tests share the module


def prior_context(prior: NullPrior) -> Any:
    return Context(prior.memory, prior.mask)


@pytest.mark.parametrize(
    "purifier",
    [GENTLE, DiffPurifier(1, 30.0), DiffPurifier(10, 0.1, (0, 0), 2**32 - 1),
     DiffPurifier(3, 2.0, (999, 999), 1)],
    ids=str,
)  # fmt: skip
def test_equals_a_float64_loop(
    conditioned: Conditioned, images: list, plain: np.ndarray, null_prior: NullPrior, purifier: Any
) -> None:
    actual = open_runtime(conditioned, purifier).embed_images(images)
    assert actual.dtype == np.float32
    expected = purify_by_loop(plain, null_prior, purifier)
    assert relative_error(actual, expected) < 1e-4
    assert relative_error(actual, plain) > 1e-2
    np.testing.assert_allclose(np.linalg.norm(actual, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("mode", ["exact", "identity", "released"])
def test_equals_the_purification_in_pytorch(
    conditioned: Conditioned, images: list, plain: np.ndarray, null_prior: NullPrior, mode: str
) -> None:
    actual = open_runtime(conditioned).embed_images(images)
    ours = purify(torch.from_numpy(plain), torch.zeros(DIM), GENTLE, mode, null_prior)
    assert relative_error(actual, ours.numpy()) < 1e-4


def test_same_answer_alone_in_a_batch_and_on_two_threads(
    conditioned: Conditioned, images: list
) -> None:
    whole = open_runtime(conditioned)
    embeddings = whole.embed_images(images)
    labels = [row[0].label for row in whole.classify(images, LABELS)]
    for threads, size in ((1, 1), (2, 1), (2, 33), (1, 5)):
        other = open_runtime(conditioned, threads=threads, batch_size=size)
        np.testing.assert_allclose(other.embed_images(images), embeddings, rtol=0, atol=1e-5)
        assert [row[0].label for row in other.classify(images, LABELS)] == labels
    backwards = whole.embed_images(images[::-1])[::-1]
    np.testing.assert_allclose(backwards, embeddings, rtol=0, atol=1e-5)
    assert np.array_equal(whole.embed_images(images), embeddings)


def test_another_seed_gives_another_answer(conditioned: Conditioned, images: list) -> None:
    actual = [
        open_runtime(conditioned, DiffPurifier(2, 0.5, seed=seed)).embed_images(images[:3])
        for seed in (0, 1, 0)
    ]
    assert relative_error(actual[1], actual[0]) > 1e-3
    assert np.array_equal(actual[2], actual[0])


@pytest.mark.parametrize("purifier", [DiffPurifier(0, 30.0), DiffPurifier(5, 0.0)], ids=str)
def test_no_steps_or_size_zero_is_the_identity(
    conditioned: Conditioned, images: list, plain: np.ndarray, purifier: DiffPurifier
) -> None:
    assert np.array_equal(open_runtime(conditioned, purifier).embed_images(images), plain)


def test_classify_agrees_with_embed_images(conditioned: Conditioned, images: list) -> None:
    runtime = open_runtime(conditioned)
    labels = runtime.labels(LABELS)
    logits = conditioned.bundle.manifest.logit_scale * (
        runtime.embed_images(images).astype(float) @ labels.embeddings.T
    )
    powers = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = powers / powers.sum(1, keepdims=True)
    pixels = runtime.preprocess(images)
    results = (
        runtime.classify(images, labels),
        list(runtime.classify_each(images, labels)),
        runtime.classify_pixels(pixels, labels),
    )
    for answers in results:
        for row, expected in zip(answers, probabilities, strict=True):
            scores = {p.index: p.score for p in row}
            np.testing.assert_allclose([scores[i] for i in range(4)], expected, atol=1e-4)
    each = np.stack(list(runtime.embed_each(images)))
    np.testing.assert_allclose(each, runtime.embed_images(images), atol=1e-6)


def test_texts_are_not_purified(conditioned: Conditioned) -> None:
    texts = ["a cat", "a dog"]
    actual = [open_runtime(conditioned, purifier).embed_texts(texts) for purifier in (None, GENTLE)]
    assert np.array_equal(*actual)


def test_no_images(conditioned: Conditioned) -> None:
    runtime = open_runtime(conditioned)
    assert runtime.embed_images([]).shape == (0, DIM)
    assert runtime.classify([], LABELS) == []
    assert next(iter(runtime.classify_each([b"no image"], LABELS))).args


def test_step_equals_pytorch(
    conditioned: Conditioned, plain: np.ndarray, null_prior: NullPrior
) -> None:
    prior = Prior(conditioned.bundle.graph(PRIOR_FILE), DIM, device="cpu", threads=1)
    (timestep, *_), (noise, *_) = GENTLE.draws(DIM)
    loss, gradient = prior.loss_and_grad(plain, int(timestep), noise)
    assert loss.shape == (33,)
    expected = null_prior.gradient(torch.from_numpy(plain), int(timestep), torch.from_numpy(noise))
    assert relative_error(gradient, expected.numpy()) < 1e-4


def test_step_for_other_embeddings_is_refused(conditioned: Conditioned) -> None:
    with pytest.raises(BundleError, match="which contradicts the manifest"):
        Prior(conditioned.bundle.graph(PRIOR_FILE), DIM + 1, device="cpu")


def test_bundle_without_a_prior_is_an_error() -> None:
    bundle = exported("vit").bundle
    for purifier in ("diff", DiffPurifier(0, 1.0)):
        with pytest.raises(BundleError) as error:
            Runtime(bundle, purify=purifier)
        assert str(error.value) == (
            "purify 'diff' needs a bundle with a diffusion prior, and this one has none: "
            "export it with --prior"
        )


def test_timesteps_beyond_the_schedule(conditioned: Conditioned) -> None:
    with pytest.raises(BundleError, match="prior has the timesteps 0 to 999"):
        open_runtime(conditioned, DiffPurifier(timesteps=(900, 1000)))


def test_prior_is_opened_on_first_use(
    conditioned: Conditioned, monkeypatch: pytest.MonkeyPatch, images: list
) -> None:
    monkeypatch.setattr("edgeclip.backends.host_pipeline.Prior", None)
    open_runtime(conditioned, CosPurifier(1, 0.1)).embed_images(images[:1])
    open_runtime(conditioned, "auto").embed_images(images[:1])
    runtime = open_runtime(conditioned, "diff")
    runtime.embed_texts(["a bag"])
    with pytest.raises(TypeError):
        runtime.embed_images(images[:1])


@pytest.fixture
def picture(tmp_path: Path, images: list[np.ndarray]) -> str:
    path = tmp_path / "a.png"
    Image.fromarray(images[0]).save(path)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def classify(conditioned: Conditioned, picture: str, *more: str) -> list[str]:
    words = ["classify", picture, "--bundle", str(conditioned.bundle.path), "--format", "json"]
    for label in LABELS:
        words += ["--label", label]
    return [*words, *more]


def test_classify_with_a_prior(
    conditioned: Conditioned, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "--purify diff --steps 2 --step-size 0.5 --seed 3 --timesteps 0 99"
    options = line.split()
    status, out, err = run(capsys, *classify(conditioned, picture, *options))
    assert (status, err) == (0, "")
    (answer,) = json.loads(out)
    runtime = open_runtime(conditioned, DiffPurifier(2, 0.5, (0, 99), 3))
    (expected,) = runtime.classify([picture], LABELS)
    assert [p["label"] for p in answer["predictions"]] == [p.label for p in expected]
    scores = [p["score"] for p in answer["predictions"]]
    np.testing.assert_allclose(scores, [p.score for p in expected], atol=1e-5)
    _, other, _ = run(
        capsys, *classify(conditioned, picture, *options[:-3], "--timesteps", "900", "999")
    )
    assert json.loads(other) != json.loads(out)


def test_published_setting_is_the_default(
    conditioned: Conditioned, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, short, _ = run(capsys, *classify(conditioned, picture, "--purify", "diff"))
    options = "--purify diff --steps 10 --step-size 30 --timesteps 900 999 --seed 0"
    _, whole, _ = run(capsys, *classify(conditioned, picture, *options.split()))
    assert json.loads(short) == json.loads(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seed 3", "needs --purify diff"),
        ("--steps 3", "--steps needs --purify cos or diff"),
        ("--purify none --timesteps 0 9", "--timesteps needs --purify diff"),
        ("--purify cos --seed 3", "needs --purify diff"),
        ("--purify cos --timesteps 0 9", "needs --purify diff"),
        ("--purify diff --timesteps 9 8", "--timesteps: 9 is after 8"),
        ("--purify diff --timesteps 900 1000", "prior has the timesteps 0 to 999"),
        ("--purify diff --timesteps 9", "--timesteps"),
        ("--purify diff --timesteps -1 9", "--timesteps"),
        ("--purify diff --timesteps a b", "--timesteps"),
        ("--purify diff --seed -1", "--seed"),
        ("--purify diff --seed 4294967296", "--seed"),
        ("--purify diff --seed 1.5", "--seed"),
        ("--purify diff --steps 0", "--steps"),
        ("--purify diff --step-size nan", "--step-size"),
    ],
)
def test_wrong_options_are_one_line(
    conditioned: Conditioned,
    picture: str,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    status, out, err = run(capsys, *classify(conditioned, picture, *options.split()))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_command_on_a_bundle_without_a_prior(
    picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["classify", picture, "--label", "a", "--bundle", str(exported("vit").bundle.path)]
    status, out, err = run(capsys, *words, "--purify", "diff")
    assert (status, out) == (2, "")
    assert err == (
        "error: purify 'diff' needs a bundle with a diffusion prior, and this one has none: "
        "export it with --prior\n"
    )


def test_embed_with_a_prior(
    conditioned: Conditioned, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "embed",
        picture,
        "--bundle",
        str(conditioned.bundle.path),
        "--purify",
        "diff",
        "--seed",
        "5",
    ]
    status, out, _ = run(capsys, *words, "--steps", "2", "--step-size", "0.5")
    assert status == 0
    (expected,) = open_runtime(conditioned, DiffPurifier(2, 0.5, seed=5)).embed_images([picture])
    np.testing.assert_allclose(json.loads(out)["embedding"], expected, atol=1e-5)


def test_info_shows_the_prior(conditioned: Conditioned, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info", str(conditioned.bundle.path))
    assert status == 0
    shown = json.loads(out)["prior"]
    assert shown[0] == "prior.onnx, exact gradient, 1000 timesteps"
    assert any(line.startswith("gradient_max_rel_diff ") for line in shown)
    _, out, _ = run(capsys, "info", str(exported("vit").bundle.path))
    assert json.loads(out)["prior"].startswith("none")
