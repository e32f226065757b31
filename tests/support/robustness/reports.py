"""Result files of train.evaluate, and the tables that train.report makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.report import BLOCK, main

MARKS = (f"<!-- {BLOCK} -->", f"<!-- /{BLOCK} -->")
PASSED = [{"name": f"name {i}", "passed": True, "figure": f"{i}.5 %"} for i in range(1, 11)]
NOTE = "± is half the width of the 95 % Wilson interval of the worst case."
COS = {"steps": 10, "step_size": 30.0}


def result(path: Path, samples: dict[str, str], **changes: Any) -> str:
    """Write a result file; changes override settings, checks, agreement, seconds or devices."""
    rest = {"checks": PASSED, "agreement": None, "seconds": {}, "devices": ["some GPU"]}
    rest |= {name: changes.pop(name) for name in tuple(rest) if name in changes}
    attacked = [key.split("/") for key in samples if key != "clean"]
    settings = {
        "subject": f"runs/{path.stem}", "checkpoint": None, "pretrained": None,
        "weights_sha256": path.stem, "data": "some", "purification": None,
        "visual": None, "quick_gelu": False, "templates": ["a {}"],
        "attack": list(dict.fromkeys(key[0] for key in attacked)),
        "gradient": list(dict.fromkeys(key[-1] for key in attacked)),
        "norm": "linf", "eps": 8 / 255, "steps": 100, "restarts": 1, "queries": 5000, "eot": 1,
        "samples": len(samples["clean"]), "seed": 0,
    } | changes  # fmt: skip
    path.write_text(json.dumps({"settings": settings, **rest, "samples": samples}))
    return str(path)


def pgd_result(path: Path, clean: str, attacked: str, **changes: Any) -> str:
    return result(path, {"clean": clean, "pgd/exact": attacked}, **changes)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    main(words)
    return capsys.readouterr().out


def rows(text: str, start: str) -> list[list[str]]:
    """Return the cells of the table rows whose first cell is `start`."""
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines()]
    return [row for row in cells if row[0] == start]


def grid(folder: Path, worst: dict[tuple[int, float] | None, tuple[str, str]]) -> list[str]:
    """Write a result for each (steps, step size), or None for no purification."""
    return [
        pgd_result(
            folder / f"{i}.json", clean, attacked, subject="runs/m", weights_sha256="m",
            purification=cos and {"steps": cos[0], "step_size": cos[1]},
        )
        for i, (cos, (clean, attacked)) in enumerate(worst.items())
    ]  # fmt: skip


DIFF = {
    "method": "diff", "steps": 10, "step_size": 30.0, "timesteps": [900, 999], "seed": 0,
    "prior_sha256": "p", "gradient": "exact",
}  # fmt: skip


def diff_rows(folder: Path) -> list[str]:
    """Write results of a model without purification, with two settings of cos, and with two of diff."""
    clean = "1" * 100
    purifications = [
        (None, 40), (COS, 41), (COS | {"steps": 2}, 42), (DIFF, 50), (DIFF | {"step_size": 0.1}, 60),
        (DIFF | {"seed": 1}, 70), (DIFF | {"step_size": 0.1}, 55),
    ]  # fmt: skip
    return [
        pgd_result(
            folder / f"{i}.json", clean, "1" * robust + "0" * (100 - robust),
            subject="runs/m", weights_sha256="m", purification=purification,
        )
        for i, (purification, robust) in enumerate(purifications)
    ]  # fmt: skip
