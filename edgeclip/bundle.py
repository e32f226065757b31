"""The bundle: a directory with everything a device needs, and no pickles.

manifest.json                     description of the model, its input, and the sha256 of every file
image_encoder.<precision>.onnx    pixels (N, 3, H, W) float32 -> embedding (N, D)
image_tokens.<precision>.onnx     ViTs only: pixels -> tokens (N, T, D), with the encoder's weights
text_encoder.<precision>.onnx     ids (N, L) int64 -> embedding (N, D)
tokenizer.json                    for the tokenizers library
embeddings.safetensors            null_text (D,): the unit embedding of "no class in particular"
golden.npz                        one input and its outputs at every stage
prior.onnx                        only for CLIPure-Diff: z, timestep, noise -> loss, gradient
fused.<precision>.onnx            only for other runtimes: image to answer, with the encoder's weights

Bundles with the same text tower may share it: where the manifest says `text_from`, the tokenizer and the
text encoders are those of the bundle of that name in the same directory, or else of the embedded one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
import zipfile
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import BundleError
from edgeclip.manifest import Manifest
from edgeclip.onnx_file import locations
from edgeclip.storage import sha256, write

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
EMBEDDINGS = "embeddings.safetensors"
GOLDEN = "golden.npz"

NAMES = {"fashion": "garments"}  # by folder; the result files of docs/ name this folder
# Folders of the embedded bundles by name.
EMBEDDED = {
    NAMES.get(path.parent.name, path.parent.name): path.parent
    for path in sorted((Path(__file__).parent / "bundles").glob(f"*/{MANIFEST}"))
}
DEFAULT = "everyday"  # name of the embedded bundle that is opened where none is named


def is_text(name: str) -> bool:
    """Return whether a file belongs to the text tower, which bundles may share."""
    return name == TOKENIZER or name.startswith("text_encoder.")


class Bundle:
    """An open bundle. Every file is checked against its sha256 on first use.

    path: an embedded bundle's name, as text; a directory; or None for the default embedded bundle. A
    directory with such a name needs a separator (./garments), or a Path.

    Raises BundleError if the directory is not a bundle, a file is missing or altered, or the schema
    version is unknown.
    """

    def __init__(self, path: str | PathLike[str] | None = None) -> None:
        name = DEFAULT if path is None else path
        self.path = EMBEDDED[name] if isinstance(name, str) and name in EMBEDDED else Path(name)
        manifest = self.path / MANIFEST
        try:
            raw = manifest.read_bytes()
            text = raw.decode()
        except (OSError, UnicodeDecodeError) as err:
            reason = "no such file" if isinstance(err, FileNotFoundError) else err
            raise BundleError(
                f"{self.path} is not a bundle: cannot read {MANIFEST} ({reason}); name an embedded "
                f"bundle ({', '.join(EMBEDDED)}), or make one with: "
                "python -m export MODEL --pretrained TAG -o DIR"
            ) from err
        try:
            self.manifest = Manifest.from_json(text)
        except BundleError as err:
            raise BundleError(f"{manifest}: {err}") from err
        for name in self._required_files():
            if name not in self.manifest.files:
                raise BundleError(f"{manifest}: no sha256 for {name}")
        self._check_presence()
        self.digest = hashlib.sha256(raw).hexdigest()  # covers every file, by its sha256
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r})"

    def _required_files(self) -> list[str]:
        graphs = [name for v in self.manifest.precisions.values() for name in v.graphs()]
        prior = self.manifest.prior
        return [*graphs, TOKENIZER, EMBEDDINGS, GOLDEN, *([prior.file] if prior else [])]

    def _check_presence(self) -> None:
        """Raise BundleError for a missing file."""
        advice, sibling = "copy the bundle again", self.manifest.text_from
        if sibling is not None:
            advice = (
                f"{self.path} takes its text tower from the bundle {sibling} beside it: copy both"
            )
            if self._text_folder(sibling).is_symlink():
                raise BundleError(f"{self._text_folder(sibling)} is a link: {advice}")
        for name in self.manifest.files:
            if not self.locate(name).is_file():
                raise BundleError(f"{self.locate(name)} is missing: {advice}")

    def locate(self, name: str) -> Path:
        """Return the path of a file, unchecked: in this directory, or in the bundle of `text_from`."""
        sibling = self.manifest.text_from
        if sibling is not None and is_text(name):
            return self._text_folder(sibling) / name
        return self.path / name

    def _text_folder(self, name: str) -> Path:
        """Return the directory of the bundle with the text tower: beside this one, or embedded."""
        beside = self.path.resolve().parent / name
        return EMBEDDED.get(name, beside) if not os.path.lexists(beside) else beside

    def file(self, name: str) -> Path:
        """Return the path of a file after checking its sha256. Raises BundleError."""
        path = self.locate(name)
        with self._lock:
            if name not in self._checked:
                self._check(name, path)
                self._checked.add(name)
        return path

    def _check(self, name: str, path: Path) -> None:
        try:
            digest = sha256(path)
        except OSError as err:
            raise BundleError(f"{path} cannot be read: {err.strerror}") from err
        if digest != self.manifest.files[name]:
            raise BundleError(
                f"{path} was altered: its sha256 is not the manifest's; copy it again"
            )

    def paths(self) -> list[Path]:
        """Return every file of the bundle."""
        return [self.path / MANIFEST, *map(self.locate, self.manifest.files)]

    def encoder(self, kind: str, precision: str) -> Path:
        """Return the ONNX file of the `image_encoder`, `image_tokens` or `text_encoder`."""
        variant = self.manifest.precisions[precision]
        owner = variant.image_encoder if kind == "image_tokens" else None
        return self.graph(getattr(variant, kind), owner)

    def graph(self, name: str, owner: str | None = None) -> Path:
        """Return an ONNX file after checking it and its external data, OWNER.data of the bundle.

        owner: the graph that owns the weights; None: the graph itself. Raises BundleError, also if the
        file refers to any other file.
        """
        path, data = self.file(name), f"{owner or name}.data"
        try:
            external = locations(path)
        except (OSError, ValueError) as err:
            raise BundleError(f"{path} is not an ONNX file: {err}") from err
        if external - {data} or (external and not self.has_beside(path, data)):
            raise BundleError(
                f"{path} has weights in {', '.join(sorted(external))}: a bundle has them in {data}, "
                "with its sha256; export it again"
            )
        if external:
            self.file(data)
        return path

    def has_beside(self, graph: Path, data: str) -> bool:
        """Return whether `data` is a file of the bundle in the graph's directory, as ONNX requires."""
        return data in self.manifest.files and self.locate(data).parent == graph.parent

    def verify(self) -> None:
        """Check every file. Raises BundleError for the first that is missing or altered."""
        for name in self.manifest.files:
            self.file(name)

    @cached_property
    def null_text(self) -> NDArray[np.float32]:
        """Unit null-text embedding, float32 (D,)."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self.file(EMBEDDINGS)
        try:
            vector: NDArray[np.float32] = load_file(path)["null_text"]
        except (SafetensorError, KeyError) as err:
            raise BundleError(f"{path} holds no null_text embedding") from err
        if vector.shape != (self.manifest.embed_dim,) or vector.dtype != np.float32:
            raise BundleError(f"{path}: null_text is not float32 ({self.manifest.embed_dim},)")
        vector.flags.writeable = False  # shared by threads
        return vector

    def golden(self) -> dict[str, NDArray[Any]]:
        """Return the golden input and outputs by name; see `edgeclip.backends.golden_values`."""
        path = self.file(GOLDEN)
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as err:
            raise BundleError(f"{path} cannot be read: {err}") from err

    @staticmethod
    def write_manifest(directory: Path, manifest: Manifest) -> None:
        """Write manifest.json with the sha256 of every other file in `directory`."""
        names = sorted(p.name for p in directory.iterdir() if p.is_file() and p.name != MANIFEST)
        hashes = {name: sha256(directory / name) for name in names}
        complete = dataclasses.replace(manifest, files=hashes)
        write(directory / MANIFEST, complete.to_json())
