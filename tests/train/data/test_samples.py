"""The folder of data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeclip import storage
from train.data.samples import default_root
from train.errors import DataError


def test_data_sets_are_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EDGECLIP_DATA", raising=False)
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "cache"))
    assert default_root() == tmp_path / "cache" / "data"
    monkeypatch.delenv("EDGECLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_root() == tmp_path / "xdg" / "edgeclip" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "edgeclip" / "data"
    assert default_root().parent == storage.default_folder()


def test_the_variable_names_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EDGECLIP_DATA", "~/data")
    assert default_root() == tmp_path / "data"


def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGECLIP_DATA", raising=False)
    monkeypatch.setattr("train.data.samples.default_folder", lambda: None)
    with pytest.raises(DataError, match="set EDGECLIP_DATA"):
        default_root()
