"""The CUDA kernels on a GPU: against the CPU path, on streams and in CUDA graphs."""

from __future__ import annotations

import numpy as np
import pytest

from edgeclip import _core

torch = pytest.importorskip("torch", reason="its tensors are the device arrays here")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _core.cuda_built(), reason="edgeclip was built without CUDA"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
NORMALIZE = {"mean": OPENAI_MEAN, "std": OPENAI_STD}
MODES = ("shortest", "longest", "squash")


def gpu(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).cuda()


def workspace(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8, device="cuda")


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def preprocess_on_gpu(
    image: torch.Tensor, target: tuple[int, int], dtype: torch.dtype = torch.float32, **options
) -> np.ndarray:
    out = torch.full((3, *target), torch.nan, dtype=dtype, device="cuda")
    how = {k: v for k, v in options.items() if k in ("resize", "interpolation")}
    scratch = workspace(_core.preprocess_workspace(image, out, **how))
    _core.preprocess(image, out, **NORMALIZE, workspace=scratch, **options)
    return out.cpu().numpy()


def preprocess_on_cpu(image: np.ndarray, target: tuple[int, int], **options) -> np.ndarray:
    out = np.empty((3, *target), np.float32)
    _core.preprocess(image, out, **NORMALIZE, **options)
    return out


class Problem:
    """Embeddings of various norms, unit classes and null text, as NumPy arrays."""

    def __init__(self, n: int, k: int, d: int, half: bool = False) -> None:
        rng = np.random.default_rng(n + k + d)
        self.half = half
        self.embeddings = rng.standard_normal((n, d)) * rng.uniform(0.1, 20, (n, 1))
        self.classes = rng.standard_normal((k, d))
        self.classes /= np.linalg.norm(self.classes, axis=1, keepdims=True)
        null_text = rng.standard_normal(d)
        if half:  # what both sides get
            self.embeddings, self.classes = map(np.float16, (self.embeddings, self.classes))
        self.embeddings, self.classes = map(np.float32, (self.embeddings, self.classes))
        self.null_text = np.float32(null_text / np.linalg.norm(null_text))
        self.null_scores = self.classes @ self.null_text
        self.options = {"logit_scale": 20.0, "logit_bias": -1.5, "top_k": 7}
        self.options |= {"steps": 3, "step_size": 0.4}

    def on_cpu(self) -> tuple[np.ndarray, ...]:
        return _core.classify(
            self.embeddings,
            self.classes,
            null_text=self.null_text,
            null_scores=self.null_scores,
            return_logits=True,
            **self.options,
        )

    def device_arrays(self) -> dict[str, torch.Tensor]:
        dtype = torch.float16 if self.half else torch.float32
        n, k = len(self.embeddings), len(self.classes)
        top = n, min(self.options["top_k"], k)
        return {
            "embeddings": gpu(self.embeddings).to(dtype),
            "classes": gpu(self.classes).to(dtype),
            "null_text": gpu(self.null_text),
            "null_scores": gpu(self.null_scores),
            "out_indices": torch.full(top, -7, dtype=torch.int32, device="cuda"),
            "out_probabilities": torch.empty(top, device="cuda"),
            "out_logits": torch.empty((n, k), device="cuda"),
            "workspace": workspace(_core.classify_workspace(n, k)),
        }

    def on_gpu(self) -> tuple[np.ndarray, ...]:
        arrays = _core.classify(**self.device_arrays(), **self.options)
        return tuple(array.cpu().numpy() for array in arrays)


