"""_core.classify against float64 NumPy, and purification fused against purification first."""

from __future__ import annotations

import numpy as np
import pytest

from edgeclip import _core


def unit(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float64)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def problem(n: int, k: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings of various norms, classes with unit rows, a unit null text."""
    rng = np.random.default_rng(seed)
    norms = rng.uniform(0.1, 20, (n, 1))
    embeddings = (rng.standard_normal((n, d)) * norms).astype(np.float32)
    classes = unit(rng.standard_normal((k, d))).astype(np.float32)
    return embeddings, classes, unit(rng.standard_normal(d)).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def check(got: tuple[np.ndarray, ...], expected_logits: np.ndarray, top_k: int, tol: float) -> None:
    indices, probabilities, logits = got
    n, k = expected_logits.shape
    assert indices.shape == probabilities.shape == (n, min(top_k, k))
    assert (indices.dtype, probabilities.dtype, logits.dtype) == (np.int32, np.float32, np.float32)
    np.testing.assert_allclose(logits, expected_logits, atol=tol, rtol=0)
    # The order is that of the returned logits, in which rounding may swap near neighbours.
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(indices, order)
    reference = np.take_along_axis(softmax(expected_logits), order, axis=1)
    np.testing.assert_allclose(probabilities, reference, rtol=2 * tol + 2e-6, atol=1e-30)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 33, 130])
@pytest.mark.parametrize("k", [1, 2, 33, 2049])
@pytest.mark.parametrize("d", [1, 2, 15, 33, 512])
def test_equals_float64(n: int, k: int, d: int) -> None:
    embeddings, classes, _ = problem(n, k, d, seed=n + k + d)
    got = _core.classify(
        embeddings, classes, logit_scale=10.0, logit_bias=-2.5, top_k=7, return_logits=True
    )
    check(got, 10 * unit(embeddings) @ classes.T.astype(float) - 2.5, 7, 1e-5)


@pytest.mark.parametrize("d", [2, 33, 512, 2049])
@pytest.mark.parametrize(("steps", "step_size"), [(1, 30), (10, 30), (5, 0.1), (4, 1), (0, 1)])
def test_fused_purification_equals_purification_first(d: int, steps: int, step_size: float) -> None:
    embeddings, classes, null_text = problem(9, 50, d, seed=d)
    got = _core.classify(
        embeddings,
        classes,
        logit_scale=100.0,
        null_text=null_text,
        null_scores=classes @ null_text,
        steps=steps,
        step_size=step_size,
        return_logits=True,
    )
    purified = _core.purify_cos(embeddings, null_text, steps=steps, step_size=step_size)
    check(got, 100 * unit(purified) @ classes.T.astype(float), 5, 2e-4)


@pytest.mark.parametrize("degrees", [0.001, 0.01, 1.0, 179.99])
def test_fused_purification_near_the_null_text(degrees: float) -> None:
    _, classes, null_text = problem(1, 50, 512)
    basis = np.linalg.qr(np.stack([null_text, classes[0]], axis=1).astype(float))[0]
    sign = np.sign(basis[:, 0] @ null_text)
    turn = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    embedding = (basis @ turn * sign).astype(np.float32)[None]
    purified = _core.purify_cos(embedding, null_text, steps=1, step_size=30.0)
    got = _core.classify(
        embedding,
        classes,
        logit_scale=100.0,
        null_text=null_text,
        null_scores=classes @ null_text,
        steps=1,
        step_size=30.0,
        return_logits=True,
    )
    check(got, 100 * unit(purified) @ classes.T.astype(float), 5, 5e-4)


def test_published_steps_change_nothing() -> None:
    embeddings, classes, null_text = problem(8, 100, 512)
    embeddings = (unit(embeddings) + 0.3 * null_text).astype(np.float32)
    plain = _core.classify(embeddings, classes, logit_scale=100.0, return_logits=True)
    purified = _core.classify(
        embeddings,
        classes,
        logit_scale=100.0,
        null_text=null_text,
        null_scores=classes @ null_text,
        steps=10,
        step_size=30.0,
        return_logits=True,
    )
    np.testing.assert_allclose(purified[2], plain[2], atol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_parallel_to_the_null_text(sign: int) -> None:
    _, classes, null_text = problem(1, 20, 33)
    scores = classes @ null_text
    got = _core.classify(
        5 * sign * null_text[None],
        classes,
        logit_scale=1.0,
        null_text=null_text,
        null_scores=scores,
        steps=3,
        step_size=30.0,
        return_logits=True,
    )
    check(got, sign * unit(null_text)[None] @ classes.T.astype(float), 5, 1e-6)


@pytest.mark.parametrize(("k", "d"), [(1, 1), (7, 33), (1000, 512), (41, 2049)])
@pytest.mark.parametrize("steps", [0, 3])
def test_alone_and_in_any_batch_bit_for_bit(k: int, d: int, steps: int) -> None:
    embeddings, classes, null_text = problem(71, k, d)
    options = {
        "logit_scale": 100.0,
        "null_text": null_text,
        "null_scores": classes @ null_text,
        "steps": steps,
        "step_size": 0.3,
        "return_logits": True,
    }
    whole = _core.classify(embeddings, classes, **options)
    for begin, end in [(0, 1), (70, 71), (3, 5), (1, 8), (2, 67), (0, 71)]:
        part = _core.classify(embeddings[begin:end], classes, **options)
        for got, expected in zip(part, whole, strict=True):
            np.testing.assert_array_equal(got, expected[begin:end])


def test_threads_give_the_bits_of_one() -> None:
    embeddings, classes, _ = problem(2, 60000, 512)  # enough work for several threads
    pair = _core.classify(embeddings, classes, logit_scale=50.0, return_logits=True)
    for first in (0, 1, 40001, 59999):
        part = _core.classify(embeddings, classes[first:], logit_scale=50.0, return_logits=True)
        np.testing.assert_allclose(part[2], pair[2][:, first:], atol=1e-5)
    again = _core.classify(embeddings[:1], classes, logit_scale=50.0, return_logits=True)
    np.testing.assert_array_equal(again[2], pair[2][:1])


def test_ties_go_to_the_lower_index() -> None:
    _, classes, _ = problem(1, 3, 16)
    repeated = classes[[1, 0, 0, 2, 0, 1]]
    indices, probabilities = _core.classify(classes[:1], repeated, logit_scale=3.0, top_k=6)
    assert indices[0, :3].tolist() == [1, 2, 4]
    pairs = indices[0].tolist()
    assert pairs.index(0) < pairs.index(5)
    assert probabilities[0, 0] == probabilities[0, 2]
    assert probabilities.sum() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("scale", [100.0, 1e4, -100.0, 0.0])
def test_extreme_logits(scale: float) -> None:
    _, classes, _ = problem(1, 300, 64)
    indices, probabilities = _core.classify(classes[:4] * 9, classes, logit_scale=scale, top_k=300)
    assert np.all(np.isfinite(probabilities))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert np.all(np.diff(probabilities, axis=1) <= 0)
    if scale > 0:
        assert indices[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("top_k", [1, 5, 64, 65, 300])
@pytest.mark.parametrize("order", ["rising", "falling", "level", "random", "few values"])
def test_top_k_of_any_order(order: str, top_k: int) -> None:
    rng = np.random.default_rng(0)
    scores = {
        "rising": np.linspace(-1, 1, 300),
        "falling": np.linspace(1, -1, 300),
        "level": np.full(300, 0.5),
        "random": rng.uniform(-1, 1, 300),
        "few values": rng.integers(0, 4, 300) / 4,
    }[order].astype(np.float32)
    classes = np.stack([scores, np.sqrt(1 - scores**2)], axis=1)
    indices, probabilities = _core.classify(
        np.float32([[3, 0]]), classes, logit_scale=2.0, top_k=top_k
    )
    expected = np.argsort(-scores, kind="stable")[:top_k]
    assert indices[0].tolist() == expected.tolist()
    reference = softmax(2.0 * scores.astype(float)[None])[0, expected]
    np.testing.assert_allclose(probabilities[0], reference, rtol=1e-6)


@pytest.mark.parametrize("span", [1e-3, 1.0, 20.0, 86.0, 88.0, 1000.0, 1e30])
@pytest.mark.parametrize("k", [2, 17, 2049])
def test_softmax_over_any_span_of_logits(span: float, k: int) -> None:
    scores = np.linspace(0, -1, k).astype(np.float32)
    classes = np.stack([scores, np.sqrt(1 - scores**2)], axis=1)
    _, probabilities, logits = _core.classify(
        np.float32([[1, 0]]), classes, logit_scale=span, top_k=1, return_logits=True
    )
    reference = softmax(logits.astype(float)).max()
    np.testing.assert_allclose(probabilities, reference, rtol=3e-7)


@pytest.mark.parametrize("at", [0, 63, 64, 299])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_class_is_found_wherever_it_is(at: int, value: float) -> None:
    embeddings, classes, _ = problem(2, 300, 8)
    broken = with_value(classes, (at, 0), value)
    with pytest.raises(ValueError, match="the logits of embedding 0 contain NaN or infinity"):
        _core.classify(np.abs(embeddings), broken, logit_scale=1.0)


def test_top_k_is_cut_to_the_number_of_classes() -> None:
    embeddings, classes, _ = problem(4, 3, 8)
    indices, probabilities = _core.classify(embeddings, classes, logit_scale=1.0, top_k=2**40)
    assert np.sort(indices, axis=1).tolist() == [[0, 1, 2]] * 4
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("power", [-44, -30, 30, 38])
def test_any_norm(power: int) -> None:
    embeddings, classes, _ = problem(1, 9, 1)
    embeddings = np.float32([[10.0**power]]) * np.ones((1, 9), np.float32)
    classes = np.eye(9, dtype=np.float32)
    _, probabilities = _core.classify(embeddings, classes, logit_scale=1.0, top_k=9)
    np.testing.assert_allclose(probabilities, 1 / 9, rtol=1e-6)


def test_no_samples() -> None:
    _, classes, _ = problem(1, 12, 8)
    empty = np.empty((0, 8), np.float32)
    indices, probabilities, logits = _core.classify(
        empty, classes, logit_scale=1.0, return_logits=True
    )
    assert (indices.shape, probabilities.shape, logits.shape) == ((0, 5), (0, 5), (0, 12))


def test_read_only_arrays_are_read() -> None:
    arrays = problem(2, 5, 8)
    for array in arrays:
        array.setflags(write=False)
    _core.classify(arrays[0], arrays[1], logit_scale=1.0)


def test_outputs_may_be_given() -> None:
    embeddings, classes, _ = problem(3, 8, 4)
    expected = _core.classify(embeddings, classes, logit_scale=1.0, return_logits=True)
    out = tuple(np.empty_like(array) for array in expected)
    got = _core.classify(
        embeddings,
        classes,
        logit_scale=1.0,
        out_indices=out[0],
        out_probabilities=out[1],
        out_logits=out[2],
    )
    for mine, theirs, reference in zip(got, out, expected, strict=True):
        assert mine is theirs
        np.testing.assert_array_equal(mine, reference)


Z, W, T = problem(3, 6, 4)
Q = W @ T


def with_value(array: np.ndarray, index: tuple[int, ...], value: float) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"embeddings": np.zeros((3, 768), np.float16)},
            "expected embeddings (N, 4) float32, got (3, 768) float16",
        ),
        ({"embeddings": Z[0]}, "expected embeddings (N, 4) float32, got (4,) float32"),
        (
            {"embeddings": np.asfortranarray(Z)},
            "expected embeddings to be C-contiguous, got strides (4, 12) for shape (3, 4)",
        ),
        ({"classes": W.astype(float)}, "expected classes (K, D) float32, got (6, 4) float64"),
        ({"classes": W[:0]}, "expected classes (K, D) with K, D >= 1, got (0, 4)"),
        (
            {"classes": W[::2]},
            "expected classes to be C-contiguous, got strides (32, 4) for shape (3, 4)",
        ),
        ({"null_text": T[:2]}, "expected null_text (4,) float32, got (2,) float32"),
        ({"null_scores": Q[:2]}, "expected null_scores (6,) float32, got (2,) float32"),
        ({"null_text": None}, "expected null_text and null_scores with steps > 0"),
        ({"null_scores": None}, "expected null_text and null_scores with steps > 0"),
        ({"steps": -2}, "expected steps >= 0, got -2"),
        ({"step_size": float("nan")}, "expected a finite step_size >= 0, got nan"),
        ({"logit_scale": float("inf")}, "expected finite logit_scale and logit_bias"),
        ({"logit_bias": float("nan")}, "expected finite logit_scale and logit_bias"),
        ({"top_k": 0}, "expected top_k >= 1, got 0"),
        (
            {"out_indices": np.empty((3, 2), np.int32)},
            "expected out_indices (3, 5) int32, got (3, 2) int32",
        ),
        ({"embeddings": with_value(Z, (1, 2), np.inf)}, "embedding 1 contains NaN or infinity"),
        (
            {"embeddings": Z * [[1], [1], [0]]},
            "expected embeddings (N, 4) float32, got (3, 4) float64",
        ),
        ({"embeddings": Z * np.float32([[1], [1], [0]])}, "embedding 2 is zero"),
        ({"null_text": T * np.float32(0)}, "null_text is zero"),
        ({"null_text": with_value(T, (1,), np.nan)}, "null_text contains NaN or infinity"),
        (
            {"classes": with_value(W, (5, 0), np.nan)},
            (
                "the logits of embedding 0 contain NaN or infinity: "
                "check classes, null_scores and logit_scale"
            ),
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    arguments = {
        "embeddings": Z,
        "classes": W,
        "logit_scale": 1.0,
        "null_text": T,
        "null_scores": Q,
        "steps": 2,
        "step_size": 30.0,
        **change,
    }
    with pytest.raises(ValueError) as error:  # noqa: PT011
        _core.classify(arguments.pop("embeddings"), arguments.pop("classes"), **arguments)
    assert str(error.value) == "[classify] " + message


class OnGpu:
    """An array that says it lies on a GPU; nothing may follow its pointer."""

    def __init__(self, array: np.ndarray) -> None:
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (16, False),
            "version": 3,
            "strides": None,
        }


@pytest.mark.skipif(_core.cuda_built(), reason="built with CUDA")
def test_cuda_tensors_reach_the_missing_kernels() -> None:
    built_without = (
        "got a CUDA tensor, but edgeclip was built without CUDA: rebuild it with EDGECLIP_CUDA=ON"
    )
    image = np.zeros((2, 2, 3), np.uint8)
    out = np.zeros((3, 2, 2), np.float32)
    calls = {
        "preprocess": lambda: _core.preprocess(
            OnGpu(image), OnGpu(out), mean=(0, 0, 0), std=(1, 1, 1)
        ),
        "purify_cos": lambda: _core.purify_cos(OnGpu(Z), OnGpu(T), steps=1, step_size=1.0),
        "classify": lambda: _core.classify(OnGpu(Z), OnGpu(W), logit_scale=1.0),
    }
    for op, call in calls.items():
        with pytest.raises(_core.CudaError) as error:
            call()
        assert str(error.value) == f"[{op}] {built_without}"
    with pytest.raises(_core.CudaError, match=r"\[classify_workspace\] edgeclip was built without"):
        _core.classify_workspace(1, 10)


def test_devices_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"\[classify\] expected classes in CUDA memory, got CPU"):
        _core.classify(OnGpu(Z), W, logit_scale=1.0)
    with pytest.raises(ValueError, match=r"\[purify_cos\] expected null_text in CPU memory"):
        _core.purify_cos(Z, OnGpu(T), steps=1, step_size=1.0)


def test_what_is_no_array_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"\[classify\] expected classes to be a NumPy array, .* got list"
    ):
        _core.classify(Z, [[1.0]], logit_scale=1.0)


def test_build_facts() -> None:
    assert isinstance(_core.cuda_built(), bool)
    assert _core.simd() in {"avx512", "avx2", "baseline"}
