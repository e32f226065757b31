"""Processes of torchrun, joined by NCCL on GPUs and by gloo elsewhere."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from train.errors import SettingsError

TIMEOUT = timedelta(hours=4)  # the first process may have to download a data set


def choose_device(name: str) -> torch.device:
    """Return the device named auto, cpu or cuda, and turn off TF32. Raises SettingsError."""
    if name not in ("auto", "cpu", "cuda"):
        raise SettingsError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no GPU")
    # TF32 gradients have ten bits: an attack would fail, and the failure look like robustness.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum the values over all processes; one process gets them back unchanged."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_max(values: torch.Tensor) -> torch.Tensor:
    """Return the maximum of each value over all processes."""
    return _all_reduce(values, dist.ReduceOp.MAX)


def _all_reduce(values: torch.Tensor, op: Any) -> torch.Tensor:
    if dist.is_initialized():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        values = values.to(device)
        dist.all_reduce(values, op)
    return values.cpu()


@contextmanager
def processes(device: torch.device) -> Iterator[tuple[int, int, torch.device]]:
    """Join the processes of torchrun; yield this one's rank, their number and this one's device."""
    if "RANK" not in os.environ:
        yield 0, 1, device
        return
    if device.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise SettingsError(f"one process for each GPU: here {count}, see --nproc-per-node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield dist.get_rank(), dist.get_world_size(), device
    dist.destroy_process_group()  # not after an error: the others may wait within a call


@contextmanager
def main_first(rank: int) -> Iterator[None]:
    """Run the block in the first process, then in the others."""
    if dist.is_initialized() and rank > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank == 0:
        dist.barrier()
