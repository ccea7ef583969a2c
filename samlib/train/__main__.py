"""Fine-tuning from the command line, on one device or, under torchrun, on several."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from samlib.model import (
    registry,
    weights,  # whatever loads torch is imported where it is needed: mistakes are told at once
)
from samlib.store.files import cache_folder
from samlib.train.device import find_device
from samlib.train.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from samlib.model.clip import Clip


def main() -> None:
    """Fine-tune one recipe.

    `python -m samlib.train '{"task": "digits", "optimizer": "sam", "steps": 100, "rho": 0.005}'`, or the same after
    `torchrun --nproc-per-node 2 -m samlib.train`.
    """
    parser = argparse.ArgumentParser(
        "python -m samlib.train", description=main.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=json.loads, help="fields of samlib.recipe.Recipe, as JSON")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="for results and checkpoints")
    parser.add_argument("--model", default=registry.TESTBED, help="testbed, or such as ViT-B-32/openai")
    parser.add_argument("--estimate", action="store_true", help="only say what memory and time it will take")
    a = parser.parse_args()
    try:
        recipe = Recipe(**a.recipe)
        weights.need(a.model, recipe.tasks)
    except (TypeError, ValueError, KeyError, ConnectionError) as error:
        parser.error(error.args[0])
    try:
        clip, device, before = _load(a.model, a.device)
    except (ValueError, ConnectionError) as error:
        parser.error(str(error))
    import torch

    from samlib.train import budget, finetune

    if a.estimate:
        needed = sum(budget.memory(a.model, recipe).values())
        pace = budget.pace(clip, device, recipe.per_pass, recipe.precision)
        print(f"{needed / 1e9:.3f} GB of memory, {budget.seconds(pace, recipe) / recipe.steps:.3f} s a step")
        return
    done = finetune.finetune(recipe, clip, device, a.cache)
    if finetune.rank() == 0:
        print(finetune.result_folder(recipe, clip, device, a.cache))
        print(f"training loss {done.train_loss:.4f}, accuracy {done.train_accuracy:.3f}")
        peak = (budget.peak_memory(str(device)) - before) / 1e9
        print(f"{peak:.3f} GB of memory at most, {done.seconds / recipe.steps:.3f} s a step")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _load(model: str, device: str) -> tuple[Clip, torch.device, int]:
    """The model on its device, and the memory in use before; under torchrun with the other processes at hand."""
    import open_clip  # noqa: F401  (here, so that libraries count as in use before)
    import torch

    from samlib.model.clip import load_clip
    from samlib.train import (
        budget,
        finetune,  # noqa: F401
    )

    device = find_device(device)
    if "RANK" in os.environ:  # torchrun sets it
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device != "cpu" else "gloo")
    before = budget.used_memory(device)
    return load_clip(device, model), torch.device(device), before


if __name__ == "__main__":
    main()
