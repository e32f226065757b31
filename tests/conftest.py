"""Fixtures shared by the tests. No test reaches the network or the user's own cache."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys

from tests.support.paths import EXAMPLES, VECTORS

# Before anything imports huggingface_hub, through tokenizers or open_clip.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeclip


@pytest.fixture(scope="session", autouse=True)
def _no_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set a cache for the fixtures of the session, which come before `cache`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGECLIP_CACHE", str(tmp_path_factory.mktemp("session-cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """Handle Ctrl-C, which tests send, and which a script's background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def embedded_trials(_no_user_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the trials of garments on this processor and no others."""
    edgeclip.Runtime("garments", device="cpu", purify="none")
    trials = Path(os.environ["EDGECLIP_CACHE"]) / "trials"
    return Path(shutil.copytree(trials, tmp_path_factory.mktemp("embedded") / "trials"))


@pytest.fixture(autouse=True)
def cache(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    embedded_trials: Path,
) -> Path:
    """Set a new cache that holds only the trials of garments."""
    folder = tmp_path_factory.mktemp("cache")
    shutil.copytree(embedded_trials, folder / "trials")
    monkeypatch.setenv("EDGECLIP_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Restore PyTorch's threads, which --threads sets and which change how sums are rounded."""
    torch: Any = sys.modules.get("torch")  # not all tests load it
    before = torch and torch.get_num_threads()
    yield
    if before:
        torch.set_num_threads(before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def labels() -> list[str]:
    return [label.name for label in edgeclip.read_labels(EXAMPLES / "labels.txt")]


@pytest.fixture(scope="session")
def rt() -> edgeclip.Runtime:
    """Return the bundle garments in fp32, without purification."""
    return edgeclip.Runtime("garments", purify="none", precision="fp32")


@pytest.fixture(scope="session")
def fashion() -> tuple[np.ndarray, np.ndarray]:
    """Return 200 test images of Fashion-MNIST, uint8 (N, 28, 28, 3), and their labels (N,)."""
    with np.load(VECTORS / "fashion_200.npz") as arrays:
        grey, labels = arrays["images"], arrays["labels"]
    return np.repeat(grey[..., None], 3, axis=3), labels


@pytest.fixture(scope="session")
def devices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the devices null and full; copies of them for root, who could destroy them."""
    if os.geteuid() != 0:
        return {name: Path("/dev", name) for name in ("null", "full")}
    folder = tmp_path_factory.mktemp("devices")
    copies = {name: folder / name for name in ("null", "full")}
    try:
        for name, path in copies.items():
            os.mknod(path, stat.S_IFCHR | 0o666, os.stat(f"/dev/{name}").st_rdev)
            path.open("wb").close()
    except OSError as err:
        pytest.skip(f"devices cannot be made or used here: {err}")
    return copies


@pytest.fixture
def fashion_folder(tmp_path: Path, fashion: tuple[np.ndarray, np.ndarray]) -> Path:
    """Write 150 training and 50 test images in the file format of Fashion-MNIST."""
    # Imported here: it loads timm and with it PyTorch, which most tests do not need.
    from tests.support.data.data_sets import write_idx

    images, labels = fashion
    for prefix, count in (("train", 150), ("t10k", 50)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images[:count, :, :, 0])
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels[:count].astype(np.uint8))
    return tmp_path
