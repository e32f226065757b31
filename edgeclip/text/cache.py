"""Label cache: text embeddings on disk, one for each label, keyed by content.

The cache is one SQLite file that processes and threads may share. Every call opens the file, does
one transaction and closes it, so that no connection survives a fork. The journal is SQLite's
rollback journal: a write-ahead log needs shared memory, which network drives lack, and a writable
folder, which a read-only cache lacks. SQLite detects a damaged file but not a damaged row: each row
has a checksum.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import EdgeclipError
from edgeclip.host import processor
from edgeclip.labels import Label
from edgeclip.storage import default_folder
from edgeclip.text.label_tokens import DIGEST_SIZE, Cut, LabelTokens

if TYPE_CHECKING:
    import sqlite3

logger = logging.getLogger(__name__)

T = TypeVar("T")
Vector = NDArray[np.float32]

# The name has the schema's number, so that an older edgeclip keeps its own file. Raise the number
# also when edgeclip cleans texts or averages prompts differently, since embeddings change.
FILE = "labels-2.sqlite"
OLDER_FILES = ("labels-1.sqlite",)  # touched by `clear` alone
SCHEMA = """
CREATE TABLE labels (
    key BLOB NOT NULL UNIQUE,
    encoder TEXT NOT NULL,
    used INTEGER NOT NULL,
    crc INTEGER NOT NULL,
    tokens BLOB NOT NULL,
    cut INTEGER NOT NULL,
    vector BLOB NOT NULL
);
CREATE INDEX by_use ON labels (used);
PRAGMA user_version = 1
"""
PAGE = 16384  # bytes; with SQLite's default of 4096 a row with D = 512 leaves half a page empty
TIMEOUT = 10.0  # seconds to wait for another process
KEYS = 500  # in one query; older versions of SQLite take 999
USE_RESOLUTION = 3600  # seconds: the precision of the time of last use
DEFAULT_LIMIT = "256M"
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
LIBRARIES = ("onnxruntime", "tokenizers", "ftfy")  # whose versions may change an embedding
CUTS = frozenset(Cut)


class CachedLabel(NamedTuple):
    """Text embedding of a label, float32 (D,), and the tokens of its prompts."""

    vector: Vector
    tokens: LabelTokens


@dataclass(frozen=True)
class Share:
    """Cached labels of one encoder."""

    encoder: str
    labels: int
    bytes: int  # of its vectors


class _DamagedError(EdgeclipError):
    """Damaged cache file."""


def label_keys(encoder: str, labels: Sequence[Label], templates: Sequence[str]) -> list[bytes]:
    """Return for each label a hash of everything that its embedding depends on.

    The hash covers `encoder` (see embedding_identity) and the label's own prompts, or else its name
    and the templates, so that prompts of most cached labels are never built.
    """
    with_prompts = hashlib.sha256(json.dumps([encoder]).encode())
    with_templates = hashlib.sha256(json.dumps([encoder, list(templates)]).encode())
    keys = []
    for label in labels:
        digest = (with_prompts if label.prompts else with_templates).copy()
        text = label.worded(templates) if label.prompts else label.name
        digest.update(json.dumps(text).encode())
        keys.append(digest.digest())
    return keys


def embedding_identity(encoder: str, device: str) -> str:
    """Return the identity of everything but the prompts that decides an embedding's bits.

    The identity names the encoder (Runtime.text_identity), the device, the processor and the
    versions of the libraries. A library's version is in the name of its metadata folder;
    importlib.metadata reads the same name but takes 25 ms to load.
    """
    names = [encoder, device, processor()]
    for library in LIBRARIES:
        spec = PathFinder.find_spec(library)
        if spec is not None and spec.origin is not None:
            siblings: list[str] = []
            with suppress(OSError):  # for example inside a zip file
                siblings = os.listdir(Path(spec.origin).parents[1])
            names += sorted(
                name
                for name in siblings
                if name.lower().startswith(library) and name.endswith((".dist-info", ".egg-info"))
            )
    return " ".join(names)


class LabelCache:
    """Text embeddings on disk, in `folder`, by default `default_folder`.

    limit: the largest size of the file in bytes, 0 for no cache, None for EDGECLIP_CACHE_SIZE. Least
    recently used labels are evicted. A cache that cannot be read or written costs time, never an
    answer: the failure is logged, and the labels are encoded again.
    Raises EdgeclipError if EDGECLIP_CACHE_SIZE is no size.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.limit = default_limit() if limit is None else limit
        folder = (folder or default_folder()) if self.limit else None
        self.path = None if folder is None else folder / FILE

    def load(self, keys: Sequence[bytes], dim: int) -> dict[bytes, CachedLabel]:
        """Return the cached labels, with vectors (dim,), of the keys present."""
        if self.path is None or not os.path.exists(self.path):
            return {}

        def work(db: sqlite3.Connection) -> dict[bytes, CachedLabel]:
            return _select(db, keys, dim) if _has_schema(db) else {}

        return self._try(self.path, work) or {}

    def store(self, encoder: str, labels: Mapping[bytes, CachedLabel]) -> None:
        """Store labels by key, all or none; `encoder` is a description for `shares`."""
        if self.path is None:
            return
        now = int(time.time())
        rows = []
        for key, (vector, (digest, cut)) in labels.items():
            data = np.ascontiguousarray(vector, "<f4").tobytes()
            crc = _crc(key, digest, cut, data)
            rows.append((key, encoder, now, crc, digest, int(cut), data))
        self._try(self.path, lambda db: _insert(db, rows, self.limit), create=True)

    def shares(self) -> list[Share]:
        """Return the content by encoder. Raise EdgeclipError if the file cannot be read."""
        if self.path is None or not os.path.exists(self.path):
            return []
        query = "SELECT encoder, count(*), sum(length(vector)) FROM labels GROUP BY 1 ORDER BY 1"

        def work(db: sqlite3.Connection) -> list[Share]:
            return [Share(*row) for row in db.execute(query)] if _has_schema(db) else []

        try:
            return _with_file(self.path, work)
        except EdgeclipError as err:
            raise EdgeclipError(f"{err}; edgeclip cache --clear deletes it") from err

    def size(self) -> int:
        """Return the size on disk in bytes."""
        return 0 if self.path is None else _file_size(self.path)

    def clear(self) -> int:
        """Delete the file and the files of older versions; return the bytes freed.

        Raises EdgeclipError if deletion is not permitted.
        """
        if self.path is None:
            return 0
        return sum(_clear(self.path.with_name(name)) for name in (FILE, *OLDER_FILES))

    def _try(
        self, path: Path, work: Callable[[sqlite3.Connection], T], *, create: bool = False
    ) -> T | None:
        """Return the result of `work`; log a failure and return None."""
        try:
            return _with_file(path, work, create=create)
        except EdgeclipError as err:
            logger.warning("label cache: %s; labels may have to be encoded again", err)
            if isinstance(err, _DamagedError):
                with suppress(EdgeclipError):
                    _remove(path)
            return None


