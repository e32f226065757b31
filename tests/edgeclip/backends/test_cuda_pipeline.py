"""GPU pipeline with ONNX Runtime's CUDA provider and with TensorRT, compared with the CPU.

    pytest -m gpu tests/edgeclip/backends/test_cuda_pipeline.py

tests/edgeclip/backends/test_emulated.py runs these tests without a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import edgeclip
from edgeclip import Runtime, _core
from edgeclip.backends.cuda_array import DeviceArray, copy
from edgeclip.backends.engine_cache import BuildOptions, EngineCache
from edgeclip.backends.select import available_devices, image_engine_key
from edgeclip.bundle import Bundle
from edgeclip.cli.main import main
from edgeclip.purify import CosPurifier
from edgeclip.tools import golden
from edgeclip.tools.build_engine import build, check
from tests.support.paths import EXAMPLES, GARMENTS

LABELS = ["bag", "ankle boot", "dress", "coat", "trouser"]
COS = CosPurifier(steps=3, step_size=0.4)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _core.cuda_built(), reason="edgeclip was built without CUDA"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Share one folder of engines among all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("engines")
        patch.setenv("EDGECLIP_CACHE", str(folder))
        yield folder


@pytest.fixture
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the fixture that gives each test its own cache."""
    monkeypatch.setenv("EDGECLIP_CACHE", str(home))
    return home


@pytest.fixture(scope="module", params=["cuda", "tensorrt"])
def device(request: pytest.FixtureRequest, home: Path) -> str:
    if request.param == "tensorrt":
        pytest.importorskip("tensorrt")
        build(Bundle("garments"), precision="fp32")
    elif "cuda" not in available_devices():
        pytest.skip("needs onnxruntime-gpu")
    return str(request.param)


def runtimes(device: str, **options: object) -> tuple[Runtime, Runtime]:
    arguments = {"bundle": "garments", "precision": "fp32", "purify": COS, **options}
    return Runtime(device=device, **arguments), Runtime(device="cpu", **arguments)


