"""The table of precisions, and the rule that only the table handles their names."""

from __future__ import annotations

import ast
import math

import pytest

from edgeclip.cli.options import PRECISIONS_OF_ENGINES
from edgeclip.precisions import PRECISIONS, REFERENCE, Precision, by_preference, engine_precisions
from tests.support.paths import ROOT

CONVERTED = [row for row in PRECISIONS.values() if row.name != REFERENCE]


def test_names_and_their_order() -> None:
    assert list(PRECISIONS) == ["fp32", "fp16", "int8", "int8-weights", "int8-qdq"]
    assert engine_precisions() == ["fp16", "fp32", "int8-qdq"]
    assert ("auto", *engine_precisions()) == PRECISIONS_OF_ENGINES


@pytest.mark.parametrize(
    ("device", "considered", "others"),
    [
        ("cpu", ["fp32", "int8", "int8-weights"], ["fp16", "int8-qdq"]),
        ("cuda", ["fp16", "fp32", "int8-weights"], ["int8-qdq", "int8"]),
        ("tensorrt", ["fp16", "fp32"], ["int8-qdq", "int8", "int8-weights"]),
    ],
)
def test_auto_prefers_the_precisions_of_a_device(
    device: str, considered: list[str], others: list[str]
) -> None:
    assert [row.name for row in by_preference(device)] == considered + others
    assert [name for name, row in PRECISIONS.items() if device in row.auto_devices] == sorted(
        considered, key=list(PRECISIONS).index
    )


@pytest.mark.parametrize("row", CONVERTED, ids=lambda row: row.name)
def test_a_device_may_be_as_far_off_as_export_allows(row: Precision) -> None:
    """Unit vectors of cosine c are sqrt(2 - 2c) apart."""
    distance = math.sqrt(2 - 2 * row.min_cosine)
    assert distance <= row.tolerance <= 1.01 * distance


def test_rows_agree_with_each_other() -> None:
    assert PRECISIONS[REFERENCE].max_difference is not None
    assert len({row.preference for row in PRECISIONS.values()}) == len(PRECISIONS)
    for name, row in PRECISIONS.items():
        assert row.name == name
        assert PRECISIONS[row.text].text == row.text
        assert row.tensorrt or "tensorrt" not in row.auto_devices


def test_only_the_table_and_the_converters_name_precisions() -> None:
    converted = {row.name for row in CONVERTED}
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("edgeclip", "export")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and node.value in converted
    }
    assert files == {"edgeclip/precisions.py", "export/graphs/precisions.py"}
