"""benchmarks.gpu where there is no GPU: its error, its table, and that both sides compute the same."""

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
from benchmarks.latency import picture
from benchmarks.purification import label_set
from edgeclip.bundle import EMBEDDED
from tests.support.export_models import PREPROCESSING, exported


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match=r"^benchmarks\.gpu: needs an NVIDIA GPU$"):
        gpu.main()


def test_the_peer_gives_edgeclip_s_answers() -> None:
    """The same weights, frames and purification through both, on the CPU."""
    made = exported("vit")
    rt = edgeclip.Runtime(made.bundle, purify=edgeclip.CosPurifier(gpu.STEPS, gpu.STEP_SIZE))
    labels = label_set(rt, 50)
    model = made.source.model
    scale = float(model.logit_scale.exp())
    assert scale == pytest.approx(made.bundle.manifest.logit_scale)
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


def test_frames_resized_on_the_device_are_nearly_open_clip_s() -> None:
    made = exported("vit")
    side = made.bundle.manifest.image.size[0]
    mean, std = (np.array(PREPROCESSING[key]) for key in ("mean", "std"))
    peer = gpu.OpenClip(
        made.source.model, None, np.eye(3, 48), np.eye(48)[0], device="cpu", resize=True
    )
    frame = np.array(picture(4 * side, 3 * side))
    found = peer.pixels([frame])[0].numpy() * std[:, None, None] + mean[:, None, None]
    image = picture(4 * side, 3 * side).resize((side * 4 // 3, side), 3)
    left = (image.width - side) // 2
    expected = np.asarray(image.crop((left, 0, left + side, side))).transpose(2, 0, 1) / 255
    assert found.shape == (3, side, side)
    np.testing.assert_allclose(found, expected, atol=3 / 255)


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
    """Of made-up figures."""
    lines = gpu.render(REPORT).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    expected = "| 1 | edgeclip cuda fp16 | 1000 | 1.00 / 2.00 | 0.50 / 1.00 | 0.25 / 0.50 | 10.0 |"
    assert lines[2] == expected
    assert lines[3].startswith("| 1 | open_clip fp32 | 100 | 10.00 / 20.00 |")
    assert lines[4].startswith("| 8 | edgeclip cuda fp16 | 1000 | 8.00 / 16.00 |")
    assert "edgeclip cuda fp16 500, open_clip fp32 700." in lines[-2]
    assert lines[-1] == "Left out: edgeclip tensorrt fp16: TensorRT is not installed."


def test_what_keeps_an_engine_from_being_built_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.build_engine(tmp_path, "fp16", 8) == "TensorRT is not installed"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: spec("json"))
    problem = gpu.build_engine(tmp_path / "none", "fp16", 8)
    assert problem.startswith("error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_where_edgeclip_does_not_run_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "free_mb", lambda: 0.0)
    monkeypatch.setattr(gpu, "build_engine", lambda *_: "TensorRT is not installed")
    monkeypatch.setattr(gpu, "bundle_for", lambda *_: EMBEDDED)
    monkeypatch.setattr(gpu.logging, "disable", lambda level: None)
    opened, left_out = gpu.open_runtimes(EMBEDDED, 2)
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
