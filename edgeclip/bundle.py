"""The bundle: a directory that holds everything a device needs, and nothing that is ever unpickled.

manifest.json                     what the model is, how to feed it, and every file's sha256
image_encoder.<precision>.onnx    pixels (N, 3, H, W) float32 -> embedding (N, D) [, tokens]
text_encoder.<precision>.onnx     ids (N, L) int64 -> embedding (N, D)
tokenizer.json                    for the tokenizers library
embeddings.safetensors            null_text (D,): the unit embedding of "no class in particular"
golden.npz                        one input and its outputs at every stage
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import BundleError
from edgeclip.purify import CosPurifier, Purifier

SCHEMA_VERSION = 1
EMBEDDED = Path(__file__).parent / "bundles" / "fashion"
DEFAULT_TEMPLATES = ("a photo of a {}.",)

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
EMBEDDINGS = "embeddings.safetensors"
GOLDEN = "golden.npz"


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes the encoder's input."""

    size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]
    resize: str = "shortest"  # shortest, longest or squash, as open_clip means them
    interpolation: str = "bicubic"  # or bilinear
    fill: int = 0  # border of resize "longest", 0..255


@dataclass(frozen=True)
class TextSpec:
    """How a prompt becomes the text encoder's input."""

    context_length: int
    clean: str  # lower, whitespace or canonicalize: see edgeclip.tokenizer
    dynamic_length: bool  # ids may be cut at the longest prompt of the batch
    pad_id: int = 0


@dataclass(frozen=True)
class TokenSpec:
    """The image encoder's `tokens` output (N, prefix + rows * columns, D)."""

    grid: tuple[int, int]  # rows, columns of patches
    prefix: int  # class and register tokens before the patches


