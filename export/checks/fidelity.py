"""Fidelity of each precision to the original model on real images, clean and under attack."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from edgeclip.bundle import Bundle
from edgeclip.purify import CosPurifier
from export import ExportError
from train.attacks import pgd
from train.data import dataset
from train.errors import DataError
from train.models.checkpoints import Source
from train.robustness.subjects import BundleClassifier, Subject

SAMPLES = 1000
BATCH = 50
EPS, STEPS = 2 / 255, 10  # PGD on pixels in [0, 1]; enough to fool any model that is not robust
MIN_AGREEMENT = 0.99
MAX_CHANGE = 0.01  # of the accuracy under attack


def load(spec: str) -> dataset.DataSet:
    """Load a data set's test images, by its name for train.evaluate. Raises ExportError."""
    try:
        return dataset.load(spec, train=False)
    except DataError as err:
        raise ExportError(f"--data {spec}: {err}") from err


def measure(bundle: Bundle, source: Source, test: dataset.DataSet) -> dict[str, dict[str, float]]:
    """Compare each precision of `bundle` with PyTorch on up to SAMPLES images of `test`.

    Returns by precision, both sides purifying as the bundle recommends:

    top1_agreement: fraction of images with the same answer as PyTorch
    attacked_accuracy: accuracy on images attacked in PyTorch (PGD on the margin, linf, EPS)
    attacked_accuracy_change: attacked_accuracy minus PyTorch's
    """
    chosen = np.linspace(0, len(test) - 1, min(SAMPLES, len(test))).round().astype(int)
    manifest = bundle.manifest
    subject = Subject(source, manifest.templates, manifest.null_templates, bundle)
    recommended = manifest.purification
    # A diffusion purifier is left out: no precision changes its prior's step.
    purifier = recommended if isinstance(recommended, CosPurifier) else None
    defence = subject.defence(test.classes, purifier).eval()
    classifiers = {
        n: BundleClassifier(subject, test.classes, purifier, n) for n in manifest.precisions
    }
    preprocess = next(iter(classifiers.values())).runtime.preprocess
    mean, std = (torch.tensor(x)[:, None, None] for x in (manifest.image.mean, manifest.image.std))
    agree, right = (dict.fromkeys(classifiers, 0) for _ in range(2))
    right_in_pytorch = 0
    for indices in np.array_split(chosen, -(-len(chosen) // BATCH)):
        pairs = [test[int(i)] for i in indices]
        labels = torch.tensor([label for _, label in pairs])
        pixels = preprocess([image for image, _ in pairs])
        images = (torch.from_numpy(pixels) * std + mean).clamp(0, 1)
        attacked = pgd(
            defence, images, labels, eps=EPS, step_size=EPS / 4, steps=STEPS, loss="cw",
            generator=torch.Generator().manual_seed(int(indices[0])),
        )  # fmt: skip
        with torch.no_grad():
            answers, attacked_answers = (defence(x).argmax(1) for x in (images, attacked))
        right_in_pytorch += int((attacked_answers == labels).sum())
        for name, classifier in classifiers.items():
            agree[name] += int((classifier.classes(images) == answers).sum())
            right[name] += int((classifier.classes(attacked) == labels).sum())
    return {
        name: {
            "top1_agreement": agree[name] / len(chosen),
            "attacked_accuracy": right[name] / len(chosen),
            "attacked_accuracy_change": (right[name] - right_in_pytorch) / len(chosen),
        }
        for name in classifiers
    }


def check(measured: Mapping[str, Mapping[str, float]], data_name: str) -> None:
    """Raise ExportError if a precision's answers or attacked accuracy differ too much."""
    for name, values in measured.items():
        agreement, change = values["top1_agreement"], values["attacked_accuracy_change"]
        if not agreement >= MIN_AGREEMENT:
            raise ExportError(
                f"{name} agrees with the original model on {agreement:.1%} of {data_name}, less "
                f"than {MIN_AGREEMENT:.0%}: export without {name}; no bundle was written"
            )
        if not abs(change) <= MAX_CHANGE + 1e-9:
            raise ExportError(
                f"{name} changes the accuracy under attack on {data_name} by {change:+.1%}, more "
                f"than {MAX_CHANGE:.0%}: export without {name}; no bundle was written"
            )
