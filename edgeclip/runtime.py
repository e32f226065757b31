"""Runtime: images and labels in, predictions out."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from os import PathLike
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from edgeclip import _core
from edgeclip.backends.base import TOKENS, unit
from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.backends.prior import Prior
from edgeclip.backends.select import open_image_side
from edgeclip.bundle import EMBEDDED, Bundle
from edgeclip.errors import BundleError, DeviceError, ImageError
from edgeclip.host import cores
from edgeclip.images.decoding import CudaFrame, ImageSource, decode, is_on_gpu
from edgeclip.labels import Label, Labels, LabelSet
from edgeclip.prediction import FrameAnswer, Prediction
from edgeclip.prefetch import batches, newest
from edgeclip.progress import Progress
from edgeclip.purify import (
    NO_PRIOR,
    CosPurifier,
    DiffPurifier,
    Purifier,
    check_prior,
    resolve,
)
from edgeclip.text.tower import TextTower

if TYPE_CHECKING:
    from edgeclip.backends.cuda_pipeline import GpuPipeline
    from edgeclip.explain import Explanation

logger = logging.getLogger(__name__)

SINGLE = (str, bytes, bytearray, memoryview)  # sequences in Python, one thing here
MAX_BATCH = 4096
MAX_THREADS = 1024
DECODINGS = ("fast", "exact")


class Runtime:
    """A bundle, loaded and ready to classify. One may be shared by threads, and pickled.

    In a process that unpickled it, or that was forked, it opens the bundle's files again.

    bundle: a directory, a Bundle, or None for the embedded demonstration bundle.
    device: auto (the best that works: a TensorRT engine that `edgeclip build` made, else CUDA, else
    the CPU), cpu, cuda or tensorrt. precision: fp32, fp16, int8, int8-qdq where the bundle has it; auto for
    the fastest on this machine of those that were verified against the model's answers (export --data)
    and give the bundle's golden outputs here. A first start tries them, and caches the result.
    purify: auto (what the bundle recommends), none, cos, diff, a CosPurifier or a DiffPurifier.
    labels: what `classify` uses where it is given none.
    decode: fast (large JPEGs at a reduced scale, see `edgeclip.images.decoding.decode`) or exact.
    batch_size: images in one run of the encoder. threads: inside one run, and beside it to prepare
    images; None for as many as affinity and CPU quota allow.

    Raises BundleError, DeviceError, LabelError; ValueError for an option that is not known;
    EdgeclipError where EDGECLIP_CACHE_SIZE is no size.
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
        if self.bundle.path == EMBEDDED:
            logger.warning(
                "note: this is the embedded demonstration bundle (%s); for anything else, "
                "export a model: python -m export ViT-B-32 --pretrained openai -o vit-b-32",
                self.bundle.manifest.description,
            )
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
        self.batch_size = batch_size
        self.purifier = resolve(purify, self.bundle.manifest.purification)
        usable = cores()
        _core.set_usable_cores(usable)
        self._threads = threads or usable
        self._preprocess_threads = (
            threads or 0
        )  # 0: as many of the usable cores as the work deserves
        self._fast_for = self.bundle.manifest.image if decode == "fast" else None
        manifest = self.bundle.manifest
        side = open_image_side(
            self.bundle, device, precision, batch_size=batch_size, threads=self._threads
        )
        self._image_encoder, self.device, self.precision = side.encoder, side.device, side.precision
        if self.device != "tensorrt":  # so that a worker chooses alike
            self._arguments |= {"device": self.device, "precision": self.precision}
        # Where the GPU does all of `classify`. A prior is run by ONNX Runtime, through the host.
        self.gpu = None if isinstance(self.purifier, DiffPurifier) else side.gpu
        spec = manifest.prior
        check_prior(self.purifier, None if spec is None else spec.timesteps)
        self._open_lock = threading.Lock()
        self._prior: Prior | None = None
        self._token_encoder: OnnxEncoder | None = None
        self.onnx_device, self.text_precision = side.onnx_device, side.text_precision
        self._text = TextTower(
            self.bundle, side.text_precision, device=side.onnx_device, threads=self._threads
        )
        self._default_labels = None if labels is None else self.labels(labels)

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
        """The `top_k` most probable labels of an image, the most probable first.

        images: a path, the bytes of a file, a PIL image or a uint8 RGB array (H, W, 3) gives a list
        of predictions; a list of these gives a list of lists. Where edgeclip has its CUDA kernels,
        the array may be on the GPU (PyTorch, CuPy).
        labels: names, or a LabelSet from `labels()`; None for the Runtime's own. Scores compare
        labels: one label alone always scores 1, so add others, such as "something else".
        Raises ImageError for an image that cannot be read, ValueError for arguments.
        """
        check_count("top_k", top_k)
        label_set = self._label_set(labels)
        many, single = _as_list(images)
        answers: list[list[Prediction]] = []
        for chunk in _chunks(many, self.batch_size):
            answers += self._classify(self._prepare(chunk), label_set, top_k)
        return answers[0] if single else answers

    def classify_each(
        self, images: Iterable[ImageSource], labels: Labels | None = None, *, top_k: int = 5
    ) -> Iterator[list[Prediction] | ImageError]:
        """Answers for any number of images, in order, in bounded memory.

        An image that cannot be read gives its ImageError, and the others their predictions.
        Threads read and prepare the next batch while the encoder runs. One of them reads `images`,
        never further than that batch. They end with the generator. An array on the GPU has to stay
        as it is until its answer.
        What `images` raises is raised after the answers before it.
        """
        check_count("top_k", top_k)
        label_set = self._label_set(labels)
        with closing(self._batches(images, self.gpu)) as prepared:
            for batch, errors in prepared:
                answers = iter(self._classify(batch, label_set, top_k) if len(batch) else [])
                yield from (error or next(answers) for error in errors)

    def stream(
        self, frames: Iterable[ImageSource], labels: Labels | None = None, *, top_k: int = 5
    ) -> Iterator[FrameAnswer]:
        """Answers about the newest frame of a camera, each as soon as it is there.

        frames: for example what a generator reads from a camera. It is read by a thread as fast as
        it gives frames; while the encoder is busy the newest one waits and the older ones are
        dropped, so nothing piles up. The last frame is always answered. For every frame of a
        recording, use `classify_each`. Arrays are copied, but on
        the GPU: a camera may write over its own.
        What frames raises is raised after the answers before it. Closing the generator stops
        reading at the next frame.
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
        """`classify` for what `preprocess` gives, float32 (N, 3, H, W): one list for each row."""
        check_count("top_k", top_k)
        label_set = self._label_set(labels)
        answers: list[list[Prediction]] = []
        for start in range(0, len(pixels), self.batch_size):
            answers += self._classify(pixels[start : start + self.batch_size], label_set, top_k)
        return answers

    def embed_images(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.float32]:
        """Unit embeddings of images, float32 (N, D), purified where the Runtime purifies.

        Takes what `classify` takes; one image gives one row.
        """
        many, _ = _as_list(images)
        rows = [self._embed(self.preprocess(chunk)) for chunk in _chunks(many, self.batch_size)]
        return np.concatenate([np.empty((0, self.bundle.manifest.embed_dim), np.float32), *rows])

    def embed_each(
        self, images: Iterable[ImageSource]
    ) -> Iterator[NDArray[np.float32] | ImageError]:
        """Unit embeddings (D,) of any number of images, in order; see `classify_each`."""
        with closing(self._batches(images)) as prepared:
            for batch, errors in prepared:
                rows = iter(self._embed(batch) if len(batch) else batch)
                yield from (next(rows) if error is None else error for error in errors)

    def embed_texts(
        self, texts: Sequence[str], *, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Unit embeddings of texts, float32 (N, D), as they are: no template is added.

        progress is called with the number of texts done so far and their total.
        """
        _refuse_single("embed_texts", texts)
        return self._text.embed(texts, progress)

    def explain(
        self, image: ImageSource, label: str | Label, *, templates: Sequence[str] | None = None
    ) -> Explanation:
        """Where one image speaks for one label: attention in [0, 1] over what the encoder sees.

        templates: as for `labels`. `edgeclip.explain.render` makes a picture of it.
        Raises BundleError where the image encoder gives no tokens, ImageError, LabelError.
        """
        # Imported here: it loads Pillow's fonts, which nothing else needs.
        from edgeclip.explain import Explanation, as_picture, attention_map

        manifest = self.bundle.manifest
        spec = manifest.tokens
        if spec is None:
            raise BundleError(
                f"{self.bundle.path}: this bundle's image encoder has no patch tokens: export a ViT"
            )
        pixels = self.preprocess([image])
        labels = self.labels([label], templates)
        tokens = self._open_tokens().embed(pixels)[0]
        expected = spec.prefix + spec.grid[0] * spec.grid[1], manifest.embed_dim
        if tokens.shape != expected:
            raise BundleError(
                f"{self.bundle.path}: the image encoder gives tokens {tokens.shape}, "
                f"which is not what the manifest says, {expected}"
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
        """The text embeddings of labels, each the mean over `templates` (None: the bundle's).

        Each is encoded once, then cached on disk; see `embed_texts` for progress. What encodes
        them is loaded for it and let go afterwards: where new labels come often, keep it with
        `load_text`. Labels whose prompts are longer than the model reads are logged.
        Raises LabelError, also for two labels that are the same tokens to the model.
        """
        return self._text.labels(names, templates, progress)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the arguments, by which another process opens the bundle again."""
        return functools.partial(type(self), **self._arguments), ()

    def load_text(self) -> None:
        """Keep the tokenizer and the text encoder in memory, as `embed_texts` and `tokenize` do."""
        self._text.load()

    def release_text(self) -> None:
        """Let go of the tokenizer and the text encoder; they are loaded again when needed."""
        self._text.release()

    def preprocess(self, images: Sequence[ImageSource]) -> NDArray[np.float32]:
        """Images as the encoder's input, float32 (N, 3, H, W), resized and normalised."""
        _refuse_single("preprocess", images)
        spec = self.bundle.manifest.image
        batch = np.empty((len(images), 3, *spec.size), np.float32)
        for image, out in zip(images, batch, strict=True):
            self._preprocess_into(out, image)
        return batch

    def encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Unit embeddings (N, D) of what `preprocess` gives, before any purification."""
        return unit(self._image_encoder.embed(pixels))

    def tokenize(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids (N, L) of texts, padded to the longest (or to the context length)."""
        _refuse_single("tokenize", texts)
        return self._text.tokenize(texts)

    def _prepare(self, images: Sequence[ImageSource]) -> NDArray[Any]:
        """What `_classify` takes: the encoder's input; or frames, where the GPU makes it of them."""
        if self.gpu is None:
            return self.preprocess(images)
        frames = np.empty((len(images), 1), object)
        for row, image in zip(frames, images, strict=True):
            row[0] = self._frame(image)
        return frames

    def _frame(self, image: ImageSource) -> NDArray[np.uint8] | CudaFrame:
        if is_on_gpu(image):
            return image
        return decode(image, fast_for=self._fast_for)

    def _frame_into(self, row: NDArray[Any], image: ImageSource) -> None:
        frame = self._frame(image)
        row[0] = np.array(frame) if frame is image and isinstance(image, np.ndarray) else frame

    def _preprocess_into(self, out: NDArray[np.float32], image: ImageSource) -> None:
        spec = self.bundle.manifest.image
        _core.preprocess(
            decode(image, fast_for=self._fast_for),
            out,
            mean=spec.mean,
            std=spec.std,
            resize=spec.resize,
            interpolation=spec.interpolation,
            fill=spec.fill,
            threads=self._preprocess_threads,
        )

    def _batches(
        self, images: Iterable[ImageSource], gpu: GpuPipeline | None = None
    ) -> Generator[tuple[NDArray[Any], list[ImageError | None]], None, None]:
        """As `_prepare` makes them, of up to `batch_size` readable images, and for each its error.

        Prepared by threads while the encoder runs; see `edgeclip.prefetch`.
        """
        _refuse_single("this method", images)
        if gpu is not None:
            frames = self.batch_size, 1
            return batches(images, self._frame_into, frames, self._threads, object)
        shape = self.batch_size, 3, *self.bundle.manifest.image.size
        return batches(images, self._preprocess_into, shape, self._threads)

    def _classify(
        self, batch: NDArray[Any], labels: LabelSet, top_k: int
    ) -> list[list[Prediction]]:
        """Of what `_prepare` gives."""
        cos = self.purifier if isinstance(self.purifier, CosPurifier) else None
        if self.gpu is not None and batch.dtype == object:
            indices, scores = self.gpu.classify(list(batch[:, 0]), labels, cos, top_k)
        else:
            indices, scores = self._classify_on_host(batch, labels, cos, top_k)
        return [
            [
                Prediction(labels.names[i], score, i)
                for i, score in zip(row, row_scores, strict=True)
            ]
            for row, row_scores in zip(indices.tolist(), scores.tolist(), strict=True)
        ]

    def _classify_on_host(
        self,
        pixels: NDArray[np.float32],
        labels: LabelSet,
        cos: CosPurifier | None,
        top_k: int,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        manifest = self.bundle.manifest
        embeddings = self._image_encoder.embed(pixels)
        if isinstance(self.purifier, DiffPurifier):
            embeddings = self._open_prior().purify(unit(embeddings), self.purifier)
        return _core.classify(
            embeddings,
            labels.embeddings,
            logit_scale=manifest.logit_scale,
            logit_bias=manifest.logit_bias,
            null_text=self.bundle.null_text if cos else None,
            null_scores=labels.null_scores if cos else None,
            steps=cos.steps if cos else 0,
            step_size=cos.step_size if cos else 0.0,
            top_k=min(top_k, len(labels)),
        )

    def _embed(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        rows, own = self.encode(batch), self.purifier
        if isinstance(own, DiffPurifier):
            return self._open_prior().purify(rows, own)
        if isinstance(own, CosPurifier):
            null_text = self.bundle.null_text
            return _core.purify_cos(rows, null_text, steps=own.steps, step_size=own.step_size)
        return rows

    def _label_set(self, labels: Labels | None) -> LabelSet:
        if labels is not None:
            return self.labels(labels)
        if self._default_labels is None:
            raise ValueError("no labels: pass labels=[...] here, or to Runtime")
        return self._default_labels

    def _open_prior(self) -> Prior:
        """Loaded when first needed: it may be larger than the encoders together."""
        with self._open_lock:
            if self._prior is None:
                spec, dim = self.bundle.manifest.prior, self.bundle.manifest.embed_dim
                if spec is None:
                    raise BundleError(NO_PRIOR)
                path = self.bundle.graph(spec.file)
                self._prior = Prior(path, dim, device=self.onnx_device, threads=self._threads)
            return self._prior

    def _open_tokens(self) -> OnnxEncoder:
        """Open the graph of the image tokens at first use: only `explain` needs it."""
        if self.device == "tensorrt":
            raise DeviceError("a TensorRT engine gives embeddings only: explain with --device cpu")
        with self._open_lock:
            if self._token_encoder is None:
                path = self.bundle.encoder("image_tokens", self.precision)
                self._token_encoder = OnnxEncoder(
                    path, device=self.device, threads=self._threads, output=TOKENS
                )
            return self._token_encoder

    def text_identity(self) -> str:
        """Return the identity of the text encoder: its files, and how texts become token ids.

        A LabelSet may be used with every Runtime of the same identity, on any device.
        """
        return self._text.identity


def check_count(name: str, value: int, high: int | None = None) -> None:
    """Raises ValueError for what is no whole number from 1 to `high`."""
    if not isinstance(value, int) or value < 1 or (high is not None and value > high):
        limit = "from 1" if high is None else f"from 1 to {high}"
        raise ValueError(f"{name} must be a whole number {limit}, got {value!r}")


def _refuse_single(method: str, given: object) -> None:
    if isinstance(given, SINGLE):
        raise TypeError(f"{method} takes a list, got one {type(given).__name__}")


def _as_list(
    images: ImageSource | Sequence[ImageSource],
) -> tuple[Sequence[ImageSource], bool]:
    """The images as a sequence, and whether it was a single one."""
    if isinstance(images, Sequence) and not isinstance(images, SINGLE):
        return images, False
    return [images], True


def _chunks(images: Sequence[ImageSource], size: int) -> Iterator[Sequence[ImageSource]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]
