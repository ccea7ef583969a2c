"""Checkpoints of a training run: weights, moments and log in one safetensors file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from samlib.cache import replacing, unreadable
from samlib.sam import SAM


def save(path: Path, model: nn.Module, optimizer: SAM | Optimizer, history: Tensor, seconds: float) -> None:
    """Write one file atomically.

    Args:
        path: safetensors file.
        model: its parameters are stored.
        optimizer: its moments are stored.
        history: (steps done, columns), the log so far.
        seconds: wall time so far.
    """
    tensors = {f"theta/{name}": p.detach() for name, p in model.named_parameters()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"state/{i}/{name}": value for name, value in moments.items()}
    with replacing(path) as scratch:
        save_file(tensors | {"history": history.contiguous()}, scratch, {"seconds": str(seconds)})


def load(path: Path, model: nn.Module, optimizer: SAM | Optimizer, history: Tensor) -> tuple[int, float]:
    """Load a checkpoint in place.

    Args:
        path: file that `save` wrote.
        model: its parameters are overwritten.
        optimizer: its moments are overwritten.
        history: (steps, columns), its first rows are overwritten.

    Returns:
        The step to go on with, and the seconds spent so far.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            seconds = float(file.metadata()["seconds"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise unreadable(path) from error
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"theta/{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("state/"):
            _, i, moment = name.split("/")
            state.setdefault(int(i), {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    steps = len(tensors["history"])
    history[:steps] = tensors["history"]
    return steps, seconds
