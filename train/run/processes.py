"""Several processes as one: torchrun's, joined by NCCL on GPUs and by gloo elsewhere."""

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

WAIT = timedelta(hours=4)  # for the first process, which may have to download a data set


def choose_device(name: str) -> torch.device:
    """auto, cpu or cuda, with float32 products that are float32. Raises SettingsError."""
    if name not in ("auto", "cpu", "cuda"):
        raise SettingsError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no GPU")
    # An attack in TF32 has gradients of ten bits, and what it fails to find looks like robustness.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes; the values themselves where there is one."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_max(values: torch.Tensor) -> torch.Tensor:
    """The largest of each value over all processes."""
    return _all_reduce(values, dist.ReduceOp.MAX)


def _all_reduce(values: torch.Tensor, op: Any) -> torch.Tensor:
    if dist.is_initialized():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        values = values.to(device)
        dist.all_reduce(values, op)
    return values.cpu()


@contextmanager
def processes(device: torch.device) -> Iterator[tuple[int, int, torch.device]]:
    """This process's rank, their number, and its device; under torchrun they are joined."""
    if "RANK" not in os.environ:
        yield 0, 1, device
        return
    if device.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise SettingsError(f"one process for each GPU: here {count}, see --nproc-per-node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    yield dist.get_rank(), dist.get_world_size(), device
    dist.destroy_process_group()  # not after an error: the others may be waiting within a call


@contextmanager
def main_first(rank: int) -> Iterator[None]:
    """The first process goes through the block before the others begin it."""
    if dist.is_initialized() and rank > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank == 0:
        dist.barrier()
