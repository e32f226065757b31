"""manifest.json: what a bundle's model is, how to feed it, and every file's sha256.

The manifest is the one file of a bundle that no hash protects, so each entry is checked.
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

SCHEMA_VERSION = 1
CLEANINGS = ("whitespace", "lower", "canonicalize")  # of texts, before the tokenizer
PRIOR_GRADIENTS = ("exact", "forward")
DEFAULT_TEMPLATES = ("a photo of a {}.",)


def _check(condition: bool, what: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{what}, got {value!r}")


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) for text in value)


def _pair(value: object, low: int, high: int) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_whole(v, low, high) for v in value)


def _table(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, Mapping) and all(isinstance(v, kind) for v in value.values())


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes the encoder's input."""

    size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]
    resize: str = "shortest"  # shortest, longest or squash, as open_clip means them
    interpolation: str = "bicubic"  # or bilinear
    fill: int = 0  # border of resize "longest", 0..255

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
    """How a prompt becomes the text encoder's input."""

    context_length: int
    clean: str  # lower, whitespace or canonicalize: see edgeclip.text.tokenizer
    dynamic_length: bool  # ids may be cut at the longest prompt of the batch
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
    """The image encoder's `tokens` output (N, prefix + rows * columns, D)."""

    grid: tuple[int, int]  # rows, columns of patches
    prefix: int  # class and register tokens before the patches

    def __post_init__(self) -> None:
        _check(_pair(self.grid, 1, 8192), "token grid must be rows, columns", self.grid)
        _check(_whole(self.prefix, 0, 8192), "token prefix must be a number of tokens", self.prefix)


@dataclass(frozen=True)
class Variant:
    """One precision: its two encoders, and how far they are from the source model."""

    image_encoder: str
    text_encoder: str
    parity: Mapping[str, float] = field(default_factory=dict)
    cpu_ms: float | None = None  # of one image, on the machine that exported; None: not measured

    def __post_init__(self) -> None:
        for name in (self.image_encoder, self.text_encoder):
            _check(isinstance(name, str), "an encoder must be the name of a file", name)
        _check(_table(self.parity, (int, float)), "parity must be numbers by name", self.parity)
        good = self.cpu_ms is None or (_number(self.cpu_ms) and self.cpu_ms > 0)
        _check(good, "cpu_ms must be a number above 0", self.cpu_ms)


@dataclass(frozen=True)
class PriorSpec:
    """The diffusion prior's step, prior.onnx: see edgeclip.backends.prior."""

    file: str
    weights_sha256: str
    timesteps: int  # of its noise schedule
    gradient: str  # exact, or forward: without what the prediction itself depends on
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
    """One measurement under attack: of the model in PyTorch, white box, by python -m train.evaluate."""

    data: str
    samples: int
    norm: str  # linf or l2
    eps: float  # largest perturbation, of pixels in [0, 1]
    attacks: tuple[str, ...]
    steps: int
    restarts: int
    seed: int
    purification: str
    clean_accuracy: float
    worst_case_accuracy: float  # right under every one of the attacks

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
    robustness: tuple[Robustness, ...] = ()  # empty: not measured
    prior: PriorSpec | None = None  # of CLIPure-Diff
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
        _check(_table(self.files, str), "files must be sha256 by name", self.files)
        timesteps = None if self.prior is None else self.prior.timesteps
        purify.check_prior(self.purification, timesteps)
        for name in self.files:  # a bundle never reaches outside its directory
            _check(PurePath(name).name == name, "files must have plain file names", name)

    def to_json(self) -> str:
        entries = dataclasses.asdict(self) | {"purification": purify.to_dict(self.purification)}
        return json.dumps(entries, indent=2) + "\n"

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
                "purification": purify.from_dict(data["purification"]),
                "precisions": {k: _record(Variant, v) for k, v in data["precisions"].items()},
                "robustness": [_record(Robustness, row) for row in data.get("robustness", [])],
                "prior": _record(PriorSpec, data["prior"]) if data.get("prior") else None,
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
