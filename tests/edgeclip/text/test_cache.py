"""The label cache: what is stored comes back, whatever happens to its file."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
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
from edgeclip.text.label_tokens import DIGEST_SIZE, Cut, LabelTokens
from tests.support.paths import ROOT

DIM = 64


@pytest.fixture(autouse=True)
def cache(cache: Path) -> Path:
    """A cache that is empty: all that is in it is the label cache's."""
    shutil.rmtree(cache / "trials")
    return cache


def vectors(first: int, count: int, dim: int = DIM) -> dict[bytes, CachedLabel]:
    """Keys and the labels that belong to them, the same in every process."""
    rows = {n: np.random.default_rng(n).standard_normal(dim) for n in range(first, first + count)}
    return {
        n.to_bytes(32, "big"): CachedLabel(
            row.astype(np.float32), LabelTokens(n.to_bytes(DIGEST_SIZE, "little"), Cut(n % 3))
        )
        for n, row in rows.items()
    }


def assert_equal(found: dict[bytes, CachedLabel], expected: dict[bytes, CachedLabel]) -> None:
    assert found.keys() == expected.keys()
    for key, label in found.items():
        assert label.vector.dtype == np.float32
        np.testing.assert_array_equal(label.vector, expected[key].vector)
        assert label.tokens == expected[key].tokens


def change(cache: Path, statement: str, *values: object) -> None:
    db = sqlite3.connect(cache / FILE)
    with db:
        db.execute(statement, values)
    db.close()


@pytest.fixture
def kept(cache: Path) -> dict[bytes, CachedLabel]:
    """Some vectors, which are in the cache."""
    rows = vectors(0, 20)
    LabelCache().store("an encoder", rows)
    return rows


def test_what_was_stored_comes_back(cache: Path, kept: dict[bytes, CachedLabel]) -> None:
    assert_equal(LabelCache().load(list(kept), DIM), kept)
    some = vectors(15, 10)
    assert LabelCache().load(list(some), DIM).keys() == kept.keys() & some.keys()
    LabelCache().store("an encoder", some)
    assert_equal(LabelCache().load(list(kept | some), DIM), kept | some)
    assert [file.name for file in cache.iterdir()] == [FILE]


def test_reading_makes_no_file(cache: Path) -> None:
    assert LabelCache().load([b"key"], DIM) == {}
    assert LabelCache().shares() == []
    assert LabelCache().clear() == LabelCache().size() == 0
    assert list(cache.iterdir()) == []


def test_more_labels_than_one_query_takes(cache: Path) -> None:
    rows = vectors(0, 1203, 3)
    LabelCache().store("an encoder", rows)
    assert_equal(LabelCache().load(list(rows), 3), rows)


def test_keys_tell_everything_apart() -> None:
    labels = [Label("a"), Label("b"), Label("a", ("a",)), Label("a", ("a", "b")), Label('["a"]')]
    keys = [
        key
        for encoder in ("x", "y")
        for templates in (["{}"], ["{}", "a {}"], ["{}a {}"])
        for key in label_keys(encoder, labels, templates)
    ]
    # Prompts of their own do not depend on the templates.
    assert len(set(keys)) == 2 * (3 * 3 + 2)
    assert label_keys("x", labels[3:4], ["{}"]) == label_keys("x", labels[3:4], ["a {}"])
    renamed = [Label("another name", ("a", "b"))]
    assert label_keys("x", labels[3:4], ["{}"]) == label_keys("x", renamed, ["{}"])
    # Unless they hold the name.
    filled = [Label(name, ("a {}",)) for name in ("cat", "dog")]
    assert len(set(label_keys("x", filled, ["{}"]))) == 2
    assert label_keys("x", filled[:1], ["{}"]) == label_keys("x", [Label("y", ("a cat",))], ["{}"])


