"""Prefetching threads: the order of images, errors, bounds, and the threads' end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import pytest

from edgeclip import ImageError
from edgeclip.images.decoding import ImageSource
from edgeclip.images.prefetch import BUFFERS, batches, newest
from tests.support.threads import WAIT, no_thread_is_left


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    with no_thread_is_left():
        yield


SIZE = 4


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


def drain(prefetched: Iterator[tuple[np.ndarray, object]], values: list[float]) -> None:
    for batch, _ in prefetched:
        values += batch[:, 0].tolist()


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
    results = run([1, -2, 3, 4, -5, -6, -7, -8, 9])
    assert [str(x) if isinstance(x, ImageError) else x for x in results] == [
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

    values: list[float] = []
    with pytest.raises(type(error)) as caught:
        drain(batches(source(), fill, (SIZE, 1), 2), values)
    assert caught.value is error
    assert values == list(range(1, before + 1))


def test_other_errors_are_raised_in_order() -> None:
    values: list[float] = []
    with pytest.raises(TypeError, match="NoneType"):
        drain(batches([1, 2, 3, 4, 5, None, 7], fill, (SIZE, 1), 2), values)
    assert values == [1, 2, 3, 4, 5]


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

    prefetched = batches(source(), fill, (SIZE, 1), 2)
    batch, _ = next(prefetched)
    assert batch[:, 0].tolist() == [0, 1, 2, 3]
    released.set()
    assert [row.tolist() for row, _ in prefetched] == [[[4.0]]]


def test_images_are_prepared_side_by_side() -> None:
    together = threading.Barrier(3, timeout=WAIT)  # fewer than three break it

    def meet(row: np.ndarray, image: ImageSource) -> None:
        together.wait()
        fill(row, image)

    assert run(range(6), meet) == list(range(6))


def test_closing_early_stops_reading() -> None:
    pulled: list[int] = []
    prefetched = batches((pulled.append(i) or i for i in count()), fill, (SIZE, 1), 2)
    next(prefetched)
    prefetched.close()  # the fixture checks that the threads have ended
    assert len(pulled) <= BUFFERS * SIZE + 1


def test_a_source_that_hangs_does_not_hold_up_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeclip.images.prefetch.GRACE", 0.01)
    hanging, released = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield from range(SIZE)
        hanging.set()
        assert released.wait(WAIT)
        yield SIZE

    prefetched = batches(source(), fill, (SIZE, 1), 2)
    next(prefetched)
    assert hanging.wait(WAIT)
    prefetched.close()
    (reader,) = (t for t in threading.enumerate() if t.name == "edgeclip-read")
    assert reader.daemon  # so that the program's exit does not wait for it
    released.set()
    reader.join(WAIT)


def test_newest_drops_skipped_frames() -> None:
    # All other frames arrive while the first one is in use.
    all_read = threading.Event()
    first_taken = threading.Event()

    def source() -> Iterator[bytes]:
        yield b"0"
        assert first_taken.wait(WAIT)
        yield from (str(i).encode() for i in range(1, 1000))
        all_read.set()

    stream = newest(source())
    assert next(stream) == (0, b"0")
    first_taken.set()
    assert all_read.wait(WAIT)
    assert list(stream) == [(999, b"999")]


def test_newest_yields_every_frame_of_a_slow_source() -> None:
    requested = threading.Semaphore(1)

    def source() -> Iterator[bytes]:
        for i in range(20):
            assert requested.acquire(timeout=WAIT)
            yield str(i).encode()

    received = []
    for index, frame in newest(source()):
        received.append((index, frame))
        requested.release()
    assert received == [(i, str(i).encode()) for i in range(20)]


def test_newest_raises_after_the_frame_before() -> None:
    def source() -> Iterator[bytes]:
        yield b"0"
        raise OSError("unplugged")

    stream = newest(source())
    assert next(stream) == (0, b"0")
    with pytest.raises(OSError, match="unplugged"):
        next(stream)
    assert list(newest([])) == []


@pytest.mark.parametrize("buffer", [np.zeros(12, np.uint8), bytearray(12)])
def test_newest_copies_frames(buffer: np.ndarray | bytearray) -> None:
    # A camera overwrites its buffer while the last frame is in use.
    taken, overwritten = threading.Event(), threading.Event()

    def source() -> Iterator[ImageSource]:
        yield buffer
        assert taken.wait(WAIT)
        memoryview(buffer)[0] = 7
        overwritten.set()

    stream = newest(source())
    _, frame = next(stream)
    taken.set()
    assert overwritten.wait(WAIT)
    assert bytes(frame) == bytes(12)
    stream.close()


def test_newest_stops_at_the_next_frame_once_closed() -> None:
    pulled: list[int] = []
    go = threading.Semaphore(1)

    def source() -> Iterator[bytes]:
        for i in count():
            assert go.acquire(timeout=WAIT)
            pulled.append(i)
            yield b""

    stream = newest(source())
    next(stream)
    closing = threading.Thread(target=stream.close)
    closing.start()
    go.release()
    closing.join()
    assert len(pulled) == 2
