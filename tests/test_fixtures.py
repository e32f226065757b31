"""Cache of models that tests make: a failure leaves no files, and is raised again by later tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models.export_models import cached


def test_a_fixture_is_cached_for_its_arguments() -> None:
    @cached
    def numbered(folder: Path, name: str) -> Path:
        return folder / name

    assert numbered("a") == numbered("a") != numbered("b")
    assert numbered("a").parent.is_dir()
    assert numbered("a").parent != numbered("b").parent


def test_a_failure_is_remembered_and_its_folder_removed() -> None:
    folders = []

    @cached
    def failing(folder: Path) -> None:
        folders.append(folder)
        (folder / "half").mkdir()
        raise OSError("the first error")

    for _ in range(2):
        with pytest.raises(OSError, match="the first error"):
            failing()
    assert len(folders) == 1
    assert not folders[0].exists()


def test_an_interruption_is_not_remembered() -> None:
    folders = []

    @cached
    def slow(folder: Path) -> Path:
        folders.append(folder)
        if len(folders) == 1:
            raise KeyboardInterrupt
        return folder

    with pytest.raises(KeyboardInterrupt):
        slow()
    assert not folders[0].exists()
    assert slow() == folders[1]
