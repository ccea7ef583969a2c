"""Fine-tuning from the command line, on one device or, under torchrun, on several."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser

from samlib.model import registry, weights  # what loads torch is imported where it is needed: mistakes are told at once
from samlib.store.files import cache_folder
from samlib.train.device import check_device, find_device
from samlib.train.recipe import Recipe

PROGRAM = "python -m samlib.train"


class Parser(ArgumentParser):
    """Tells a mistake in one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        types = {field.name: field.type for field in fields(Recipe)}
        wrong = re.match(r'Parser key "(\w+)".*value: (.*)', message, re.DOTALL)
        if wrong and wrong[1] in types:
            message = f"{wrong[1]} must be of type {types[wrong[1]]}, not {wrong[2]}"
        self.exit(2, f"{PROGRAM}: {' '.join(message.split())}\n")


def parser() -> Parser:
    """Of the fields of `Recipe` and of what is no part of one."""
    parser = Parser(
        PROGRAM, description="Fine-tune one recipe; on two devices `torchrun --nproc-per-node 2 -m samlib.train`."
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_class_arguments(Recipe, skip={"tasks"})
    parser.add_argument("--tasks", nargs="+", required=True, help="one name, or several that take turns")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--cache", help="folder for results and checkpoints; that of SAMLIB_CACHE by default")
    parser.add_argument("--model", default=registry.TESTBED, help="testbed, or such as ViT-B-32/openai")
    parser.add_argument("--estimate", action="store_true", help="only say what memory and time it will take")
    return parser


def main() -> None:
    """Fine-tune one recipe: `python -m samlib.train --tasks digits --optimizer sam --steps 100 --rho 0.005`."""
    options = parser()
    a = options.parse_args()
    try:
        recipe = Recipe(**{field.name: a[field.name] for field in fields(Recipe)})
        check_device(a.device)
        cache = Path(a.cache) if a.cache else cache_folder()
        weights.need(a.model, recipe.tasks)
    except (ValueError, KeyError, ConnectionError) as error:
        options.error(error.args[0])
    import open_clip  # noqa: F401  (here, so that libraries count as in use before)
    import torch

    from samlib.model.clip import load_clip
    from samlib.train import budget, distributed
    from samlib.train.finetune import finetune, result_folder

    try:
        device = torch.device(distributed.join(find_device(a.device)))
        before = budget.used_memory(device)
        clip = load_clip(str(device), a.model)
    except (ValueError, ConnectionError) as error:
        options.error(str(error))
    if a.estimate:
        pace = budget.pace(clip, device, recipe.per_pass, recipe.precision)
        needed, taken = budget.peak(a.model, recipe), budget.seconds(pace, recipe)
        print(f"{needed / 1e9:.3f} GB of memory, {taken / recipe.steps:.3f} s a step")
        return
    done = finetune(recipe, clip, device, cache)
    if distributed.rank() == 0:
        print(result_folder(recipe, clip, device, cache))
        print(f"training loss {done.train_loss:.4f}, accuracy {done.train_accuracy:.3f}")
        peak = (budget.peak_memory(device) - before) / 1e9
        print(f"{peak:.3f} GB of memory at most, {done.seconds / recipe.steps:.3f} s a step")
    distributed.leave()


if __name__ == "__main__":
    main()
