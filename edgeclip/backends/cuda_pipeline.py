"""Pipeline from frames to the top-k on one GPU: preprocess, encoder and classify on one stream.

The CPU waits once for all three stages, and only the top-k leaves the device. A batch that comes a
second time, with the same shapes and addresses, is captured in a CUDA graph and replayed afterwards.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeclip import _core
from edgeclip.backends.base import GpuEncoder
from edgeclip.backends.cuda_array import DeviceArray, copy, cuda_errors
from edgeclip.errors import DeviceError
from edgeclip.labels import LabelSet
from edgeclip.manifest import Manifest
from edgeclip.purify import CosPurifier

logger = logging.getLogger(__name__)

GRAPHS_KEPT = 32
CAPTURE_ATTEMPTS = 3  # failed captures before graphs are disabled
LABEL_SETS_KEPT = 4
GROWTH = 1.5  # factor, relative to the required size, by which buffers grow

Key = tuple[Any, ...]


class _Batch(NamedTuple):
    """Frames, labels and memory of one batch."""

    frames: list[Any]
    classes: DeviceArray
    null_scores: DeviceArray
    purifier: CosPurifier | None
    indices: DeviceArray
    scores: DeviceArray
    preprocess_workspace: DeviceArray
    classify_workspace: DeviceArray

    def key(self) -> Key | None:
        """Return the key of its CUDA graph: addresses, shapes and purifier; None: not capturable.

        Buffers need no entry: graphs are dropped when a buffer is replaced.
        """
        frames: list[Any] = []
        for frame in self.frames:
            if not hasattr(frame, "__cuda_array_interface__"):
                return None
            array = frame.__cuda_array_interface__
            frames.append((array["data"], array["shape"], array["typestr"], array.get("strides")))
        return tuple(frames), self.classes.pointer, self.purifier, self.indices.shape


class GpuPipeline:
    """Classifier of frames with an encoder on the GPU. May be shared by threads.

    null_text: unit embedding, float32 (D,).
    """

    def __init__(
        self, encoder: GpuEncoder, manifest: Manifest, null_text: NDArray[np.float32]
    ) -> None:
        # Graphs first: attributes are released in this order, and graphs need the encoder.
        self._graphs: OrderedDict[Key, _core.CudaGraph | None] = (
            OrderedDict()
        )  # None: ran once, not captured
        self._attempts = CAPTURE_ATTEMPTS
        self.max_batch = len(encoder.pixels)
        self._encoder, self._manifest = encoder, manifest
        self._handle = encoder.stream.handle
        self._labels: OrderedDict[LabelSet, tuple[DeviceArray, DeviceArray]] = OrderedDict()
        self._buffers: dict[str, DeviceArray] = {}
        self._null_text = self._upload(null_text)

    def classify(
        self,
        frames: Sequence[NDArray[np.uint8]],
        labels: LabelSet,
        purifier: CosPurifier | None,
        top_k: int,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return indices and probabilities (N, k) of the top k labels, most probable first.

        frames: uint8 RGB (H, W, 3), NumPy arrays, or GPU arrays with __cuda_array_interface__ or
        __dlpack__. Raises DeviceError if the GPU fails, or an embedding is zero or not finite.
        """
        batches = [
            self._classify(frames[start : start + self.max_batch], labels, purifier, top_k)
            for start in range(0, len(frames), self.max_batch)
        ]
        width = min(top_k, len(labels))
        empty = np.empty((0, width), np.int32), np.empty((0, width), np.float32)
        indices, scores = zip(empty, *batches, strict=True)
        return np.concatenate(indices), np.concatenate(scores)

    def stage_ms(
        self,
        frames: Sequence[NDArray[np.uint8]],
        labels: LabelSet,
        purifier: CosPurifier | None,
        top_k: int = 5,
    ) -> dict[str, float]:
        """Measure each stage of one batch in GPU milliseconds, by CUDA events, without a graph."""
        with self._encoder.lock, cuda_errors():
            batch = self._batch(frames, labels, purifier, top_k)
            stages: dict[str, Callable[[], None]] = {
                "preprocess": lambda: self._queue_preprocess(batch),
                "encoder": lambda: self._queue_encoder(batch),
                "classify": lambda: self._queue_classify(batch),
            }
            events = [_core.CudaEvent() for _ in range(len(stages) + 1)]
            events[0].record(self._handle)
            for queue, after in zip(stages.values(), events[1:], strict=True):
                queue()
                after.record(self._handle)
            _core.cuda_synchronize(self._handle)
            return {
                name: after.milliseconds_since(before)
                for name, (before, after) in zip(stages, pairwise(events), strict=True)
            }

    def warm_up(self) -> None:
        """Run, capture and replay one frame, which loads all kernels. Raises DeviceError."""
        width = self._manifest.embed_dim
        label = LabelSet(("",), np.ones((1, width), np.float32), np.ones(1, np.float32), "")
        for _ in range(3):
            self.classify([np.zeros((1, 1, 3), np.uint8)], label, CosPurifier(), 1)
        self._graphs.clear()
        del self._labels[label]

    def _classify(
        self,
        frames: Sequence[NDArray[np.uint8]],
        labels: LabelSet,
        purifier: CosPurifier | None,
        top_k: int,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        with self._encoder.lock, cuda_errors():
            batch = self._batch(frames, labels, purifier, top_k)
            try:
                self._run(batch.key(), partial(self._queue, batch))
            finally:  # even after an error, queued work still reads the frames
                _core.cuda_synchronize(self._handle)
            indices, scores = batch.indices.host.copy(), batch.scores.host.copy()
        if (indices < 0).any():
            raise DeviceError(
                "the encoder computed an embedding that is zero or not finite: see edgeclip doctor"
            )
        return indices, scores

    def _run(self, key: Key | None, queue: Callable[[], None]) -> None:
        graph = self._graphs.get(key) if key else None
        if graph is not None:
            graph.launch(self._handle)
        else:
            queue()
        if key is None:
            return
        if graph is None and key in self._graphs:  # captured work must have run before
            graph = self._capture(len(key[0]), queue)
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        if len(self._graphs) > GRAPHS_KEPT:
            self._graphs.popitem(last=False)

    def _capture(self, count: int, queue: Callable[[], None]) -> _core.CudaGraph | None:
        """Capture a graph; None if it is not capturable, or another thread disturbed the capture."""
        if self._attempts == 0 or not self._encoder.is_capturable(bucket(count, self.max_batch)):
            return None
        _core.cuda_synchronize(self._handle)  # a failed capture must not affect this answer
        try:
            return self._encoder.stream.capture(queue)
        except (RuntimeError, DeviceError) as err:
            self._attempts -= 1
            logger.warning(
                "no CUDA graph was captured, answers stay right but take longer: %s", err
            )
            return None

    def _queue(self, batch: _Batch) -> None:
        self._queue_preprocess(batch)
        self._queue_encoder(batch)
        self._queue_classify(batch)

    def _queue_preprocess(self, batch: _Batch) -> None:
        image = self._manifest.image
        for slot, frame in enumerate(batch.frames):
            source = frame
            if isinstance(frame, DeviceArray) and frame.pinned:
                # Copied once, since preprocessing reads each pixel several times.
                source = self._buffers[_gpu_buffer(slot)].head(frame.shape)
                copy(source, frame, self._handle)
            _core.preprocess(
                source,
                self._encoder.pixels[slot],
                mean=image.mean,
                std=image.std,
                fill=image.fill,
                resize=image.resize,
                interpolation=image.interpolation,
                workspace=batch.preprocess_workspace,
                stream=self._handle,
            )

    def _queue_encoder(self, batch: _Batch) -> None:
        self._encoder.enqueue(bucket(len(batch.frames), self.max_batch))

    def _queue_classify(self, batch: _Batch) -> None:
        embedding, purifier = self._encoder.embedding, batch.purifier
        _core.classify(
            embedding.head((len(batch.frames), embedding.shape[1])),
            batch.classes,
            logit_scale=self._manifest.logit_scale,
            logit_bias=self._manifest.logit_bias,
            null_text=self._null_text if purifier else None,
            null_scores=batch.null_scores if purifier else None,
            steps=purifier.steps if purifier else 0,
            step_size=purifier.step_size if purifier else 0.0,
            top_k=batch.indices.shape[1],
            out_indices=batch.indices,
            out_probabilities=batch.scores,
            workspace=batch.classify_workspace,
            stream=self._handle,
        )

    def _batch(
        self,
        frames: Sequence[NDArray[np.uint8]],
        labels: LabelSet,
        purifier: CosPurifier | None,
        top_k: int,
    ) -> _Batch:
        """Allocate all memory of a batch, so that nothing is allocated while work is queued."""
        image, out = self._manifest.image, self._encoder.pixels[0]
        options = {"resize": image.resize, "interpolation": image.interpolation}
        staged = [self._stage(slot, frame) for slot, frame in enumerate(frames)]
        # One workspace for all frames, which are preprocessed one after the other.
        preprocess_bytes = max(_core.preprocess_workspace(x, out, **options) for x in staged)
        classify_bytes = _core.classify_workspace(self.max_batch, len(labels))
        shape = len(frames), min(top_k, len(labels))
        classes, null_scores = self._on_device(labels)
        # Pinned: the kernel writes its few bytes directly to host memory.
        size = self.max_batch * shape[1]
        indices = self._buffer("indices", size, np.int32, pinned=True)
        scores = self._buffer("scores", size, np.float32, pinned=True)
        return _Batch(
            staged,
            classes,
            null_scores,
            purifier,
            indices.head(shape),
            scores.head(shape),
            self._buffer("preprocess", preprocess_bytes, np.uint8),
            self._buffer("classify", classify_bytes, np.uint8),
        )

    def _stage(self, slot: int, frame: Any) -> Any:
        """Copy a host frame to the slot's pinned memory, or wait until a GPU frame is complete."""
        if isinstance(frame, np.ndarray):
            buffer = self._buffer(f"frame {slot}", frame.nbytes, np.uint8, pinned=True)
            self._buffer(_gpu_buffer(slot), frame.nbytes, np.uint8)
            staged = buffer.head(frame.shape)
            np.copyto(staged.host, frame)
            return staged
        if hasattr(frame, "__dlpack__"):  # the producer makes our stream wait for its own
            frame.__dlpack__(stream=self._handle)
        else:
            stream = frame.__cuda_array_interface__.get("stream")
            if stream is not None:
                _core.cuda_synchronize(stream)
        return frame

    def _buffer(self, name: str, size: int, dtype: Any, pinned: bool = False) -> DeviceArray:
        """Return a buffer of at least `size` elements; growing it discards its contents."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            self._graphs.clear()  # some may use the old buffer; none is running now
            capacity = size if buffer is None else int(GROWTH * size)
            buffer = self._buffers[name] = DeviceArray((capacity,), dtype, pinned=pinned)
        return buffer

    def _on_device(self, labels: LabelSet) -> tuple[DeviceArray, DeviceArray]:
        """Return the embeddings and null scores of the labels on the GPU."""
        arrays = self._labels.get(labels)
        if arrays is None:
            arrays = self._upload(labels.embeddings), self._upload(labels.null_scores)
            self._labels[labels] = arrays
            if len(self._labels) > LABEL_SETS_KEPT:
                self._labels.popitem(last=False)
                self._graphs.clear()
        self._labels.move_to_end(labels)
        return arrays

    def _upload(self, array: NDArray[np.float32]) -> DeviceArray:
        on_device, dense = DeviceArray(array.shape), np.ascontiguousarray(array)
        with cuda_errors():
            copy(on_device, dense, self._handle)
            _core.cuda_synchronize(self._handle)
        return on_device


def _gpu_buffer(slot: int) -> str:
    """Return the name of the buffer that a slot's frame is copied to."""
    return f"frame {slot} on the GPU"


def bucket(count: int, largest: int) -> int:
    """Round `count` up to a power of two, at most `largest`: few batch sizes need few graphs."""
    return min(1 << (count - 1).bit_length(), largest)
