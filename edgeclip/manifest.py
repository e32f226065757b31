"""Schema of manifest.json: a bundle's model, its inputs and outputs, and the sha256 of every file.

No hash protects the manifest itself, so every entry is checked.

Schema 2 has a graph of its own for the patch tokens: `image_tokens` of each precision. In schema 1 the
image encoder has two outputs, `embedding` and `tokens`. Both schemas are read; schema 2 is written.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from edgeclip import purify
from edgeclip._core import INTERPOLATIONS, RESIZES
from edgeclip.errors import BundleError
from edgeclip.labels import check_templates
from edgeclip.precisions import PRECISIONS
from edgeclip.purify import Purifier

SCHEMA_VERSION = 2
CLEANINGS = ("whitespace", "lower", "canonicalize")  # text cleaning before the tokenizer
PRIOR_GRADIENTS = ("exact", "forward")
DEFAULT_TEMPLATES = ("a photo of a {}.",)
LARGEST_INTEGER = 1 << 63  # JSON integers have no limit; larger ones do not convert to float


def _check(condition: bool, requirement: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{requirement}, got {value!r}")


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < LARGEST_INTEGER
    return isinstance(value, float) and math.isfinite(value)


def _plain(name: object) -> bool:
    """Return whether a name is one part of a path, and not its parent."""
    return isinstance(name, str) and name not in ("", "..") and PurePath(name).name == name


def _texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) for text in value)


def _pair(value: object, low: int, high: int) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_whole(v, low, high) for v in value)


def _table(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, Mapping) and all(isinstance(v, kind) for v in value.values())


@dataclass(frozen=True)
class ImageSpec:
    """Preprocessing of an image to the encoder's input."""

    size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]
    resize: str = "shortest"  # shortest, longest or squash, as defined by open_clip
    interpolation: str = "bicubic"  # or bilinear
    fill: int = 0  # border value for resize "longest", 0 to 255

    def __post_init__(self) -> None:
        _check(_pair(self.size, 1, 8192), "image size must be height, width in pixels", self.size)
        for name, values in (("mean", self.mean), ("std", self.std)):
            good = isinstance(values, tuple) and len(values) == 3 and all(map(_number, values))
            _check(good, f"image {name} must be three numbers", values)
        _check(all(self.std), "image std must not be 0", self.std)
        _check(self.resize in RESIZES, f"image resize must be one of {RESIZES}", self.resize)
        good = self.interpolation in INTERPOLATIONS
        _check(good, f"interpolation must be one of {INTERPOLATIONS}", self.interpolation)
        _check(_whole(self.fill, 0, 255), "image fill must be 0 to 255", self.fill)


@dataclass(frozen=True)
class TextSpec:
    """Preprocessing of a prompt to the text encoder's input."""

    context_length: int
    clean: str  # lower, whitespace or canonicalize: see edgeclip.text.tokenizer
    dynamic_length: bool  # whether ids may be cut at the longest prompt of the batch
    pad_id: int = 0

    def __post_init__(self) -> None:
        good = _whole(self.context_length, 3, 1 << 20)
        _check(good, "context_length must be a whole number from 3", self.context_length)
        _check(self.clean in CLEANINGS, f"clean must be one of {CLEANINGS}", self.clean)
        good = isinstance(self.dynamic_length, bool)
        _check(good, "dynamic_length must be true or false", self.dynamic_length)
        _check(_whole(self.pad_id, 0, 1 << 31), "pad_id must be a token id", self.pad_id)


@dataclass(frozen=True)
class TokenSpec:
    """Layout of the image tokens (N, prefix + rows * columns, D)."""

    grid: tuple[int, int]  # rows, columns of patches, or of a feature map
    prefix: int  # class and register tokens before the patches

    def __post_init__(self) -> None:
        _check(_pair(self.grid, 1, 8192), "token grid must be rows, columns", self.grid)
        _check(_whole(self.prefix, 0, 8192), "token prefix must be a number of tokens", self.prefix)


@dataclass(frozen=True)
class Variant:
    """Graphs of one precision, and their differences from the source model."""

    image_encoder: str
    text_encoder: str
    # Graph of the tokens, with its weights in the external data of image_encoder; None: no tokens.
    image_tokens: str | None = None
    parity: Mapping[str, float] = field(default_factory=dict)
    cpu_ms: float | None = None  # time of one image on the exporting machine; None: not measured

    def __post_init__(self) -> None:
        for name in self.graphs():
            _check(isinstance(name, str), "an encoder must be the name of a file", name)
        _check(_table(self.parity, (int, float)), "parity must be numbers by name", self.parity)
        good = self.cpu_ms is None or (_number(self.cpu_ms) and self.cpu_ms > 0)
        _check(good, "cpu_ms must be a number above 0", self.cpu_ms)

    def graphs(self) -> list[str]:
        """Return the names of all ONNX files."""
        tokens = [] if self.image_tokens is None else [self.image_tokens]
        return [self.image_encoder, self.text_encoder, *tokens]


@dataclass(frozen=True)
class PriorSpec:
    """One step of the diffusion prior, prior.onnx: see edgeclip.backends.prior."""

    file: str
    weights_sha256: str
    timesteps: int  # length of the noise schedule
    gradient: str  # exact, or forward: without the gradient of the prediction itself
    parity: Mapping[str, float] = field(default_factory=dict)  # differences from PyTorch

    def __post_init__(self) -> None:
        for name in (self.file, self.weights_sha256):
            _check(isinstance(name, str), "prior file and weights_sha256 must be texts", name)
        _check(
            _whole(self.timesteps, 1, 1 << 20), "prior timesteps must be a number", self.timesteps
        )
        good = self.gradient in PRIOR_GRADIENTS
        _check(good, f"prior gradient must be one of {PRIOR_GRADIENTS}", self.gradient)
        _check(_table(self.parity, (int, float)), "parity must be numbers by name", self.parity)


