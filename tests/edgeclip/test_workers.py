"""A Runtime in worker processes: pickled for a new one, inherited by one that was forked."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgeclip
from edgeclip import CosPurifier, Runtime
from tests.support.paths import EXAMPLES, GARMENTS

IMAGES = sorted(str(path) for path in (EXAMPLES).glob("*.png"))


class Embeddings(torch.utils.data.Dataset):
    """A user's data set: image files, and a Runtime that workers share by fork or pickle."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.runtime.embed_images(IMAGES[index])[0]


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    """Open a Runtime with two threads, which a fork does not inherit."""
    runtime = Runtime("garments", labels=["bag", "ankle boot"], precision="fp32", threads=2)
    runtime.classify(IMAGES)
    return runtime


def test_a_pickled_runtime_answers_alike(runtime: Runtime) -> None:
    other = pickle.loads(pickle.dumps(runtime))
    assert other.classify(IMAGES) == runtime.classify(IMAGES)
    assert other.bundle.path == runtime.bundle.path


def test_its_arguments_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").symlink_to(GARMENTS)
    monkeypatch.chdir(tmp_path)
    labels = Runtime("garments", precision="int8").labels(["bag", "boot"])
    asked: dict[str, Any] = {
        "device": "cpu",
        "precision": "int8",
        "purify": CosPurifier(3, 0.1),
        "decode": "exact",
        "batch_size": 3,
        "threads": 1,
    }
    pickled = pickle.dumps(Runtime("here", labels=labels, **asked))
    monkeypatch.chdir("/")  # a worker may run elsewhere
    other = pickle.loads(pickled)
    assert (other.precision, other.batch_size, other.purifier) == ("int8", 3, CosPurifier(3, 0.1))
    assert other._preprocessor._fast_for is None
    assert other._threads == 1
    assert len(other.classify(IMAGES[0])) == 2


def test_an_unused_text_encoder_and_tokens_survive_a_fork(runtime: Runtime) -> None:
    runtime.explain(IMAGES[0], "bag")
    runtime.embed_texts(["a bag"])
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found, map_there = pool.apply_async(_all_of, (runtime,)).get(timeout=60)
    np.testing.assert_allclose(found, runtime.embed_texts(["a coat"]), atol=1e-6)
    np.testing.assert_array_equal(map_there, runtime.explain(IMAGES[0], "bag").attention)


def _all_of(runtime: Runtime) -> tuple[np.ndarray, np.ndarray]:
    return runtime.embed_texts(["a coat"]), runtime.explain(IMAGES[0], "bag").attention


class Holder:
    """Keeps the Runtime in a global, which a fork inherits without pickling."""

    runtime: Runtime


def _inherited(image: str) -> tuple[list[edgeclip.Prediction], bytes]:
    attention = Holder.runtime.explain(image, "bag").attention
    return Holder.runtime.classify(image), attention.tobytes()


def test_a_forked_process_inherits_it(runtime: Runtime) -> None:
    Holder.runtime = runtime
    expected = [_inherited(image) for image in IMAGES]  # the token graph is open before the fork
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map_async(_inherited, IMAGES).get(timeout=60)
    assert found == expected


# A fork of a process with as many threads as a session of tests has may hang in any library's lock.
@pytest.mark.parametrize("method", [pytest.param("fork", marks=pytest.mark.slow), "spawn"])
def test_a_loader_of_pytorch(runtime: Runtime, method: str) -> None:
    loader = torch.utils.data.DataLoader(
        Embeddings(runtime),
        batch_size=2,
        num_workers=1 if method == "spawn" else 2,  # each loads PyTorch anew
        multiprocessing_context=method,
        timeout=100,
    )
    found = np.concatenate([batch.numpy() for batch in loader])
    np.testing.assert_allclose(found, runtime.embed_images(IMAGES), atol=1e-6)
