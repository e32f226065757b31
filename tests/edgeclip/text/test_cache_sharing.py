"""Label cache in use by others: read-only and full disks, processes and threads."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgeclip.text.cache import (
    FILE,
    CachedLabel,
    LabelCache,
)
from tests.support.cached_labels import DIM, assert_equal, cached_labels, execute
from tests.support.paths import ROOT


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


def test_folder_that_cannot_be_created(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    label_cache = LabelCache(tmp_path / "file" / "cache")
    label_cache.store("an encoder", cached_labels(0, 1))
    assert "cannot use" in caplog.text
    assert label_cache.load(list(cached_labels(0, 1)), DIM) == {}


@pytest.mark.parametrize("where", ["file", "folder"])
def test_read_only_cache_is_read(
    cache: Path,
    stored: dict[bytes, CachedLabel],
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    execute(cache, "UPDATE labels SET used = 0")
    connect = sqlite3.connect

    def read_only(name: str, *args: object, **options: object) -> sqlite3.Connection:
        mode = (
            "immutable=1" if where == "folder" else "mode=ro"
        )  # root may write to read-only files
        return connect(f"{name.partition('?')[0]}?{mode}", *args, **options)

    monkeypatch.setattr(sqlite3, "connect", read_only)
    assert_equal(LabelCache().load(list(stored), DIM), stored)
    assert caplog.text == ""
    LabelCache().store("an encoder", cached_labels(50, 1))
    assert "readonly database" in caplog.text


def test_full_disk(
    cache: Path,
    stored: dict[bytes, CachedLabel],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    connect = sqlite3.connect

    def limited(*args: object, **options: object) -> sqlite3.Connection:
        db = connect(*args, **options)
        db.execute("PRAGMA max_page_count = 1")  # SQLite raises this to the present size
        return db

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", limited)
        LabelCache().store("an encoder", cached_labels(50, 500))
    assert "disk is full" in caplog.text
    assert_equal(LabelCache().load(list(stored | cached_labels(50, 500)), DIM), stored)


def test_cache_in_use_by_a_process_that_hangs(
    cache: Path,
    stored: dict[bytes, CachedLabel],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("edgeclip.text.cache.TIMEOUT", 0.05)
    execute(cache, "UPDATE labels SET used = 0")
    hung = sqlite3.connect(cache / FILE, isolation_level=None)
    hung.execute("BEGIN IMMEDIATE")
    assert_equal(LabelCache().load(list(stored), DIM), stored)  # reading still works
    LabelCache().store("an encoder", cached_labels(50, 1))
    assert "database is locked" in caplog.text
    hung.close()
    LabelCache().store("an encoder", cached_labels(50, 1))
    assert_equal(LabelCache().load(list(cached_labels(50, 1)), DIM), cached_labels(50, 1))


def work(folder: Path, number: int) -> None:
    """Write labels that overlap with those of other processes, and read theirs."""
    label_cache = LabelCache(folder)
    for turn in range(10):
        rows = cached_labels(10 * (turn + number), 30)
        label_cache.store(f"encoder {number}", rows)
        assert_equal(label_cache.load(list(rows), DIM), rows)
        others = cached_labels(10 * turn, 60)
        loaded = label_cache.load(list(others), DIM)
        assert_equal(loaded, {key: others[key] for key in loaded})


def work_and_fork(folder: Path, number: int) -> None:
    work(folder, number)
    child = os.fork()
    work(folder, number if child else number + 2)
    if child and os.waitpid(child, 0)[1]:
        raise RuntimeError("the forked process failed")


def test_many_processes(tmp_path: Path) -> None:
    """Run two processes that fork after using the cache: no error, no warning, no lost labels."""
    code = "import sys; from pathlib import Path; from tests.edgeclip.text import test_cache_sharing as t; t.work_and_fork(Path(sys.argv[1]), int(sys.argv[2]))"
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
    everything = cached_labels(0, 150)
    assert_equal(LabelCache(tmp_path).load(list(everything), DIM), everything)


def test_many_threads(cache: Path) -> None:
    label_cache = LabelCache()

    def turn(number: int) -> None:
        rows = cached_labels(number, 10)
        label_cache.store("an encoder", rows)
        assert_equal(label_cache.load(list(rows), DIM), rows)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(turn, range(40)))
    assert_equal(label_cache.load(list(cached_labels(0, 49)), DIM), cached_labels(0, 49))
