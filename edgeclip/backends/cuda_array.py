"""Arrays in GPU memory or pinned host memory, without PyTorch or CuPy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgeclip import _core
from edgeclip.errors import DeviceError


@contextmanager
def cuda_errors() -> Iterator[None]:
    """Raise the core's CUDA errors as DeviceError."""
    try:
        yield
    except _core.CudaError as err:
        raise DeviceError(str(err)) from err


class DeviceArray:
    """A C-contiguous array of zeros on the GPU or, if `pinned`, in host memory that the GPU shares.

    PyTorch, CuPy and Numba read it without a copy, by __cuda_array_interface__.
    Raises DeviceError without a GPU or enough memory.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: DTypeLike = np.float32, *, pinned: bool = False
    ) -> None:
        element = np.dtype(dtype)
        with cuda_errors():
            memory = _core.CudaMemory(math.prod(shape) * element.itemsize, pinned=pinned)
        self._set(memory, memory.pointer, shape, element)

    def _set(
        self, memory: _core.CudaMemory, pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._memory, self.pointer = memory, pointer
        self.shape, self.dtype = shape, dtype
        self.nbytes = math.prod(shape) * dtype.itemsize

    def _view(self, pointer: int, shape: tuple[int, ...]) -> DeviceArray:
        view: DeviceArray = object.__new__(DeviceArray)
        view._set(self._memory, pointer, shape, self.dtype)
        return view

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
        }

    @property
    def pinned(self) -> bool:
        return self._memory.pinned

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> DeviceArray:
        """Return a view of one row of the first axis."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self._view(self.pointer + row * self.nbytes // len(self), self.shape[1:])

    def head(self, shape: tuple[int, ...]) -> DeviceArray:
        """Return a view of the first elements in another shape."""
        if math.prod(shape) * self.dtype.itemsize > self.nbytes:
            raise ValueError(f"shape {shape} has more elements than {self.shape}")
        return self._view(self.pointer, shape)

    @property
    def host(self) -> NDArray[Any]:
        """Return a NumPy view of a pinned array."""
        if not self.pinned:
            raise ValueError("only a pinned array has a host view")
        return np.asarray(_HostView(self))


class _HostView:
    """Owner of a NumPy view, which keeps the memory alive."""

    def __init__(self, array: DeviceArray) -> None:
        self.array = array
        self.__array_interface__ = array.__cuda_array_interface__


def copy(to: DeviceArray, source: DeviceArray | NDArray[Any], stream: int) -> None:
    """Copy the bytes of `source`, which is C-contiguous, to the start of `to`, on `stream`."""
    address = source.pointer if isinstance(source, DeviceArray) else source.ctypes.data
    _core.cuda_copy(to.pointer, address, source.nbytes, stream=stream)
