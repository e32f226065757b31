"""Text tower: batches do not change embeddings, labels are encoded once, memory is released."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from edgeclip import EdgeclipError, Label, LabelError, Runtime
from edgeclip.backends.golden_values import GoldenValues
from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.bundle import Bundle
from edgeclip.text import tower
from edgeclip.text.cache import FILE, LabelCache
from tests.support.paths import EXAMPLES, GARMENTS

TEMPLATES = ["a {}.", "a very long way to say that there is a {} in this picture.", "{}"]


@pytest.fixture
def run_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of prompts in each run of a text encoder."""
    runs: list[int] = []
    open_encoder = tower.OnnxEncoder

    def open_recorded(*args: object, **options: object) -> object:
        encoder = open_encoder(*args, **options)
        embed = encoder.embed
        encoder.embed = lambda ids: (runs.append(len(ids)), embed(ids))[1]
        return encoder

    monkeypatch.setattr(tower, "OnnxEncoder", open_recorded)
    return runs


def embed_one_by_one(rt: Runtime, texts: list[str]) -> np.ndarray:
    return np.concatenate([rt.embed_texts([one]) for one in texts])


def test_batches_do_not_change_embeddings(rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [template.format(n) for n in ("bag", "ankle boot", "bag") for template in TEMPLATES]
    expected = embed_one_by_one(rt, texts)
    for tokens in (1, 20, 10_000):
        monkeypatch.setattr(tower, "RUN_TOKENS", tokens)
        np.testing.assert_allclose(rt.embed_texts(texts), expected, atol=1e-6)
    assert rt.embed_texts([]).shape == (0, 128)


def test_runs_are_bounded_and_equal_prompts_encoded_once(run_sizes: list[int]) -> None:
    rt = Runtime("garments")
    texts = [f"thing {i}" for i in range(2000)]
    steps: list[tuple[int, int]] = []
    actual = rt.embed_texts([*texts, *texts, "THING 7"], progress=lambda *x: steps.append(x))
    assert sum(run_sizes) == 2000
    longest = rt.tokenize(texts).shape[1]
    assert max(run_sizes) * longest <= tower.RUN_TOKENS * 1.5  # a run has prompts of one length
    assert min(run_sizes[:-1]) * longest >= tower.RUN_TOKENS / 2
    assert [total for _, total in steps] == [4001] * len(run_sizes)
    assert steps[-1] == (4001, 4001)
    np.testing.assert_array_equal(actual[:2000], actual[2000:4000])
    np.testing.assert_array_equal(actual[4000], actual[7])


def test_only_new_labels_are_encoded(
    labels: list[str], run_sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Runtime("garments").labels(labels, TEMPLATES)
    assert sum(run_sizes) == len(labels) * len(TEMPLATES)
    run_sizes.clear()
    second = Runtime("garments")
    actual = second.labels(labels, TEMPLATES)
    np.testing.assert_array_equal(actual.embeddings, first.embeddings)
    assert second.labels(labels, TEMPLATES) is actual
    assert run_sizes == []
    more = Runtime("garments").labels(["something new", *reversed(labels)], TEMPLATES)
    assert sum(run_sizes) == len(TEMPLATES)
    assert more.names == ("something new", *reversed(labels))
    np.testing.assert_array_equal(more.embeddings[1:], first.embeddings[::-1])
    np.testing.assert_allclose(
        more.null_scores, more.embeddings @ second.bundle.null_text, atol=1e-6
    )
    run_sizes.clear()
    Runtime("garments").labels([Label("bag", ("a bag.",))])
    assert sum(run_sizes) == 1
    monkeypatch.setenv("EDGECLIP_CACHE_SIZE", "0")
    Runtime("garments").labels(["bag"], TEMPLATES)
    assert sum(run_sizes) == 1 + len(TEMPLATES)


@pytest.fixture
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after whose call no tokenizer can be loaded."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the tokenizer was loaded")

    return lambda: monkeypatch.setattr(tower, "Tokenizer", refuse)


def test_labels_that_are_the_same_tokens(
    cache: Path, run_sizes: list[int], no_tokenizer: Callable[[], None]
) -> None:
    """Expect an error before any encoding, with none, one and both labels in the cache."""
    rt = Runtime("garments")
    pairs = (("Trousers", "trousers"), ("caf\u00e9", "cafe\u0301"), ("a  b", "a b"))
    for a, b in pairs:
        with pytest.raises(LabelError, match=f"{a!r} and {b!r} cannot be told apart"):
            rt.labels(["bag", a, b])
    assert run_sizes == []
    for a, _ in pairs:
        rt.labels([a])
    run_sizes.clear()
    for a, b in pairs:
        with pytest.raises(LabelError, match=f"{a!r} and {b!r} cannot be told apart"):
            rt.labels([a, b])
    assert run_sizes == []
    for _, b in pairs:  # one of them alone is valid
        assert rt.labels([b]).names == (b,)
    no_tokenizer()
    for a, b in pairs:
        with pytest.raises(LabelError, match=f"{a!r} and {b!r} cannot be told apart"):
            Runtime("garments").labels([a, b])
        with pytest.raises(LabelError, match="cannot be told apart"):
            Runtime("garments", labels=[a, b])


def test_prompts_of_a_label_may_contain_its_name(rt: Runtime) -> None:
    prompted = [Label(name, ("a sketch of a {}",)) for name in ("bag", "dress")]
    expected = rt.labels(["bag", "dress"], ["a sketch of a {}"])
    np.testing.assert_array_equal(rt.labels(prompted).embeddings, expected.embeddings)


def test_cut_prompts_are_logged_whether_cached_or_not(
    caplog: pytest.LogCaptureFixture, no_tokenizer: Callable[[], None]
) -> None:
    length = Runtime("garments").bundle.manifest.text.context_length
    long, template = "bag " * length, "a " * length + "{}"
    with pytest.raises(LabelError, match=f"it reads {length} tokens, and they differ only after"):
        Runtime("garments").labels(["dress", "bag"], [template])
    messages = []
    for _ in range(2):
        rt = Runtime("garments")
        caplog.clear()
        rt.labels(["dress", long], ["{}", "a {}."])
        rt.labels(["dress"], [template])
        rt.labels(["dress"], [template])  # in memory
        rt.labels(["dress"])
        messages.append(caplog.messages)
        no_tokenizer()
    assert messages[0] == messages[1]
    label_warning, template_warning = messages[0]
    assert label_warning.startswith("label 'bag bag")
    assert (
        f"longer than the {length} tokens that the model reads, and its end is cut" in label_warning
    )
    assert template_warning.startswith("label 'dress': ")
    assert "the label itself is cut off: shorten the template" in template_warning


def test_labels_are_cached_for_each_processor_and_device(
    labels: list[str], run_sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check also that a LabelSet can be used with any Runtime that has the same encoder."""
    first = Runtime("garments")
    label_set = first.labels(labels)
    run_sizes.clear()
    monkeypatch.setattr("edgeclip.text.cache.processor", lambda: "another processor")
    other = Runtime("garments")
    np.testing.assert_allclose(other.labels(labels).embeddings, label_set.embeddings, atol=1e-6)
    assert sum(run_sizes) == len(labels) * len(first.bundle.manifest.templates)
    assert other.text_identity() == first.text_identity()
    assert other.labels(label_set) is label_set
    towers = [tower.TextTower(Bundle("garments"), "int8", device=name) for name in ("cpu", "cuda")]
    assert towers[0].identity == towers[1].identity
    towers[0].labels(labels)
    with pytest.raises(EdgeclipError, match="cuda"):  # no device of these tests
        towers[1].labels(labels)


def test_another_encoder_has_other_labels(tmp_path: Path, labels: list[str]) -> None:
    rt = Runtime("garments")
    rt.labels(labels)
    other = Path(shutil.copytree(GARMENTS, tmp_path / "bundle"))
    manifest = other / "manifest.json"
    changed = manifest.read_text().replace('"clean": "lower"', '"clean": "whitespace"')
    assert changed != manifest.read_text()
    manifest.write_text(changed)
    Runtime(other).labels(labels)
    assert Runtime(other).text_identity() != rt.text_identity()
    assert sum(share.labels for share in LabelCache().shares()) == 2 * len(labels)


def test_damaged_label_is_encoded_again(
    cache: Path, labels: list[str], run_sizes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first = Runtime("garments").labels(labels)
    db = sqlite3.connect(cache / FILE)
    with db:
        db.execute("UPDATE labels SET vector = zeroblob(512) WHERE rowid = 3")
    db.close()
    run_sizes.clear()
    with caplog.at_level(logging.WARNING):
        actual = Runtime("garments").labels(labels)
    np.testing.assert_allclose(actual.embeddings, first.embeddings, atol=1e-6)
    assert run_sizes == [len(Runtime("garments").bundle.manifest.templates)]
    assert "1 labels in it are damaged; encoding them again" in caplog.text
    (cache / FILE).write_bytes(b"spoilt")
    np.testing.assert_allclose(
        Runtime("garments").labels(labels).embeddings, first.embeddings, atol=1e-6
    )
    run_sizes.clear()
    Runtime("garments").labels(labels)
    assert run_sizes == []


def test_interrupted_encoding_keeps_finished_labels(
    run_sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower, "BLOCK_PROMPTS", 20)
    names = [f"thing {i}" for i in range(100)]
    steps: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        steps.append((done, total))
        if done >= 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runtime("garments").labels(names, ["{}"], progress=interrupt)
    assert steps == [(20, 100), (40, 100), (60, 100)]
    run_sizes.clear()
    steps.clear()
    assert (
        len(Runtime("garments").labels(names, ["{}"], progress=lambda *x: steps.append(x))) == 100
    )
    assert sum(run_sizes) == 60
    assert steps[-1] == (60, 60)


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[object]]:
    """Record the text encoders that were opened."""
    opened: list[weakref.ref[object]] = []
    open_encoder = tower.OnnxEncoder

    def open_recorded(*args: object, **options: object) -> object:
        encoder = open_encoder(*args, **options)
        opened.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(tower, "OnnxEncoder", open_recorded)
    return opened


def test_labels_release_the_encoder(encoders: list[weakref.ref[object]]) -> None:
    rt = Runtime("garments")
    rt.labels(["bag"])
    assert [ref() for ref in encoders] == [None]
    rt.labels(["bag", "coat"])
    assert [ref() for ref in encoders] == [None, None]
    rt.embed_texts(["a coat"])
    rt.labels(["dress"])
    rt.tokenize(["a coat"])
    assert [ref() is not None for ref in encoders] == [False, False, True]
    rt.release_text()
    assert encoders[2]() is None
    rt.load_text()
    rt.labels(["shirt"])
    rt.labels(["gown"])
    assert [ref() is not None for ref in encoders] == [False, False, False, True]
    assert rt.labels(["shirt", "gown"]).names == ("shirt", "gown")


def test_memory_is_trimmed_after_the_encoder_is_freed(
    encoders: list[weakref.ref[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rt = Runtime("garments")
    living: list[object] = []
    monkeypatch.setattr(tower, "trim_memory", lambda: living.append(encoders[0]()))
    rt.labels(["bag"])
    assert living == [None]


def test_encoder_is_released_after_a_failure(encoders: list[weakref.ref[object]]) -> None:
    rt = Runtime("garments")

    def fail(*_: int) -> None:
        raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError):
        rt.labels(["bag"], progress=fail)
    assert encoders[0]() is None
    assert len(rt.labels(["bag"])) == 1


def test_release_waits_for_running_calls(encoders: list[weakref.ref[object]]) -> None:
    rt = Runtime("garments")
    encoding, go_on = threading.Event(), threading.Event()

    def wait(*_: int) -> None:
        encoding.set()
        assert go_on.wait(30)

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(rt.labels, ["bag"], progress=wait)
        assert encoding.wait(30)
        rt.labels(["coat"])
        rt.release_text()
        assert len(encoders) == 1  # one encoder for both
        assert encoders[0]() is not None
        go_on.set()
        slow.result()
    assert encoders[0]() is None


def test_text_from_many_threads(labels: list[str]) -> None:
    expected = Runtime("garments").embed_texts([f"a {name}." for name in labels])
    rt = Runtime("garments")

    def turn(i: int) -> None:
        name = labels[i % len(labels)]
        actual = rt.labels([name, f"new {i}"], ["a {}."]).embeddings[0]
        np.testing.assert_allclose(actual, expected[i % len(labels)], atol=1e-6)
        np.testing.assert_allclose(rt.embed_texts([f"a {name}."])[0], actual, atol=1e-6)
        rt.release_text()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(turn, range(40)))


def test_labels_in_memory_do_not_wait_for_new_ones(labels: list[str]) -> None:
    rt = Runtime("garments", labels=labels)
    encoding, go_on = threading.Event(), threading.Event()

    def wait(*_: int) -> None:
        encoding.set()
        assert go_on.wait(30)

    with ThreadPoolExecutor(1) as pool:
        new = pool.submit(rt.labels, ["something new"], progress=wait)
        assert encoding.wait(30)
        assert (
            rt.classify(EXAMPLES / "bag.png", labels)[0].label == "bag"
        )  # while the other call waits
        assert not new.done()
        go_on.set()
        assert len(new.result()) == 1


@pytest.mark.parametrize("name", ["everyday", "garments"])
def test_weights_that_stay_int8_give_the_same_embeddings(name: str) -> None:
    bundle = Bundle(name)
    ids = GoldenValues(bundle).ids
    for precision in bundle.manifest.precisions:
        path = bundle.encoder("text_encoder", precision)
        both = [OnnxEncoder(path, device="cpu", expand=x).embed(ids) for x in (True, False)]
        np.testing.assert_allclose(both[1], both[0], rtol=1e-4, atol=1e-5 * abs(both[0]).max())


def test_invalid_cache_size_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE_SIZE", "lots")
    with pytest.raises(EdgeclipError, match="EDGECLIP_CACHE_SIZE is 'lots'"):
        Runtime("garments")
