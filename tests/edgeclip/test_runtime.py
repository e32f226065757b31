"""Runtime: answers against NumPy, alone, in batches, from threads."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import edgeclip
from edgeclip import CosPurifier, ImageError, LabelError, Prediction, Runtime
from edgeclip.backends.onnx_runtime import available_devices
from tests.support.paths import EXAMPLES, ROOT


def test_examples_are_named_rightly(rt: Runtime, labels: list[str]) -> None:
    files = sorted([*EXAMPLES.glob("*.png"), *EXAMPLES.glob("*.jpg")])
    assert len(files) == 13
    first = 0
    for file, answer in zip(files, rt.classify(files, labels), strict=True):
        name = file.stem.removeprefix("coloured-")
        ranked = [prediction.label.replace(" ", "-") for prediction in answer]
        assert name in ranked[:2], file
        first += ranked[0] == name
    assert first >= 11  # of a model that is right on five in six


def test_attacked_examples_keep_their_answer_in_sight(rt: Runtime, labels: list[str]) -> None:
    # examples/make_attacked.py attacked this model's weights.
    dress, boot = rt.classify(
        [EXAMPLES / "attacked" / f"{n}.png" for n in ("dress", "ankle-boot")], labels
    )
    assert dress[0].label == "dress"
    assert dress[0].score > 0.9
    assert "ankle boot" in [prediction.label for prediction in boot[:2]]


def test_embedded_bundle_tells_its_robustness(rt: Runtime) -> None:
    # The same figures as in the file that train.evaluate wrote for these weights.
    row = rt.bundle.manifest.robustness[0]
    assert rt.bundle.manifest.purification is None
    results = ROOT / "docs" / "results" / "robust-autoattack-8.json"
    found = json.loads(results.read_text())
    weights = rt.bundle.manifest.source["weights_sha256"]
    assert found["settings"]["weights_sha256"] == weights
    assert (row.norm, row.eps, row.steps) == ("linf", 8 / 255, 100)
    assert row.samples == found["finished"] == 1000
    assert (row.attacks, row.purification) == (("autoattack",), "none")
    assert row.clean_accuracy == found["clean_accuracy"] >= 0.8
    assert row.worst_case_accuracy == found["worst_case_accuracy"] >= 0.65


def test_accuracy_on_test_images(
    rt: Runtime, labels: list[str], fashion: tuple[np.ndarray, np.ndarray]
) -> None:
    images, truth = fashion
    answers = rt.classify(list(images), labels, top_k=1)
    right = np.mean([answer[0].index == y for answer, y in zip(answers, truth, strict=True)])
    assert right >= 0.82  # `make accuracy` measures all 10,000


def test_labels_may_be_worded_freely(rt: Runtime, fashion: tuple[np.ndarray, np.ndarray]) -> None:
    words = ["tee", "pants", "sweater", "gown", "jacket", "sandals", "blouse", "trainer"]
    words += ["handbag", "boot"]
    images, truth = fashion
    answers = rt.classify(list(images), words, top_k=1)
    right = np.mean([answer[0].index == y for answer, y in zip(answers, truth, strict=True)])
    assert right >= 0.75


def reference(
    rt: Runtime, images: list[np.ndarray], labels: list[str], purifier: CosPurifier | None
) -> np.ndarray:
    """Compute softmax scores (N, K) in float64 from the published equations."""
    null_text = rt.bundle.null_text.astype(np.float64)
    scores = []
    for u in rt.encode(rt.preprocess(images)).astype(np.float64):
        for _ in range(purifier.steps if purifier else 0):
            cosine = u @ null_text
            tangent = (null_text - cosine * u) / np.sqrt(1 - cosine**2)
            u = (u + purifier.step_size * tangent) / np.hypot(1, purifier.step_size)
        logits = rt.bundle.manifest.logit_scale * rt.labels(labels).embeddings @ u
        weights = np.exp(logits - logits.max())
        scores.append(weights / weights.sum())
    return np.array(scores)


@pytest.mark.parametrize("purifier", [None, CosPurifier(), CosPurifier(9), CosPurifier(3, 0.1)])
def test_scores_equal_numpy(
    rt: Runtime,
    labels: list[str],
    fashion: tuple[np.ndarray, np.ndarray],
    purifier: CosPurifier | None,
) -> None:
    images = list(fashion[0][:33])
    expected = reference(rt, images, labels, purifier)
    answers = Runtime("garments", purify=purifier, precision="fp32").classify(
        images, labels, top_k=3
    )
    for answer, row in zip(answers, expected, strict=True):
        assert [p.index for p in answer] == list(np.argsort(-row)[:3])
        assert [p.label for p in answer] == [labels[p.index] for p in answer]
        # An image 88 degrees from the null text lands beside it, where directions are ill-conditioned.
        np.testing.assert_allclose([p.score for p in answer], np.sort(row)[::-1][:3], atol=1e-3)


@pytest.mark.parametrize("purifier", [None, CosPurifier(9), CosPurifier(3, 0.1)])
def test_score_tables_equal_numpy(
    rt: Runtime,
    labels: list[str],
    fashion: tuple[np.ndarray, np.ndarray],
    purifier: CosPurifier | None,
) -> None:
    images = list(fashion[0][:5])
    expected = reference(rt, images, labels, purifier)
    runtime = Runtime("garments", purify=purifier, precision="fp32", labels=labels, batch_size=2)
    table = runtime.scores(images)
    assert (table.dtype, table.shape) == (np.float32, (5, len(labels)))
    np.testing.assert_allclose(table, expected, atol=1e-3)
    np.testing.assert_array_equal(runtime.pixel_scores(runtime.preprocess(images)), table)
    # Columns follow the labels, whatever their number and order.
    swapped = reference(rt, images, labels[::-1], purifier)
    np.testing.assert_allclose(runtime.scores(images, labels[::-1]), swapped, atol=1e-3)
    assert runtime.scores(images[0]).shape == (1, len(labels))
    assert runtime.scores([], ["a", "b", "c"]).shape == (0, 3)
    np.testing.assert_array_equal(runtime.scores(images, ["one"]), np.ones((5, 1)))


def test_score_tables_are_what_classify_ranks(
    rt: Runtime, fashion: tuple[np.ndarray, np.ndarray]
) -> None:
    many = edgeclip.LabelSet.random(1000, rt.bundle.null_text, rt.text_identity())
    images = list(fashion[0][:3])
    for row, answer in zip(rt.scores(images, many), rt.classify(images, many), strict=True):
        assert [p.score for p in answer] == [float(row[p.index]) for p in answer]
        assert row.max() == answer[0].score


def test_random_label_sets(rt: Runtime) -> None:
    null_text = rt.bundle.null_text
    found = edgeclip.LabelSet.random(7, null_text, "mine", seed=3)
    rows = np.random.default_rng(3).standard_normal((7, len(null_text)), np.float32)
    expected = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(found.embeddings, expected, atol=1e-6)
    np.testing.assert_allclose(found.null_scores, expected @ null_text, atol=1e-6)
    assert found.embeddings.dtype == found.null_scores.dtype == np.float32
    assert (len(set(found.names)), found.encoder) == (7, "mine")


def test_label_embeddings_are_means_over_templates(rt: Runtime) -> None:
    found = rt.labels(["coat", "bag"], ["a {}.", "my {}"])
    rows = rt.embed_texts(["a coat.", "my coat", "a bag.", "my bag"]).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    means = rows.reshape(2, 2, -1).mean(1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(found.embeddings, means, atol=1e-6)
    np.testing.assert_allclose(found.null_scores, means @ rt.bundle.null_text, atol=1e-6)


def test_custom_prompts_replace_templates(rt: Runtime) -> None:
    labels = [edgeclip.Label("x", ("a coat.", "my coat")), edgeclip.Label("bag")]
    found = rt.labels(labels, ["a {}.", "my {}"])
    expected = rt.labels(["coat", "bag"], ["a {}.", "my {}"])
    assert found.names == ("x", "bag")
    np.testing.assert_allclose(found.embeddings, expected.embeddings, atol=1e-6)


def test_one_image_many_images_and_every_source(rt: Runtime, labels: list[str]) -> None:
    path = EXAMPLES / "bag.png"
    answer = rt.classify(path, labels)
    assert isinstance(answer[0], Prediction)
    assert len(answer) == 5
    assert rt.classify([path, path.read_bytes()], labels) == [answer, answer]
    assert rt.classify([], labels) == []
    assert len(rt.classify(path, labels, top_k=100)) == len(labels)


def test_pixels_are_classified_as_their_images(
    labels: list[str], fashion: tuple[np.ndarray, np.ndarray]
) -> None:
    runtime = Runtime("garments", purify=CosPurifier(2, 0.3), labels=labels, batch_size=4)
    images = list(fashion[0][:9])
    pixels = runtime.preprocess(images)
    assert runtime.classify_pixels(pixels, top_k=3) == runtime.classify(images, top_k=3)
    assert runtime.classify_pixels(pixels[:0]) == []
    with pytest.raises(ValueError, match="top_k"):
        runtime.classify_pixels(pixels, top_k=0)


def test_same_answer_alone_and_in_a_batch(
    labels: list[str], fashion: tuple[np.ndarray, np.ndarray]
) -> None:
    images = list(fashion[0][:33])
    alone = Runtime("garments", batch_size=1, purify="cos").embed_images(images)
    together = Runtime("garments", batch_size=33, purify="cos").embed_images(images)
    np.testing.assert_allclose(alone, together, atol=1e-6)
    one = Runtime("garments", batch_size=1).classify(images, labels)
    many = Runtime("garments", batch_size=8).classify(images, labels)
    for a, b in zip(one, many, strict=True):
        assert [p.index for p in a] == [p.index for p in b]
        np.testing.assert_allclose([p.score for p in a], [p.score for p in b], atol=1e-5)


def test_one_runtime_in_many_threads(
    labels: list[str], fashion: tuple[np.ndarray, np.ndarray]
) -> None:
    shared = Runtime("garments")
    images = list(fashion[0][:64])
    expected = [shared.classify(image, labels) for image in images]
    fresh = Runtime("garments")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda image: fresh.classify(image, labels), images))
    assert found == expected


def test_classify_each_goes_on_after_a_bad_image(rt: Runtime, labels: list[str]) -> None:
    good, bad = EXAMPLES / "bag.png", EXAMPLES / "none.png"
    answers = list(rt.classify_each([bad, *[good] * 9, bad, good], labels))
    assert [isinstance(answer, ImageError) for answer in answers] == [1, *[0] * 9, 1, 0]
    assert all(a[0].label == "bag" for a in answers if not isinstance(a, ImageError))
    assert [isinstance(a, ImageError) for a in rt.classify_each([bad] * 20, labels)] == [True] * 20
    rows = list(rt.embed_each([bad, good]))
    assert isinstance(rows[0], ImageError)
    np.testing.assert_allclose(rows[1], rt.embed_images(good)[0], atol=1e-6)
    with pytest.raises(ImageError, match="no such file"):
        rt.classify([good, bad], labels)


def test_classify_each_reads_no_further_than_it_must(rt: Runtime, labels: list[str]) -> None:
    read = []

    def images():  # type: ignore[no-untyped-def]
        while True:
            read.append(1)
            yield EXAMPLES / "bag.png"

    next(rt.classify_each(images(), labels))
    assert rt.batch_size <= len(read) <= 2 * rt.batch_size


def test_many_labels_and_one(rt: Runtime) -> None:
    seen: list[tuple[int, int]] = []
    many = rt.labels(
        [f"thing number {i}" for i in range(300)], ["{}"], progress=lambda *x: seen.append(x)
    )
    assert len(many) == 300
    assert seen[-1] == (300, 300)
    assert len(rt.classify(EXAMPLES / "bag.png", many, top_k=300)) == 300
    assert rt.classify(EXAMPLES / "bag.png", ["bag"]) == [Prediction("bag", 1.0, 0)]


def test_label_set_belongs_to_its_bundle(rt: Runtime, labels: list[str], tmp_path: Path) -> None:
    mine = rt.labels(labels)
    assert rt.labels(mine) is mine
    with pytest.raises(ValueError, match="has its prompts already"):
        rt.labels(mine, ["a {}"])
    foreign = dataclasses.replace(mine, encoder="another")
    with pytest.raises(ValueError, match="was made with another bundle"):
        rt.classify(EXAMPLES / "bag.png", foreign)
    with pytest.raises(ValueError, match="expected as many rows as names"):
        dataclasses.replace(mine, names=("one",))
    with pytest.raises(ValueError, match="read-only"):
        mine.embeddings[0] = 0


def test_failing_encoder_is_a_device_error(rt: Runtime) -> None:
    with pytest.raises(edgeclip.DeviceError, match=r"image_encoder\.fp32\.onnx failed on cpu"):
        rt.encode(np.zeros((1, 3, 5, 5), np.float32))


def test_default_labels() -> None:
    rt = Runtime("garments", labels=["bag", "coat"])
    assert rt.classify(EXAMPLES / "bag.png")[0].label == "bag"
    with pytest.raises(ValueError, match="no labels"):
        Runtime("garments").classify(EXAMPLES / "bag.png")


def test_bad_options(rt: Runtime, labels: list[str]) -> None:
    with pytest.raises(edgeclip.DeviceError, match="tensorrt"):
        Runtime("garments", device="tensorrt")
    if "cuda" not in available_devices():
        with pytest.raises(edgeclip.DeviceError, match="CUDAExecutionProvider"):
            Runtime("garments", device="cuda")
    with pytest.raises(edgeclip.DeviceError, match="has no fp16 encoders; it has fp32, int8"):
        Runtime("garments", precision="fp16")
    with pytest.raises(ValueError, match="device must be"):
        Runtime("garments", device="tpu")
    with pytest.raises(ValueError, match="batch_size"):
        Runtime("garments", batch_size=0)
    with pytest.raises(LabelError, match="there twice"):
        rt.classify(EXAMPLES / "bag.png", ["a", "a"])
    for method in (rt.embed_texts, rt.tokenize, rt.preprocess):
        with pytest.raises(TypeError, match="takes a list, got one str"):
            method("a coat")
    with pytest.raises(TypeError, match="takes a list, got one str"):
        next(rt.classify_each("a.png", labels))
    for bad in (None, 1.5, 0):
        with pytest.raises(ValueError, match="top_k must be a whole number from 1"):
            rt.classify(EXAMPLES / "bag.png", labels, top_k=bad)
    with pytest.raises(TypeError, match="labels must be names or Label objects"):
        rt.labels([1, 2])
    with pytest.raises(TypeError, match="must be a list of templates"):
        rt.labels(["bag"], "a {}")


def test_the_library_logs_nothing_about_the_embedded_bundle(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        Runtime("garments")
    assert caplog.text == ""


def test_import_loads_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys, edgeclip; heavy = {'torch', 'onnxruntime', 'open_clip', 'tokenizers', 'PIL'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_classifying_never_loads_torch(tmp_path: Path) -> None:
    code = (
        "import sys, edgeclip; sys.modules['torch'] = None;"
        f"print(edgeclip.Runtime('garments').classify({str(EXAMPLES / 'bag.png')!r}, ['bag', 'coat'])[0].label)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "bag\n"