def _with_file(path: Path, work: Callable[[sqlite3.Connection], T], *, create: bool = False) -> T:
    """Return the result of `work` on an open connection. Raise EdgeclipError if it fails."""
    try:
        import sqlite3  # takes 5 ms, and some builds of Python lack it
    except ImportError as err:
        raise EdgeclipError(f"this Python has no sqlite3 ({err})") from err
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
        with closing(sqlite3.connect(uri, TIMEOUT, isolation_level=None, uri=True)) as db:
            # Never wait for the disk: a power cut may damage the file, which is then rebuilt.
            db.execute("PRAGMA synchronous = OFF")
            return work(db)
    except (OSError, sqlite3.OperationalError) as err:
        raise EdgeclipError(f"cannot use {path} ({err})") from err
    except sqlite3.DatabaseError as err:
        raise _DamagedError(f"{path} is damaged ({err})") from err


def _has_schema(db: sqlite3.Connection) -> bool:
    """Return whether the tables exist: a new file has none until the first insert."""
    return bool(db.execute("PRAGMA user_version").fetchone()[0])


def _select(db: sqlite3.Connection, keys: Sequence[bytes], dim: int) -> dict[bytes, CachedLabel]:
    """Return the undamaged labels of the keys, and mark them as used."""
    now = int(time.time())
    valid: dict[bytes, bytes] = {}
    tokens: list[LabelTokens] = []
    stale, damaged = [], 0
    for start in range(0, len(keys), KEYS):
        page = keys[start : start + KEYS]
        marks = ",".join("?" * len(page))
        query = f"SELECT key, used, crc, tokens, cut, vector FROM labels WHERE key IN ({marks})"
        for key, used, crc, digest, cut, data in db.execute(query, page):
            blobs = all(isinstance(value, bytes) for value in (key, digest, data))
            sizes = blobs and (len(digest), len(data)) == (DIGEST_SIZE, 4 * dim)
            if sizes and cut in CUTS and _crc(key, digest, cut, data) == crc:
                valid[key] = data
                tokens.append(LabelTokens(digest, Cut(cut)))
                if not isinstance(used, int) or abs(now - used) > USE_RESOLUTION:
                    stale.append((now, key))
            else:
                damaged += 1
    if stale:
        _mark_used(db, stale)
    rows = np.frombuffer(b"".join(valid.values()), "<f4").astype(np.float32).reshape(-1, dim)
    finite: list[bool] = np.logical_and.reduce(np.isfinite(rows), axis=1).tolist()
    damaged += finite.count(False)
    if damaged:
        logger.warning("label cache: %d labels in it are damaged; encoding them again", damaged)
    labels = map(CachedLabel, rows, tokens)
    return {
        key: label for key, label, is_finite in zip(valid, labels, finite, strict=True) if is_finite
    }


