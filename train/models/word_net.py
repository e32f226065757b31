"""Hypernyms of WordNet's nouns, from its file data.noun (Princeton WordNet; wndb(5WN))."""

from __future__ import annotations

from pathlib import Path

from train.errors import ModelError

HYPERNYM = ("@", "@i")  # pointers of a noun to its class, and of an instance to its class

Noun = tuple[str, int | None]  # first word, and the offset of the first hypernym


def read_nouns(file: Path) -> dict[int, Noun]:
    """Read the nouns by their offsets: n02084071 has the offset 2084071. Raises ModelError."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return dict(_parse(line) for line in lines if not line.startswith("  "))  # the licence
    except (OSError, ValueError, IndexError) as err:
        raise ModelError(f"{file} is no data.noun of WordNet 3.0: {err}") from err


def _parse(line: str) -> tuple[int, Noun]:
    fields = line.partition("|")[0].split()
    start = 4 + 2 * int(fields[3], 16)  # after the words and their numbers
    count = int(fields[start])
    pointers = (fields[start + 1 + 4 * i : start + 5 + 4 * i] for i in range(count))
    parents = [int(offset) for kind, offset, *_ in pointers if kind in HYPERNYM]
    return int(fields[0]), (fields[4].replace("_", " "), parents[0] if parents else None)


def hypernyms(nouns: dict[int, Noun], wnid: str, limit: int) -> list[str]:
    """Return the words of up to `limit` hypernyms of a WordNet id, nearest first.

    Raises ModelError for an id that is not among the nouns.
    """
    try:
        chain: list[str] = []
        parent = nouns[int(wnid[1:])][1]
        while parent is not None and len(chain) < limit:
            word, parent = nouns[parent]
            chain.append(word)
    except KeyError as err:
        raise ModelError(f"{wnid} is not in data.noun: ImageNet's ids are WordNet 3.0's") from err
    return chain
