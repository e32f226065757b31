"""Label cache: stored labels are loaded unchanged, and damage to the file is detected."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from edgeclip import EdgeclipError, Label
from edgeclip.text.cache import (
    FILE,
    OLDER_FILES,
    CachedLabel,
    LabelCache,
    Share,
    embedding_identity,
    label_keys,
)
from tests.support.cached_labels import DIM, assert_equal, cached_labels, execute


@pytest.fixture(autouse=True)
def cache(cache: Path) -> Path:
    """Empty the cache, so that only the label cache writes to it."""
    shutil.rmtree(cache / "trials")
    return cache


@pytest.fixture
def stored(cache: Path) -> dict[bytes, CachedLabel]:
    """Store labels in the cache, and return them."""
    rows = cached_labels(0, 20)
    LabelCache().store("an encoder", rows)
    return rows


def test_stored_labels_are_loaded(cache: Path, stored: dict[bytes, CachedLabel]) -> None:
    assert_equal(LabelCache().load(list(stored), DIM), stored)
    overlapping = cached_labels(15, 10)
    assert LabelCache().load(list(overlapping), DIM).keys() == stored.keys() & overlapping.keys()
    LabelCache().store("an encoder", overlapping)
    assert_equal(LabelCache().load(list(stored | overlapping), DIM), stored | overlapping)
    assert [file.name for file in cache.iterdir()] == [FILE]


def test_reading_creates_no_file(cache: Path) -> None:
    assert LabelCache().load([b"key"], DIM) == {}
    assert LabelCache().shares() == []
    assert LabelCache().clear() == LabelCache().size() == 0
    assert list(cache.iterdir()) == []


def test_more_labels_than_one_query_takes(cache: Path) -> None:
    rows = cached_labels(0, 1203, 3)
    LabelCache().store("an encoder", rows)
    assert_equal(LabelCache().load(list(rows), 3), rows)


def test_keys_depend_on_encoder_templates_and_prompts() -> None:
    labels = [Label("a"), Label("b"), Label("a", ("a",)), Label("a", ("a", "b")), Label('["a"]')]
    keys = [
        key
        for encoder in ("x", "y")
        for templates in (["{}"], ["{}", "a {}"], ["{}a {}"])
        for key in label_keys(encoder, labels, templates)
    ]
    # Keys of labels with prompts do not depend on the templates.
    assert len(set(keys)) == 2 * (3 * 3 + 2)
    assert label_keys("x", labels[3:4], ["{}"]) == label_keys("x", labels[3:4], ["a {}"])
    renamed = [Label("another name", ("a", "b"))]
    assert label_keys("x", labels[3:4], ["{}"]) == label_keys("x", renamed, ["{}"])
    # Prompts that contain the name depend on it.
    filled = [Label(name, ("a {}",)) for name in ("cat", "dog")]
    assert len(set(label_keys("x", filled, ["{}"]))) == 2
    assert label_keys("x", filled[:1], ["{}"]) == label_keys("x", [Label("y", ("a cat",))], ["{}"])


def test_embedding_identity_depends_on_versions_and_hardware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Install versions as pip writes them, with either package of ONNX Runtime."""
    identities = {embedding_identity("x", "cpu")}
    for name in ("onnxruntime", "tokenizers", "ftfy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for folder in (
        "onnxruntime_gpu-1.2.0.dist-info",
        "tokenizers-0.1.dist-info",
        "ftfy-6.0.egg-info",
        "numpy-9.dist-info",
    ):
        (tmp_path / folder).mkdir()
        identities.add(embedding_identity("x", "cpu"))
    assert len(identities) == 4
    (tmp_path / "onnxruntime_gpu-1.2.0.dist-info").rename(tmp_path / "onnxruntime-1.3.0.dist-info")
    identities.add(embedding_identity("x", "cpu"))
    identities.add(embedding_identity("y", "cpu"))
    identities.add(embedding_identity("x", "cuda"))
    monkeypatch.setattr("edgeclip.text.cache.processor", lambda: "another processor")
    identities.add(embedding_identity("x", "cpu"))
    assert len(identities) == 8


