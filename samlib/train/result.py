"""Results of fine-tuning on the disk: named by all that decides them, whole or absent."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from samlib.data import tasks
from samlib.model.clip import Clip
from samlib.store import keys, provenance
from samlib.store.files import read_json, replacing, unreadable, write_json
from samlib.train.distributed import world
from samlib.train.loop import Finetuned, train
from samlib.train.recipe import Recipe

FACTS = ("seconds", "train_loss", "train_accuracy", "skipped")  # of a result, beside weights and log


def result_folder(recipe: Recipe, clip: Clip, device: torch.device, cache: Path) -> Path:
    """Where a result is, or will be.

    Args:
        recipe, clip, device, cache: as in `finetune`.

    Raises:
        KeyError: no such task.
    """
    key = keys.key(
        {
            "recipe": asdict(recipe.same()),
            "task": [tasks.fingerprint(name, clip.size) for name in recipe.tasks],
            "clip": clip.fingerprint,
            "device": device.type,
            "processes": world(),
            "code": keys.code_of(train),
        }
    )
    return cache / "finetune" / key


def write(done: Finetuned, clip: Clip, folder: Path) -> None:
    """Make the folder: weights with their history in the header, log and facts."""
    names, size = done.recipe.tasks, clip.size
    data = [tasks.load_task(name, size).revision or tasks.fingerprint(name, size) for name in names]
    header = {"model": clip.name, "task": "+".join(names), "revision": "+".join(data)}
    header |= {"recipe": json.dumps(asdict(done.recipe))} | provenance.software()
    with replacing(folder) as scratch:
        scratch.mkdir()
        save_file(done.theta, scratch / "theta.safetensors", header)
        if done.best:
            save_file(done.best, scratch / "best.safetensors", header)
        done.log.to_parquet(scratch / "log.parquet")
        facts = {name: getattr(done, name) for name in FACTS}
        write_json(scratch / "recipe.json", {"recipe": asdict(done.recipe), **facts})


def read(recipe: Recipe, folder: Path) -> Finetuned:
    """What `write` wrote.

    Raises:
        ValueError: a file is damaged.
    """
    file = folder / "theta.safetensors"
    try:
        theta = load_file(file)
        file = folder / "best.safetensors"
        best = load_file(file) if recipe.validate_every else None
        file = folder / "log.parquet"
        log = pd.read_parquet(file)
        file = folder / "recipe.json"
        facts = read_json(file)
        return Finetuned(recipe=recipe, theta=theta, best=best, log=log, **{name: facts[name] for name in FACTS})
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise unreadable(file) from error
