"""The threads behind classify_each, embed_each and stream: order, errors, bounds, and their end."""

from __future__ import annotations

import dataclasses
import io
import sys
import threading
import types
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edgeclip
from edgeclip import ImageError, Runtime
from edgeclip.images.decoding import ImageSource
from edgeclip.prediction import FrameAnswer
from edgeclip.prefetch import BUFFERS, batches, newest
from examples import camera
from tests.support.paths import EXAMPLES

WAIT = 30  # seconds until a test fails; none measures time
SIZE = 4


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def frames(fashion: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    return list(fashion[0][:21])


def fill(row: np.ndarray, image: ImageSource) -> None:
    """Imitate preprocessing: a number is an image, and a negative one is unreadable."""
    if image < 0:
        raise ImageError(f"image {image}")
    row[:] = image


def run(
    source: object, prepare: Callable[..., None] = fill, workers: int = 3
) -> list[float | ImageError]:
    """Return the value or error of each image of the source, in order."""
    results: list[float | ImageError] = []
    for batch, errors in batches(source, prepare, (SIZE, 1), workers):
        rows = iter(batch[:, 0].tolist())
        results += [error or next(rows) for error in errors]
        assert next(rows, None) is None
    return results


def drain(given: Iterator[tuple[np.ndarray, object]], seen: list[float]) -> None:
    for batch, _ in given:
        seen += batch[:, 0].tolist()


@pytest.mark.parametrize("total", [0, 1, SIZE - 1, SIZE, SIZE + 1, 10 * SIZE + 3])
def test_every_image_comes_once_and_in_order(total: int) -> None:
    assert run(range(1, total + 1)) == list(range(1, total + 1))


def test_order_holds_where_later_images_are_ready_first() -> None:
    second_done = threading.Event()

    def slow_first(row: np.ndarray, image: ImageSource) -> None:
        if image == 1:
            assert second_done.wait(WAIT)
        fill(row, image)
        if image == 2:
            second_done.set()

    assert run(range(1, 10), slow_first) == list(range(1, 10))


def test_unreadable_images_leave_the_others_in_place() -> None:
    found = run([1, -2, 3, 4, -5, -6, -7, -8, 9])
    assert [str(x) if isinstance(x, ImageError) else x for x in found] == [
        1, "image -2", 3, 4, "image -5", "image -6", "image -7", "image -8", 9,
    ]  # fmt: skip


@pytest.mark.parametrize("before", [0, 1, SIZE, SIZE + 2])
@pytest.mark.parametrize("error", [OSError("unplugged"), KeyboardInterrupt()])
def test_error_of_the_source_comes_after_the_images_before_it(
    before: int, error: BaseException
) -> None:
    def source() -> Iterator[int]:
        yield from range(1, before + 1)
        raise error

    seen: list[float] = []
    with pytest.raises(type(error)) as caught:
        drain(batches(source(), fill, (SIZE, 1), 2), seen)
    assert caught.value is error
    assert seen == list(range(1, before + 1))


def test_error_that_is_no_image_error_is_raised_in_its_place() -> None:
    seen: list[float] = []
    with pytest.raises(TypeError, match="NoneType"):
        drain(batches([1, 2, 3, 4, 5, None, 7], fill, (SIZE, 1), 2), seen)
    assert seen == [1, 2, 3, 4, 5]


def test_source_is_read_by_one_thread_and_a_bounded_way_ahead() -> None:
    readers: set[int] = set()
    pulled: list[int] = []

    def source() -> Iterator[int]:
        for i in range(100 * SIZE):
            readers.add(threading.get_ident())
            pulled.append(i)
            yield i

    for done, (_batch, errors) in enumerate(batches(source(), fill, (SIZE, 1), 3)):
        assert len(errors) == SIZE
        assert (done + 1) * SIZE <= len(pulled) <= (done + BUFFERS) * SIZE
    assert len(pulled) == 100 * SIZE
    assert len(readers) == 1


def test_full_batch_does_not_wait_for_the_source() -> None:
    released = threading.Event()

    def source() -> Iterator[int]:
        yield from range(SIZE)
        assert released.wait(WAIT)
        yield SIZE

    given = batches(source(), fill, (SIZE, 1), 2)
    batch, _ = next(given)
    assert batch[:, 0].tolist() == [0, 1, 2, 3]
    released.set()
    assert [row.tolist() for row, _ in given] == [[[4.0]]]


def test_images_are_prepared_side_by_side() -> None:
    together = threading.Barrier(3, timeout=WAIT)  # broken, and so an error, by fewer than three

    def meet(row: np.ndarray, image: ImageSource) -> None:
        together.wait()
        fill(row, image)

    assert run(range(6), meet) == list(range(6))


def test_closing_early_stops_reading() -> None:
    pulled: list[int] = []
    given = batches((pulled.append(i) or i for i in count()), fill, (SIZE, 1), 2)
    next(given)
    given.close()  # the fixture sees that the threads are gone
    assert len(pulled) <= BUFFERS * SIZE + 1


def test_a_source_that_hangs_does_not_hold_up_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeclip.prefetch.GRACE", 0.01)
    hanging, released = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield from range(SIZE)
        hanging.set()
        assert released.wait(WAIT)
        yield SIZE

    given = batches(source(), fill, (SIZE, 1), 2)
    next(given)
    assert hanging.wait(WAIT)
    given.close()
    (reader,) = (t for t in threading.enumerate() if t.name == "edgeclip-read")
    assert reader.daemon  # the end of the program does not wait for it either
    released.set()
    reader.join(WAIT)


def test_classify_each_and_embed_each_equal_one_batch_after_another(
    rt: Runtime, labels: list[str], frames: list[np.ndarray]
) -> None:
    """Bit for bit, since the batches are the same ones."""
    assert list(rt.classify_each(iter(frames), labels)) == rt.classify(frames, labels)
    np.testing.assert_array_equal(list(rt.embed_each(iter(frames))), rt.embed_images(frames))


def test_an_iterator_may_reuse_what_it_gave(
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
            with Image.open(tmp_path / f"{i}.png") as picture:  # not decoded, and closed again
                yield picture

    expected = rt.embed_images(frames)
    np.testing.assert_array_equal(list(rt.embed_each(arrays())), expected)
    np.testing.assert_array_equal(list(rt.embed_each(pictures())), expected)


def test_failing_encoder_ends_the_threads(
    labels: list[str], frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    rt = Runtime(labels=labels)

    def fail(inputs: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(rt._image_encoder, "embed", fail)
    with pytest.raises(KeyboardInterrupt) as caught:
        list(rt.classify_each(count_from(frames), labels))
    assert "edgeclip-read" not in {thread.name for thread in threading.enumerate()}
    del caught  # its traceback holds the generator: the threads were gone before that was


def count_from(frames: list[np.ndarray]) -> Iterator[np.ndarray]:
    for i in count():
        yield frames[i % len(frames)]


def test_one_runtime_pipelines_in_many_threads(
    rt: Runtime, labels: list[str], frames: list[np.ndarray]
) -> None:
    expected, found = rt.classify(frames, labels), {}

    def work(name: int) -> None:
        found[name] = list(rt.classify_each(frames, labels))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), expected)


def test_newest_drops_what_was_not_taken() -> None:
    # All other frames arrive while the first one is in use.
    all_read = threading.Event()
    first_taken = threading.Event()

    def source() -> Iterator[bytes]:
        yield b"0"
        assert first_taken.wait(WAIT)
        yield from (str(i).encode() for i in range(1, 1000))
        all_read.set()

    given = newest(source())
    assert next(given) == (0, b"0")
    first_taken.set()
    assert all_read.wait(WAIT)
    assert list(given) == [(999, b"999")]


def test_newest_gives_every_frame_of_a_slow_source() -> None:
    wanted = threading.Semaphore(1)

    def source() -> Iterator[bytes]:
        for i in range(20):
            assert wanted.acquire(timeout=WAIT)
            yield str(i).encode()

    seen = []
    for index, frame in newest(source()):
        seen.append((index, frame))
        wanted.release()
    assert seen == [(i, str(i).encode()) for i in range(20)]


def test_newest_raises_after_the_frame_before() -> None:
    def source() -> Iterator[bytes]:
        yield b"0"
        raise OSError("unplugged")

    given = newest(source())
    assert next(given) == (0, b"0")
    with pytest.raises(OSError, match="unplugged"):
        next(given)
    assert list(newest([])) == []


@pytest.mark.parametrize("buffer", [np.zeros(12, np.uint8), bytearray(12)])
def test_newest_keeps_its_own_copy(buffer: np.ndarray | bytearray) -> None:
    # A camera overwrites its buffer while the last frame is in use.
    taken, overwritten = threading.Event(), threading.Event()

    def source() -> Iterator[ImageSource]:
        yield buffer
        assert taken.wait(WAIT)
        memoryview(buffer)[0] = 7
        overwritten.set()

    given = newest(source())
    _, frame = next(given)
    taken.set()
    assert overwritten.wait(WAIT)
    assert bytes(frame) == bytes(12)
    given.close()


def test_newest_stops_at_the_next_frame_once_closed() -> None:
    pulled: list[int] = []
    go = threading.Semaphore(1)

    def source() -> Iterator[bytes]:
        for i in count():
            assert go.acquire(timeout=WAIT)
            pulled.append(i)
            yield b""

    given = newest(source())
    next(given)
    closing = threading.Thread(target=given.close)
    closing.start()
    go.release()
    closing.join()
    assert len(pulled) == 2


def test_stream_answers_frames_as_classify_does(
    rt: Runtime, labels: list[str], frames: list[np.ndarray]
) -> None:
    wanted = threading.Semaphore(1)

    def take() -> Iterator[ImageSource]:
        buffer = np.empty_like(frames[0])
        for frame in frames[:5]:
            assert wanted.acquire(timeout=WAIT)
            buffer[:] = frame
            yield buffer
        assert wanted.acquire(timeout=WAIT)
        yield b"no image"

    found = []
    for answer in rt.stream(take(), labels, top_k=2):
        found.append(answer)
        wanted.release()
    alone = [rt.classify(frame, labels, top_k=2) for frame in frames[:5]]
    assert found[:5] == [FrameAnswer(i, answer) for i, answer in enumerate(alone)]
    assert isinstance(found[5].predictions, ImageError)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found[0].index = 3


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


def test_stream_refuses_what_is_no_stream(rt: Runtime, labels: list[str]) -> None:
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
    found = list(rt.classify_each(sorted(tmp_path.iterdir()), labels))
    assert isinstance(found[9], ImageError)
    assert "009.png" in str(found[9])
    del found[9], frames[9]
    for answer, alone in zip(found, rt.classify(frames, labels), strict=True):
        assert [p.index for p in answer] == [p.index for p in alone]
        np.testing.assert_allclose([p.score for p in answer], [p.score for p in alone], atol=1e-5)


def fake_cv2(opens: bool, pictures: list[np.ndarray]) -> types.ModuleType:
    """OpenCV as far as the example uses it; pictures are RGB."""
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
    arguments = [word for label in labels for word in ("--label", label)]
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert camera.main(arguments) == 2
    assert "error: OpenCV is missing: pip install" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "cv2", fake_cv2(False, []))
    assert camera.main(["--camera", "rtsp://none", *arguments]) == 2
    assert capsys.readouterr().err == "error: camera rtsp://none does not open\n"
    trousers = np.asarray(Image.open(EXAMPLES / "coloured-trousers.jpg"))
    monkeypatch.setitem(sys.modules, "cv2", fake_cv2(True, [trousers]))
    assert camera.main(arguments) == 0
    best = edgeclip.Runtime(labels=labels).classify(trousers, top_k=1)[0]
    assert capsys.readouterr().out == f"frame 0: {best.score:.1%} {best.label}\n"
    monkeypatch.setitem(sys.modules, "cv2", fake_cv2(True, [trousers]))
    assert camera.main([*arguments, "--bundle", "none"]) == 2
    assert capsys.readouterr().err.startswith("error: none")