def check(got: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    """The CPU's logits but for rounding, and the right order and softmax of these very logits."""
    indices, probabilities, logits = got
    np.testing.assert_allclose(logits, expected[2], atol=1e-4, rtol=0)
    order = np.argsort(-logits, axis=1, kind="stable")[:, : indices.shape[1]]
    np.testing.assert_array_equal(indices, order)
    powers = np.exp(logits.astype(float) - logits.max(axis=1, keepdims=True))
    softmax = powers / powers.sum(axis=1, keepdims=True)
    reference = np.take_along_axis(softmax, order, axis=1)
    np.testing.assert_allclose(probabilities, reference, rtol=2e-5, atol=1e-30)


SIZES = [(1, 1), (7, 5), (33, 100), (2049, 33), (97, 2049), (640, 481), (480, 640), (1000, 200)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", [(1, 1), (33, 33), (24, 41), (224, 224)])
def test_pixels_are_the_cpu_paths(mode: str, interpolation: str, target: tuple[int, int]) -> None:
    options = {"resize": mode, "interpolation": interpolation, "fill": 9}
    for size in SIZES:
        image = random_image(*size)
        expected = preprocess_on_cpu(image, target, **options)
        got = preprocess_on_gpu(gpu(image), target, **options)
        np.testing.assert_array_equal(got, expected, err_msg=str(size))
        half = preprocess_on_gpu(gpu(image), target, torch.float16, **options)
        np.testing.assert_array_equal(half, expected.astype(np.float16), err_msg=str(size))


@pytest.mark.parametrize("size", [(3000, 4000), (4000, 3000), (4608, 2592), (20000, 3), (3, 20000)])
@pytest.mark.parametrize("mode", MODES)
def test_large_frames(size: tuple[int, int], mode: str) -> None:
    image = random_image(*size)
    expected = preprocess_on_cpu(image, (224, 224), resize=mode)
    got = preprocess_on_gpu(gpu(image), (224, 224), resize=mode)
    np.testing.assert_array_equal(got, expected)


STRIDED = {
    "every other": lambda a: a[::2, 1::3],
    "cropped": lambda a: a[5:60, 7:50],
    "transposed": lambda a: a.transpose(0, 1),
    "planar": lambda a: a.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "one row repeated": lambda a: a[:1].expand(a.shape),
    "RGB of RGBA": lambda a: torch.cat([a, a[:, :, :1]], dim=2)[:, :, :3],
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("mode", MODES)
def test_any_strides(name: str, mode: str) -> None:
    image = STRIDED[name](gpu(random_image(70, 91)))
    expected = preprocess_on_cpu(image.cpu().numpy(), (32, 32), resize=mode)
    np.testing.assert_array_equal(preprocess_on_gpu(image, (32, 32), resize=mode), expected)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("n", [1, 2, 8, 33, 130])
@pytest.mark.parametrize("k", [1, 33, 1000, 1024, 1025, 2049])
@pytest.mark.parametrize("d", [1, 33, 512, 1024, 1025])
def test_classify_equals_the_cpu_path(n: int, k: int, d: int, half: bool) -> None:
    problem = Problem(n, k, d, half)
    check(problem.on_gpu(), problem.on_cpu())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_many_classes_and_samples(half: bool) -> None:
    for size in [(3, 21841, 768), (9000, 20, 64), (5000, 1100, 32)]:
        problem = Problem(*size, half)
        check(problem.on_gpu(), problem.on_cpu())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize(("k", "d"), [(7, 33), (1000, 512), (1025, 64)])
def test_alone_and_in_any_batch_bit_for_bit(k: int, d: int, half: bool) -> None:
    problem = Problem(71, k, d, half)
    embeddings, whole = problem.embeddings, problem.on_gpu()
    for begin, end in [(0, 1), (70, 71), (3, 5), (1, 9), (2, 67)]:
        problem.embeddings = embeddings[begin:end]
        for got, expected in zip(problem.on_gpu(), whole, strict=True):
            np.testing.assert_array_equal(got, expected[begin:end])


def test_a_misaligned_view_gives_the_same_bits() -> None:
    arrays = Problem(1, 50, 64).device_arrays()
    _core.classify(**arrays, logit_scale=20.0, top_k=7)
    expected = arrays["out_logits"].clone()
    shifted = torch.empty(65, device="cuda")[1:]
    shifted.copy_(arrays["embeddings"][0])
    _core.classify(**{**arrays, "embeddings": shifted[None]}, logit_scale=20.0, top_k=7)
    assert torch.equal(arrays["out_logits"], expected)


@pytest.mark.parametrize("k", [12, 1032])
def test_ties_go_to_the_lower_index(k: int) -> None:
    problem = Problem(2, 12, 16)
    problem.classes = np.tile(problem.classes[:4], (k // 4, 1))
    problem.null_scores = problem.classes @ problem.null_text
    problem.options["top_k"] = k
    got = problem.on_gpu()
    check(got, problem.on_cpu())
    assert np.all(np.diff(got[0][:, : k // 4]) == 4)


@pytest.mark.parametrize("k", [50, 2000])
@pytest.mark.parametrize("steps", [0, 1])
def test_near_the_null_text_and_of_any_norm(k: int, steps: int) -> None:
    problem = Problem(6, k, 512)
    problem.options |= {"steps": steps, "step_size": 30.0}
    noise = problem.embeddings[:3] / np.linalg.norm(problem.embeddings[:3], axis=1, keepdims=True)
    problem.embeddings[:3] = problem.null_text + noise * np.float32([[0.1], [1e-3], [0]])
    problem.embeddings[3:] *= np.float32([[1e-30], [1e-20], [1e30]])
    got, expected = problem.on_gpu(), problem.on_cpu()
    np.testing.assert_allclose(got[2], expected[2], atol=5e-4)


@pytest.mark.parametrize("k", [9, 1025])
def test_what_has_no_answer(k: int) -> None:
    problem = Problem(4, k, 8)
    problem.embeddings[1] = 0
    problem.embeddings[2, 3] = np.nan
    indices, probabilities, _ = problem.on_gpu()
    assert np.all(indices[1:3] == -1)
    assert np.all(np.isnan(probabilities[1:3]))
    assert np.all(indices[[0, 3]] >= 0)
    problem.classes[0, 0] = np.nan
    assert np.all(problem.on_gpu()[0] == -1)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize(("n", "d"), [(0, 5), (1, 1), (9, 33), (33, 512), (130, 1025)])
def test_purify_cos_equals_the_cpu_path(n: int, d: int, half: bool) -> None:
    rng = np.random.default_rng(n)
    dtype, tolerance = (np.float16, 1e-3) if half else (np.float32, 1e-6)
    z = rng.standard_normal((n, d)).astype(dtype)
    t = rng.standard_normal(d).astype(np.float32)
    expected = _core.purify_cos(z.astype(np.float32), t, steps=7, step_size=0.6)
    rows = gpu(z)
    out = torch.empty_like(rows)
    for target in (out, rows):  # the second in place
        got = _core.purify_cos(rows, gpu(t), steps=7, step_size=0.6, out=target)
        assert got is target
        np.testing.assert_allclose(
            got.cpu().numpy().astype(np.float32), expected, atol=4 * tolerance, rtol=tolerance
        )


def test_workspace_serves_calls_of_all_sizes() -> None:
    scratch = workspace(_core.classify_workspace(40, 1500))
    for n, k in [(1, 10), (40, 1000), (2, 1500), (33, 7), (1, 1024), (40, 1000)]:
        problem = Problem(n, k, 64)
        arrays = {**problem.device_arrays(), "workspace": scratch}
        got = _core.classify(**arrays, **problem.options)
        check(tuple(array.cpu().numpy() for array in got), problem.on_cpu())


def test_other_streams() -> None:
    problem = Problem(8, 1000, 512)
    image = random_image(480, 640)
    arrays, frame = problem.device_arrays(), gpu(image)
    out = torch.empty((3, 224, 224), device="cuda")
    scratch = workspace(_core.preprocess_workspace(frame, out))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    handle = stream.cuda_stream
    got = _core.classify(**arrays, **problem.options, stream=handle)
    _core.preprocess(frame, out, **NORMALIZE, workspace=scratch, stream=handle)
    stream.synchronize()
    check(tuple(array.cpu().numpy() for array in got), problem.on_cpu())
    np.testing.assert_array_equal(out.cpu().numpy(), preprocess_on_cpu(image, (224, 224)))


@pytest.mark.parametrize(("n", "k"), [(1, 1000), (9, 100), (2, 3000)])
def test_a_graph_replays_with_changed_inputs(n: int, k: int) -> None:
    first, second = Problem(n, k, 256), Problem(n, k, 256)
    second.embeddings = second.embeddings[:, ::-1].copy()
    images = [random_image(480, 640), random_image(480, 640)[::-1].copy()]
    arrays, frame = first.device_arrays(), gpu(images[0])
    out = torch.empty((3, 224, 224), dtype=torch.float16, device="cuda")
    purified = torch.empty_like(arrays["embeddings"])
    scratch = workspace(_core.preprocess_workspace(frame, out))
    how = {"steps": 2, "step_size": 0.5}

    def run() -> tuple[torch.Tensor, ...]:
        handle = torch.cuda.current_stream().cuda_stream
        z, t = arrays["embeddings"], arrays["null_text"]
        _core.preprocess(frame, out, **NORMALIZE, workspace=scratch, stream=handle)
        _core.purify_cos(z, t, out=purified, stream=handle, **how)
        return _core.classify(**arrays, **first.options, stream=handle)

    run()  # CUDA loads a kernel at its first launch, which is not for a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for problem, image in zip((first, second, first), (*images, images[0]), strict=True):
        arrays["embeddings"].copy_(gpu(problem.embeddings))
        frame.copy_(gpu(image))
        graph.replay()
        torch.cuda.synchronize()
        check(tuple(array.cpu().numpy() for array in got), problem.on_cpu())
        expected = preprocess_on_cpu(image, (224, 224)).astype(np.float16)
        np.testing.assert_array_equal(out.cpu().numpy(), expected)
        rows = _core.purify_cos(problem.embeddings, problem.null_text, **how)
        np.testing.assert_allclose(purified.cpu().numpy(), rows, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    arrays = Problem(2, 9, 8).device_arrays()

    def error(**change: object) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            _core.classify(**{**arrays, **change}, logit_scale=1.0, top_k=7)
        return str(caught.value)

    assert error(out_indices=None) == "[classify] expected out_indices in CUDA memory, got CPU"
    assert "expected classes in CUDA memory" in error(classes=arrays["classes"].cpu().numpy())
    half = arrays["embeddings"].half()
    assert "expected embeddings (N, 8) float32, got (2, 8) float16" in error(embeddings=half)
    message = "[classify] expected workspace of at least 4224 bytes of uint8 in CUDA memory"
    assert error(workspace=None).startswith(message)
    assert error(workspace=arrays["workspace"][:-16]).startswith(message)
    assert error(workspace=workspace(5000)[1:]).startswith(message)