@dataclass(frozen=True)
class Variant:
    """One precision: its two encoders, and how far they are from the source model."""

    image_encoder: str
    text_encoder: str
    parity: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    description: str
    source: Mapping[str, str]  # model, pretrained, weights_sha256
    embed_dim: int
    image: ImageSpec
    text: TextSpec
    tokens: TokenSpec | None
    logit_scale: float  # multiplies cosines: already exponentiated
    logit_bias: float
    templates: tuple[str, ...]
    null_templates: tuple[str, ...]
    purification: Purifier
    precisions: Mapping[str, Variant]
    robustness: tuple[Mapping[str, Any], ...] = ()  # measured rows; empty: not measured
    files: Mapping[str, str] = field(default_factory=dict)  # name -> sha256
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises BundleError, saying which entry is wrong; entries that are not known are ignored."""
        try:
            data = json.loads(text)
        except ValueError as err:
            raise BundleError(f"not valid JSON: {err}") from err
        if not isinstance(data, dict):
            raise BundleError("expected a JSON object")
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"schema version {version} is not supported, this edgeclip reads version "
                f"{SCHEMA_VERSION}: update edgeclip, or export the bundle again"
            )
        try:
            nested: dict[str, Any] = {
                "image": _record(ImageSpec, data["image"]),
                "text": _record(TextSpec, data["text"]),
                "tokens": None if data["tokens"] is None else _record(TokenSpec, data["tokens"]),
                "purification": _purifier(data["purification"]),
                "precisions": {k: _record(Variant, v) for k, v in data["precisions"].items()},
            }
            manifest: Manifest = _record(cls, data | nested)
        except KeyError as err:
            raise BundleError(f"entry {err} is missing") from err
        except (AttributeError, TypeError, ValueError) as err:
            raise BundleError(f"an entry is malformed: {err}") from err
        return manifest


def _record(cls: type[Any], data: Mapping[str, Any]) -> Any:
    """A dataclass from a JSON object; lists become tuples."""
    values = {}
    for entry in dataclasses.fields(cls):
        if entry.name in data:
            value = data[entry.name]
            values[entry.name] = tuple(value) if isinstance(value, list) else value
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise KeyError(entry.name)
    return cls(**values)


def _purifier(data: Mapping[str, Any] | None) -> Purifier:
    return None if data is None else CosPurifier(int(data["steps"]), float(data["step_size"]))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Bundle:
    """A bundle that was opened. Every file is checked against its sha256 when it is first used.

    Raises BundleError where the directory is no bundle, a file is missing or altered, or the
    schema version is not known.
    """

    def __init__(self, path: str | PathLike[str] | None = None) -> None:
        self.path = EMBEDDED if path is None else Path(path)
        manifest = self.path / MANIFEST
        try:
            text = manifest.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            reason = "no such file" if isinstance(err, FileNotFoundError) else err
            raise BundleError(
                f"{self.path} is not a bundle: cannot read {MANIFEST} ({reason}); "
                "make one with: python -m export MODEL --pretrained TAG -o DIR"
            ) from err
        try:
            self.manifest = Manifest.from_json(text)
        except BundleError as err:
            raise BundleError(f"{manifest}: {err}") from err
        for name in self._needed():
            if name not in self.manifest.files:
                raise BundleError(f"{manifest}: no sha256 for {name}")
        for name in self.manifest.files:
            if Path(name).name != name:  # a bundle never reaches outside its directory
                raise BundleError(f"{manifest}: {name!r} is not a plain file name")
            if not (self.path / name).is_file():
                raise BundleError(f"{self.path / name} is missing: copy the bundle again")
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r})"

    def _needed(self) -> list[str]:
        variants = self.manifest.precisions.values()
        encoders = [name for v in variants for name in (v.image_encoder, v.text_encoder)]
        return [*encoders, TOKENIZER, EMBEDDINGS, GOLDEN]

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files, once its contents are known to be intact."""
        path = self.path / name
        with self._lock:
            if name not in self._checked:
                self._check(name, path)
                self._checked.add(name)
        return path

    def _check(self, name: str, path: Path) -> None:
        try:
            found = sha256(path)
        except OSError as err:
            raise BundleError(f"{path} cannot be read: {err.strerror}") from err
        if found != self.manifest.files[name]:
            raise BundleError(
                f"{path} was altered: its sha256 is not the manifest's; copy it again"
            )

    def encoder(self, kind: str, precision: str) -> Path:
        """The ONNX file of the `image_encoder` or `text_encoder`, with its external data checked."""
        name: str = getattr(self.manifest.precisions[precision], kind)
        data = f"{name}.data"
        if data in self.manifest.files:
            self.file(data)
        return self.file(name)

    def verify(self) -> None:
        """Check every file. Raises BundleError that names the first one that is not intact."""
        for name in self.manifest.files:
            self.file(name)

    @cached_property
    def null_text(self) -> NDArray[np.float32]:
        """The unit null-text embedding, float32 (D,)."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self.file(EMBEDDINGS)
        try:
            vector: NDArray[np.float32] = load_file(path)["null_text"]
        except (SafetensorError, KeyError) as err:
            raise BundleError(f"{path} holds no null_text embedding") from err
        if vector.shape != (self.manifest.embed_dim,) or vector.dtype != np.float32:
            raise BundleError(f"{path}: null_text is not float32 ({self.manifest.embed_dim},)")
        return vector

    def golden(self) -> dict[str, NDArray[Any]]:
        """The golden input and outputs; see export/verify.py for what they are."""
        path = self.file(GOLDEN)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError) as err:
            raise BundleError(f"{path} cannot be read: {err}") from err

    @staticmethod
    def write_manifest(directory: Path, manifest: Manifest) -> None:
        """Write manifest.json with the sha256 of every other file in `directory`."""
        names = sorted(p.name for p in directory.iterdir() if p.is_file() and p.name != MANIFEST)
        hashes = {name: sha256(directory / name) for name in names}
        complete = dataclasses.replace(manifest, files=hashes)
        (directory / MANIFEST).write_text(complete.to_json(), encoding="utf-8")
