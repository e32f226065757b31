"""Layout of the repository: sizes of files and folders, and imports of the package's face."""

from __future__ import annotations

import ast
from collections import Counter

from tests.support.paths import ROOT

FOLDERS = ("benchmarks", "csrc", "edgeclip", "examples", "export", "tests", "train")
SUFFIXES = (".py", ".pyi", ".h", ".cc", ".cu", ".cuh")
FILES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in SUFFIXES and "third_party" not in path.parts
]
MAX_LINES = 400
MAX_FILES = 17  # of one folder


def test_no_file_is_long() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert {path: count for path, count in lengths.items() if count > MAX_LINES} == {}


def test_no_folder_is_crowded() -> None:
    counts = Counter(path.parent for path in FILES)
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}


def test_the_runtime_does_not_import_its_own_face() -> None:
    """Check that edgeclip's modules import names from where they are defined."""
    allowed = {"__version__", "_core"}
    for path in (ROOT / "edgeclip").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "edgeclip":
                for name in (alias.name for alias in node.names):
                    module = (ROOT / "edgeclip" / name).with_suffix(".py")
                    assert name in allowed or module.is_file(), f"{path}: {name}"
