"""Several processes as one: torchrun's, joined by NCCL on GPUs and by gloo elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


class DeviceError(Exception):
    """A device that is not there; the message says which are."""


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes; the values themselves where there is one."""
    if dist.is_initialized():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        values = values.to(device)
        dist.all_reduce(values)
    return values.cpu()


@contextmanager
def processes(device: str) -> Iterator[tuple[int, int, torch.device]]:
    """This process's rank, their number, and its device; under torchrun they are joined."""
    if device not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"--device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: PyTorch finds no GPU")
    cuda = torch.cuda.is_available() and device != "cpu"
    if "RANK" not in os.environ:
        yield 0, 1, torch.device("cuda" if cuda else "cpu")
        return
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size(), place
    finally:
        dist.destroy_process_group()


@contextmanager
def main_first(rank: int) -> Iterator[None]:
    """The first process goes through the block before the others begin it."""
    if dist.is_initialized() and rank > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank == 0:
        dist.barrier()