@dataclass(frozen=True)
class Robustness:
    """One white-box measurement of the PyTorch model under attack, by python -m train.evaluate."""

    data: str
    samples: int
    norm: str  # linf or l2
    eps: float  # largest perturbation, in units of [0, 1]
    attacks: tuple[str, ...]
    steps: int
    restarts: int
    seed: int
    purification: str
    clean_accuracy: float
    worst_case_accuracy: float  # accuracy over the worst case of all attacks

    def __post_init__(self) -> None:
        for name in ("data", "norm", "purification"):
            value = getattr(self, name)
            _check(isinstance(value, str), f"robustness {name} must be a text", value)
        _check(_texts(self.attacks), "robustness attacks must be a list of texts", self.attacks)
        for name in ("samples", "steps", "restarts", "seed"):
            value = getattr(self, name)
            _check(_whole(value, 0, 1 << 62), f"robustness {name} must be a whole number", value)
        for name in ("eps", "clean_accuracy", "worst_case_accuracy"):
            value = getattr(self, name)
            _check(_number(value), f"robustness {name} must be a number", value)


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json."""

    description: str
    source: Mapping[str, str]  # model, pretrained, weights_sha256
    embed_dim: int
    image: ImageSpec
    text: TextSpec
    tokens: TokenSpec | None
    logit_scale: float  # factor of cosines, already exponentiated
    logit_bias: float
    templates: tuple[str, ...]
    null_templates: tuple[str, ...]
    purification: Purifier
    precisions: Mapping[str, Variant]
    robustness: tuple[Robustness, ...] = ()  # empty: not measured
    prior: PriorSpec | None = None  # for CLIPure-Diff
    # Name of the bundle beside this one that has its tokenizer and text encoders; None: itself.
    text_from: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)  # name -> sha256
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check(isinstance(self.description, str), "description must be a text", self.description)
        _check(_table(self.source, str), "source must be texts by name", self.source)
        _check(_whole(self.embed_dim, 1, 1 << 20), "embed_dim must be a size", self.embed_dim)
        good = _number(self.logit_scale) and self.logit_scale > 0
        _check(good, "logit_scale must be a number above 0", self.logit_scale)
        _check(_number(self.logit_bias), "logit_bias must be a number", self.logit_bias)
        for name, value in (("templates", self.templates), ("null_templates", self.null_templates)):
            _check(_texts(value), f"{name} must be a list of texts", value)
            check_templates(value, name)
        _check(bool(self.precisions), "precisions must name one at least", self.precisions)
        for name in self.precisions:
            _check(name in PRECISIONS, f"precision must be one of {tuple(PRECISIONS)}", name)
        if self.tokens is not None:
            for name, variant in self.precisions.items():
                named = variant.image_tokens is not None
                _check(named, f"precision {name} must name its image_tokens", variant.image_tokens)
        _check(_table(self.files, str), "files must be sha256 by name", self.files)
        timesteps = None if self.prior is None else self.prior.timesteps
        purify.check_prior(self.purification, timesteps)
        for name in self.files:  # no path leaves the bundle's directory
            _check(_plain(name), "files must have plain file names", name)
        good = self.text_from is None or _plain(self.text_from)
        _check(good, "text_from must be the name of a bundle beside this one", self.text_from)

    def to_json(self) -> str:
        """Return the manifest as JSON of schema 2."""
        entries = dataclasses.asdict(self) | {"purification": purify.to_dict(self.purification)}
        return json.dumps(entries, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest of schema 1 or 2; unknown entries are ignored.

        Raises BundleError, which names the wrong entry.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as err:
            raise BundleError(f"not valid JSON: {err}") from err
        if not isinstance(data, dict):
            raise BundleError("expected a JSON object")
        version = data.get("schema_version")
        if not _whole(version, 1, SCHEMA_VERSION):
            raise BundleError(
                f"schema version {version} is not supported, this edgeclip reads versions 1 to "
                f"{SCHEMA_VERSION}: update edgeclip, or export the bundle again"
            )
        try:
            if version == 1:
                data = _upgrade(data)
            nested: dict[str, Any] = {
                "image": _record(ImageSpec, data["image"]),
                "text": _record(TextSpec, data["text"]),
                "tokens": None if data["tokens"] is None else _record(TokenSpec, data["tokens"]),
                "purification": purify.from_dict(data["purification"]),
                "precisions": {k: _record(Variant, v) for k, v in data["precisions"].items()},
                "robustness": [_record(Robustness, row) for row in data.get("robustness", [])],
                "prior": _record(PriorSpec, data["prior"]) if data.get("prior") else None,
            }
            manifest: Manifest = _record(cls, data | nested)
        except KeyError as err:
            raise BundleError(f"entry {err} is missing") from err
        except (AttributeError, OverflowError, RecursionError, TypeError, ValueError) as err:
            raise BundleError(f"an entry is malformed: {err}") from err
        return manifest


def _upgrade(data: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of schema 1 as those of schema 2: the image encoder itself has the tokens."""
    precisions = data["precisions"]
    if data["tokens"] is not None:
        precisions = {k: v | {"image_tokens": v["image_encoder"]} for k, v in precisions.items()}
    return data | {"precisions": precisions, "schema_version": SCHEMA_VERSION}


def _record(cls: type[Any], data: Mapping[str, Any]) -> Any:
    """Build a dataclass from a JSON object; lists become tuples."""
    values = {}
    for entry in dataclasses.fields(cls):
        if entry.name in data:
            value = data[entry.name]
            values[entry.name] = tuple(value) if isinstance(value, list) else value
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise KeyError(entry.name)
    return cls(**values)
