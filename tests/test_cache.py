"""The label cache: what is stored comes back, whatever happens to its file."""

from __future__ import annotations

import logging
import os
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
from edgeclip.cache import FILE, LabelCache, Share, label_keys

DIM = 64


def vectors(first: int, count: int, dim: int = DIM) -> dict[bytes, np.ndarray]:
    """Keys and the vectors that belong to them, the same in every process."""
    rows = {n: np.random.default_rng(n).standard_normal(dim) for n in range(first, first + count)}
    return {n.to_bytes(32, "big"): row.astype(np.float32) for n, row in rows.items()}


def assert_equal(found: dict[bytes, np.ndarray], expected: dict[bytes, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for key, row in found.items():
        assert row.dtype == np.float32
        np.testing.assert_array_equal(row, expected[key])


def change(cache: Path, statement: str, *values: object) -> None:
    db = sqlite3.connect(cache / FILE)
    with db:
        db.execute(statement, values)
    db.close()


@pytest.fixture
def kept(cache: Path) -> dict[bytes, np.ndarray]:
    """Some vectors, which are in the cache."""
    rows = vectors(0, 20)
    LabelCache().store("an encoder", rows)
    return rows


def test_what_was_stored_comes_back(cache: Path, kept: dict[bytes, np.ndarray]) -> None:
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


def test_shares_and_clearing(cache: Path, kept: dict[bytes, np.ndarray]) -> None:
    LabelCache().store("another", vectors(100, 5, 8))
    mine = LabelCache()
    assert mine.shares() == [Share("an encoder", 20, 20 * 4 * DIM), Share("another", 5, 5 * 4 * 8)]
    size = (cache / FILE).stat().st_size
    assert mine.size() == mine.clear() == size
    assert list(cache.iterdir()) == []
    LabelCache().store("an encoder", kept)
    assert_equal(LabelCache().load(list(kept), DIM), kept)


@pytest.mark.parametrize("damage", ["nothing", "garbage", "truncated", "middle"])
def test_damaged_file_is_made_anew(
    cache: Path, kept: dict[bytes, np.ndarray], damage: str, caplog: pytest.LogCaptureFixture
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
    cache: Path, kept: dict[bytes, np.ndarray], rng: np.random.Generator
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
    cache: Path, kept: dict[bytes, np.ndarray], vector: object, caplog: pytest.LogCaptureFixture
) -> None:
    """Though its checksum is right."""
    key = next(iter(kept))
    crc = zlib.crc32(key + (vector if isinstance(vector, bytes) else b""))
    change(cache, "UPDATE labels SET vector = ?, crc = ? WHERE key = ?", vector, crc, key)
    with caplog.at_level(logging.WARNING):
        found = LabelCache().load(list(kept), DIM)
    assert_equal(found, {k: row for k, row in kept.items() if k != key})
    assert "1 labels in it are damaged; encoding them again" in caplog.text
    LabelCache().store("an encoder", {key: kept[key]})
    assert_equal(LabelCache().load(list(kept), DIM), kept)


def test_labels_of_another_width_are_not_used(kept: dict[bytes, np.ndarray]) -> None:
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
    kept: dict[bytes, np.ndarray],
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
    kept: dict[bytes, np.ndarray],
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
    kept: dict[bytes, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("edgeclip.cache.TIMEOUT", 0.05)
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
    code = "import sys, test_cache as t; t.work_and_fork(t.Path(sys.argv[1]), int(sys.argv[2]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), str(number)],
            cwd=Path(__file__).parent,
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
