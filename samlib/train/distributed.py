"""The processes that train one model together, as torchrun starts them; a process may also be alone."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def join(device: str) -> str:
    """Under torchrun, meet the other processes.

    Args:
        device: "cpu", "cuda" or "cuda:N".

    Returns:
        The device of this process: of several GPUs its own.
    """
    if "RANK" in os.environ:  # torchrun sets it
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
    return device


def leave() -> None:
    """The end of what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """How many processes train together, 1 for one that is alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Of this process among those that train together, 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def share(batch: Tensor) -> Tensor:
    """This process's part of a batch, whose length is a multiple of `world`."""
    return batch.chunk(world())[rank()]


def mean(x: Tensor) -> Tensor:
    """Over the processes; x is overwritten."""
    if world() > 1:
        dist.all_reduce(x)
        x /= world()
    return x


def together(model: nn.Module) -> nn.Module:
    """The model with gradients averaged over the processes, or the model itself."""
    return DistributedDataParallel(model) if world() > 1 else model
