"""Runtime: images and labels in, predictions out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from edgeclip import _core
from edgeclip.bundle import EMBEDDED, TOKENIZER, Bundle
from edgeclip.encoders import Encoder, open_encoder
from edgeclip.errors import BundleError, DeviceError, ImageError
from edgeclip.images import ImageSource, decode
from edgeclip.labels import EmbeddingCache, Label, LabelSet, check_labels, check_templates
from edgeclip.prior import Prior
from edgeclip.purify import (
    NO_PRIOR,
    CosPurifier,
    DiffPurifier,
    Purifier,
    check_prior,
    resolve,
)
from edgeclip.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgeclip.explain import Explanation

logger = logging.getLogger(__name__)

Labels = LabelSet | Sequence[str | Label]
Progress = Callable[[int, int], object]

TEXT_BATCH = 64  # prompts in one run of the text encoder
LABEL_SETS_KEPT = 8  # in memory; on disk all are
SINGLE = (str, bytes, bytearray, memoryview)  # sequences in Python, one thing here
MAX_BATCH = 4096
MAX_THREADS = 1024
DECODINGS = ("fast", "exact")


@dataclass(frozen=True)
class Prediction:
    """One class of an answer."""

    label: str
    score: float  # softmax probability over all labels
    index: int  # position among the labels


class Runtime:
    """A bundle, loaded and ready to classify. One may be shared by threads.

    bundle: a directory, a Bundle, or None for the embedded demonstration bundle.
    device: auto (the best that works), cpu or cuda. precision: auto, or one that the bundle has.
    purify: auto (what the bundle recommends), none, cos, diff, a CosPurifier or a DiffPurifier.
    labels: what `classify` uses where it is given none.
    decode: fast (large JPEGs at a reduced scale, see `edgeclip.images.decode`) or exact.
    batch_size: images in one run of the encoder. threads: inside one run; None for one per core.

    Raises BundleError, DeviceError, LabelError; ValueError for an option that is not known.
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
        self.batch_size = batch_size
        self.precision = self._choose_precision(precision)
        self.purifier = resolve(purify, self.bundle.manifest.purification)
        self._threads = threads
        self._fast_for = self.bundle.manifest.image if decode == "fast" else None
        path = self.bundle.encoder("image_encoder", self.precision)
        self._image_encoder, self.device = open_encoder(path, device, threads)
        manifest = self.bundle.manifest
        self._image_encoder.check_shapes((3, *manifest.image.size), manifest.embed_dim)
        spec = manifest.prior
        check_prior(self.purifier, None if spec is None else spec.timesteps)
        self._prior_lock = threading.Lock()
        self._prior: Prior | None = None
        self._text_lock = threading.Lock()
        self._text: tuple[Tokenizer, Encoder] | None = None
        self._label_lock = threading.Lock()
        self._label_sets: dict[tuple[tuple[Label, ...], tuple[str, ...]], LabelSet] = {}
        self._cache = EmbeddingCache()
        self._default_labels = None if labels is None else self.labels(labels)

    def _choose_precision(self, precision: str) -> str:
        available = list(self.bundle.manifest.precisions)
        if precision == "auto":
            return available[0]
        if precision not in available:
            raise DeviceError(
                f"{self.bundle.path} has no {precision} encoders; it has {', '.join(available)}"
            )
        return precision

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
        of predictions; a list of these gives a list of lists.
        labels: names, or a LabelSet from `labels()`; None for the Runtime's own.
        Raises ImageError for an image that cannot be read, ValueError for arguments.
        """
        check_count("top_k", top_k)
        label_set = self._label_set(labels)
        many, single = _as_list(images)
        answers: list[list[Prediction]] = []
        for chunk in _chunks(many, self.batch_size):
            answers += self._classify(self.preprocess(chunk), label_set, top_k)
        return answers[0] if single else answers

    def classify_each(
        self, images: Iterable[ImageSource], labels: Labels | None = None, *, top_k: int = 5
    ) -> Iterator[list[Prediction] | ImageError]:
        """Answers for any number of images, in order, in bounded memory.

        An image that cannot be read gives its ImageError, and the others their predictions.
        """
        check_count("top_k", top_k)
        label_set = self._label_set(labels)
        for batch, errors in self._batches(images):
            answers = iter(self._classify(batch, label_set, top_k) if len(batch) else [])
            yield from (error or next(answers) for error in errors)

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
        for batch, errors in self._batches(images):
            rows = self._embed(batch) if len(batch) else batch
            good = iter(rows)
            yield from (error or next(good) for error in errors)

    def embed_texts(
        self, texts: Sequence[str], *, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Unit embeddings of texts, float32 (N, D), as they are: no template is added.

        progress is called with the number of texts done so far and their total.
        """
        _refuse_single("embed_texts", texts)
        tokenizer, encoder = self._text_encoder()
        ids = tokenizer(texts)
        found = np.empty((len(ids), self.bundle.manifest.embed_dim), np.float32)
        # Sorted by length, so that a batch is hardly longer than each of its prompts.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), TEXT_BATCH):
            chosen = order[start : start + TEXT_BATCH]
            found[chosen] = encoder.embed(self._pad([ids[i] for i in chosen]))
            if progress is not None:
                progress(start + len(chosen), len(order))
        return _unit(found)

    def explain(
        self, image: ImageSource, label: str | Label, *, templates: Sequence[str] | None = None
    ) -> Explanation:
        """Where one image speaks for one label: attention in [0, 1] over what the encoder sees.

        templates: as for `labels`. `edgeclip.explain.render` makes a picture of it.
        Raises BundleError where the image encoder gives no tokens, ImageError, LabelError.
        """
        from edgeclip.explain import explain  # loads Pillow's fonts, which nothing else needs

        return explain(self, self._image_encoder, image, label, templates)

    def labels(
        self,
        names: Labels,
        templates: Sequence[str] | None = None,
        *,
        progress: Progress | None = None,
    ) -> LabelSet:
        """The text embeddings of labels, each the mean over `templates` (None: the bundle's).

        Encoded once per set, then cached in memory and on disk; see `embed_texts` for progress.
        Raises LabelError.
        """
        if isinstance(names, LabelSet):
            return self._own(names, templates)
        checked = tuple(check_labels(names))
        worded = check_templates(self.bundle.manifest.templates if templates is None else templates)
        key = checked, tuple(worded)
        with self._label_lock:
            found = self._label_sets.get(key)
        if found is not None:
            return found
        # Without the lock, which others need for labels that are there: at worst two threads
        # encode the same ones at once.
        embeddings = self._class_embeddings([label.worded(worded) for label in checked], progress)
        names = tuple(label.name for label in checked)
        made = LabelSet(names, embeddings, embeddings @ self.bundle.null_text, self.text_identity())
        with self._label_lock:
            while len(self._label_sets) >= LABEL_SETS_KEPT:
                del self._label_sets[next(iter(self._label_sets))]  # the oldest
            return self._label_sets.setdefault(key, made)

    def _own(self, labels: LabelSet, templates: object) -> LabelSet:
        if templates is not None:
            raise ValueError("a LabelSet has its prompts already: templates go with names")
        if labels.encoder != self.text_identity():
            raise ValueError(
                "the LabelSet was made with another bundle: use this Runtime's labels()"
            )
        return labels

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
        return _unit(self._image_encoder.embed(pixels))

    def tokenize(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids (N, L) of texts, padded to the longest (or to the context length)."""
        _refuse_single("tokenize", texts)
        tokenizer, _ = self._text_encoder()
        return self._pad(tokenizer(texts))

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
            threads=self._threads or 0,
        )

    def _batches(
        self, images: Iterable[ImageSource]
    ) -> Iterator[tuple[NDArray[np.float32], list[ImageError | None]]]:
        """Encoder inputs of up to `batch_size` readable images, and for each image its error."""
        _refuse_single("this method", images)
        spec = self.bundle.manifest.image
        batch = np.empty((self.batch_size, 3, *spec.size), np.float32)
        errors: list[ImageError | None] = []
        filled = 0
        for image in images:
            try:
                self._preprocess_into(batch[filled], image)
                errors.append(None)
                filled += 1
            except ImageError as err:
                errors.append(err)
            if len(errors) == self.batch_size:
                yield batch[:filled], errors
                errors, filled = [], 0
        if errors:
            yield batch[:filled], errors

    def _classify(
        self, batch: NDArray[np.float32], labels: LabelSet, top_k: int
    ) -> list[list[Prediction]]:
        manifest = self.bundle.manifest
        embeddings = self._image_encoder.embed(batch)
        if isinstance(self.purifier, DiffPurifier):
            embeddings = self._open_prior().purify(_unit(embeddings), self.purifier)
        cos = self.purifier if isinstance(self.purifier, CosPurifier) else None
        indices, scores = _core.classify(
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
        return [
            [
                Prediction(labels.names[i], score, i)
                for i, score in zip(row, row_scores, strict=True)
            ]
            for row, row_scores in zip(indices.tolist(), scores.tolist(), strict=True)
        ]

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

    def _class_embeddings(
        self, prompts: list[list[str]], progress: Progress | None
    ) -> NDArray[np.float32]:
        key = EmbeddingCache.key(self.text_identity(), prompts)
        shape = (len(prompts), self.bundle.manifest.embed_dim)
        cached = self._cache.load(key, shape)
        if cached is not None:
            return cached
        rows = self.embed_texts(
            [prompt for worded in prompts for prompt in worded], progress=progress
        )
        counts = [len(worded) for worded in prompts]
        starts = np.cumsum([0, *counts[:-1]])
        classes = _unit(np.add.reduceat(rows, starts, axis=0))
        self._cache.store(key, classes)
        return classes

    def _open_prior(self) -> Prior:
        """Loaded when first needed: it may be larger than the encoders together."""
        with self._prior_lock:
            if self._prior is None:
                spec, dim = self.bundle.manifest.prior, self.bundle.manifest.embed_dim
                if spec is None:
                    raise BundleError(NO_PRIOR)
                path = self.bundle.graph(spec.file)
                self._prior = Prior(path, dim, device=self.device, threads=self._threads)
            return self._prior

    def _text_encoder(self) -> tuple[Tokenizer, Encoder]:
        """Loaded when first needed: labels that are cached need neither."""
        with self._text_lock:
            if self._text is None:
                spec = self.bundle.manifest.text
                tokenizer = Tokenizer(
                    self.bundle.file(TOKENIZER),
                    context_length=spec.context_length,
                    clean=spec.clean,
                )
                path = self.bundle.encoder("text_encoder", self.precision)
                encoder, _ = open_encoder(path, self.device, self._threads)
                encoder.check_shapes((spec.context_length,), self.bundle.manifest.embed_dim)
                self._text = tokenizer, encoder
            return self._text

    def text_identity(self) -> str:
        """What text embeddings depend on besides the prompts: two equal ones may share them."""
        manifest = self.bundle.manifest
        files = manifest.files
        encoder = manifest.precisions[self.precision].text_encoder
        return f"{files[encoder]} {files.get(encoder + '.data')} {files[TOKENIZER]} {manifest.text}"

    def _pad(self, ids: list[list[int]]) -> NDArray[np.int64]:
        spec = self.bundle.manifest.text
        length = max(map(len, ids), default=1) if spec.dynamic_length else spec.context_length
        batch = np.full((len(ids), length), spec.pad_id, np.int64)
        for row, prompt in zip(batch, ids, strict=True):
            row[: len(prompt)] = prompt
        return batch


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


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows divided by their norms; a row of an encoder is never zero unless its weights are."""
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
