"""Arrays that are not NumPy's: DLPack, by PyTorch on the CPU and by producers that are wrong."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from edgeclip import DeviceError, _core
from edgeclip.backends.cuda_array import cuda_errors

NORMALIZE = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def pixels(image: object, out: object = None) -> np.ndarray:
    made = np.empty((3, 8, 8), np.float32) if out is None else out
    _core.preprocess(image, made, **NORMALIZE)
    return np.asarray(made)


@pytest.fixture
def image(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)


class Old:
    """A producer of before DLPack's versions."""

    def __init__(self, tensor: torch.Tensor, device: tuple[int, int] = (1, 0)) -> None:
        self.tensor, self.device = tensor, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, stream: int | None = None) -> object:
        return self.tensor.__dlpack__()


class _Tensor(ctypes.Structure):
    """DLManagedTensor of https://dmlc.github.io/dlpack/latest/c_api.html"""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class Handmade:
    """A dense uint8 array in memory of any kind, beginning after an offset, without strides."""

    def __init__(self, array: np.ndarray, kind: int, index: int = 0) -> None:
        self.array, self.kind, self.index = array, kind, index
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        address = array.ctypes.data - 5
        self.tensor = _Tensor(address, kind, index, array.ndim, 1, 8, 1, self.shape, None, 5)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, self.index

    def __dlpack__(self, stream: int | None = None) -> object:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p] * 3
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


@pytest.mark.parametrize("wrap", [lambda t: t, Old], ids=["versioned", "old"])
def test_dlpack_is_read_and_written_in_place(wrap: object, image: np.ndarray) -> None:
    tensor = torch.from_numpy(image)
    for view in (
        tensor,
        tensor[3:, 2:],
        tensor[::2, ::3],
        tensor.flip(0),
        tensor[:1].expand(5, 31, 3),
    ):
        np.testing.assert_array_equal(pixels(wrap(view)), pixels(view.numpy()))
    planar = tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    np.testing.assert_array_equal(pixels(wrap(planar)), pixels(image))
    out = torch.empty(2, 3, 8, 8)
    pixels(image, wrap(out[1]))
    np.testing.assert_array_equal(out[1].numpy(), pixels(image))


def test_classify_takes_dlpack(rng: np.random.Generator) -> None:
    embeddings = rng.standard_normal((4, 33)).astype(np.float32)
    classes = rng.standard_normal((5, 33)).astype(np.float32)
    expected = _core.classify(embeddings, classes, logit_scale=3.0)
    found = _core.classify(*map(torch.from_numpy, (embeddings, classes)), logit_scale=3.0)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_is_read_only_is_not_written(image: np.ndarray) -> None:
    class ReadOnly:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array
            array.flags.writeable = False

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.array.__dlpack_device__()

        def __dlpack__(self, **how: object) -> object:
            return self.array.__dlpack__(**how)

    if np.lib.NumpyVersion(np.__version__) < "2.1.0":
        pytest.skip("this NumPy does not export what is read-only")
    with pytest.raises(ValueError, match="expected out to be writable"):
        pixels(image, ReadOnly(np.empty((3, 8, 8), np.float32)))
    np.testing.assert_array_equal(pixels(ReadOnly(image)), pixels(image))


def test_types_that_do_not_fit(image: np.ndarray) -> None:
    out = torch.empty((3, 8, 8), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected out \(3, h, w\) float32, got \(3, 8, 8\)"):
        pixels(image, out)
    with pytest.raises(ValueError, match=r"expected image .* uint8, got \(20, 31, 3\) int16"):
        pixels(torch.from_numpy(image).to(torch.int16))


def test_devices_and_producers_that_do_not_fit(image: np.ndarray) -> None:
    class Nothing(Old):
        def __dlpack__(self, stream: int | None = None) -> object:
            return object()

    class Failing(Old):
        def __dlpack__(self, stream: int | None = None) -> object:
            raise BufferError("not now")

    tensor = torch.from_numpy(image)
    with pytest.raises(
        TypeError, match="expected image to return a DLPack capsule from __dlpack__, got object"
    ):
        pixels(Nothing(tensor))
    with pytest.raises(BufferError, match="not now"):
        pixels(Failing(tensor))
    with pytest.raises(
        TypeError, match="expected image in CPU or CUDA memory, got DLPack device type 15"
    ):
        pixels(Handmade(image, kind=15))
    with pytest.raises(TypeError, match="expected image on GPU 0, got GPU 1: choose a GPU with"):
        pixels(Handmade(image, kind=2, index=1))
    np.testing.assert_array_equal(pixels(Handmade(image, kind=1)), pixels(image))
    np.testing.assert_array_equal(pixels(Handmade(image, kind=3)), pixels(image))  # pinned
    with pytest.raises(TypeError, match="expected image to be a NumPy array, or to have __cuda_"):
        pixels([[1, 2, 3]])


@pytest.mark.skipif(_core.cuda_built(), reason="built with CUDA")
def test_cuda_objects_need_a_cuda_build() -> None:
    for make in (_core.CudaStream, _core.CudaEvent, lambda: _core.CudaMemory(8), _core.cuda_device):
        with pytest.raises(_core.CudaError, match=r"\[cuda\] edgeclip was built without CUDA"):
            make()


def test_cuda_error_is_a_runtime_error_of_the_core() -> None:
    assert _core.CudaError.__bases__ == (RuntimeError,)
    assert f"{_core.CudaError.__module__}.{_core.CudaError.__name__}" == "edgeclip._core.CudaError"


def test_only_cuda_errors_become_device_errors() -> None:
    with pytest.raises(DeviceError, match="out of memory"), cuda_errors():
        raise _core.CudaError("out of memory")
    with pytest.raises(RuntimeError, match=r"\[other\] failed"), cuda_errors():
        raise RuntimeError("[other] failed")
