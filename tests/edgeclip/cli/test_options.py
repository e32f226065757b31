"""The options of purifiers, and the purifiers that they name."""

from __future__ import annotations

import pytest

from edgeclip.cli.options import Parser, PurifierOptions
from edgeclip.errors import EdgeclipError
from edgeclip.purify import CosPurifier, DiffPurifier, Purifier

COS, DIFF = CosPurifier(3, 0.5), DiffPurifier(4, 0.25, (7, 9), 5)


def purifier(options: PurifierOptions, words: str, recommended: Purifier) -> Purifier:
    parser = Parser(prog="test")
    options.add(parser)
    return options.purifier(parser.parse_args(words.split()), recommended)


@pytest.mark.parametrize(
    ("words", "recommended", "expected"),
    [
        ("", None, None),
        ("", COS, COS),
        ("--purify none", COS, None),
        ("--purify cos", COS, COS),
        ("--purify cos", DIFF, CosPurifier()),
        ("--purify cos --steps 2", COS, CosPurifier(2, 0.5)),
        ("--purify cos --step-size 1/4", COS, CosPurifier(3, 0.25)),
        ("--purify diff", None, DiffPurifier()),
        ("--purify diff --timesteps 1 2 --seed 0", DIFF, DiffPurifier(4, 0.25, (1, 2), 0)),
    ],
)
def test_named_purifiers(words: str, recommended: Purifier, expected: Purifier) -> None:
    assert purifier(PurifierOptions(), words, recommended) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", COS),
        ("--purify cos", CosPurifier()),
        ("--purify cos --p-steps 2", CosPurifier(2, 30)),
        ("--purify diff --p-seed 2", DiffPurifier(seed=2)),
    ],
)
def test_published_numbers_under_prefixed_names(words: str, expected: Purifier) -> None:
    assert purifier(PurifierOptions(prefix="p-", published=True), words, COS) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--p-steps 2", "--p-steps needs --purify cos or diff"),
        ("--purify none --p-step-size 2", "--p-step-size needs --purify cos or diff"),
        ("--purify cos --p-seed 0", "--p-seed needs --purify diff"),
        ("--purify diff --p-timesteps 9 8", "--p-timesteps: 9 is after 8"),
    ],
)
def test_numbers_that_do_not_fit(words: str, message: str) -> None:
    with pytest.raises(EdgeclipError, match=f"^{message}$"):
        purifier(PurifierOptions(prefix="p-"), words, COS)


@pytest.mark.parametrize(
    "words",
    [
        "--purify diff",
        "--seed 1",
        "--steps 0",
        "--steps 10001",
        "--step-size -1",
        "--step-size nan",
        "--step-size 1/0",
        "--step-size 1/x",
        "--step-size 1/",
        "--step-size 1/inf/2",
    ],
)
def test_wrong_usage(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        purifier(PurifierOptions(methods=("auto", "none", "cos")), words, None)
    assert end.value.code == 2
    assert words.split()[0] in capsys.readouterr().err
