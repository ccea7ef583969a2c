"""Checkpoints of a training run: weights, moments, log and what else it needs, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from samlib.store.files import replacing, unreadable


def save(path: Path, owner: str, tensors: Mapping[str, Tensor], optimizer: Optimizer, facts: dict[str, Any]) -> None:
    """Write one file atomically.

    Args:
        path: safetensors file.
        owner: what the checkpoint belongs to; `load` asks for the same.
        tensors: weights, log and the like by name.
        optimizer: its moments are stored.
        facts: JSON-able, such as steps done and seconds spent.
    """
    whole = dict(tensors)
    for i, moments in optimizer.state_dict()["state"].items():
        whole |= {f"state/{i}/{name}": value for name, value in moments.items()}
    whole = {name: value.detach().contiguous() for name, value in whole.items()}
    with replacing(path) as scratch:
        save_file(whole, scratch, {"owner": owner, "facts": json.dumps(facts)})


def load(path: Path, owner: str, tensors: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Any]:
    """Load a checkpoint in place, all of it or nothing.

    Args:
        path: file that `save` wrote.
        owner, tensors, optimizer: as they were saved; tensors and moments are overwritten.

    Returns:
        The facts.

    Raises:
        ValueError: the file is damaged, belongs to another owner, or holds tensors of other names or shapes.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}
        saved_by = metadata["owner"]
        facts: dict[str, Any] = json.loads(metadata["facts"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise unreadable(path) from error
    if saved_by != owner:
        raise ValueError(f"{path} is a checkpoint of {saved_by}, not of {owner}; delete it and run again")
    state: dict[int, dict[str, Tensor]] = {}
    for name in [name for name in found if name.startswith("state/")]:
        _, i, moment = name.split("/")
        state.setdefault(int(i), {})[moment] = found.pop(name)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fitting = all(v.shape in ((), parameters[i].shape) for i, moments in state.items() for v in moments.values())
    wrong = [n for n in {*found, *tensors} if n not in found or n not in tensors or found[n].shape != tensors[n].shape]
    if wrong or not fitting:
        differs = min(wrong, default="the optimiser's state")
        raise ValueError(f"{path} is a checkpoint of another model: {differs} differs; delete it and run again")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found[name])
    return facts