def test_embedding_identity_has_the_installed_versions() -> None:
    import onnxruntime  # imported here, since it does not survive the fork of test_many_processes

    loaded = embedding_identity("x", "cpu")
    for name in ("tokenizers", "ftfy"):
        assert f"{name}-{importlib.metadata.version(name)}." in loaded
    assert f"-{onnxruntime.__version__}." in loaded


def test_shares_and_clearing(cache: Path, stored: dict[bytes, CachedLabel]) -> None:
    LabelCache().store("another", cached_labels(100, 5, 8))
    label_cache = LabelCache()
    assert label_cache.shares() == [
        Share("an encoder", 20, 20 * 4 * DIM),
        Share("another", 5, 5 * 4 * 8),
    ]
    size = (cache / FILE).stat().st_size
    assert label_cache.size() == label_cache.clear() == size
    assert list(cache.iterdir()) == []
    older = cache / OLDER_FILES[0]
    older.write_bytes(b"of an older edgeclip")
    LabelCache().store("an encoder", stored)
    assert older.read_bytes() == b"of an older edgeclip"
    assert label_cache.clear() == size + len(b"of an older edgeclip")
    assert list(cache.iterdir()) == []
    LabelCache().store("an encoder", stored)
    assert_equal(LabelCache().load(list(stored), DIM), stored)


