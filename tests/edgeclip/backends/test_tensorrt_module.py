"""TensorRT's Python module: which one is imported, and the errors of one that does not work."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgeclip.backends.tensorrt_module import import_tensorrt
from edgeclip.errors import DeviceError
from tests.support.gpu import fake_tensorrt


def test_import(monkeypatch: pytest.MonkeyPatch) -> None:
    jetpack = fake_tensorrt.module("tensorrt-10.3.0")
    rtx = fake_tensorrt.module("tensorrt_rtx-1.4.0.76")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    monkeypatch.setitem(sys.modules, "tensorrt", jetpack)
    assert import_tensorrt() is jetpack
    monkeypatch.setattr(jetpack, "__version__", "8.6.2")
    with pytest.raises(
        DeviceError, match=r"tensorrt 8.6.2 is too old, edgeclip needs 10.3 or later: pip"
    ):
        import_tensorrt()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("raise ModuleNotFoundError(name='tensorrt')", "tensorrt is not installed: pip install"),
        ("import tensorrt_bindings_of_nobody", r"only partly installed \(No module named"),
        (
            "raise ImportError('libnvinfer.so.10: cannot open\\nshared object file')",
            r"libraries do not load \(libnvinfer.so.10: cannot open shared object file\)",
        ),
        ("raise OSError('libcuda.so.1: no such file')", "libraries do not load"),
    ],
)
def test_a_module_that_does_not_import(
    module: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(module)
    (tmp_path / "tensorrt_rtx.py").write_text("raise ModuleNotFoundError(name='tensorrt_rtx')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(DeviceError, match=message) as err:
        import_tensorrt()
    assert "--system-site-packages" in str(err.value)
    assert "\n" not in str(err.value)
