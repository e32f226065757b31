"""classify_each, embed_each and stream of a Runtime, and the camera example."""

from __future__ import annotations

import dataclasses
import io
import sys
import threading
import types
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edgeclip
from edgeclip import ImageError, Runtime
from edgeclip.images.decoding import ImageSource
from edgeclip.prediction import FrameAnswer
from examples import camera
from tests.support.commands import BUNDLE
from tests.support.paths import EXAMPLES
from tests.support.threads import WAIT, no_thread_is_left


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    with no_thread_is_left():
        yield


@pytest.fixture
def frames(fashion: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    return list(fashion[0][:21])


def test_classify_each_and_embed_each_equal_one_batch_after_another(
    rt: Runtime, labels: list[str], frames: list[np.ndarray]
) -> None:
    """Compare bit for bit, since the batches are the same."""
    assert list(rt.classify_each(iter(frames), labels)) == rt.classify(frames, labels)
    np.testing.assert_array_equal(list(rt.embed_each(iter(frames))), rt.embed_images(frames))


def test_an_iterator_may_reuse_its_buffer(
    tmp_path: Path, rt: Runtime, frames: list[np.ndarray]
) -> None:
    def arrays() -> Iterator[np.ndarray]:
        buffer = np.empty_like(frames[0])
        for frame in frames:
            buffer[:] = frame
            yield buffer
            buffer[:] = 0

    def pictures() -> Iterator[Image.Image]:
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(tmp_path / f"{i}.png")
            # Not decoded yet, and closed after the yield.
            with Image.open(tmp_path / f"{i}.png") as picture:
                yield picture

    expected = rt.embed_images(frames)
    np.testing.assert_array_equal(list(rt.embed_each(arrays())), expected)
    np.testing.assert_array_equal(list(rt.embed_each(pictures())), expected)


def test_failing_encoder_ends_the_threads(
    labels: list[str], frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    rt = Runtime("garments", labels=labels)

    def fail(inputs: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(rt._image_encoder, "embed", fail)
    with pytest.raises(KeyboardInterrupt) as caught:
        list(rt.classify_each(count_from(frames), labels))
    assert "edgeclip-read" not in {thread.name for thread in threading.enumerate()}
    del caught  # its traceback holds the generator, which the threads did not outlive


def count_from(frames: list[np.ndarray]) -> Iterator[np.ndarray]:
    for i in count():
        yield frames[i % len(frames)]


def test_one_runtime_pipelines_in_many_threads(
    rt: Runtime, labels: list[str], frames: list[np.ndarray]
) -> None:
    expected, answers = rt.classify(frames, labels), {}

    def work(name: int) -> None:
        answers[name] = list(rt.classify_each(frames, labels))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == dict.fromkeys(range(4), expected)


def test_stream_answers_frames_as_classify_does(
    rt: Runtime, labels: list[str], frames: list[np.ndarray]
) -> None:
    requested = threading.Semaphore(1)

    def take() -> Iterator[ImageSource]:
        buffer = np.empty_like(frames[0])
        for frame in frames[:5]:
            assert requested.acquire(timeout=WAIT)
            buffer[:] = frame
            yield buffer
        assert requested.acquire(timeout=WAIT)
        yield b"no image"

    answers = []
    for answer in rt.stream(take(), labels, top_k=2):
        answers.append(answer)
        requested.release()
    alone = [rt.classify(frame, labels, top_k=2) for frame in frames[:5]]
    assert answers[:5] == [FrameAnswer(i, answer) for i, answer in enumerate(alone)]
    assert isinstance(answers[5].predictions, ImageError)
    with pytest.raises(dataclasses.FrozenInstanceError):
        answers[0].index = 3


def test_stream_of_a_fast_camera_and_a_slow_encoder(
    rt: Runtime, labels: list[str], frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding, all_read = threading.Event(), threading.Event()
    embed = rt._image_encoder.embed

    def slow(inputs: np.ndarray) -> np.ndarray:
        encoding.set()
        assert all_read.wait(WAIT)
        return embed(inputs)

    monkeypatch.setattr(rt._image_encoder, "embed", slow)

    def take() -> Iterator[np.ndarray]:
        yield frames[0]
        assert encoding.wait(WAIT)
        yield from frames[1:]
        all_read.set()

    answers = list(rt.stream(take(), labels))
    # The reader may end before the last answer is taken, never before the last frame is.
    assert [answer.index for answer in answers] == [0, len(frames) - 1]
    assert answers[1].predictions == rt.classify(frames[-1], labels)


def test_stream_refuses_other_types(rt: Runtime, labels: list[str]) -> None:
    with pytest.raises(TypeError, match="takes a list, got one str"):
        next(rt.stream("a.png", labels))
    with pytest.raises(TypeError, match="not iterable"):
        next(rt.stream(3, labels))
    with pytest.raises(ValueError, match="top_k"):
        next(rt.stream([], labels, top_k=0))
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8"):
        list(rt.stream([np.zeros((2, 2))], labels))


def test_directory_of_many_files_is_answered_in_order(
    tmp_path: Path, rt: Runtime, labels: list[str], frames: list[np.ndarray]
) -> None:
    for i, frame in enumerate(frames):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "PNG")
        (tmp_path / f"{i:03}.png").write_bytes(buffer.getvalue() if i != 9 else b"broken")
    answers = list(rt.classify_each(sorted(tmp_path.iterdir()), labels))
    assert isinstance(answers[9], ImageError)
    assert "009.png" in str(answers[9])
    del answers[9], frames[9]
    for answer, alone in zip(answers, rt.classify(frames, labels), strict=True):
        assert [p.index for p in answer] == [p.index for p in alone]
        np.testing.assert_allclose([p.score for p in answer], [p.score for p in alone], atol=1e-5)


def fake_cv2(opens: bool, pictures: list[np.ndarray]) -> types.ModuleType:
    """Imitate the part of OpenCV that the example uses; pictures are RGB."""
    waiting = [np.ascontiguousarray(picture[:, :, ::-1]) for picture in pictures]

    class VideoCapture:
        def __init__(self, source: int | str) -> None:
            self.source = source

        def isOpened(self) -> bool:  # noqa: N802  (OpenCV's name)
            return opens

        def read(self) -> tuple[bool, np.ndarray | None]:
            return (True, waiting.pop(0)) if waiting else (False, None)

        def release(self) -> None:
            waiting.clear()

    module = types.ModuleType("cv2")
    module.VideoCapture = VideoCapture
    return module


def test_camera_example(
    labels: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*BUNDLE, *(word for label in labels for word in ("--label", label))]
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert camera.main(arguments) == 2
    assert "error: OpenCV is missing: pip install" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "cv2", fake_cv2(False, []))
    assert camera.main(["--camera", "rtsp://none", *arguments]) == 2
    assert capsys.readouterr().err == (
        "error: camera rtsp://none does not open: name another with --camera\n"
    )
    trousers = np.asarray(Image.open(EXAMPLES / "coloured-trousers.jpg"))
    monkeypatch.setitem(sys.modules, "cv2", fake_cv2(True, [trousers]))
    assert camera.main(arguments) == 0
    best = edgeclip.Runtime("garments", labels=labels).classify(trousers, top_k=1)[0]
    assert capsys.readouterr().out == f"frame 0: {best.score:.1%} {best.label}\n"
    monkeypatch.setitem(sys.modules, "cv2", fake_cv2(True, [trousers]))
    assert camera.main([*arguments, "--bundle", "none"]) == 2
    assert capsys.readouterr().err.startswith("error: none")