def frame(height: int, width: int, seed: int = 0) -> np.ndarray:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[height // 4 : height // 2, width // 4 :] = 230
    return image


def check_same(actual: list, expected: list) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        scores = {p.label: p.score for p in theirs}
        assert [p.label for p in ours] == sorted(scores, key=scores.__getitem__, reverse=True)
        np.testing.assert_allclose(
            [p.score for p in ours], [scores[p.label] for p in ours], atol=2e-5
        )


@pytest.mark.parametrize("purify", ["none", "cos", COS], ids=str)
def test_answers_are_the_cpus(device: str, purify: object) -> None:
    ours, theirs = runtimes(device, purify=purify)
    sources = [EXAMPLES / f"{name}.png" for name in ("bag", "dress", "ankle-boot")]
    for _ in range(3):  # the third run replays a graph, if there is one
        check_same(ours.classify(sources, LABELS), theirs.classify(sources, LABELS))


@pytest.mark.parametrize("count", [1, 3, 9])
def test_any_number_of_frames(device: str, count: int) -> None:
    ours, theirs = runtimes(device)
    frames = [frame(20 + 7 * (i % 3), 25, i) for i in range(count)]
    expected = theirs.classify(frames, LABELS)
    for _ in range(3):
        check_same(ours.classify(frames, LABELS), expected)


def test_frames_of_many_sizes_and_strides(device: str) -> None:
    ours, theirs = runtimes(device)
    whole = frame(133, 110)
    views = [frame(1, 1), frame(33, 2), whole, whole[::2, ::-1], whole[5:60, 7:50]]
    for view in views:
        for _ in range(2):
            check_same([ours.classify(view, LABELS)], [theirs.classify(view, LABELS)])


def test_a_replayed_graph_reads_the_new_pixels(device: str) -> None:
    ours, theirs = runtimes(device)
    label_set = ours.labels(LABELS)
    for seed in range(5):
        image = frame(48, 64, seed)
        check_same([ours.classify(image, label_set)], [theirs.classify(image, LABELS)])
    captured = [graph for graph in ours.gpu._graphs.values() if graph is not None]
    assert len(captured) == (1 if device == "tensorrt" else 0)


def test_labels_and_top_k_change_between_graphs(device: str) -> None:
    ours, theirs = runtimes(device)
    image = frame(48, 64)
    many = [f"thing number {i}" for i in range(1030)]
    for _ in range(2):
        for labels, top_k in ((LABELS, 5), (LABELS[:2], 1), (many, 7), (LABELS[:1], 3)):
            actual = ours.classify(image, labels, top_k=top_k)
            assert len(actual) == min(top_k, len(labels))
            (expected,) = theirs.scores(image, labels)
            scores = [p.score for p in actual]
            np.testing.assert_allclose(scores, expected[[p.index for p in actual]], atol=2e-5)
            np.testing.assert_allclose(scores, np.sort(expected)[::-1][:top_k], atol=2e-5)
            np.testing.assert_allclose(ours.scores([image], labels)[0], expected, atol=2e-5)


def test_more_label_sets_than_the_cache_holds(device: str) -> None:
    ours, theirs = runtimes(device)
    image = frame(48, 64)
    sets = [[f"{word} {i}" for i in range(3)] for word in "abcde"]
    for labels in [*sets, *sets]:
        check_same([ours.classify(image, labels)], [theirs.classify(image, labels)])


def test_a_failed_allocation_is_a_device_error() -> None:
    message = r"\[cuda\] cudaMalloc\(\d+ bytes\): cudaErrorMemoryAllocation"
    with pytest.raises(_core.CudaError, match=message):
        _core.CudaMemory(1 << 50)
    with pytest.raises(edgeclip.DeviceError, match=message):
        DeviceArray((1 << 50,), np.uint8)


def test_a_frame_on_the_gpu(device: str) -> None:
    ours, theirs = runtimes(device)
    image = frame(48, 64)
    on_gpu = DeviceArray(image.shape, np.uint8)
    stream = _core.CudaStream()
    copy(on_gpu, image, stream.handle)
    _core.cuda_synchronize(stream.handle)
    for _ in range(3):
        check_same([ours.classify(on_gpu, LABELS)], [theirs.classify(image, LABELS)])
    with pytest.raises(ValueError, match=r"expected image \(H, W, 3\) uint8"):
        ours.classify(DeviceArray((4, 4), np.uint8), LABELS)
    with pytest.raises(TypeError, match="got DeviceArray"):
        theirs.classify(on_gpu, LABELS)


class Foreign:
    """GPU frame that another stream is still writing, with an interface to wait for it."""

    def __init__(self, image: np.ndarray, *, by_dlpack: bool) -> None:
        self.array = DeviceArray(image.shape, np.uint8)
        self.stream, self.waiting = _core.CudaStream(), []
        copy(self.array, image, self.stream.handle)
        if by_dlpack:
            self.__dlpack__ = self.wait

    def wait(self, stream: int) -> None:
        self.waiting.append(stream)
        _core.cuda_synchronize(self.stream.handle)

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return self.array.__cuda_array_interface__ | {"stream": self.stream.handle}


@pytest.mark.parametrize("by_dlpack", [False, True])
def test_an_incomplete_frame_is_awaited(device: str, by_dlpack: bool) -> None:
    ours, theirs = runtimes(device)
    for seed in range(4):
        image = frame(200, 300, seed)
        foreign = Foreign(image, by_dlpack=by_dlpack)
        check_same([ours.classify(foreign, LABELS)], [theirs.classify(image, LABELS)])
        assert foreign.waiting == ([ours.gpu._handle] if by_dlpack else [])


def test_another_dtype_at_the_same_address_is_no_replay(device: str) -> None:
    ours, theirs = runtimes(device)
    image = frame(40, 50)
    on_gpu = Foreign(image, by_dlpack=False).array
    for _ in range(3):
        check_same([ours.classify(on_gpu, LABELS)], [theirs.classify(image, LABELS)])
    on_gpu.dtype = np.dtype(np.int8)
    with pytest.raises(ValueError, match=r"uint8, got .* int8"):
        ours.classify(on_gpu, LABELS)


def test_two_runtimes_in_two_threads(device: str) -> None:
    images = [frame(20 + 3 * i, 30, i) for i in range(5)]
    _, theirs = runtimes(device)
    expected = [theirs.classify(image, LABELS) for image in images]

    def work(_: int) -> list:
        ours, _ = runtimes(device)
        return [ours.classify(image, LABELS) for _ in range(3) for image in images]

    with ThreadPoolExecutor(2) as pool:
        for actual in pool.map(work, range(2)):
            check_same(actual, 3 * expected)


def test_many_images_and_broken_ones(device: str, tmp_path: Path) -> None:
    ours, theirs = runtimes(device, batch_size=3)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    sources = [frame(40, 50, 1), broken, EXAMPLES / "bag.png", frame(20, 30, 2), frame(9, 9, 3)]
    actual = list(ours.classify_each(iter(sources), LABELS))
    expected = list(theirs.classify_each(sources, LABELS))
    assert isinstance(actual[1], edgeclip.ImageError)
    check_same(
        [x for x in actual if isinstance(x, list)], [x for x in expected if isinstance(x, list)]
    )


def test_a_generator_may_reuse_its_array(device: str) -> None:
    ours, theirs = runtimes(device, batch_size=4)
    images = [frame(40, 50, seed) for seed in range(6)]

    def source() -> Iterator[np.ndarray]:
        array = np.empty_like(images[0])
        for image in images:
            array[...] = image
            yield array

    check_same(list(ours.classify_each(source(), LABELS)), theirs.classify(images, LABELS))


def test_threads_share_a_runtime(device: str) -> None:
    ours, theirs = runtimes(device)
    images = [frame(30 + i % 3, 40, i) for i in range(12)]
    expected = [theirs.classify(image, LABELS) for image in images]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda image: ours.classify(image, LABELS), images))
    check_same(actual, expected)