def _crc(key: bytes, digest: bytes, cut: int, data: bytes) -> int:
    """Return the checksum of a row, key included: a damaged index may point to another row."""
    return zlib.crc32(data, zlib.crc32(b"%b%b%d" % (key, digest, cut)))


def _mark_used(db: sqlite3.Connection, marks: Sequence[tuple[int, bytes]]) -> None:
    """Update the time of last use; skip it if the file is read-only or busy."""
    import sqlite3

    with suppress(sqlite3.OperationalError):
        db.execute("PRAGMA busy_timeout = 0")
        db.execute("BEGIN IMMEDIATE")
        db.executemany("UPDATE labels SET used = ? WHERE key = ?", marks)
        db.execute("COMMIT")


def _insert(db: sqlite3.Connection, rows: Sequence[tuple[object, ...]], limit: int) -> None:
    """Insert rows, creating the tables and evicting labels as needed."""
    if not _has_schema(db):  # both pragmas must precede the first table and the transaction
        db.execute(f"PRAGMA page_size = {PAGE}")
        db.execute("PRAGMA auto_vacuum = FULL")  # deletion shrinks the file
    db.execute("BEGIN IMMEDIATE")
    if not _has_schema(db):
        for statement in SCHEMA.split(";"):
            db.execute(statement)
    db.executemany("INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    while _size(db) > limit and _evict(db):
        pass
    db.execute("COMMIT")


def _size(db: sqlite3.Connection) -> int:
    """Return the bytes in use."""
    pages, free, size = (
        db.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def _evict(db: sqlite3.Connection) -> int:
    """Delete the least recently used tenth of the labels; return their number."""
    (count,) = db.execute("SELECT count(*) FROM labels").fetchone()
    oldest = "SELECT rowid FROM labels ORDER BY used, rowid LIMIT ?"
    deleted = db.execute(f"DELETE FROM labels WHERE rowid IN ({oldest})", (-(-count // 10),))
    return deleted.rowcount


def _file_size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _clear(path: Path) -> int:
    """Delete a label file once no process writes to it; return the bytes freed."""
    size = _file_size(path)
    if os.path.exists(path):

        def work(db: sqlite3.Connection) -> None:
            db.execute("BEGIN IMMEDIATE")  # no process writes, and no journal is in use
            _remove(path)

        with suppress(EdgeclipError):
            _with_file(path, work)
        _remove(path)
    return size


def _remove(path: Path) -> None:
    try:
        for file in (path, path.with_name(f"{path.name}-journal")):
            file.unlink(missing_ok=True)
    except OSError as err:
        raise EdgeclipError(f"cannot delete {file} ({err.strerror or err})") from err


def default_limit() -> int:
    """Return EDGECLIP_CACHE_SIZE in bytes. Raise EdgeclipError if it is no size."""
    text = os.environ.get("EDGECLIP_CACHE_SIZE") or DEFAULT_LIMIT
    match = re.fullmatch(r"([0-9]{1,12})([KMG]?)", text.strip().upper())
    if match is None:
        raise EdgeclipError(
            f"EDGECLIP_CACHE_SIZE is {text!r}: expected bytes, such as 500M or 2G, or 0 for no cache"
        )
    return int(match[1]) * UNITS[match[2]]
