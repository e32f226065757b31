"""Text half of a bundle: prompts to embeddings, labels to LabelSets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edgeclip.backends.base import Encoder, unit
from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.bundle import TOKENIZER, Bundle
from edgeclip.host import trim_memory
from edgeclip.labels import Label, Labels, LabelSet, check_labels, check_templates
from edgeclip.progress import Progress
from edgeclip.text.cache import CachedLabel, LabelCache, embedding_identity, label_keys
from edgeclip.text.label_tokens import LabelTokens, check_texts, check_tokens, read_tokens
from edgeclip.text.tokenizer import Tokenizer

# Tokens in one run of the encoder. Fewer read the weights too often, more overflow the processor's
# cache: 250 and 4000 are a seventh slower on two cores.
RUN_TOKENS = 1024
# Prompts that are encoded and stored together: enough to fill runs with prompts of one length, few
# enough that an interruption loses little and memory stays small.
BLOCK_PROMPTS = 4096
LABEL_SETS_KEPT = 8  # in memory; the cache on disk has all


class TextTower:
    """Tokenizer, text encoder and label cache of a bundle. May be shared by threads.

    Tokenizer and encoder are loaded on demand, which cached labels never cause. `labels` releases
    them afterwards, unless `load`, `tokenize` or `embed` was called before: then they stay until
    `release`.
    """

    def __init__(
        self, bundle: Bundle, precision: str, *, device: str, threads: int | None = None
    ) -> None:
        self._bundle, self._precision = bundle, precision
        self._device, self._threads = device, threads
        manifest = bundle.manifest
        files, encoder = manifest.files, manifest.precisions[precision].text_encoder
        data = files.get(encoder + ".data")
        # Without the device: labels encoded on the CPU may be used on the GPU.
        self.identity = f"{files[encoder]} {data} {files[TOKENIZER]} {manifest.text}"
        model = manifest.source.get("model", manifest.description)
        self._description = f"{model}, {precision}, {files[encoder][:12]}"
        self._cache = LabelCache()
        self._lock = threading.Lock()
        self._loaded: tuple[Tokenizer, Encoder] | None = None
        self._users = 0
        self._kept = False
        self._label_lock = threading.Lock()
        self._label_sets: dict[tuple[tuple[Label, ...], tuple[str, ...]], LabelSet] = {}

    def load(self) -> None:
        """Load the tokenizer and the encoder, and keep them until `release`."""
        with self._lock:
            self._kept = True
            self._load()

    def release(self) -> None:
        """Release the tokenizer and the encoder as soon as no thread uses them."""
        with self._lock:
            self._kept = False
            self._unload_if_unused()
        self._trim()

    def tokenize(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return token ids (N, L) of texts, padded to the longest (or to the context length)."""
        self.load()
        with self._using() as (tokenizer, _):
            return self._pad(tokenizer(texts))

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> NDArray[np.float32]:
        """Return unit embeddings (N, D), float32, of texts without templates; warn of cut texts."""
        self.load()
        with self._using() as (tokenizer, encoder):
            check_texts(texts, tokenizer)
            return self._encode(tokenizer, encoder, texts, progress)

    def labels(
        self,
        names: Labels,
        templates: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> LabelSet:
        """Return the LabelSet of labels; see `Runtime.labels`."""
        if isinstance(names, LabelSet):
            return self._check_label_set(names, templates)
        checked = tuple(check_labels(names))
        manifest = self._bundle.manifest
        worded = tuple(check_templates(manifest.templates if templates is None else templates))
        key = checked, worded
        with self._label_lock:
            label_set = self._label_sets.get(key)
        if label_set is not None:
            return label_set
        # Without the lock, so that threads with known labels do not wait: at worst two threads
        # encode the same labels at once.
        embeddings = self._class_embeddings(checked, worded, progress)
        null_scores = embeddings @ self._bundle.null_text
        names_of = tuple(label.name for label in checked)
        label_set = LabelSet(names_of, embeddings, null_scores, self.identity)
        with self._label_lock:
            while len(self._label_sets) >= LABEL_SETS_KEPT:
                del self._label_sets[next(iter(self._label_sets))]  # the oldest
            return self._label_sets.setdefault(key, label_set)

    def _check_label_set(self, labels: LabelSet, templates: object) -> LabelSet:
        """Return the LabelSet. Raise ValueError if it comes from another encoder."""
        if templates is not None:
            raise ValueError("a LabelSet has its prompts already: templates go with names")
        if labels.encoder != self.identity:
            raise ValueError(
                "the LabelSet was made with another bundle: use this Runtime's labels()"
            )
        return labels

    def _class_embeddings(
        self, labels: Sequence[Label], templates: Sequence[str], progress: Progress | None
    ) -> NDArray[np.float32]:
        """Return unit embeddings (K, D), each the mean over its prompts, from the cache or encoded."""
        spec, dim = self._bundle.manifest.text, self._bundle.manifest.embed_dim
        keys = label_keys(self._embedding_identity, labels, templates)
        cached = self._cache.load(keys, dim)
        missing = {key: x for key, x in zip(keys, labels, strict=True) if key not in cached}

        def check(new: Mapping[bytes, LabelTokens]) -> None:
            tokens = [new[key] if key in new else cached[key].tokens for key in keys]
            check_tokens(labels, tokens, templates, spec.context_length)

        if missing:
            cached |= self._encode_labels(missing, templates, check, progress)
            self._trim()  # here, since no frame refers to the encoder any more
        else:
            check({})
        vectors = [cached[key].vector for key in keys]
        return np.concatenate(vectors).reshape(-1, dim)  # faster than stack

    @cached_property
    def _embedding_identity(self) -> str:
        return embedding_identity(self.identity, self._device)

    def _encode_labels(
        self,
        labels: Mapping[bytes, Label],
        templates: Sequence[str],
        check: Callable[[Mapping[bytes, LabelTokens]], None],
        progress: Progress | None,
    ) -> dict[bytes, CachedLabel]:
        """Encode labels by key, storing each block: an interruption loses one block at most.

        check: called with the tokens of all labels before the encoding, which may take minutes.
        """
        labels_by_key: dict[bytes, CachedLabel] = {}
        prompts = {key: label.worded(templates) for key, label in labels.items()}
        total, done = sum(map(len, prompts.values())), 0
        with self._using() as (tokenizer, encoder):
            tokens = {key: read_tokens(tokenizer, x, templates) for key, x in labels.items()}
            check(tokens)
            for block in _blocks(prompts):
                texts = [text for worded in block.values() for text in worded]
                rows = self._encode(tokenizer, encoder, texts, _offset(progress, done, total))
                starts = np.cumsum([0, *map(len, block.values())])[:-1]
                means = zip(block, unit(np.add.reduceat(rows, starts)), strict=True)
                encoded = {key: CachedLabel(mean, tokens[key]) for key, mean in means}
                self._cache.store(self._description, encoded)
                labels_by_key |= encoded
                done += len(texts)
        return labels_by_key

    def _encode(
        self,
        tokenizer: Tokenizer,
        encoder: Encoder,
        texts: Sequence[str],
        progress: Progress | None,
    ) -> NDArray[np.float32]:
        """Return unit embeddings (N, D) of texts; equal prompts are encoded once."""
        row_of: dict[tuple[int, ...], int] = {}
        positions = [row_of.setdefault(tuple(ids), len(row_of)) for ids in tokenizer(texts)]
        prompts = list(row_of)
        rows = np.empty((len(prompts), self._bundle.manifest.embed_dim), np.float32)
        done = len(texts) - len(prompts)
        for run in self._runs(prompts):
            rows[run] = encoder.embed(self._pad([prompts[i] for i in run]))
            done += len(run)
            if progress is not None:
                progress(done, len(texts))
        return unit(rows)[np.array(positions, np.intp)]

    def _runs(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yield runs of prompts by index, sorted by length so that padding is short."""
        spec = self._bundle.manifest.text
        run: list[int] = []
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            length = len(prompts[i]) if spec.dynamic_length else spec.context_length
            if run and (len(run) + 1) * length > RUN_TOKENS:
                yield run
                run = []
            run.append(i)
        if run:
            yield run

    def _pad(self, ids: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Return ids as one batch (N, L), padded at the end."""
        spec = self._bundle.manifest.text
        length = max(map(len, ids), default=1) if spec.dynamic_length else spec.context_length
        batch = np.full((len(ids), length), spec.pad_id, np.int64)
        for row, prompt in zip(batch, ids, strict=True):
            row[: len(prompt)] = prompt
        return batch

    def _load(self) -> tuple[Tokenizer, Encoder]:
        """Load what is not loaded; the caller holds the lock."""
        if self._loaded is None:
            spec = self._bundle.manifest.text
            tokenizer = Tokenizer(
                self._bundle.file(TOKENIZER), context_length=spec.context_length, clean=spec.clean
            )
            path = self._bundle.encoder("text_encoder", self._precision)
            encoder = OnnxEncoder(path, device=self._device, threads=self._threads, expand=False)
            encoder.check_shapes((spec.context_length,), self._bundle.manifest.embed_dim)
            self._loaded = tokenizer, encoder
        return self._loaded

    def _unload_if_unused(self) -> None:
        """Unload the tokenizer and the encoder if nobody uses them; the caller holds the lock."""
        if not self._users and not self._kept:
            self._loaded = None

    def _trim(self) -> None:
        """Return a released encoder's memory to the system: 275 MB for a ViT-B/32."""
        if self._loaded is None:
            trim_memory()

    @contextmanager
    def _using(self) -> Iterator[tuple[Tokenizer, Encoder]]:
        """Yield the tokenizer and the encoder, which stay loaded in the block."""
        with self._lock:
            loaded = self._load()
            self._users += 1
        try:
            yield loaded
        finally:
            with self._lock:
                self._users -= 1
                self._unload_if_unused()


def _blocks(prompts: Mapping[bytes, list[str]]) -> Iterator[dict[bytes, list[str]]]:
    """Yield the labels' prompts by key, in blocks of about BLOCK_PROMPTS."""
    block: dict[bytes, list[str]] = {}
    count = 0
    for key, worded in prompts.items():
        block[key] = worded
        count += len(worded)
        if count >= BLOCK_PROMPTS:
            yield block
            block, count = {}, 0
    if block:
        yield block


def _offset(progress: Progress | None, done: int, total: int) -> Progress | None:
    """Return `progress` for a part of the work that starts at `done`."""
    return None if progress is None else lambda n, _: progress(done + n, total)
