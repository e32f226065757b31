from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt

_Float32: TypeAlias = npt.NDArray[np.float32]
_Int32: TypeAlias = npt.NDArray[np.int32]

class _CudaArray(Protocol):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

_Out = TypeVar("_Out", bound=_CudaArray)
_Indices = TypeVar("_Indices", bound=_CudaArray)
_Probabilities = TypeVar("_Probabilities", bound=_CudaArray)
_Logits = TypeVar("_Logits", bound=_CudaArray)

__version__: str
# Smallest sine between an embedding and the null text at which purification moves the embedding.
MIN_SINE: Final[float]
# Values of `resize` and `interpolation`.
RESIZES: Final[tuple[str, ...]]
INTERPOLATIONS: Final[tuple[str, ...]]

class CudaError(RuntimeError): ...

@overload
def preprocess(
    image: npt.NDArray[np.uint8],
    out: _Float32,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    resize: str = "shortest",
    interpolation: str = "bicubic",
    fill: int = 0,
    threads: int = 0,
) -> None: ...
@overload
def preprocess(
    image: _CudaArray,
    out: _CudaArray,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    resize: str = "shortest",
    interpolation: str = "bicubic",
    fill: int = 0,
    threads: int = 0,
    workspace: _CudaArray,
    stream: int = 0,
) -> None: ...
def preprocess_workspace(
    image: npt.NDArray[np.uint8] | _CudaArray,
    out: _Float32 | _CudaArray,
    *,
    resize: str = "shortest",
    interpolation: str = "bicubic",
) -> int: ...
@overload
def purify_cos(
    embeddings: _Float32,
    null_text: _Float32,
    *,
    steps: int,
    step_size: float,
    out: _Float32 | None = None,
) -> _Float32: ...
@overload
def purify_cos(
    embeddings: _CudaArray,
    null_text: _CudaArray,
    *,
    steps: int,
    step_size: float,
    out: _Out,
    stream: int = 0,
) -> _Out: ...
@overload
def classify(
    embeddings: _Float32,
    classes: _Float32,
    *,
    logit_scale: float,
    logit_bias: float = 0.0,
    null_text: _Float32 | None = None,
    null_scores: _Float32 | None = None,
    steps: int = 0,
    step_size: float = 0.0,
    top_k: int = 5,
    return_logits: Literal[False] = False,
    out_indices: _Int32 | None = None,
    out_probabilities: _Float32 | None = None,
) -> tuple[_Int32, _Float32]: ...
@overload
def classify(
    embeddings: _Float32,
    classes: _Float32,
    *,
    logit_scale: float,
    logit_bias: float = 0.0,
    null_text: _Float32 | None = None,
    null_scores: _Float32 | None = None,
    steps: int = 0,
    step_size: float = 0.0,
    top_k: int = 5,
    return_logits: Literal[True],
    out_indices: _Int32 | None = None,
    out_probabilities: _Float32 | None = None,
    out_logits: _Float32 | None = None,
) -> tuple[_Int32, _Float32, _Float32]: ...
@overload
def classify(
    embeddings: _CudaArray,
    classes: _CudaArray,
    *,
    logit_scale: float,
    logit_bias: float = 0.0,
    null_text: _CudaArray | None = None,
    null_scores: _CudaArray | None = None,
    steps: int = 0,
    step_size: float = 0.0,
    top_k: int = 5,
    out_indices: _Indices,
    out_probabilities: _Probabilities,
    workspace: _CudaArray,
    stream: int = 0,
) -> tuple[_Indices, _Probabilities]: ...
@overload
def classify(
    embeddings: _CudaArray,
    classes: _CudaArray,
    *,
    logit_scale: float,
    logit_bias: float = 0.0,
    null_text: _CudaArray | None = None,
    null_scores: _CudaArray | None = None,
    steps: int = 0,
    step_size: float = 0.0,
    top_k: int = 5,
    out_indices: _Indices,
    out_probabilities: _Probabilities,
    out_logits: _Logits,
    workspace: _CudaArray,
    stream: int = 0,
) -> tuple[_Indices, _Probabilities, _Logits]: ...
def classify_workspace(samples: int, classes: int) -> int: ...
def polar_step(embeddings: _Float32, gradients: _Float32, *, step_size: float) -> _Float32: ...
def usable_cores() -> int: ...
def set_usable_cores(cores: int) -> None: ...
def cuda_built() -> bool: ...
def simd() -> str: ...
def cuda_device() -> dict[str, Any]: ...
def cuda_synchronize(stream: int) -> None: ...
def cuda_copy(to: int, from_: int, nbytes: int, *, stream: int) -> None: ...

class CudaMemory:
    def __init__(self, nbytes: int, *, pinned: bool = False) -> None: ...
    @property
    def pointer(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def pinned(self) -> bool: ...

class CudaGraph:
    def launch(self, stream: int) -> None: ...

class CudaStream:
    def __init__(self) -> None: ...
    @property
    def handle(self) -> int: ...
    def capture(self, queue: Callable[[], object]) -> CudaGraph: ...

class CudaEvent:
    def __init__(self) -> None: ...
    def record(self, stream: int) -> None: ...
    def milliseconds_since(self, earlier: CudaEvent) -> float: ...
