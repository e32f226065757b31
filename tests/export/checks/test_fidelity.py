"""Fidelity of precisions to the original model on a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import edgeclip
from export import ExportError
from export.checks import fidelity
from tests.support.models.export_models import exported, folder_of_images, quantized


def test_answers_are_compared_on_a_data_set(tmp_path: Path) -> None:
    tiny, bundle = exported("vit"), quantized("vit")
    spec = f"folder:{folder_of_images(tmp_path / 'set')}"
    measured = fidelity.measure(bundle, tiny.source, fidelity.load(spec))
    assert measured.keys() == {"fp32", "fp16", "int8", "int8-weights"}
    assert measured["fp32"]["top1_agreement"] == 1
    assert measured["fp32"]["attacked_accuracy_change"] == 0
    model, image = tiny.source.model, bundle.manifest.image
    runtime = edgeclip.Runtime(bundle, device="cpu", precision="int8", labels=["blue", "red"])
    files = sorted((tmp_path / "set").rglob("*.png"))
    with torch.no_grad():
        texts = torch.from_numpy(runtime.labels(["blue", "red"]).embeddings.copy())
        answers = (
            model.encode_image(torch.from_numpy(runtime.preprocess(files))) @ texts.T
        ).argmax(1)
    same = [a[0].index == b for a, b in zip(runtime.classify(files), answers.tolist(), strict=True)]
    assert measured["int8"]["top1_agreement"] == pytest.approx(np.mean(same), abs=1 / 8)
    assert image.size == (32, 32)
    with pytest.raises(ExportError, match="--data nonsense: unknown data set"):
        fidelity.load("nonsense")


@pytest.mark.parametrize(
    ("actual", "reason"),
    [
        ({"top1_agreement": 0.98, "attacked_accuracy_change": 0.0}, "98.0% of x, less than 99%"),
        ({"top1_agreement": float("nan"), "attacked_accuracy_change": 0.0}, "less than 99%"),
        ({"top1_agreement": 1.0, "attacked_accuracy_change": -0.02}, "under attack on x by -2.0%"),
        ({"top1_agreement": 1.0, "attacked_accuracy_change": 0.02}, r"under attack on x by \+2.0%"),
    ],
)
def test_precisions_with_other_answers_are_refused(actual: dict[str, float], reason: str) -> None:
    good = {"top1_agreement": 0.99, "attacked_accuracy_change": 0.01}
    fidelity.check({"int8": good}, "x")
    with pytest.raises(ExportError, match=reason):
        fidelity.check({"fp32": good, "int8": actual}, "x")
