"""Trials of precisions on this machine: correctness, choice of the fastest, and caching."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgeclip
from edgeclip import DeviceError, Runtime, host
from edgeclip.backends import trials
from edgeclip.backends.golden_values import GoldenValues, embedding_limit
from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.backends.trials import Trial, best
from edgeclip.bundle import Bundle
from edgeclip.cli.main import main
from edgeclip.storage import sha256
from tests.support.paths import EXAMPLES, GARMENTS

BAG = str(EXAMPLES / "bag.png")


@pytest.fixture
def fresh(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that clears the trials in memory; the cache starts empty."""
    shutil.rmtree(cache / "trials")

    def forget() -> None:
        monkeypatch.setattr(trials, "_memory", {})

    forget()
    return forget


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Replace timings by a table, which is returned: precision -> milliseconds."""
    table = {"fp32": 2.0, "int8": 1.0}

    def time_ms(encoder: OnnxEncoder, _: object) -> float:
        return table[encoder._path.name.split(".")[1]]

    monkeypatch.setattr(trials, "_time_ms", time_ms)
    return table


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the precision of each trial that is not cached."""
    precisions: list[str] = []
    make_trial = trials._try

    def record(bundle: Bundle, precision: str, *rest: Any) -> Trial:
        precisions.append(precision)
        return make_trial(bundle, precision, *rest)

    monkeypatch.setattr(trials, "_try", record)
    return precisions


def spoil(bundle: Path, file: str) -> Path:
    """Make one encoder wrong, and update its hash in the manifest."""
    model = onnx.load(bundle / file)
    names = ("visual.ln_post.bias", "encoder.model.ln_final.bias")
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name in names)
    noise = np.random.default_rng(0).standard_normal(bias.dims[0]).astype(np.float32)
    bias.CopyFrom(numpy_helper.from_array(noise, bias.name))
    onnx.save(model, bundle / file)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][file] = sha256(bundle / file)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


@pytest.fixture
def copy(tmp_path: Path, fresh: Callable[[], None]) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(GARMENTS, folder)
    return folder


@pytest.mark.parametrize("file", ["image_encoder.int8.onnx", "text_encoder.int8.onnx"])
def test_auto_rejects_a_wrong_precision(
    copy: Path, times: dict[str, float], caplog: pytest.LogCaptureFixture, file: str
) -> None:
    spoil(copy, file)
    runtime = Runtime(copy)
    assert (runtime.precision, runtime.text_precision) == ("fp32", "fp32")
    (message,) = (record.getMessage() for record in caplog.records)
    kind = file.partition("_")[0]
    assert f"not using int8 on this cpu: golden {kind} embeddings differ by" in message
    caplog.clear()
    Runtime(copy)
    assert not caplog.records  # the warning comes once


