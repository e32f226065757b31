"""benchmarks.gpu without a GPU: its error, its table, and equal results of edgeclip and open_clip."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

import edgeclip
from benchmarks import gpu
from benchmarks.common import STEP_SIZE, STEPS, label_set
from edgeclip.tools.pictures import picture
from tests.support.models.export_models import PREPROCESSING, exported
from tests.support.paths import GARMENTS


def test_a_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match=r"^benchmarks\.gpu: needs an NVIDIA GPU$"):
        gpu.main()


def test_open_clip_gives_the_same_answers() -> None:
    """Compare both on the CPU, with the same weights, frames and purification."""
    export = exported("vit")
    rt = edgeclip.Runtime(export.bundle, purify=edgeclip.CosPurifier(STEPS, STEP_SIZE))
    labels = label_set(rt, 50)
    model = export.source.model
    scale = float(model.logit_scale.exp())
    assert scale == pytest.approx(export.bundle.manifest.logit_scale)
    settings = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    transform = open_clip.transform.image_transform_v2(settings, is_train=False)
    peer = gpu.OpenClip(model, transform, labels.embeddings, rt.bundle.null_text, device="cpu")
    frames = [np.array(picture(80, 60)), np.array(picture(50, 70))]
    indices, scores = peer.answer(peer.pixels(frames))
    expected = rt.classify(frames, labels)
    assert indices.tolist() == [[p.index for p in row] for row in expected]
    np.testing.assert_allclose(scores, [[p.score for p in row] for row in expected], atol=1e-4)

    ours, theirs = gpu.our_calls(rt, labels, frames), peer.calls(frames)
    assert tuple(ours) == tuple(theirs) == gpu.STAGES
    np.testing.assert_allclose(
        ours["encoder"](),
        torch.nn.functional.normalize(theirs["encoder"](), dim=1),  # type: ignore[arg-type]
        atol=1e-4,
    )


def test_frames_resized_on_the_device_are_close_to_open_clips() -> None:
    export = exported("vit")
    side = export.bundle.manifest.image.size[0]
    mean, std = (np.array(PREPROCESSING[key]) for key in ("mean", "std"))
    peer = gpu.OpenClip(
        export.source.model, None, np.eye(3, 48), np.eye(48)[0], device="cpu", resize=True
    )
    frame = np.array(picture(4 * side, 3 * side))
    actual = peer.pixels([frame])[0].numpy() * std[:, None, None] + mean[:, None, None]
    image = picture(4 * side, 3 * side).resize((side * 4 // 3, side), 3)
    left = (image.width - side) // 2
    expected = np.asarray(image.crop((left, 0, left + side, side))).transpose(2, 0, 1) / 255
    assert actual.shape == (3, side, side)
    np.testing.assert_allclose(actual, expected, atol=3 / 255)


def test_every_stage_and_batch_is_measured() -> None:
    sizes: list[int] = []

    def calls(frames: list[np.ndarray]) -> gpu.Calls:
        sizes.append(len(frames))
        return dict.fromkeys(gpu.STAGES, int)

    rows = gpu.measure({gpu.PEER: calls, "edgeclip": calls}, [1, 4], repeats=4)
    assert sizes == [1, 1, 4, 4]
    assert len(rows) == 2 * len(gpu.STAGES) * 2
    assert all(0 <= row["p50"] <= row["p99"] and row["runs"] == 4 for row in rows)


REPORT: dict[str, Any] = {
    "labels": 1000,
    "gpu_mb": {"edgeclip cuda fp16": 500.4, gpu.PEER: 700.0},
    "left_out": {"edgeclip tensorrt fp16": "TensorRT is not installed"},
    "rows": [
        {"batch": batch, "stage": stage, "name": name, "p50": ms * batch, "p99": 2 * ms * batch}
        for batch in (1, 8)
        for stage, share in zip(gpu.STAGES, (1, 0.5, 0.25), strict=True)
        for name, ms in (("edgeclip cuda fp16", share), (gpu.PEER, 10 * share))
    ],
}


def test_table() -> None:
    lines = gpu.render(REPORT).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    expected = "| 1 | edgeclip cuda fp16 | 1000 | 1.00 / 2.00 | 0.50 / 1.00 | 0.25 / 0.50 | 10.0 |"
    assert lines[2] == expected
    assert lines[3].startswith("| 1 | open_clip fp32 | 100 | 10.00 / 20.00 |")
    assert lines[4].startswith("| 8 | edgeclip cuda fp16 | 1000 | 8.00 / 16.00 |")
    assert "edgeclip cuda fp16 500, open_clip fp32 700." in lines[-2]
    assert lines[-1] == "Left out: edgeclip tensorrt fp16: TensorRT is not installed."


def test_build_problems_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.build_engine(tmp_path, "fp16", 8) == "TensorRT is not installed"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: spec("json"))
    problem = gpu.build_engine(tmp_path / "none", "fp16", 8)
    assert problem.startswith("error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests machines without a GPU")
def test_precisions_that_do_not_run_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "free_mb", lambda: 0.0)
    monkeypatch.setattr(gpu, "build_engine", lambda *_: "TensorRT is not installed")
    monkeypatch.setattr(gpu, "bundle_for", lambda *_: GARMENTS)
    monkeypatch.setattr(gpu.logging, "disable", lambda level: None)
    opened, left_out = gpu.open_runtimes(GARMENTS, 2)
    assert opened == {}
    assert list(left_out) == [
        f"edgeclip {device} {precision}"
        for device in ("cuda", "tensorrt")
        for precision in gpu.PRECISIONS
    ]
    assert left_out["edgeclip tensorrt fp16"] == "TensorRT is not installed"
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match=r"^benchmarks\.gpu: edgeclip does not run on the GPU: "):
        gpu.main()
