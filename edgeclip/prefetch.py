"""Threads that read and prepare images while the encoder is busy.

One thread reads the source from start to end, so that a generator may keep what belongs to a
thread, such as a database cursor. A thread that waits inside a source cannot be interrupted: closing
waits GRACE seconds for it, and it ends when the source yields its next image.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgeclip.errors import ImageError
from edgeclip.images.decoding import ImageSource

Batch: TypeAlias = NDArray[Any]
Batches: TypeAlias = Generator[tuple[Batch, list[ImageError | None]], None, None]
Prepare: TypeAlias = Callable[[Batch, ImageSource], None]

BUFFERS = 2  # one in the encoder, one being filled: the slower side never waits for the other
GRACE = 1.0  # seconds


def batches(
    images: Iterable[ImageSource],
    prepare: Prepare,
    shape: Sequence[int],
    workers: int,
    dtype: DTypeLike = np.float32,
) -> Batches:
    """Yield batches of prepared images in order, with an error or None for each image.

    prepare: fills one row of a batch, an array of `shape`, in one of `workers` threads. A row is left
    out if prepare raises ImageError. A batch is overwritten once the next one is requested.
    An iterator is asked for another image only after its last array or PIL image is prepared: it may
    then overwrite or close that image. Paths and bytes are prepared in parallel.
    An exception of the source, or another one of prepare, is raised after the images before it.
    """
    source = iter(images)
    is_stable = isinstance(images, (Sequence, np.ndarray))
    free: SimpleQueue[Batch | None] = SimpleQueue()
    for _ in range(BUFFERS):
        free.put(np.empty(shape, dtype))
    filled: SimpleQueue[tuple[Batch, list[Future[None]]] | BaseException | None] = SimpleQueue()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="edgeclip-prepare")

    def read() -> None:
        while (buffer := free.get()) is not None:
            futures: list[Future[None]] = []
            end: BaseException | None = None
            try:
                for row, image in zip(buffer, source, strict=False):
                    futures.append(pool.submit(prepare, row, image))
                    if not (is_stable or isinstance(image, (str, PathLike, bytes))):
                        futures[-1].exception()  # waits; raised later, in the image's turn
            except BaseException as err:  # noqa: BLE001  (raised in the consumer's thread)
                end = err
            if futures:
                filled.put((buffer, futures))
            if len(futures) < len(buffer):
                filled.put(end)
                return

    reader = _start(read)
    try:
        while (item := filled.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            buffer, futures = item
            yield from _finish(buffer, futures)
            free.put(buffer)
    finally:
        free.put(None)
        pool.shutdown(cancel_futures=True)
        reader.join(GRACE)


def _finish(
    buffer: Batch, futures: Sequence[Future[None]]
) -> Iterator[tuple[Batch, list[ImageError | None]]]:
    """Yield the rows before the first fatal error, then raise that error.

    Every error but an ImageError is fatal.
    """
    errors: list[ImageError | None] = []
    fatal: BaseException | None = None
    for future in futures:
        err = future.exception()
        if err is not None and not isinstance(err, ImageError):
            fatal = err
            break
        errors.append(err)
    good = [row for row, err in enumerate(errors) if err is None]
    if errors:
        yield buffer[: len(errors)] if len(good) == len(errors) else buffer[good], errors
    if fatal is not None:
        raise fatal


def newest(
    frames: Iterable[ImageSource],
) -> Generator[tuple[int, ImageSource], None, None]:
    """Yield the newest frame on each request, with its position among all frames.

    Frames are read as fast as they come. Older ones are dropped, but never the last one. Arrays and
    other buffers are copied, since a camera may overwrite them.
    An exception of the source is raised after the frame before it.
    """
    source = iter(frames)
    slot = _FrameSlot()

    def read() -> None:
        try:
            for index, frame in enumerate(source):
                if slot.closed:
                    return
                slot.put((index, _copy_buffer(frame)))
            slot.end(None)
        except BaseException as err:  # noqa: BLE001  (raised in the consumer's thread)
            slot.end(err)

    reader = _start(read)
    try:
        while (item := slot.take()) is not None:
            yield item
    finally:
        slot.closed = True
        reader.join(GRACE)


class _FrameSlot:
    """A queue of length one: a new frame replaces one that was not taken."""

    def __init__(self) -> None:
        self.closed = False
        self._changed = threading.Condition()
        self._frame: tuple[int, ImageSource] | None = None
        self._ended = False
        self._error: BaseException | None = None

    def put(self, frame: tuple[int, ImageSource]) -> None:
        with self._changed:
            self._frame = frame
            self._changed.notify()

    def end(self, error: BaseException | None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify()

    def take(self) -> tuple[int, ImageSource] | None:
        """Wait for a frame; return None after the last one. Raises the error of `end`."""
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or self._ended)
            frame, self._frame = self._frame, None
            if frame is None and self._error is not None:
                raise self._error
            return frame


def _copy_buffer(frame: ImageSource) -> ImageSource:
    if isinstance(frame, np.ndarray):
        return np.array(frame)
    return bytes(frame) if isinstance(frame, (bytearray, memoryview)) else frame


def _start(read: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread: it may block in a source, and must not delay the program's exit."""
    reader = threading.Thread(target=read, name="edgeclip-read", daemon=True)
    reader.start()
    return reader