def test_embedding_identity_has_all_that_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions as pip writes them: of whichever package of ONNX Runtime is installed."""
    seen = {embedding_identity("x", "cpu")}
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
        seen.add(embedding_identity("x", "cpu"))
    assert len(seen) == 4
    (tmp_path / "onnxruntime_gpu-1.2.0.dist-info").rename(tmp_path / "onnxruntime-1.3.0.dist-info")
    seen.add(embedding_identity("x", "cpu"))
    seen.add(embedding_identity("y", "cpu"))
    seen.add(embedding_identity("x", "cuda"))
    monkeypatch.setattr("edgeclip.text.cache.processor", lambda: "another processor")
    seen.add(embedding_identity("x", "cpu"))
    assert len(seen) == 8


def test_embedding_identity_has_the_versions_that_are_installed() -> None:
    import onnxruntime  # here: test_many_processes forks, which it does not survive

    found = embedding_identity("x", "cpu")
    for name in ("tokenizers", "ftfy"):
        assert f"{name}-{importlib.metadata.version(name)}." in found
    assert f"-{onnxruntime.__version__}." in found


def test_shares_and_clearing(cache: Path, kept: dict[bytes, CachedLabel]) -> None:
    LabelCache().store("another", vectors(100, 5, 8))
    mine = LabelCache()
    assert mine.shares() == [Share("an encoder", 20, 20 * 4 * DIM), Share("another", 5, 5 * 4 * 8)]
    size = (cache / FILE).stat().st_size
    assert mine.size() == mine.clear() == size
    assert list(cache.iterdir()) == []
    older = cache / OLDER_FILES[0]
    older.write_bytes(b"of an older edgeclip")
    LabelCache().store("an encoder", kept)
    assert older.read_bytes() == b"of an older edgeclip"
    assert mine.clear() == size + len(b"of an older edgeclip")
    assert list(cache.iterdir()) == []
    LabelCache().store("an encoder", kept)
    assert_equal(LabelCache().load(list(kept), DIM), kept)


@pytest.mark.parametrize("damage", ["nothing", "garbage", "truncated", "middle"])
def test_damaged_file_is_made_anew(
    cache: Path, kept: dict[bytes, CachedLabel], damage: str, caplog: pytest.LogCaptureFixture
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
    mine = LabelCache()
    found = mine.load(list(kept), DIM)
    assert_equal(found, {key: kept[key] for key in found})  # what is found is right
    assert len(found) < len(kept)
    assert ("damaged" in caplog.text) == (damage != "nothing")
    for _ in range(2):  # the first may only find that more is damaged
        mine.store("an encoder", kept)
    caplog.clear()
    assert_equal(LabelCache().load(list(kept), DIM), kept)
    assert caplog.text == ""


def test_flipped_bits_never_give_another_answer(
    cache: Path, kept: dict[bytes, CachedLabel], rng: np.random.Generator
) -> None:
    path = cache / FILE
    sound = path.read_bytes()
    for position in rng.integers(0, len(sound), 200):
        spoilt = bytearray(sound)
        spoilt[position] ^= 1 << rng.integers(8)
        path.write_bytes(spoilt)
        found = LabelCache().load(list(kept), DIM)
        assert_equal(found, {key: kept[key] for key in found.keys() & kept.keys()})


@pytest.mark.parametrize(
    "vector",
    [
        np.full(DIM, np.nan, np.float32).tobytes(),
        np.ones(DIM - 1, np.float32).tobytes(),
        b"",
        "a text",
    ],
)
def test_vector_that_cannot_be_used(
    cache: Path, kept: dict[bytes, CachedLabel], vector: object, caplog: pytest.LogCaptureFixture
) -> None:
    """Though its checksum is right."""
    key = next(iter(kept))
    digest, cut = kept[key].tokens
    data = vector if isinstance(vector, bytes) else b""
    crc = zlib.crc32(key + digest + str(int(cut)).encode() + data)
    change(cache, "UPDATE labels SET vector = ?, crc = ? WHERE key = ?", vector, crc, key)
    assert_encoded_again(key, kept, caplog)


@pytest.mark.parametrize(
    ("column", "value"),
    [("tokens", b""), ("tokens", "a text"), ("cut", 3), ("cut", "a text"), ("cut", b"0")],
)
def test_tokens_that_cannot_be_used(
    cache: Path,
    kept: dict[bytes, CachedLabel],
    column: str,
    value: object,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Though its checksum is right, where there could be one."""
    key = next(iter(kept))
    digest, cut = kept[key].tokens
    digest = value if column == "tokens" and isinstance(value, bytes) else digest
    cut = value if isinstance(value, int) else int(cut)
    crc = zlib.crc32(key + digest + str(cut).encode() + kept[key].vector.tobytes())
    change(cache, f"UPDATE labels SET {column} = ?, crc = ? WHERE key = ?", value, crc, key)
    assert_encoded_again(key, kept, caplog)


