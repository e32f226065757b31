"""Robustness measurements in a bundle, and the purification that they recommend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeclip.bundle import Bundle
from edgeclip.purify import CosPurifier
from export import ExportError
from export.bundle import export_bundle
from export.checks import evidence
from tests.support.models.export_models import Exported, exported, reuse_encoders
from train.models.wording import wording

CHECKED = [{"name": f"check {i}", "passed": True, "figure": ""} for i in range(9)]


def result_file(
    path: Path, tiny: Exported, held: str = "1100", purifier: Any = None, **changes: Any
) -> Path:
    """Write a result file of images that are right without an attack.

    held: a mark for each image, 1 if it is right under attack too.
    """
    settings = {
        "subject": "name", "pretrained": None, "visual": None, "checkpoint": None,
        "weights_sha256": tiny.source.weights_sha256, "quick_gelu": tiny.source.quick_gelu,
        "templates": list(tiny.bundle.manifest.templates),
        "attack": ["apgd-ce", "apgd-t"], "gradient": ["exact"], "queries": 1, "eot": 1,
        "data": "set", "samples": len(held), "norm": "l2", "eps": 0.5, "steps": 3, "restarts": 1,
        "seed": 0, "purification": purifier,
    }  # fmt: skip
    actual = {
        "settings": settings | changes,
        "checks": [*CHECKED, {"name": "other", "passed": None, "figure": ""}],
        "agreement": None,
        "devices": [],
        "seconds": {},
        "samples": {"clean": "1" * len(held), "apgd-ce/exact": held, "apgd-t/exact": held},
    }
    path.write_text(json.dumps(actual))
    return path


def test_robustness_is_that_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = exported("vit")
    reuse_encoders(monkeypatch, tiny)
    words = wording(tiny.source)
    path = result_file(tmp_path / "a.json", tiny)
    rows, recommended = evidence.read([path], tiny.source, words.templates)
    manifest = export_bundle(
        tiny.source, tmp_path / "out", words, robustness=rows, purification=CosPurifier(2, 0.5)
    )
    assert manifest == Bundle(tmp_path / "out").manifest
    assert manifest.robustness == rows
    assert (rows[0].attacks, rows[0].eps) == (("apgd-ce", "apgd-t"), 0.5)
    assert (rows[0].clean_accuracy, rows[0].worst_case_accuracy) == (1.0, 0.5)
    assert rows[0].purification == "none"
    assert recommended is None
    assert manifest.purification == CosPurifier(2, 0.5)
    purified = result_file(tmp_path / "b.json", tiny, purifier={"steps": 1, "step_size": 2})
    assert evidence.read([path, Path(purified)], tiny.source, words.templates)[0] == rows


def test_purification_is_recommended_for_a_gain_that_is_no_chance(tmp_path: Path) -> None:
    tiny = exported("vit")

    def read(*held: str, **changes: Any) -> Any:
        """Read results without purification, then with one step, two steps, ..."""
        paths = []
        for i, marks in enumerate(held):
            purifier = {"steps": i, "step_size": 0.5} if i else None
            path = tmp_path / f"{i}.json"
            paths.append(result_file(path, tiny, marks, purifier, **(changes if i else {})))
        return evidence.read(paths, tiny.source, wording(tiny.source).templates)

    def recommended(*held: str, **changes: Any) -> Any:
        return read(*held, **changes)[1]

    none = "10" * 500
    assert recommended(none) is None
    assert recommended(none, none) is None
    assert recommended(none, "111" + none[3:]) is None  # one image of a thousand: chance
    assert recommended(none, "1" * 6 + none[6:]) is None  # 3 images: 1.73 standard errors
    good = "1" * 8 + none[8:]  # 4 images: 2.00 standard errors
    assert recommended(none, good) == CosPurifier(1, 0.5)
    assert recommended(none, good, none) is None  # two comparisons widen the interval
    better, best = "1" * 40 + none[40:], "1" * 80 + none[80:]
    rows, chosen = read(none, better, best)
    assert chosen == CosPurifier(2, 0.5)
    assert [row.purification for row in rows] == ["none", "cos 2 x 0.5"]
    assert recommended(best, better) is None
    assert recommended(none, best, eps=0.25) is None  # different threats
    assert recommended(none, best, steps=2) is None
    assert recommended("10" * 400, "1" * 80 + "10" * 360) is None  # too few images


def test_purified_figures_that_failed_are_left_out(tmp_path: Path) -> None:
    tiny = exported("vit")
    words = wording(tiny.source)
    none = result_file(tmp_path / "a.json", tiny, "10" * 500)
    best = result_file(tmp_path / "b.json", tiny, "1" * 1000, {"steps": 1, "step_size": 0.5})
    assert evidence.read([none, best], tiny.source, words.templates)[1] == CosPurifier(1, 0.5)
    actual = json.loads(best.read_text())
    best.write_text(
        json.dumps(actual | {"checks": [*CHECKED, {"name": "x", "passed": False, "figure": ""}]})
    )
    rows, recommended = evidence.read([none, best], tiny.source, words.templates)
    assert (len(rows), recommended) == (1, None)


def test_figures_of_another_model_are_refused(tmp_path: Path) -> None:
    tiny, path = exported("vit"), tmp_path / "a.json"
    templates = wording(tiny.source).templates

    def message() -> str:
        with pytest.raises(ExportError) as caught:
            evidence.read([path], tiny.source, templates)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is no result of python -m train.evaluate" in message()
    result_file(path, tiny, weights_sha256="0")
    assert "was measured on other weights" in message()
    result_file(path, tiny, quick_gelu=True)
    assert "was measured with another activation" in message()
    result_file(path, tiny, templates=["other {}"])
    assert "was measured with other templates" in message()
    actual = json.loads(result_file(path, tiny).read_text())
    unfinished = actual["samples"] | {"apgd-t/exact": "110?"}
    path.write_text(json.dumps(actual | {"samples": unfinished}))
    assert "is not finished" in message()
    path.write_text(json.dumps(actual | {"checks": CHECKED}))
    assert "was not checked" in message()
    path.write_text(
        json.dumps(actual | {"checks": [*CHECKED, {"name": "x", "passed": False, "figure": ""}]})
    )
    assert "failed x" in message()
    result_file(path, tiny, eps="much")
    assert "is no result of python -m train.evaluate" in message()
