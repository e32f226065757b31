"""What a precision keeps of the model's answers on real images, as they are and under attack."""

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
EPS, STEPS = 2 / 255, 10  # of pixels in [0, 1]; enough to bend any model that is not robust
MIN_AGREEMENT = 0.99
MAX_CHANGE = 0.01  # of the accuracy under attack


def load(spec: str) -> dataset.DataSet:
    """The test images of a data set, by its name as for train.evaluate. Raises ExportError."""
    try:
        return dataset.load(spec, train=False)
    except DataError as err:
        raise ExportError(f"--data {spec}: {err}") from err


def measure(bundle: Bundle, source: Source, test: dataset.DataSet) -> dict[str, dict[str, float]]:
    """For each precision of `bundle`, with its purification, on up to SAMPLES images of `test`:

    top1_agreement: how often its answer is that of the model in PyTorch; attacked_accuracy and
    attacked_accuracy_change: on images attacked in PyTorch (PGD on the margin, linf EPS), its
    accuracy, and how much more that is than PyTorch's.
    """
    chosen = np.linspace(0, len(test) - 1, min(SAMPLES, len(test))).round().astype(int)
    manifest = bundle.manifest
    subject = Subject(source, manifest.templates, manifest.null_templates, bundle)
    own = manifest.purification
    purifier = own if isinstance(own, CosPurifier) else None  # no precision changes a prior's step
    defence = subject.defence(test.classes, purifier).eval()
    shipped = {n: BundleClassifier(subject, test.classes, purifier, n) for n in manifest.precisions}
    mean, std = (torch.tensor(x)[:, None, None] for x in (manifest.image.mean, manifest.image.std))
    agree, right = (dict.fromkeys(shipped, 0) for _ in range(2))
    held = 0
    for part in np.array_split(chosen, -(-len(chosen) // BATCH)):
        pairs = [test[int(i)] for i in part]
        labels = torch.tensor([label for _, label in pairs])
        pixels = next(iter(shipped.values())).runtime.preprocess([image for image, _ in pairs])
        images = (torch.from_numpy(pixels) * std + mean).clamp(0, 1)
        attacked = pgd(
            defence, images, labels, eps=EPS, step_size=EPS / 4, steps=STEPS, loss="cw",
            generator=torch.Generator().manual_seed(int(part[0])),
        )  # fmt: skip
        with torch.no_grad():
            answers, bent = defence(images).argmax(1), defence(attacked).argmax(1)
        held += int((bent == labels).sum())
        for name, runtime in shipped.items():
            agree[name] += int((runtime.classes(images) == answers).sum())
            right[name] += int((runtime.classes(attacked) == labels).sum())
    return {
        name: {
            "top1_agreement": agree[name] / len(chosen),
            "attacked_accuracy": right[name] / len(chosen),
            "attacked_accuracy_change": (right[name] - held) / len(chosen),
        }
        for name in shipped
    }


def check(measured: Mapping[str, Mapping[str, float]], name_of_set: str) -> None:
    """Raises ExportError for a precision that does not keep enough."""
    for name, found in measured.items():
        agreement, change = found["top1_agreement"], found["attacked_accuracy_change"]
        if not agreement >= MIN_AGREEMENT:
            raise ExportError(
                f"{name} answers as the model does on {agreement:.1%} of {name_of_set}, less than "
                f"{MIN_AGREEMENT:.0%}: export without {name}; no bundle was written"
            )
        if not abs(change) <= MAX_CHANGE + 1e-9:
            raise ExportError(
                f"{name} is right on {change:+.1%} of {name_of_set} under attack, compared with the model, "
                f"more than {MAX_CHANGE:.0%} apart: export without {name}; no bundle was written"
            )
