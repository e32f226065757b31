"""Mixtures of data sets for training: equal parts of each, with the classes joined by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.data.class_names import fold
from train.data.dataset import DataSet
from train.errors import SettingsError


@dataclass(frozen=True, eq=False)
class Mixture:
    """Samples of k data sets in equal parts: sample i is of set i % k.

    There are k times as many as in the largest set. A smaller set begins again at its end, so that its
    images come equally often, or some of them once more. labels: for each set, the class index in the
    mixture of each of its classes; -1 for none.
    """

    sets: tuple[DataSet, ...]
    labels: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.sets) * max(map(len, self.sets))

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        turn, part = divmod(index, len(self.sets))
        data = self.sets[part]
        image, label = data[turn % len(data)]
        return image, self.labels[part][label]


def mix(
    sets: Sequence[DataSet], classes: Sequence[str] | None = None, *, labelled: bool = True
) -> DataSet:
    """Return the data set of equal parts of `sets`; one set without other classes stays as it is.

    classes: names of the classes, None for those of the sets. Differences of case, white space and
    Unicode form do not count. Without `labelled`, an image of a class that is not among them has the
    label -1; else this raises SettingsError.
    """
    if classes is None and len(sets) == 1:
        return sets[0]
    own: dict[str, str] = {}
    for name in (name for data in sets for name in data.classes):
        own.setdefault(fold(name), name)
    names = tuple(classes or own.values())
    indices = {fold(name): index for index, name in enumerate(names)}
    missing = [name for key, name in own.items() if key not in indices]
    if labelled and missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise SettingsError(
            f"the loss reads the labels of the images, and --classes lacks {missing[0]!r}{others}: "
            "add every class of --data to the file"
        )
    labels = tuple(tuple(indices.get(fold(name), -1) for name in s.classes) for s in sets)
    title = " and ".join(data.name for data in sets)
    return DataSet(title, names, sets[0].templates, Mixture(tuple(sets), labels))