def test_a_named_wrong_precision_is_used_with_one_warning(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(copy, "image_encoder.int8.onnx")
    for _ in range(2):
        caplog.clear()
        assert Runtime(copy, precision="int8").precision == "int8"
        (message,) = (record.getMessage() for record in caplog.records)
        assert (
            "int8 misses the golden outputs on this cpu (golden image embeddings differ by"
            in message
        )
        assert "use precision auto" in message
    caplog.clear()
    Runtime(copy, precision="fp32")
    assert not caplog.records


def test_it_is_an_error_if_all_precisions_are_wrong(
    copy: Path, capsys: pytest.CaptureFixture[str], times: dict[str, float]
) -> None:
    spoil(spoil(copy, "image_encoder.fp32.onnx"), "image_encoder.int8.onnx")
    with pytest.raises(
        DeviceError, match=r"no precision reproduces the golden outputs \(fp32: golden"
    ):
        Runtime(copy)
    assert main(["classify", BAG, "--label", "bag", "--bundle", str(copy)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert main(["doctor", str(copy)]) == 2
    assert "no precision reproduces the golden outputs" in capsys.readouterr().err


def test_doctor_fails_only_for_the_precision_that_auto_uses(
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    times: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = Path(shutil.copytree(copy, copy.with_name("good")))
    spoil(copy, "image_encoder.int8.onnx")
    assert main(["doctor", str(copy), "--format", "json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["device_used"], report["precision_used"]) == ("cpu", "fp32")
    assert "do not use int8 here" in report["devices"][-1]
    assert err == ""

    assert main(["doctor", str(good), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["precision_used"] == "int8"
    # An older trial, whose result is outdated.
    monkeypatch.setattr(trials, "trials", lambda *_, **__: {})
    monkeypatch.setattr("edgeclip.backends.select.choose_precision", lambda *_: "int8")
    assert main(["doctor", str(copy)]) == 2
    out, err = capsys.readouterr()
    assert "do not use int8 here" in err
    assert "do not use int8 here" in json.loads(out)["problem"]


@pytest.mark.parametrize(
    ("fp32", "int8", "expected"),
    [(2.0, 1.0, "int8"), (1.0, 2.0, "fp32"), (2.0, 1.41, "fp32"), (2.0, 1.39, "int8")],
)
def test_auto_takes_the_fastest_by_a_margin(
    fresh: Callable[[], None], times: dict[str, float], fp32: float, int8: float, expected: str
) -> None:
    times.update(fp32=fp32, int8=int8)
    assert Runtime("garments").precision == expected


def test_best_of_trials() -> None:
    def chosen(**results: tuple[str, float | None]) -> str:
        return best({name: Trial(*result) for name, result in results.items()}, "fp32", 0.9)

    assert chosen(int8=("", 5.0), fp16=("", 4.0)) == "fp16"  # without fp32
    assert chosen(fp32=("", None)) == "fp32"  # alone, and not timed
    assert chosen(fp32=("wrong", None), int8=("", 9.0)) == "int8"
    with pytest.raises(DeviceError, match=r"\(fp32: wrong; int8: too\)"):
        chosen(fp32=("wrong", None), int8=("too", None))


def test_a_trial_is_cached(
    fresh: Callable[[], None],
    runs: list[str],
    times: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    Runtime("garments", precision="fp32")
    assert runs == ["fp32"]
    assert Runtime("garments").precision == "int8"
    assert runs == ["fp32", "fp32", "int8"]  # fp32 again, now timed
    monkeypatch.setattr(trials, "_memory", {})
    for precision in ("auto", "fp32", "int8"):
        Runtime("garments", precision=precision)
    assert len(runs) == 3  # as in another process, which reads the cache
    # Each part of the key requires a new trial.
    ort = trials.import_onnxruntime()
    monkeypatch.setattr(ort, "__version__", "9.9.9")
    Runtime("garments")
    monkeypatch.setattr(host, "processor", lambda: "another")
    Runtime("garments")
    Runtime("garments", threads=1)
    other = tmp_path / "other"
    shutil.copytree(GARMENTS, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"description": "another"}))
    Runtime(other)
    assert len(runs) == 3 + 4 * 2


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"nonsense", b'{"key": {}, "trials": {}}', None, b"\xff", b'{"key": 1}'],
)
def test_a_damaged_file_is_replaced_by_a_new_trial(
    fresh: Callable[[], None], runs: list[str], cache: Path, content: bytes | None
) -> None:
    Runtime("garments", precision="fp32")
    (file,) = (cache / "trials").iterdir()
    if content is None:  # the key is valid, a value is not
        document = json.loads(file.read_text())
        content = json.dumps(document | {"trials": {"fp32": {"problem": 3, "ms": "x"}}}).encode()
    file.write_bytes(content)
    fresh()
    Runtime("garments", precision="fp32")
    assert len(runs) == 2
    fresh()
    Runtime("garments", precision="fp32")
    assert len(runs) == 2


def test_an_unwritable_cache_is_logged(
    fresh: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "file" / "cache"))
    Runtime("garments", precision="fp32")
    assert "cannot cache the trials of precisions" in caplog.text
    assert "set EDGECLIP_CACHE" in caplog.text


def test_a_failure_is_not_cached(
    fresh: Callable[[], None],
    times: dict[str, float],
    runs: list[str],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    embed = OnnxEncoder.embed

    def no_memory(encoder: OnnxEncoder, inputs: np.ndarray) -> np.ndarray:
        if "int8" in encoder._path.name:
            raise DeviceError("out of memory")
        return embed(encoder, inputs)

    monkeypatch.setattr(OnnxEncoder, "embed", no_memory)
    assert Runtime("garments").precision == "fp32"
    assert "not using int8 on this cpu: out of memory" in caplog.text
    (file,) = (cache / "trials").iterdir()
    assert json.loads(file.read_text())["trials"].keys() == {"fp32"}
    monkeypatch.setattr(OnnxEncoder, "embed", embed)
    assert Runtime("garments").precision == "int8"
    assert runs == ["fp32", "int8", "int8"]


@pytest.mark.parametrize("file", ["image_encoder.int8.onnx", "text_encoder.int8.onnx"])
def test_auto_rejects_a_precision_that_does_not_load(
    copy: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    """Use an operator that this ONNX Runtime does not know."""
    model = onnx.load(copy / file)
    model.graph.node[-1].op_type = "OfTomorrow"
    onnx.save(model, copy / file)
    Bundle.write_manifest(copy, Bundle(copy).manifest)
    assert Runtime(copy).precision == "fp32"
    assert "not using int8" in caplog.text
    with pytest.raises(edgeclip.BundleError, match="does not load on cpu"):
        Runtime(copy, precision="int8").labels(["bag"])


def test_threads_share_a_trial(fresh: Callable[[], None], runs: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        opened = list(
            pool.map(lambda name: Runtime("garments", precision=name), ["auto", "fp32"] * 4)
        )
    assert len({runtime.precision for runtime in opened[::2]}) == 1
    assert len(runs) <= 3


def test_a_limit_follows_the_distance_measured_at_export() -> None:
    manifest = Bundle("garments").manifest
    parity = manifest.precisions["int8"].parity
    for kind, largest in (("image", 0.05), ("text", 0.142)):
        assert embedding_limit(manifest, "fp32", kind) == 1e-4
        exported = np.sqrt(2 - 2 * parity[f"golden_{kind}_min_cosine"])
        assert exported < embedding_limit(manifest, "int8", kind) < largest
    older = {"golden_min_cosine": 0.999}
    variant = dataclasses.replace(manifest.precisions["int8"], parity=older)
    manifest = dataclasses.replace(manifest, precisions={"int8": variant})
    assert embedding_limit(manifest, "int8", "image") == pytest.approx(0.01 + 2 * 0.002**0.5)


def test_golden_values_are_checked(copy: Path) -> None:
    arrays = dict(np.load(copy / "golden.npz"))
    np.savez(copy / "golden.npz", **arrays | {"pixels": arrays["pixels"][:, :5]})
    Bundle.write_manifest(copy, Bundle(copy).manifest)
    values = GoldenValues(Bundle(copy))
    assert values.ids.shape == arrays["ids"].shape
    with pytest.raises(edgeclip.BundleError, match="no array 'pixels' of the right shape"):
        _ = values.pixels


def test_a_first_trial_is_logged(
    fresh: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "edgeclip.backends.trials")
    Runtime("garments")
    assert "trying fp32 and int8 on this machine, once" in caplog.text


def test_clearing_the_cache_deletes_trials(
    fresh: Callable[[], None],
    runs: list[str],
    cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Runtime("garments", precision="fp32")
    assert main(["cache", "--clear", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] > 0
    assert not list((cache / "trials").iterdir())
    Runtime("garments", precision="fp32")
    assert len(runs) == 2
