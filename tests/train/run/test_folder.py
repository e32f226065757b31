"""Files of a run: tokenizer, checkpoint and metrics."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path

import open_clip
import pytest
import torch

from train.errors import SettingsError
from train.run.folder import (
    Metrics,
    check_same_run,
    open_folder,
    save_checkpoint,
    write_small_bpe,
)


def test_small_bpe_encodes_any_text(tmp_path: Path) -> None:
    small = write_small_bpe(tmp_path / "bpe.txt.gz", 100)
    assert small.vocab_size == 512 + 100 + 2
    for text in ("a photo of a sneaker.", "Käse 猫 🐈", ""):
        ids = small.encode(text)
        assert max(ids, default=0) < small.vocab_size - 2
        assert small.decode(ids).replace(" ", "") == text.lower().replace(" ", "")
    whole = write_small_bpe(tmp_path / "all.txt.gz", 49152 - 512 - 2 + 256)
    assert whole.encode("a photo of a sneaker") == open_clip.SimpleTokenizer().encode(
        "a photo of a sneaker"
    )


def test_files_of_a_run_are_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt.part").write_text("mine")
    path = tmp_path / "checkpoint.pt"
    for _ in range(2):
        save_checkpoint(tmp_path, {"weights": torch.ones(3)})
        path.chmod(0o600)
    first = path.read_bytes()
    with pytest.raises(AttributeError):  # a lambda cannot be pickled
        save_checkpoint(tmp_path, {"weights": lambda: None})
    assert path.read_bytes() == first
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "checkpoint.pt.part").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2
    save_checkpoint(tmp_path, {"weights": torch.ones(3)})
    assert path.read_bytes() == first  # no name of a temporary file in it


def test_metrics_that_are_not_finite_are_json(tmp_path: Path) -> None:
    with closing(Metrics(tmp_path, 0)) as metrics:
        metrics.write({"step": 1, "loss": math.nan})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None}


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": float(step)} for step in range(1, 5)]
    with closing(Metrics(tmp_path, 0)) as metrics:
        for row in rows:
            metrics.write(row)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a killed writer leaves half a row
    with closing(Metrics(tmp_path, 2)) as metrics:
        metrics.write({"step": 3, "loss": 9.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [*rows[:2], {"step": 3, "loss": 9.0}]


def test_folder_without_a_run_is_checked(tmp_path: Path) -> None:
    assert open_folder(tmp_path / "new", setting="steps", resume=True) is None
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="is a file: --out names a folder"):
        open_folder(tmp_path / "file", setting="steps", resume=True)
    for marker in ("open_clip_config.json", "manifest.json"):
        (tmp_path / marker).touch()
        with pytest.raises(SettingsError, match="holds a model or a bundle"):
            open_folder(tmp_path, setting="steps", resume=True)
        (tmp_path / marker).unlink()


def test_checkpoint_is_opened_for_its_own_kind_of_run(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"training": {"steps": 3}})
    state = open_folder(tmp_path, setting="steps", resume=True)
    assert state == {"training": {"steps": 3}}
    with pytest.raises(SettingsError, match="add --resume"):
        open_folder(tmp_path, setting="steps", resume=False)
    with pytest.raises(SettingsError, match="a run of another kind"):
        open_folder(tmp_path, setting="variant", resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(SettingsError, match="cannot be read: remove it"):
        open_folder(tmp_path, setting="steps", resume=True)


def test_settings_of_a_resumed_run(tmp_path: Path) -> None:
    previous = {"steps": 3, "batch_size": 4, "workers": 0, "classes": ["cat"]}
    check_same_run(tmp_path, previous | {"workers": 2, "resume": True}, previous)
    with pytest.raises(SettingsError, match="begun with batch-size 4, not 5: resume it with"):
        check_same_run(tmp_path, previous | {"batch_size": 5}, previous)
    with pytest.raises(SettingsError, match="begun with other classes: resume it with the same"):
        check_same_run(tmp_path, previous | {"classes": ["dog"]}, previous)
