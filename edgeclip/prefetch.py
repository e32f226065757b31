"""Threads that read and prepare images while the encoder is busy.

A source of images is read by one thread of its own, always the same one, so that a generator may
keep what belongs to a thread, such as a database cursor. A thread that waits inside a source cannot
be interrupted: closing waits GRACE for it, and it ends when the source gives its next image.
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
Prepare: TypeAlias = Callable[[Batch, ImageSource], None]

BUFFERS = 2  # one in the encoder, one being filled: the slower side never waits for the other
GRACE = 1.0  # seconds


def batches(
    images: Iterable[ImageSource],
    prepare: Prepare,
    shape: Sequence[int],
    workers: int,
    dtype: DTypeLike = np.float32,
) -> Generator[tuple[Batch, list[ImageError | None]], None, None]:
    """Batches of prepared images in order, and for each image that went in its error or None.

    prepare fills one row of a batch, an array of `shape`, in one of `workers` threads; where it raises
    ImageError the row is left out. A batch is overwritten once the next one is asked for.
    An iterator is asked for another image only once an array or PIL image that it gave is prepared:
    it may then write over it, or close it. Paths and bytes are prepared side by side.
    What the source raises, or prepare other than ImageError, is raised after the images before it.
    """
    source = iter(images)
    lasting = isinstance(images, (Sequence, np.ndarray))
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
                    if not (lasting or isinstance(image, (str, PathLike, bytes))):
                        futures[-1].exception()  # waits; raised in its place
            except BaseException as err:  # noqa: BLE001  (raised where the images are asked for)
                end = err
            if futures:
                filled.put((buffer, futures))
            if len(futures) < len(buffer):
                filled.put(end)
                return

    reader = _start(read)
    try:
        while (got := filled.get()) is not None:
            if isinstance(got, BaseException):
                raise got
            yield from _settled(*got)
            free.put(got[0])
    finally:
        free.put(None)
        pool.shutdown(cancel_futures=True)
        reader.join(GRACE)


def _settled(
    buffer: Batch, futures: Sequence[Future[None]]
) -> Iterator[tuple[Batch, list[ImageError | None]]]:
    """The batch, up to the first image that raised something else, which is then raised."""
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
    """The newest of the frames whenever one is asked for, with its position among all of them.

    Frames are read as fast as they come, and the older ones are dropped, but never the last.
    Arrays and other buffers are copied, since a camera may write its next frame over them.
    What the source raises is raised after the frame before it.
    """
    source = iter(frames)
    newest_frame = _Newest()

    def read() -> None:
        try:
            for index, frame in enumerate(source):
                if newest_frame.closed:
                    return
                newest_frame.put((index, _own(frame)))
            newest_frame.end(None)
        except BaseException as err:  # noqa: BLE001  (raised where the frames are asked for)
            newest_frame.end(err)

    reader = _start(read)
    try:
        while (got := newest_frame.take()) is not None:
            yield got
    finally:
        newest_frame.closed = True
        reader.join(GRACE)


class _Newest:
    """A place for one frame: what is put replaces what was not taken."""

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
        """Waits for a frame; None once there is no other. Raises the error it ended with."""
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or self._ended)
            frame, self._frame = self._frame, None
            if frame is None and self._error is not None:
                raise self._error
            return frame


def _own(frame: ImageSource) -> ImageSource:
    if isinstance(frame, np.ndarray):
        return np.array(frame)
    return bytes(frame) if isinstance(frame, (bytearray, memoryview)) else frame


def _start(read: Callable[[], None]) -> threading.Thread:
    """A thread that the end of the program does not wait for: it may hang in a source."""
    reader = threading.Thread(target=read, name="edgeclip-read", daemon=True)
    reader.start()
    return reader
