"""Precisions of encoders, one row for each.

A new precision needs a row here and a converter in export/graphs/precisions.py.
"""

from __future__ import annotations

from dataclasses import dataclass

NO_TOWERS, CONVOLUTIONAL_TOWERS, ALL_TOWERS = "none", "convolutional", "all"
REFERENCE = "fp32"  # exported first; other precisions are converted from it and compared with it


@dataclass(frozen=True)
class Precision:
    """Number format of a bundle's encoders, with its devices and error limits.

    `auto` considers a converted precision only if export measured its answers (top1_agreement).
    """

    name: str  # in options, manifests and file names
    hardware: str  # for help texts and errors
    auto_devices: tuple[str, ...]  # devices on which `auto` considers it
    preference: int  # order of `auto`, lowest first
    tensorrt: bool  # TensorRT reads the graphs
    text: str  # precision of the text encoder
    min_cosine: float  # minimum cosine at export, between its embeddings and PyTorch's
    max_difference: float | None  # of unit embeddings, and tokens by their norm; None: any
    tolerance: float  # largest distance of a unit embedding from its golden value, on any device
    fused_limit: float  # largest difference of a probability, between fused graph and Runtime
    images: str = NO_TOWERS  # towers whose activation ranges come from a data set at export


# Converted precisions: tolerance is sqrt(2 - 2c) for the minimum cosine c. CPUs compute fp16 in fp32,
# and GPUs have no kernels for the graphs of int8. int8-qdq marks its int8 products with Q/DQ nodes.
_ROWS = (
    Precision(
        name="fp32",
        hardware="any device",
        auto_devices=("cpu", "cuda", "tensorrt"),
        preference=2,
        tensorrt=True,
        text="fp32",
        min_cosine=1 - 1e-4,
        max_difference=1e-4,
        tolerance=1e-4,
        fused_limit=1e-5,
    ),
    Precision(
        name="fp16",
        hardware="GPUs",
        auto_devices=("cuda", "tensorrt"),
        preference=1,
        tensorrt=True,
        text="fp16",
        min_cosine=0.999,
        max_difference=None,
        tolerance=0.045,
        fused_limit=1e-2,
    ),
    Precision(
        name="int8",
        hardware="CPUs",
        auto_devices=("cpu",),
        preference=4,
        tensorrt=False,
        text="int8",
        min_cosine=0.99,
        max_difference=None,
        tolerance=0.142,
        fused_limit=1e-2,
        images=CONVOLUTIONAL_TOWERS,
    ),
    Precision(
        name="int8-weights",
        hardware="little storage",
        auto_devices=("cpu", "cuda"),
        preference=5,
        tensorrt=False,
        text="int8-weights",
        min_cosine=0.99,
        max_difference=None,
        tolerance=0.142,
        fused_limit=1e-2,
    ),
    Precision(
        name="int8-qdq",
        hardware="TensorRT",
        auto_devices=(),
        preference=3,
        tensorrt=True,
        text="fp32",
        min_cosine=0.99,
        max_difference=None,
        tolerance=0.142,
        fused_limit=1e-2,
        images=ALL_TOWERS,
    ),
)
PRECISIONS = {row.name: row for row in _ROWS}


def by_preference(device: str) -> list[Precision]:
    """Return all precisions, those that `auto` considers on `device` first."""
    rows = PRECISIONS.values()
    return sorted(rows, key=lambda row: (device not in row.auto_devices, row.preference))


def engine_precisions() -> list[str]:
    """Return the names of the precisions that TensorRT reads, in the order of `auto`."""
    return [row.name for row in by_preference("tensorrt") if row.tensorrt]
