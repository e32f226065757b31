"""The arithmetic about Jetsons: its amounts against PyTorch's, its peaks against the data sheets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.roofline import DEVICES, Device, Vit, Work, milliseconds
from train.models.self_attention import plain_attention
from train.models.towers import VitImageEncoder

SPARSE = 2  # the data sheets' headline counts it twice with structured sparsity


def vision(model: str) -> VisionTransformer:
    """open_clip's image tower, of which there are only shapes."""
    with torch.device("meta"):
        return open_clip.model.CLIP(**open_clip.get_model_config(model)).visual.eval()


@pytest.mark.parametrize("model", roofline.MODELS)
def test_operations_and_parameters_are_those_of_pytorch(model: str) -> None:
    visual, vit = vision(model), Vit.named(model)
    pixels = torch.zeros(1, 3, 224, 224, device="meta")
    # Fused attention is not counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        visual(pixels)
    assert vit.flop(whole=True) == counter.get_total_flops()
    assert vit.parameters == sum(p.numel() for p in visual.parameters())


def test_operations_of_the_exported_graph() -> None:
    """Which gives embedding and tokens: less the tokens' last block and projection."""
    visual, vit = vision("ViT-B-32"), Vit.named("ViT-B-32")
    with torch.no_grad(), torch.device("meta"), plain_attention(visual):
        encoder = VitImageEncoder(visual)
        with FlopCounterMode(display=False) as counter:
            encoder(torch.zeros(1, 3, 224, 224))
    tokens = vit.patches + 1
    for_tokens = vit.block(tokens) + 2 * tokens * vit.width * vit.dim
    assert vit.flop() == counter.get_total_flops() - for_tokens


@pytest.mark.parametrize(
    ("model", "published"),
    # Billions of multiplications with their addition: docs/model_profile.csv of open_clip.
    [("ViT-B-32", 4.41), ("ViT-B-16", 17.58), ("ViT-L-14", 81.08)],
)
def test_operations_are_about_the_published_ones(model: str, published: float) -> None:
    assert Vit.named(model).flop(whole=True) / 2e9 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("name", "fp16", "fp32"),
    [
        # int8 without sparsity is twice fp16: 40, 67 and, of the GPU alone, 170 TOPS with it.
        ("Orin Nano 8GB", 40 / SPARSE / 2, 1.28),
        ("Orin Nano 8GB Super", 67 / SPARSE / 2, 2.09),
        ("AGX Orin 64GB", 170 / SPARSE / 2, 5.3),
        # fp4 is four times fp16: 2070 TFLOPS with sparsity.
        ("Thor T5000", 2070 / SPARSE / 4, 8.06),
        ("H100 SXM", 1979 / SPARSE, 67),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name: str, fp16: float, fp32: float) -> None:
    assert DEVICES[name].fp16 == pytest.approx(fp16, rel=0.03)  # 40 TOPS are 41 rounded
    assert DEVICES[name].fp32 == pytest.approx(fp32, rel=0.01)


def test_bytes_are_those_of_the_arrays() -> None:
    vit = Vit.named("ViT-B-32")
    pixels, embeddings = torch.zeros(8, 3, 224, 224), torch.zeros(8, 512)
    weights = sum(p.nbytes for p in vision("ViT-B-32").half().parameters())
    assert vit.work(8, 2).bytes == weights + pixels.nbytes + embeddings.nbytes
    frame = torch.zeros(480, 480, 3, dtype=torch.uint8)  # what is left of 480 x 640
    assert roofline.preprocess(480, 640).bytes == frame.nbytes + pixels[0].nbytes
    classes, null_scores = torch.zeros(1000, 512), torch.zeros(1000)
    moved = classes.nbytes + null_scores.nbytes + embeddings.nbytes
    assert roofline.classify(8, 512, 4).bytes == moved


def test_the_longer_time_counts() -> None:
    device = Device(1, 1e6, 2, 1000, "2 TFLOPS of fp16, 1 TB/s", cores=1)
    assert device.fp16 == device.fp32 == 2
    assert milliseconds(Work(4e9, 1e9), device, "fp16") == {"bound": 2, "expected": 4}
    found = milliseconds(Work(1e9, 1.4e9, 0.7e9), device, "fp32")
    assert found == {"bound": pytest.approx(1.4), "expected": pytest.approx(3)}


def test_nothing_is_expected_below_its_bound_or_measured_there() -> None:
    report = roofline.compute()
    cells = [ms for row in report["rows"] for ms in row["ms"].values()]
    assert len(cells) == len(DEVICES) * (2 * 2 * len(roofline.MODELS) + 2 + 2)
    assert all(0 < ms["bound"] <= ms["expected"] for ms in cells)
    measured = report["h100_kernels_ms"]
    assert all(ms["bound"] < ms["measured"] for ms in measured.values())


def test_table_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "roofline.json"
    monkeypatch.setattr(sys, "argv", ["roofline", "--json", str(out)])
    roofline.main()
    report = json.loads(out.read_text())
    assert report == roofline.compute()
    shown = capsys.readouterr().out
    assert shown == f"{roofline.render(report)}\n"
    assert shown.startswith("Arithmetic, not measurements")
    header = next(line for line in shown.splitlines() if line.startswith("| milliseconds"))
    assert [cell.strip() for cell in header.split("|")[4:-1]] == list(DEVICES)
