"""Progress messages on stderr, on a terminal and elsewhere."""

from __future__ import annotations

import logging
import re
import warnings

import pytest

from train import progress


def test_lines_say_that_a_step_runs_and_how_long_it_took(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "NOTICE_AFTER", 0)
    with progress.step("thinking"):
        pass
    assert re.fullmatch(
        r"thinking \.\.\.\nthinking \.\.\. done in \d+\.\d s\n", capsys.readouterr().err
    )
    with pytest.raises(KeyboardInterrupt), progress.step("thinking"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "thinking ...\n"


def test_a_long_step_repeats_its_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = progress.threading.Event()
    monkeypatch.setattr(progress, "REPEAT_EVERY", 0.001)

    def record(text: str) -> None:
        if "so far" in text:
            repeated.set()

    monkeypatch.setattr(progress, "say", record)
    with progress.step("thinking"):
        assert repeated.wait(60)


def test_a_terminal_gets_one_live_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with progress.step("reading [a] file"):
        progress.say("a note")
        print("an answer")
    out, err = capsys.readouterr()
    assert out == "an answer\n"
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", err).split("\n")
    assert "a note" in lines
    assert re.fullmatch(r"reading \[a\] file \.\.\. \d+\.\d s", [x for x in lines if x.strip()][-1])


def test_quiet_suppresses_warnings_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    with progress.quiet():
        warnings.warn("noise", stacklevel=1)
        logging.getLogger("library").warning("noise")
    assert not caplog.records
    logging.getLogger("library").warning("news")
    assert [record.getMessage() for record in caplog.records] == ["news"]


@pytest.mark.parametrize(
    ("err", "text"), [(ValueError("\n  first \nsecond"), "first"), (KeyError(), "KeyError")]
)
def test_brief_is_one_line(err: BaseException, text: str) -> None:
    assert progress.brief(err) == text
