"""`python -m export`: output, refusals, and the files left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeclip.bundle import Bundle
from export import ExportError, bundle
from export.__main__ import main
from tests.support.models.export_models import exported, reuse_encoders, write_folder
from train.models import wording


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]


def test_a_folder_becomes_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write_folder(tmp_path / "run", "vit"), tmp_path / "deep" / "bundle"
    templates = ("--template", "a {}", "--template", "the {}", "--null-template", "nothing {}")
    assert run(folder, "-o", out, *templates, "--description", "mine") == 0
    printed = capsys.readouterr()
    assert f"edgeclip classify IMAGE --labels FILE --bundle {out}" in printed.out
    assert "image_max_abs_diff" in printed.out
    assert " MB" in printed.out
    assert "exporting the image encoder ..." in printed.err
    assert "torch" not in printed.out + printed.err  # its exporter is silent
    manifest = Bundle(out).manifest
    assert manifest.templates == ("a {}", "the {}")
    assert manifest.null_templates == ("nothing {}",)
    assert manifest.description == "mine"
    assert manifest.source["model"] == "run"
    assert sorted(path.name for path in out.parent.iterdir()) == ["bundle"]
    assert out.stat().st_mode & 0o777 == out.parent.stat().st_mode & 0o777
    same = exported("vit").bundle.manifest.files  # an earlier export of the same weights
    assert {name for name in same if manifest.files[name] != same[name]} == {
        "embeddings.safetensors"  # another null template
    }

    before = (out / "manifest.json").read_bytes()
    assert run(folder, "-o", out) == 2
    assert last_line(capsys) == (
        f"error: {out} exists: add --force to replace it, or name another directory"
    )
    assert (out / "manifest.json").read_bytes() == before


def test_force_replaces_a_bundle_only_once_the_new_one_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = exported("vit")
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "manifest.json").write_text("old")
    (out / "stale.onnx").write_text("old")

    reuse_encoders(monkeypatch, tiny)
    words = wording.wording(tiny.source)

    def failing(*_: object) -> None:
        raise ExportError("not the same")

    with monkeypatch.context() as patch:
        patch.setattr(bundle, "verify", failing)
        with pytest.raises(ExportError, match="not the same"):
            bundle.export_bundle(tiny.source, out, words, force=True)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "stale.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]

    bundle.export_bundle(tiny.source, out, words, force=True)
    assert not (out / "stale.onnx").exists()
    Bundle(out).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_force_does_not_delete_what_is_no_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run("ViT-B-32", "--pretrained", "random", "-o", tmp_path, "--force") == 2
    assert last_line(capsys).endswith("is not empty and not a bundle: name another directory")
    assert (tmp_path / "thesis.tex").exists()
    assert run("ViT-B-32", "--pretrained", "random", "-o", tmp_path / "thesis.tex") == 2
    assert "is a file: name a directory" in last_line(capsys)


@pytest.mark.parametrize("kind", ["model", "pretrained", "robustness", "prior"])
def test_force_does_not_destroy_an_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "manifest.json").write_text("old")
    folder = write_folder((out if kind == "model" else tmp_path) / "run", "vit")
    source = folder if kind == "model" else out / "input"
    if kind != "model":
        source.touch()
    more = [] if kind == "model" else [f"--{kind}", source]
    (tmp_path / "link").symlink_to("bundle")
    for name in ("bundle", "link"):
        assert run(folder, "-o", tmp_path / name, "--force", *more) == 2
        assert last_line(capsys) == (
            f"error: cannot write {tmp_path / name}: that would destroy the input {source}; "
            "name another output"
        )
    assert source.exists()
    assert (out / "manifest.json").read_text() == "old"


def test_a_bundle_replaces_the_target_of_a_link_and_keeps_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = exported("vit")
    reuse_encoders(monkeypatch, tiny)
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    target.chmod(0o700)
    link.symlink_to("target")
    for name in (".target.old", "target.old", "link.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    bundle.export_bundle(tiny.source, link, wording.wording(tiny.source))
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o700
    Bundle(target).verify()
    bundle.export_bundle(tiny.source, link, wording.wording(tiny.source), force=True)
    assert target.stat().st_mode & 0o777 == 0o700
    others = {".target.old", "target.old", "link.old"}
    assert {path.name for path in tmp_path.iterdir()} == others | {"target", "link"}
    assert all((tmp_path / name / "mine").exists() for name in others)


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    folder, out = write_folder(tmp_path / "run", "vit"), tmp_path / "file" / "bundle"
    assert run(folder, "-o", out) == 2
    assert last_line(capsys).startswith(f"error: cannot write {out}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ViT-B-23", "--pretrained", "openai"], "error: unknown model 'ViT-B-23': did you mean"),
        (["ViT-B-32"], "error: --pretrained is missing"),
        (["ViT-B-32", "--pretrained", "nothing.pt"], "error: 'nothing.pt' is neither a file nor"),
        (["ViT-B-32", "--pretrained", "a.pt#ema"], "error: 'a.pt#ema' is neither a file nor"),
        (["ViT-B-32", "--pretrained", "random", "--visual", "a.pt"], "error: a.pt does not exist"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*arguments, "-o", tmp_path / "out") == 2
    assert last_line(capsys).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["ViT-B-32"], ["ViT-B-32", "-o", "x", "--precision", "fp64"]):
        with pytest.raises(SystemExit) as caught:
            run(*arguments)
        assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for text in ("TAG_OR_FILE", "--visual fare_eps_2.pt", "#model_ema", "--no-quickgelu"):
        assert text in shown
