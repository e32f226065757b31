"""From frames to the top-k on one GPU: preprocess, encoder and classify on one stream.

All three are queued at once and waited for once; only the top-k leaves the device. What is asked a
second time with the same sizes is captured in a CUDA graph, one launch from then on.
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
CAPTURE_ATTEMPTS = 3  # that may fail before it is left alone
LABEL_SETS_KEPT = 4
GROWTH = 1.5  # by how much more than needed buffers grow

Key = tuple[Any, ...]


class _Batch(NamedTuple):
    """What is queued for one batch."""

    frames: list[Any]
    classes: DeviceArray
    null_scores: DeviceArray
    purifier: CosPurifier | None
    indices: DeviceArray
    scores: DeviceArray
    preprocess_workspace: DeviceArray
    classify_workspace: DeviceArray

    def key(self) -> Key | None:
        """What a graph notes of it, of arrays their addresses and sizes; None: not to be captured.

        Buffers and labels are not in it: graphs go where these are replaced.
        """
        places: list[Any] = []
        for frame in self.frames:
            if not hasattr(frame, "__cuda_array_interface__"):
                return None
            seen = frame.__cuda_array_interface__
            places.append((seen["data"], seen["shape"], seen["typestr"], seen.get("strides")))
        return tuple(places), self.classes.pointer, self.purifier, self.indices.shape


class GpuPipeline:
    """Classifies frames with an encoder on the GPU. May be shared by threads.

    null_text: unit, float32 (D,).
    """

    def __init__(
        self, encoder: GpuEncoder, manifest: Manifest, null_text: NDArray[np.float32]
    ) -> None:
        # The graphs first, since attributes are let go of in this order: they need the encoder.
        self._graphs: OrderedDict[Key, _core.CudaGraph | None] = OrderedDict()  # None: ran once
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
        """Indices and probabilities (N, k) of frames, uint8 RGB (H, W, 3), the most probable first.

        A frame may also be an array on the GPU, with __cuda_array_interface__ or __dlpack__.
        Raises DeviceError where the GPU fails, or the encoder gives what is no embedding.
        """
        parts = [
            self._classify(frames[start : start + self.max_batch], labels, purifier, top_k)
            for start in range(0, len(frames), self.max_batch)
        ]
        width = min(top_k, len(labels))
        none = np.empty((0, width), np.int32), np.empty((0, width), np.float32)
        indices, scores = zip(none, *parts, strict=True)
        return np.concatenate(indices), np.concatenate(scores)

    def stage_ms(
        self,
        frames: Sequence[NDArray[np.uint8]],
        labels: LabelSet,
        purifier: CosPurifier | None,
        top_k: int = 5,
    ) -> dict[str, float]:
        """Milliseconds of the GPU for each stage of one batch, by CUDA events, without a graph."""
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
        """Run, capture and replay, so that all kernels are loaded, and what does not work shows now.

        Raises DeviceError.
        """
        width = self._manifest.embed_dim
        one = LabelSet(("",), np.ones((1, width), np.float32), np.ones(1, np.float32), "")
        for _ in range(3):
            self.classify([np.zeros((1, 1, 3), np.uint8)], one, CosPurifier(), 1)
        self._graphs.clear()
        del self._labels[one]

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
            finally:  # also after an error: what was queued still reads the frames
                _core.cuda_synchronize(self._handle)
            indices, scores = batch.indices.host.copy(), batch.scores.host.copy()
        if (indices < 0).any():
            raise DeviceError(
                "the encoder gave an embedding that is zero or not finite: see edgeclip doctor"
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
        if graph is None and key in self._graphs:  # so it ran twice, as all of a graph must before
            graph = self._capture(len(key[0]), queue)
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        if len(self._graphs) > GRAPHS_KEPT:
            self._graphs.popitem(last=False)

    def _capture(self, count: int, queue: Callable[[], None]) -> _core.CudaGraph | None:
        """None where it cannot be, or was disturbed, as by another thread that lets go of memory."""
        if self._attempts == 0 or not self._encoder.is_capturable(bucket(count, self.max_batch)):
            return None
        _core.cuda_synchronize(self._handle)  # the answer is there, whatever comes of this
        try:
            return self._encoder.stream.capture(queue)
        except (RuntimeError, DeviceError) as err:
            self._attempts -= 1
            logger.warning("no CUDA graph was captured, which costs time and nothing else: %s", err)
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
                # Once, since each pixel is read for several of the encoder's.
                source = self._buffers[_crossed(slot)].head(frame.shape)
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
        """With all memory that it needs: nothing is allocated once something is queued."""
        image, out = self._manifest.image, self._encoder.pixels[0]
        how = {"resize": image.resize, "interpolation": image.interpolation}
        placed = [self._place(slot, frame) for slot, frame in enumerate(frames)]
        # One workspace for all frames, which are prepared one after the other.
        needed = max(_core.preprocess_workspace(frame, out, **how) for frame in placed)
        needed_after = _core.classify_workspace(self.max_batch, len(labels))
        top = len(frames), min(top_k, len(labels))
        classes, null_scores = self._on_device(labels)
        # Pinned: the kernel's few bytes are written to where the CPU reads them.
        size = self.max_batch * top[1]
        indices = self._buffer("indices", size, np.int32, pinned=True)
        scores = self._buffer("scores", size, np.float32, pinned=True)
        return _Batch(
            placed,
            classes,
            null_scores,
            purifier,
            indices.head(top),
            scores.head(top),
            self._buffer("preprocess", needed, np.uint8),
            self._buffer("classify", needed_after, np.uint8),
        )

    def _place(self, slot: int, frame: Any) -> Any:
        """The frame in pinned memory of the slot; or where it is on the GPU already, complete."""
        if isinstance(frame, np.ndarray):
            staged = self._buffer(f"frame {slot}", frame.nbytes, np.uint8, pinned=True)
            self._buffer(_crossed(slot), frame.nbytes, np.uint8)
            shaped = staged.head(frame.shape)
            np.copyto(shaped.host, frame)
            return shaped
        if hasattr(frame, "__dlpack__"):  # by which its producer lets our stream wait for its own
            frame.__dlpack__(stream=self._handle)
        else:
            stream = frame.__cuda_array_interface__.get("stream")
            if stream is not None:
                _core.cuda_synchronize(stream)
        return frame

    def _buffer(self, name: str, size: int, dtype: Any, pinned: bool = False) -> DeviceArray:
        """At least `size` elements; what was there before is gone where it has to grow."""
        found = self._buffers.get(name)
        if found is None or len(found) < size:
            self._graphs.clear()  # some of them use the one that goes, of which nothing is running
            grown = size if found is None else int(GROWTH * size)
            found = self._buffers[name] = DeviceArray((grown,), dtype, pinned=pinned)
        return found

    def _on_device(self, labels: LabelSet) -> tuple[DeviceArray, DeviceArray]:
        """Embeddings and null scores of the labels."""
        found = self._labels.get(labels)
        if found is None:
            found = self._upload(labels.embeddings), self._upload(labels.null_scores)
            self._labels[labels] = found
            if len(self._labels) > LABEL_SETS_KEPT:
                self._labels.popitem(last=False)
                self._graphs.clear()
        self._labels.move_to_end(labels)
        return found

    def _upload(self, array: NDArray[np.float32]) -> DeviceArray:
        on_device, dense = DeviceArray(array.shape), np.ascontiguousarray(array)
        with cuda_errors():
            copy(on_device, dense, self._handle)
            _core.cuda_synchronize(self._handle)
        return on_device


def _crossed(slot: int) -> str:
    """The buffer that a slot's frame is copied to."""
    return f"frame {slot} on the GPU"


def bucket(count: int, most: int) -> int:
    """How many images the encoder runs for `count`: the next power of two, so that few sizes occur."""
    return min(1 << (count - 1).bit_length(), most)
