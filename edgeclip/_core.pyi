from collections.abc import Sequence
from typing import Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

_Float32: TypeAlias = npt.NDArray[np.float32]
_Int32: TypeAlias = npt.NDArray[np.int32]

__version__: str

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
def purify_cos(
    embeddings: _Float32, null_text: _Float32, *, steps: int, step_size: float
) -> _Float32: ...
def polar_step(embeddings: _Float32, gradients: _Float32, *, step_size: float) -> _Float32: ...
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
) -> tuple[_Int32, _Float32, _Float32]: ...
def cuda_built() -> bool: ...
def simd() -> str: ...