@pytest.mark.parametrize("damage", ["nothing", "garbage", "truncated", "middle"])
def test_damaged_file_is_replaced(
    cache: Path, stored: dict[bytes, CachedLabel], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = cache / FILE
    data = bytearray(path.read_bytes())
    if damage == "middle":
        data[1000:-100] = os.urandom(len(data) - 1100)
    path.write_bytes(
        {"nothing": b"", "garbage": b"no database" * 999, "truncated": data[: len(data) // 2]}.get(
            damage, data
        )
    )
    label_cache = LabelCache()
    loaded = label_cache.load(list(stored), DIM)
    assert_equal(loaded, {key: stored[key] for key in loaded})  # loaded labels are right
    assert len(loaded) < len(stored)
    assert ("damaged" in caplog.text) == (damage != "nothing")
    for _ in range(2):  # the first may only detect more damage
        label_cache.store("an encoder", stored)
    caplog.clear()
    assert_equal(LabelCache().load(list(stored), DIM), stored)
    assert caplog.text == ""


def test_flipped_bits_never_give_wrong_labels(
    cache: Path, stored: dict[bytes, CachedLabel], rng: np.random.Generator
) -> None:
    path = cache / FILE
    intact = path.read_bytes()
    for position in rng.integers(0, len(intact), 200):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        loaded = LabelCache().load(list(stored), DIM)
        assert_equal(loaded, {key: stored[key] for key in loaded.keys() & stored.keys()})


@pytest.mark.parametrize(
    "vector",
    [
        np.full(DIM, np.nan, np.float32).tobytes(),
        np.ones(DIM - 1, np.float32).tobytes(),
        b"",
        "a text",
    ],
)
def test_invalid_vector_with_a_valid_checksum_is_encoded_again(
    cache: Path, stored: dict[bytes, CachedLabel], vector: object, caplog: pytest.LogCaptureFixture
) -> None:
    key = next(iter(stored))
    digest, cut = stored[key].tokens
    data = vector if isinstance(vector, bytes) else b""
    crc = zlib.crc32(key + digest + str(int(cut)).encode() + data)
    execute(cache, "UPDATE labels SET vector = ?, crc = ? WHERE key = ?", vector, crc, key)
    assert_encoded_again(key, stored, caplog)


@pytest.mark.parametrize(
    ("column", "value"),
    [("tokens", b""), ("tokens", "a text"), ("cut", 3), ("cut", "a text"), ("cut", b"0")],
)
def test_invalid_tokens_with_a_valid_checksum_are_encoded_again(
    cache: Path,
    stored: dict[bytes, CachedLabel],
    column: str,
    value: object,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key = next(iter(stored))
    digest, cut = stored[key].tokens
    digest = value if column == "tokens" and isinstance(value, bytes) else digest
    cut = value if isinstance(value, int) else int(cut)
    crc = zlib.crc32(key + digest + str(cut).encode() + stored[key].vector.tobytes())
    execute(cache, f"UPDATE labels SET {column} = ?, crc = ? WHERE key = ?", value, crc, key)
    assert_encoded_again(key, stored, caplog)


def assert_encoded_again(
    key: bytes, stored: dict[bytes, CachedLabel], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = LabelCache().load(list(stored), DIM)
    assert_equal(loaded, {k: label for k, label in stored.items() if k != key})
    assert "1 labels in it are damaged; encoding them again" in caplog.text
    LabelCache().store("an encoder", {key: stored[key]})
    assert_equal(LabelCache().load(list(stored), DIM), stored)


def test_labels_of_another_width_are_not_used(stored: dict[bytes, CachedLabel]) -> None:
    assert LabelCache().load(list(stored), DIM + 1) == {}


def test_unknown_file_is_not_changed(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    execute(cache, "CREATE TABLE labels (id INTEGER)")
    execute(cache, "PRAGMA user_version = 1")
    label_cache = LabelCache()
    label_cache.store("an encoder", cached_labels(0, 1))
    assert label_cache.load(list(cached_labels(0, 1)), DIM) == {}
    assert "cannot use" in caplog.text
    assert (cache / FILE).exists()
    with pytest.raises(EdgeclipError, match="cannot use"):
        label_cache.shares()
    assert label_cache.clear() > 0
    label_cache.store("an encoder", cached_labels(0, 1))
    assert_equal(label_cache.load(list(cached_labels(0, 1)), DIM), cached_labels(0, 1))


def test_least_recently_used_labels_are_evicted(cache: Path) -> None:
    label_cache = LabelCache(limit=1 << 20)
    now = int(time.time())
    for n in range(40):  # 41 kB each
        label_cache.store("an encoder", cached_labels(100 * n, 40, 256))
        old = now - 10_000_000 + n
        execute(cache, "UPDATE labels SET used = ? WHERE used > ?", old, now - 1000)
        label_cache.load(list(cached_labels(0, 40)), 256)  # the first labels are used most recently
        assert label_cache.size() <= 1 << 20
    assert_equal(label_cache.load(list(cached_labels(0, 40)), 256), cached_labels(0, 40, 256))
    assert_equal(label_cache.load(list(cached_labels(3900, 40)), 256), cached_labels(3900, 40, 256))
    assert label_cache.load(list(cached_labels(100, 40)), 256) == {}
    assert label_cache.size() > 1 << 19
    LabelCache(limit=1 << 18).store("an encoder", cached_labels(9999, 1, 256))
    assert label_cache.size() <= 1 << 18  # a lower limit shrinks the file


@pytest.mark.parametrize(
    ("text", "limit"), [("", 1 << 28), ("1000", 1000), ("3k", 3072), ("2G", 2 << 30), ("0", 0)]
)
def test_limit(monkeypatch: pytest.MonkeyPatch, text: str, limit: int) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE_SIZE", text)
    assert LabelCache().limit == limit


@pytest.mark.parametrize("text", ["much", "-1", "1.5G", "1T", "9" * 30, "K"])
def test_invalid_limits_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE_SIZE", text)
    with pytest.raises(EdgeclipError, match=r"EDGECLIP_CACHE_SIZE is .* expected bytes, such as"):
        LabelCache()


def test_no_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE_SIZE", "0")
    label_cache = LabelCache()
    label_cache.store("an encoder", cached_labels(0, 1))
    assert label_cache.load(list(cached_labels(0, 1)), DIM) == {}
    assert label_cache.path is None
    assert label_cache.size() == label_cache.clear() == 0
    assert list(cache.iterdir()) == []
