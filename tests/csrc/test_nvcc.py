"""Compilation of the CUDA kernels by nvcc: no warnings, and few enough registers. Needs no GPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support.gpu import cuda_check


@pytest.mark.skipif(cuda_check.find_nvcc() is None, reason="needs nvcc (the extra dev has it)")
def test_kernels_compile_and_fit() -> None:
    nvcc = cuda_check.find_nvcc()
    assert nvcc is not None
    kernels = cuda_check.report(nvcc, [87])  # make cuda-check compiles for all architectures
    names = {kernel.name.partition("<")[0] for kernel in kernels}
    expected = {"score", "finish", "purify", "filter", "fill", "horizontal", "vertical"}
    assert names == {f"{name}_kernel" for name in expected}
    assert [kernel for kernel in kernels if not kernel.fits] == []


def test_every_architecture_of_the_build_is_checked() -> None:
    text = (cuda_check.ROOT / "CMakeLists.txt").read_text()
    [line] = [line for line in text.splitlines() if "-real" in line]
    numbers = line.partition("CACHE")[0]
    assert [int(n) for n in re.findall(r"\d+", numbers)] == cuda_check.ARCHITECTURES


def test_nvcc_on_the_path_is_preferred_to_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lay the packages out as pip does; several share the folder `nvidia`."""
    names = ("path/nvcc", "site/nvidia/cu13/bin/nvcc", "site/nvidia/cu12/bin/nvcc")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert cuda_check.find_nvcc() == str(tmp_path / names[0])
    monkeypatch.setenv("PATH", "")
    assert cuda_check.find_nvcc() == str(tmp_path / names[1])
    monkeypatch.setattr(sys, "path", [str(tmp_path / "path")])
    assert cuda_check.find_nvcc() is None