def test_a_graph_that_takes_one_image_at_a_time(device: str) -> None:
    if device == "tensorrt":
        return  # TensorRT has no int8 engines
    ours, theirs = runtimes(device, precision="int8")
    images = [frame(20, 30, seed) for seed in range(3)]
    check_same(ours.classify(images, LABELS), theirs.classify(images, LABELS))
    assert ours.gpu.max_batch == 1


def test_embeddings_and_golden_outputs(device: str) -> None:
    ours, theirs = runtimes(device, purify="none")
    images = [frame(20, 30, seed) for seed in range(9)]
    np.testing.assert_allclose(ours.embed_images(images), theirs.embed_images(images), atol=2e-5)
    assert golden.check(ours)["scores"] < 1e-3


def test_texts_are_the_cpus(device: str) -> None:
    texts = ["a dress", "two boots"]
    actual, expected = (rt.embed_texts(texts) for rt in runtimes(device))
    np.testing.assert_allclose(actual, expected, atol=1e-5)  # TensorFloat-32 is 1e-4 apart


def test_bench_times_the_stages_on_the_gpu(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    from edgeclip.tools import bench

    settings = bench.Settings(
        image=(EXAMPLES / "bag.png").read_bytes(), batch_sizes=(1,), repeats=1
    )
    report = bench.measure(GARMENTS, device, "fp32", settings)
    assert list(report["gpu_stages_ms"]) == ["preprocess", "encoder", "classify"]
    (heading, *lines) = bench._render_one(
        report | {"device": device, "precision": "fp32", "problem": ""}
    )
    assert heading.startswith(f"{device} fp32")
    assert any("by the GPU's own clock" in line for line in lines)


def test_no_images(device: str) -> None:
    ours, _ = runtimes(device)
    assert ours.classify([], LABELS) == []


def test_stages_are_timed(device: str) -> None:
    ours, _ = runtimes(device)
    times = ours.gpu.stage_ms([frame(9, 9), frame(12, 9)], ours.labels(LABELS), COS)
    assert list(times) == ["preprocess", "encoder", "classify"]
    assert min(times.values()) >= 0


def test_a_zero_embedding_is_an_error(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = runtimes(device)
    monkeypatch.setattr(ours._image_encoder, "enqueue", lambda count: None)
    zeros = np.zeros(ours._image_encoder.embedding.shape, np.float32)
    copy(ours._image_encoder.embedding, zeros, ours._image_encoder.stream.handle)
    with pytest.raises(edgeclip.DeviceError, match="zero or not finite"):
        ours.classify(frame(9, 9), LABELS)


def test_build_stores_an_engine_for_later_use(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt")
    bundle = Bundle("garments")
    first = build(bundle, precision="fp32", options=BuildOptions(max_batch=2), force=True)
    assert first.is_new
    assert first.checked["top1_agreement"] == 1.0
    assert first.checked["golden"] < 1e-4
    assert first.checked["scores"] < 1e-3
    again = build(bundle, precision="fp32", options=BuildOptions(max_batch=2))
    assert not again.is_new
    assert again.path == first.path
    rt = Runtime("garments", purify="none")  # auto takes the engine
    assert (rt.device, rt.precision) == ("tensorrt", "fp32")
    assert rt.gpu.max_batch == 2
    ours, theirs = runtimes("tensorrt")
    images = [frame(9, 9, i) for i in range(5)]  # three batches
    check_same(ours.classify(images, LABELS), theirs.classify(images, LABELS))
    assert (
        main(["build", "garments", "--precision", "fp32", "--max-batch", "2", "--format", "json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["engine"] == str(first.path)
    with pytest.raises(edgeclip.DeviceError, match="a TensorRT engine gives embeddings only"):
        rt.explain(EXAMPLES / "bag.png", "bag")


def test_build_refuses_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt")
    with pytest.raises(edgeclip.DeviceError, match="int8 encoders are for ONNX Runtime on CPUs"):
        build(Bundle("garments"), precision="int8")
    with pytest.raises(edgeclip.DeviceError, match="has no fp16 encoders"):
        build(Bundle("garments"), precision="fp16")
    with pytest.raises(ValueError, match="pictures and labels go together"):
        build(Bundle("garments"), labels=LABELS)
    assert main(["build", "no-such-bundle"]) == 2
    assert "is not a bundle" in capsys.readouterr().err


def test_a_wrong_engine_is_refused(home: Path) -> None:
    rt = Runtime("garments", device="cpu", precision="fp32", purify="none")

    class WrongEncoder:
        """Encoder of mirrored images."""

        def embed(self, inputs: np.ndarray) -> np.ndarray:
            return rt.encode(np.ascontiguousarray(inputs[..., ::-1]))

    with pytest.raises(edgeclip.DeviceError, match="engine is not the bundle's encoder"):
        check(WrongEncoder(), Bundle("garments"), "fp32")
    images = [EXAMPLES / f"{name}.png" for name in ("bag", "dress", "ankle-boot")]
    actual = check(rt._image_encoder, Bundle("garments"), "fp32", images, LABELS)
    assert actual["top1_agreement"] == 1.0
    assert actual["pictures"] == 3


def test_a_missing_engine_is_an_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = pytest.importorskip("tensorrt")
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path))
    with pytest.raises(edgeclip.DeviceError, match=r"no TensorRT engine of .*: run edgeclip build"):
        Runtime("garments", device="tensorrt")
    assert EngineCache().latest(image_engine_key(Bundle("garments"), "fp32", trt)) is None


def test_doctor_reports_the_device(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "garments", "--device", device, "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device_used"] == device
    assert any(line.startswith(f"{device} fp32: works") for line in report["devices"])