def assert_encoded_again(
    key: bytes, kept: dict[bytes, CachedLabel], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = LabelCache().load(list(kept), DIM)
    assert_equal(found, {k: label for k, label in kept.items() if k != key})
    assert "1 labels in it are damaged; encoding them again" in caplog.text
    LabelCache().store("an encoder", {key: kept[key]})
    assert_equal(LabelCache().load(list(kept), DIM), kept)


def test_labels_of_another_width_are_not_used(kept: dict[bytes, CachedLabel]) -> None:
    assert LabelCache().load(list(kept), DIM + 1) == {}


def test_file_of_someone_else_is_left_alone(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(cache, "CREATE TABLE labels (id INTEGER)")
    change(cache, "PRAGMA user_version = 1")
    mine = LabelCache()
    mine.store("an encoder", vectors(0, 1))
    assert mine.load(list(vectors(0, 1)), DIM) == {}
    assert "cannot use" in caplog.text
    assert (cache / FILE).exists()
    with pytest.raises(EdgeclipError, match="cannot use"):
        mine.shares()
    assert mine.clear() > 0
    mine.store("an encoder", vectors(0, 1))
    assert_equal(mine.load(list(vectors(0, 1)), DIM), vectors(0, 1))


def test_least_recently_used_labels_make_room(cache: Path) -> None:
    mine = LabelCache(limit=1 << 20)
    now = int(time.time())
    for n in range(40):  # of 41 kB each
        mine.store("an encoder", vectors(100 * n, 40, 256))
        old = now - 10_000_000 + n
        change(cache, "UPDATE labels SET used = ? WHERE used > ?", old, now - 1000)
        mine.load(list(vectors(0, 40)), 256)  # the first are used again and again
        assert mine.size() <= 1 << 20
    assert_equal(mine.load(list(vectors(0, 40)), 256), vectors(0, 40, 256))
    assert_equal(mine.load(list(vectors(3900, 40)), 256), vectors(3900, 40, 256))
    assert mine.load(list(vectors(100, 40)), 256) == {}
    assert mine.size() > 1 << 19
    LabelCache(limit=1 << 18).store("an encoder", vectors(9999, 1, 256))
    assert mine.size() <= 1 << 18  # a lower limit makes it smaller


@pytest.mark.parametrize(
    ("text", "limit"), [("", 1 << 28), ("1000", 1000), ("3k", 3072), ("2G", 2 << 30), ("0", 0)]
)
def test_limit(monkeypatch: pytest.MonkeyPatch, text: str, limit: int) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE_SIZE", text)
    assert LabelCache().limit == limit


@pytest.mark.parametrize("text", ["much", "-1", "1.5G", "1T", "9" * 30, "K"])
def test_limit_that_is_no_size(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE_SIZE", text)
    with pytest.raises(EdgeclipError, match=r"EDGECLIP_CACHE_SIZE is .* expected bytes, such as"):
        LabelCache()


def test_no_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE_SIZE", "0")
    mine = LabelCache()
    mine.store("an encoder", vectors(0, 1))
    assert mine.load(list(vectors(0, 1)), DIM) == {}
    assert mine.path is None
    assert mine.size() == mine.clear() == 0
    assert list(cache.iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    mine = LabelCache(tmp_path / "file" / "cache")
    mine.store("an encoder", vectors(0, 1))
    assert "cannot use" in caplog.text
    assert mine.load(list(vectors(0, 1)), DIM) == {}


@pytest.mark.parametrize("where", ["file", "folder"])
def test_read_only_cache_is_read(
    cache: Path,
    kept: dict[bytes, CachedLabel],
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    change(cache, "UPDATE labels SET used = 0")
    connect = sqlite3.connect

    def read_only(name: str, *args: object, **options: object) -> sqlite3.Connection:
        mode = "immutable=1" if where == "folder" else "mode=ro"  # root may write to anything
        return connect(f"{name.partition('?')[0]}?{mode}", *args, **options)

    monkeypatch.setattr(sqlite3, "connect", read_only)
    assert_equal(LabelCache().load(list(kept), DIM), kept)
    assert caplog.text == ""
    LabelCache().store("an encoder", vectors(50, 1))
    assert "readonly database" in caplog.text


def test_full_disk(
    cache: Path,
    kept: dict[bytes, CachedLabel],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    connect = sqlite3.connect

    def small(*args: object, **options: object) -> sqlite3.Connection:
        db = connect(*args, **options)
        db.execute("PRAGMA max_page_count = 1")  # SQLite raises this to what is there
        return db

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", small)
        LabelCache().store("an encoder", vectors(50, 500))
    assert "disk is full" in caplog.text
    assert_equal(LabelCache().load(list(kept | vectors(50, 500)), DIM), kept)


def test_cache_in_use_by_a_process_that_hangs(
    cache: Path,
    kept: dict[bytes, CachedLabel],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("edgeclip.text.cache.TIMEOUT", 0.05)
    change(cache, "UPDATE labels SET used = 0")
    hung = sqlite3.connect(cache / FILE, isolation_level=None)
    hung.execute("BEGIN IMMEDIATE")
    assert_equal(LabelCache().load(list(kept), DIM), kept)  # it can still be read
    LabelCache().store("an encoder", vectors(50, 1))
    assert "database is locked" in caplog.text
    hung.close()
    LabelCache().store("an encoder", vectors(50, 1))
    assert_equal(LabelCache().load(list(vectors(50, 1)), DIM), vectors(50, 1))


def work(folder: Path, number: int) -> None:
    """Writes sets that overlap with those of other processes, and reads what they wrote."""
    mine = LabelCache(folder)
    for turn in range(10):
        rows = vectors(10 * (turn + number), 30)
        mine.store(f"encoder {number}", rows)
        assert_equal(mine.load(list(rows), DIM), rows)
        others = vectors(10 * turn, 60)
        found = mine.load(list(others), DIM)
        assert_equal(found, {key: others[key] for key in found})


def work_and_fork(folder: Path, number: int) -> None:
    work(folder, number)
    child = os.fork()
    work(folder, number if child else number + 2)
    if child and os.waitpid(child, 0)[1]:
        raise RuntimeError("the forked process failed")


def test_many_processes(tmp_path: Path) -> None:
    """Two, which fork after they have used it: no error, no warning, and nothing is lost."""
    code = "import sys; from pathlib import Path; from tests.edgeclip.text import test_cache as t; t.work_and_fork(Path(sys.argv[1]), int(sys.argv[2]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), str(number)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    everything = vectors(0, 150)
    assert_equal(LabelCache(tmp_path).load(list(everything), DIM), everything)


def test_many_threads(cache: Path) -> None:
    mine = LabelCache()

    def turn(number: int) -> None:
        rows = vectors(number, 10)
        mine.store("an encoder", rows)
        assert_equal(mine.load(list(rows), DIM), rows)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(turn, range(40)))
    assert_equal(mine.load(list(vectors(0, 49)), DIM), vectors(0, 49))
