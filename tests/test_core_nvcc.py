"""The CUDA kernels compile by nvcc without a warning and fit the registers. No GPU is needed."""

from __future__ import annotations

import re
import shutil

import cuda_check
import pytest


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on the PATH")
def test_kernels_compile_and_fit() -> None:
    kernels = cuda_check.report([87])  # all of them: make cuda-check
    names = {kernel.name.partition("<")[0] for kernel in kernels}
    expected = {"score", "finish", "purify", "filter", "fill", "horizontal", "vertical"}
    assert names == {f"{name}_kernel" for name in expected}
    assert [kernel for kernel in kernels if not kernel.fits] == []


def test_every_architecture_of_the_build_is_checked() -> None:
    text = (cuda_check.ROOT / "CMakeLists.txt").read_text()
    [line] = [line for line in text.splitlines() if "-real" in line]
    numbers = line.partition("CACHE")[0]
    assert [int(n) for n in re.findall(r"\d+", numbers)] == cuda_check.ARCHITECTURES
