"""Result files: the committed ones, their keys, and parsing without the train extra."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from train.robustness.checks import CHECKS
from train.robustness.result_file import CHECK_COUNT, parse_key, read, stage_key
from train.robustness.threat import AUTOATTACK, plan

RESULTS = ROOT / "docs" / "results"
COMMITTED = [
    path
    for folder in (RESULTS, RESULTS / "grid", RESULTS / "diff", RESULTS / "training")
    for path in sorted(folder.glob("*.json"))
]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_figures_follow_from_their_marks(path: Path) -> None:
    assert read(path).to_dict() == json.loads(path.read_text(encoding="utf-8"))


def test_keys() -> None:
    assert stage_key("pgd", "exact") == "pgd/exact"
    assert stage_key("autoattack", "exact", "square") == "autoattack/square/exact"
    stages = plan(["autoattack", "square"], ["exact"], classes=10)
    keys = [parse_key(stage.key) for stage in stages]
    cascade = [("autoattack", "exact", name) for name in AUTOATTACK]
    assert keys == [*cascade, ("square", "exact", "")]
    for wrong in ("pgd", "a/b/c/d"):
        with pytest.raises(ValueError, match="values to unpack"):
            parse_key(wrong)


def test_a_trusted_figure_passed_every_check() -> None:
    assert len(CHECKS) == CHECK_COUNT


def test_reading_needs_nothing_of_the_train_extra() -> None:
    code = (
        "import sys, train.robustness.result_file; "
        "print(sorted({'matplotlib', 'rich', 'scipy', 'torch', 'torchattacks'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout == "[]\n"
