"""Selection of a device: the best that works, with warnings about the others."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path

import pytest

from edgeclip import DeviceError, _core
from edgeclip.backends import select
from edgeclip.backends.engine_cache import BuildOptions, EngineCache, EngineKey
from edgeclip.bundle import Bundle
from edgeclip.cli.main import main
from tests.support.commands import BUNDLE
from tests.support.paths import EXAMPLES


def key(graphs: tuple[str, ...], **changes: object) -> EngineKey:
    fields = {
        "module": "tensorrt",
        "version": "10.3.0",
        "capability": (8, 7),
        "device": "Orin",
        "options": BuildOptions(),
        "flags": (),
    }
    return EngineKey(graphs=graphs, **{**fields, **changes})


BAG = str(EXAMPLES / "bag.png")
ORDER = ["tensorrt", "cuda", "cpu"]


def open_auto() -> select.ImageSide:
    return select.open_image_side(Bundle("garments"), "auto", "auto", batch_size=1, threads=1)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_auto_falls_back_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: int
) -> None:
    open_device, tried = select._open, []

    def some_fail(bundle: Bundle, device: str, *_: object) -> select.ImageSide:
        tried.append(device)
        if device in ORDER[:broken]:
            raise DeviceError(f"{device} is broken")
        return open_device(bundle, "cpu", "fp32", 1, 1)

    monkeypatch.setattr(select, "_open", some_fail)
    monkeypatch.setattr(select, "available_devices", lambda: ["cuda", "cpu"])
    monkeypatch.setattr(select, "stored_engines", lambda _: [Path("an.engine")])
    open_auto()
    assert tried == ORDER[: broken + 1]
    messages = [record.getMessage() for record in caplog.records]
    expected = [f"{a} is broken; using {b}" for a, b in pairwise(ORDER)]
    assert messages == expected[:broken]


def test_the_last_error_is_raised_if_no_device_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> select.ImageSide:
        raise DeviceError("broken")

    monkeypatch.setattr(select, "_open", fail)
    with pytest.raises(DeviceError, match="broken"):
        open_auto()


def test_a_broken_driver_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError("no CUDA-capable device is detected")

    monkeypatch.setattr(_core, "cuda_built", lambda: True)
    monkeypatch.setattr(_core, "cuda_device", broken, raising=False)
    with pytest.raises(DeviceError, match="do not work here: no CUDA-capable device"):
        select.open_image_side(Bundle("garments"), "cuda", "auto", batch_size=1, threads=1)


def test_stored_engines_belong_to_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, cache = Bundle("garments"), EngineCache()
    cache.save(key(("another graph",)), b"engine", {"golden": 0.0})
    engine = cache.save(key(select.graph_hashes(bundle, "fp32")), b"own engine", {"golden": 0.0})
    monkeypatch.setattr(select._core, "cuda_built", lambda: True)
    assert select.stored_engines(bundle) == [engine]
    monkeypatch.setattr(select._core, "cuda_built", lambda: False)
    assert select.stored_engines(bundle) == []  # no device can run them


def test_the_latest_engine_ignores_options(caplog: pytest.LogCaptureFixture) -> None:
    cache, graphs = EngineCache(), ("graph",)
    assert cache.latest(key(graphs)) is None
    old = cache.save(key(graphs), b"old", {"golden": 0.0})
    new = cache.save(key(graphs, options=BuildOptions(max_batch=2)), b"new", {"golden": 0.0})
    os.utime(old, (1, 1))
    assert cache.latest(key(graphs, options=BuildOptions(max_batch=4))) == new
    for other in ({"version": "10.13.0"}, {"device": "Thor"}, {"capability": (11, 0)}):
        assert cache.latest(key(graphs, **other)) is None
    new.write_bytes(b"damaged")
    os.utime(new, (2, 2))
    assert cache.latest(key(graphs)) == old
    assert "is damaged" in caplog.text


@pytest.mark.skipif(_core.cuda_built(), reason="needs an extension without CUDA")
@pytest.mark.parametrize("command", [["classify", BAG, *BUNDLE, "--label", "bag"], ["doctor"]])
def test_tensorrt_without_cuda_is_a_line(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--device", "tensorrt"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: device 'tensorrt' needs edgeclip's CUDA kernels")


@pytest.mark.skipif(_core.cuda_built(), reason="needs an extension without CUDA")
def test_build_without_cuda_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "garments", "--precision", "fp32"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.match("error: (device 'tensorrt' needs edgeclip's CUDA|TensorRT is not)", error)
    for arguments, message in (
        (["--precision", "int8"], "invalid choice"),
        (["--images", BAG], "--images and --labels go together"),
        (["--max-batch", "65"], "up to 64"),
    ):
        try:
            status = main(["build", *arguments])
        except SystemExit as err:
            status = err.code
        assert status == 2
        assert message in capsys.readouterr().err
