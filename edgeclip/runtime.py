"""Runtime: images and labels in, predictions out."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from edgeclip import _core
from edgeclip.backends.host_pipeline import HostPipeline
from edgeclip.backends.select import open_image_side
from edgeclip.bundle import Bundle
from edgeclip.errors import BundleError, DeviceError, ImageError
from edgeclip.host import cores
from edgeclip.images.decoding import ImageSource
from edgeclip.images.prefetch import Batches, newest
from edgeclip.images.preprocessor import Preprocessor
from edgeclip.labels import Label, Labels, LabelSet
from edgeclip.prediction import FrameAnswer, Prediction, score_table, to_predictions
from edgeclip.progress import Progress
from edgeclip.purify import CosPurifier, DiffPurifier, Purifier, resolve
from edgeclip.text.tower import TextTower

if TYPE_CHECKING:
    from edgeclip.explain import Explanation

Items = TypeVar("Items", Sequence[ImageSource], NDArray[np.float32])

SINGLE = (str, bytes, bytearray, memoryview)  # one image or text, although Python's sequences
MAX_BATCH = 4096
MAX_THREADS = 1024
DECODINGS = ("fast", "exact")


class Runtime:
    """A loaded bundle that classifies images. Threads may share it, and it can be pickled.

    A process that unpickled or inherited it (fork) opens the bundle's files again.

    bundle: an embedded bundle's name, a directory, a Bundle, or None for the default bundle.
    device: cpu, cuda, tensorrt, or auto for the best that works: a TensorRT engine made by
    `edgeclip build`, else CUDA, else the CPU.
    precision: fp32, fp16, int8 or int8-qdq if the bundle has it, or auto: the fastest on this machine
    of those that were verified against the model's answers (export --data) and give the bundle's
    golden outputs here. The first start measures them and caches the result.
    purify: auto (what the bundle recommends), none, cos, diff, a CosPurifier or a DiffPurifier.
    labels: default labels of `classify`.
    decode: fast (large JPEGs at a reduced scale, see `edgeclip.images.decoding.decode`) or exact.
    batch_size: images in one run of the encoder.
    threads: for one run of the encoder, and as many more to prepare images; None for as many as
    affinity and CPU quota allow.

    Raises BundleError, DeviceError and LabelError; ValueError for an unknown option; EdgeclipError if
    EDGECLIP_CACHE_SIZE is not a size.
    """

    def __init__(
        self,
        bundle: str | PathLike[str] | Bundle | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        purify: str | Purifier = "auto",
        labels: Labels | None = None,
        decode: str = "fast",
        batch_size: int = 8,
        threads: int | None = None,
    ) -> None:
        if decode not in DECODINGS:
            raise ValueError(f"decode must be {' or '.join(DECODINGS)}, got {decode!r}")
        check_count("batch_size", batch_size, MAX_BATCH)
        if threads is not None:
            check_count("threads", threads, MAX_THREADS)
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
        self._arguments: dict[str, Any] = {
            "bundle": self.bundle.path.resolve(),
            "device": device,
            "precision": precision,
            "purify": purify,
            "labels": labels,
            "decode": decode,
            "batch_size": batch_size,
            "threads": threads,
        }
        manifest = self.bundle.manifest
        self.batch_size = batch_size
        self.purifier = resolve(purify, manifest.purification)
        usable = cores()
        _core.set_usable_cores(usable)
        self._threads = threads or usable
        self._preprocessor = Preprocessor(manifest.image, exact=decode == "exact", threads=threads)
        side = open_image_side(
            self.bundle, device, precision, batch_size=batch_size, threads=self._threads
        )
        self._image_encoder, self.device, self.precision = side.encoder, side.device, side.precision
        if self.device != "tensorrt":  # so that a worker process chooses the same
            self._arguments |= {"device": self.device, "precision": self.precision}
        # None: the host preprocesses and classifies. ONNX Runtime runs a prior through the host.
        self.gpu = None if isinstance(self.purifier, DiffPurifier) else side.gpu
        self.onnx_device, self.text_precision = side.onnx_device, side.text_precision
        self._host = HostPipeline(
            self.bundle,
            side.encoder,
            self.purifier,
            precision=self.precision,
            onnx_device=side.onnx_device,
            threads=self._threads,
        )
        self._text = TextTower(
            self.bundle, side.text_precision, device=side.onnx_device, threads=self._threads
        )
        self._default_labels = None if labels is None else self.labels(labels)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments, with which another process opens the bundle again."""
        return functools.partial(type(self), **self._arguments), ()

    @overload
    def classify(  # type: ignore[overload-overlap]  # a str is one image, not a sequence of them
        self, images: ImageSource, labels: Labels | None = None, *, top_k: int = 5
    ) -> list[Prediction]: ...
    @overload
    def classify(
        self, images: Sequence[ImageSource], labels: Labels | None = None, *, top_k: int = 5
    ) -> list[list[Prediction]]: ...
    def classify(
        self,
        images: ImageSource | Sequence[ImageSource],
        labels: Labels | None = None,
        *,
        top_k: int = 5,
    ) -> list[Prediction] | list[list[Prediction]]:
        """Return the `top_k` most probable labels of images, the most probable first.

        images: one image gives a list of predictions, a list of images a list of lists. An image is
        a path, the bytes of a file, a PIL image or a uint8 RGB array (H, W, 3). If edgeclip has its
        CUDA kernels, the array may be on the GPU (PyTorch, CuPy).
        labels: names, or a LabelSet from `labels()`; None for the Runtime's default. Scores compare
        labels: a single label always scores 1, so add others, such as "something else".
        Raises ImageError for an image that cannot be read, and ValueError for arguments.
        """
        check_count("top_k", top_k)
        label_set = self._label_set(labels)
        sequence, is_single = _as_list(images)
        answers: list[list[Prediction]] = []
        for chunk in _chunks(sequence, self.batch_size):
            answers += self._predict(self._prepare(chunk), label_set, top_k)
        return answers[0] if is_single else answers

    def classify_each(
        self, images: Iterable[ImageSource], labels: Labels | None = None, *, top_k: int = 5
    ) -> Iterator[list[Prediction] | ImageError]:
        """Yield the answers for any number of images, in order, in bounded memory.

        An image that cannot be read yields its ImageError; the others yield their predictions.
        Threads read and prepare the next batch while the encoder runs, and end with the generator.
        One of them reads `images`, never beyond that batch. An array on the GPU must not change
        before its answer. An exception of `images` is raised after the answers before it.
        """
        check_count("top_k", top_k)
        label_set = self._label_set(labels)
        with closing(self._batches(images, as_frames=self.gpu is not None)) as prepared:
            for batch, errors in prepared:
                answers = iter(self._predict(batch, label_set, top_k) if len(batch) else [])
                yield from (error or next(answers) for error in errors)

    def stream(
        self, frames: Iterable[ImageSource], labels: Labels | None = None, *, top_k: int = 5
    ) -> Iterator[FrameAnswer]:
        """Yield answers for the newest frame of a camera, each as soon as it is ready.

        frames: for example a generator that reads a camera. A thread reads it as fast as it yields.
        While the encoder is busy, the newest frame waits and older ones are dropped. The last frame
        is always answered. Use `classify_each` for every frame of a recording. Arrays are copied,
        except on the GPU, so that a camera may overwrite its buffer.
        An exception of `frames` is raised after the answers before it. Closing the generator stops
        the reading at the next frame.
        """
        check_count("top_k", top_k)
        label_set = self._label_set(labels)
        _refuse_single("stream", frames)
        with closing(newest(frames)) as newest_frames:
            for index, frame in newest_frames:
                answer: list[Prediction] | ImageError
                try:
                    (answer,) = self.classify([frame], label_set, top_k=top_k)
                except ImageError as err:
                    answer = err
                yield FrameAnswer(index, answer)

    def classify_pixels(
        self, pixels: NDArray[np.float32], labels: Labels | None = None, *, top_k: int = 5
    ) -> list[list[Prediction]]:
        """Classify the output of `preprocess`, float32 (N, 3, H, W): one list for each row."""
        check_count("top_k", top_k)
        label_set = self._label_set(labels)
        answers: list[list[Prediction]] = []
        for chunk in _chunks(pixels, self.batch_size):
            answers += self._predict(chunk, label_set, top_k)
        return answers

    def scores(
        self, images: ImageSource | Sequence[ImageSource], labels: Labels | None = None
    ) -> NDArray[np.float32]:
        """Return the score of every label, float32 (N, K), in the order of the labels.

        Takes the images and labels of `classify`, and gives its scores; one image gives one row.
        """
        label_set = self._label_set(labels)
        sequence, _ = _as_list(images)
        chunks = _chunks(sequence, self.batch_size)
        return self._score_tables((self._prepare(chunk) for chunk in chunks), label_set)

    def pixel_scores(
        self, pixels: NDArray[np.float32], labels: Labels | None = None
    ) -> NDArray[np.float32]:
        """Return `scores` for the output of `preprocess`, float32 (N, 3, H, W)."""
        return self._score_tables(_chunks(pixels, self.batch_size), self._label_set(labels))

    def embed_images(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.float32]:
        """Return unit embeddings of images, float32 (N, D), purified if the Runtime purifies.

        Takes the images of `classify`; one image gives one row.
        """
        sequence, _ = _as_list(images)
        chunks = _chunks(sequence, self.batch_size)
        rows = [self._host.embed(self.preprocess(chunk)) for chunk in chunks]
        return np.concatenate([np.empty((0, self.bundle.manifest.embed_dim), np.float32), *rows])

    def embed_each(
        self, images: Iterable[ImageSource]
    ) -> Iterator[NDArray[np.float32] | ImageError]:
        """Yield unit embeddings (D,) of any number of images, in order; see `classify_each`."""
        with closing(self._batches(images, as_frames=False)) as prepared:
            for batch, errors in prepared:
                rows = iter(self._host.embed(batch) if len(batch) else batch)
                yield from (next(rows) if error is None else error for error in errors)

    def embed_texts(
        self, texts: Sequence[str], *, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Return unit embeddings of texts, float32 (N, D); no template is added.

        progress: called with the number of encoded texts and their total.
        """
        _refuse_single("embed_texts", texts)
        return self._text.embed(texts, progress)

    def explain(
        self, image: ImageSource, label: str | Label, *, templates: Sequence[str] | None = None
    ) -> Explanation:
        """Return the attention of an image to a label, in [0, 1] over the encoder's input.

        templates: as for `labels`. `edgeclip.explain.render` draws the result.
        Raises BundleError if the image encoder has no token output; ImageError and LabelError.
        """
        # Imported here: it loads Pillow's fonts, which nothing else needs.
        from edgeclip.explain import Explanation, as_picture, attention_map

        manifest = self.bundle.manifest
        spec = manifest.tokens
        if spec is None:
            raise BundleError(
                f"{self.bundle.path}: this bundle's image encoder has no patch tokens: "
                "export a ViT, or a convolutional model from timm"
            )
        if self.device == "tensorrt":
            raise DeviceError("a TensorRT engine gives embeddings only: explain with --device cpu")
        pixels = self.preprocess([image])
        labels = self.labels([label], templates)
        tokens = self._host.tokens(pixels)[0]
        expected = spec.prefix + spec.grid[0] * spec.grid[1], manifest.embed_dim
        if tokens.shape != expected:
            raise BundleError(
                f"{self.bundle.path}: the image encoder returns tokens {tokens.shape}, "
                f"which is not what the manifest says, {expected}: export the bundle again"
            )
        (text,) = labels.embeddings
        return Explanation(
            label=labels.names[0],
            attention=attention_map(tokens, text, spec.grid, spec.prefix, manifest.image.size),
            image=as_picture(pixels[0], manifest.image),
            similarity=float(self.encode(pixels)[0] @ text),
        )

    def labels(
        self,
        names: Labels,
        templates: Sequence[str] | None = None,
        *,
        progress: Progress | None = None,
    ) -> LabelSet:
        """Return the text embeddings of labels, each the mean over `templates`.

        templates: None for the bundle's. progress: see `embed_texts`.
        Each label is encoded once, then cached on disk. The text encoder is loaded for it and
        released afterwards; keep it with `load_text` if new labels come often. Labels whose prompts
        exceed the context length are logged.
        Raises LabelError, also for two labels with equal tokens.
        """
        return self._text.labels(names, templates, progress)

    def text_identity(self) -> str:
        """Return the identity of the text encoder: its files and its tokenization.

        A LabelSet may be used with every Runtime of the same identity, on any device.
        """
        return self._text.identity

    def load_text(self) -> None:
        """Keep the tokenizer and text encoder in memory, as `embed_texts` and `tokenize` do."""
        self._text.load()

    def release_text(self) -> None:
        """Release the tokenizer and text encoder; they are reloaded on demand."""
        self._text.release()

    def preprocess(self, images: Sequence[ImageSource]) -> NDArray[np.float32]:
        """Resize and normalise images to the encoder's input, float32 (N, 3, H, W)."""
        _refuse_single("preprocess", images)
        return self._preprocessor.pixels(images)

    def encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return unit embeddings (N, D) of the output of `preprocess`, before any purification."""
        return self._host.encode(pixels)

    def tokenize(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return token ids (N, L) of texts, padded to the longest (or to the context length)."""
        _refuse_single("tokenize", texts)
        return self._text.tokenize(texts)

    def _prepare(self, images: Sequence[ImageSource]) -> NDArray[Any]:
        """Return frames for the GPU pipeline, else pixels for the encoder."""
        make = self._preprocessor.pixels if self.gpu is None else self._preprocessor.frames
        return make(images)

    def _batches(self, images: Iterable[ImageSource], *, as_frames: bool) -> Batches:
        """Prepare frames or pixels in threads, in batches of at most `batch_size`."""
        _refuse_single("this method", images)
        preprocessor = self._preprocessor
        make = preprocessor.frame_batches if as_frames else preprocessor.pixel_batches
        return make(images, self.batch_size, self._threads)

    def _rank(
        self, batch: NDArray[Any], labels: LabelSet, top_k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return indices and scores (N, k) of frames or pixels, the most probable first."""
        if self.gpu is not None and batch.dtype == object:
            cos = self.purifier if isinstance(self.purifier, CosPurifier) else None
            return self.gpu.classify(list(batch[:, 0]), labels, cos, top_k)
        return self._host.classify(batch, labels, top_k)

    def _predict(self, batch: NDArray[Any], labels: LabelSet, top_k: int) -> list[list[Prediction]]:
        return to_predictions(labels.names, *self._rank(batch, labels, top_k))

    def _score_tables(
        self, batches: Iterable[NDArray[Any]], labels: LabelSet
    ) -> NDArray[np.float32]:
        rows = [score_table(*self._rank(batch, labels, len(labels))) for batch in batches]
        return np.concatenate([np.empty((0, len(labels)), np.float32), *rows])

    def _label_set(self, labels: Labels | None) -> LabelSet:
        if labels is not None:
            return self.labels(labels)
        if self._default_labels is None:
            raise ValueError("no labels: pass labels=[...] here, or to Runtime")
        return self._default_labels


def check_count(name: str, value: int, high: int | None = None) -> None:
    """Raise ValueError unless `value` is a whole number from 1 to `high`."""
    if not isinstance(value, int) or value < 1 or (high is not None and value > high):
        limit = "from 1" if high is None else f"from 1 to {high}"
        raise ValueError(f"{name} must be a whole number {limit}, got {value!r}")


def _refuse_single(method: str, argument: object) -> None:
    if isinstance(argument, SINGLE):
        raise TypeError(f"{method} takes a list, got one {type(argument).__name__}")


def _as_list(
    images: ImageSource | Sequence[ImageSource],
) -> tuple[Sequence[ImageSource], bool]:
    """Return the images as a sequence, and whether the argument was a single image."""
    if isinstance(images, Sequence) and not isinstance(images, SINGLE):
        return images, False
    return [images], True


def _chunks(items: Items, size: int) -> Iterator[Items]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
