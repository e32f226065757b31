"""The cache of TensorRT engines: keys, checks, damage, and concurrent builds."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest

from edgeclip.backends import engine_cache
from edgeclip.backends.engine_cache import BuildOptions, EngineCache, EngineKey, Gpu
from edgeclip.backends.tensorrt_builder import engine_key
from edgeclip.errors import EdgeclipError
from tests.support.gpu import fake_tensorrt

ORIN = Gpu("Orin", (8, 7))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"context_length": 0}, "context_length must be at least 1"),
        ({"max_batch": 2, "opt_batch": 3}, "opt_batch 3 is above max_batch 2"),
        ({"workspace_bytes": -1}, "workspace_bytes must not be negative"),
        ({"optimization_level": 6}, "optimization_level must be 0 to 5, got 6"),
    ],
)
def test_invalid_options(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BuildOptions(**wrong)


def key(**changed: Any) -> EngineKey:
    original = engine_key(
        ["11" * 32, "22" * 32], fake_tensorrt.module("tensorrt-10.3.0"), ORIN, BuildOptions()
    )
    return dataclasses.replace(original, **changed)


def test_every_field_changes_the_key() -> None:
    others = [
        key(graphs=("11" * 32,)),
        key(module="tensorrt_rtx"),
        key(version="10.3.1"),
        key(capability=(8, 6)),
        key(device="Thor"),
        key(flags=()),
        key(options=BuildOptions(max_batch=9)),
        key(options=BuildOptions(opt_batch=2)),
        key(options=BuildOptions(context_length=64)),
        key(options=BuildOptions(workspace_bytes=None)),
        key(options=BuildOptions(optimization_level=3)),
        key(recipe=engine_cache.RECIPE + 1),
    ]
    assert len({each.digest for each in (key(), *others)}) == len(others) + 1
    assert key().digest == key().digest


def test_a_saved_engine_is_found(tmp_path: Path) -> None:
    cache, report = EngineCache(tmp_path / "engines"), {"image": 1e-5}
    assert cache.find(key()) is None
    assert cache.entries() == []
    path = cache.save(key(), b"engine", report)
    assert path.read_bytes() == b"engine"
    reopened = EngineCache(tmp_path / "engines")
    assert reopened.find(key()) == path
    assert reopened.find(key(version="10.3.1")) is None
    (entry,) = reopened.entries()
    assert (entry.path, entry.key, entry.checked) == (path, key().fields(), report)
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    assert reopened.remove() == size
    assert reopened.find(key()) is None
    assert list((tmp_path / "engines").iterdir()) == []


def test_damaged_engines_are_not_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = EngineCache(tmp_path)
    path = cache.save(key(), b"engine", {"image": 1e-5})
    (record,) = tmp_path.glob("*.json")
    text = record.read_text()

    path.write_bytes(b"engime")
    assert cache.find(key()) is None
    assert f"{path} is damaged or missing" in caplog.text
    path.unlink()
    assert cache.find(key()) is None
    path.write_bytes(b"engine")
    assert cache.find(key()) == path

    for wrong in (
        text[:-20],
        "[]",
        "{}",
        text.replace('"image": 1e-05', ""),  # no checks
        text.replace('"Orin"', '"Thor"'),
        text.replace(f'"{path.name}"', f'"../{tmp_path.name}/{path.name}"'),
    ):
        assert wrong != text
        record.write_text(wrong)
        assert cache.find(key()) is None, wrong
    record.write_text(text)
    assert cache.find(key()) == path

    record.rename(tmp_path / f"{key(device='Thor').digest[:32]}.json")  # file name of another key
    assert cache.find(key(device="Thor")) is None


def test_an_engine_without_checks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checks"):
        EngineCache(tmp_path).save(key(), b"engine", {})
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    first = cache.save(key(), b"engine", {"image": 1e-5})
    other = cache.save(key(device="Thor"), b"engine", {"image": 1e-5})
    second = cache.save(key(), b"another", {"image": 2e-5})
    assert cache.find(key()) == second
    assert cache.find(key(device="Thor")) == other
    assert not first.exists()
    assert len(list(tmp_path.iterdir())) == 4


def test_concurrent_saves_leave_a_complete_engine(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    threads = [
        threading.Thread(target=cache.save, args=(key(), bytes([i]) * 100_000, {"image": 1e-5}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.save(key(), b"last", {"image": 1e-5})
    engine = cache.find(key())
    assert engine is not None
    assert engine.read_bytes() == b"last"
    assert not list(tmp_path.glob("*.tmp"))


def test_paths_of_engines_and_timings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path))
    cache = EngineCache()
    assert cache.folder == tmp_path / "engines"
    file = cache.timing_cache(key(device="Orin (nvgpu)/8 GB"))
    assert file == tmp_path / "engines" / "tensorrt-10.3.0-Orin-nvgpu-8-GB-sm87.timings"
    assert cache.timing_cache(key(graphs=())) == cache.timing_cache(key())
    assert cache.timing_cache(key(version="10.16.1.11")) != cache.timing_cache(key())


def test_without_a_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_cache, "default_folder", lambda: None)
    cache = EngineCache()
    assert cache.find(key()) is None
    assert cache.entries() == []
    assert cache.remove() == 0
    for call in (lambda: cache.save(key(), b"", {"image": 0}), lambda: cache.timing_cache(key())):
        with pytest.raises(EdgeclipError, match="set EDGECLIP_CACHE"):
            call()
    (tmp_path / "engines").touch()
    with pytest.raises(EdgeclipError, match=r"cannot write the engine to .*engines"):
        EngineCache(tmp_path / "engines").save(key(), b"engine", {"image": 0.0})
