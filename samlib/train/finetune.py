"""Fine-tune the image encoder by recipes, each once: results are kept under the content that decides them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import joblib
import torch
from tqdm.auto import tqdm

from samlib.model.clip import Clip
from samlib.train import budget, result
from samlib.train.beside import alone
from samlib.train.distributed import rank, wait, world
from samlib.train.loop import Finetuned, train
from samlib.train.recipe import Recipe
from samlib.train.result import result_folder


def finetune(recipe: Recipe, clip: Clip, device: str | torch.device, cache: Path) -> Finetuned:
    """Fine-tune, or read the result of an earlier run of the same recipe, task, model, device type and code.

    On the CPU a run uses one thread, so that its result does not depend on how many run side by side. An
    interrupted run goes on from its last checkpoint; on the CPU the result is the same bit for bit.

    Args:
        recipe: what to train.
        clip: the pre-trained model; it is not changed.
        device: where to train, such as "cpu" or "cuda".
        cache: folder for results and checkpoints.

    Returns:
        The fine-tuned weights with their log.

    Raises:
        KeyError: no such task.
        FloatingPointError: the loss or the gradient is not finite.
        ValueError: a cached file is damaged.

    Taught in: 04_fine_tuning.
    """
    device = torch.device(device)
    folder = result_folder(recipe, clip, device, cache)
    _fill(folder, recipe, clip, device)
    return result.read(recipe, folder)


def finetune_many(
    recipes: Sequence[Recipe], clip: Clip, device: str | torch.device, cache: Path, jobs: int | None = None
) -> list[Finetuned]:
    """Fine-tune several recipes, side by side on the CPU, one after the other on a GPU.

    Args:
        recipes: what to train; equal recipes are trained once.
        clip, device, cache: as in `finetune`.
        jobs: processes on the CPU, >= 1; None for one a core. Fewer where the free memory does not suffice.

    Returns:
        The results in the order of the recipes.

    Raises:
        ValueError: jobs < 1, or as in `finetune`.

    Taught in: 04_fine_tuning.
    """
    folders = train_many(recipes, clip, device, cache, jobs)
    return [result.read(recipe, folder) for recipe, folder in zip(recipes, folders, strict=True)]


def train_many(
    recipes: Sequence[Recipe], clip: Clip, device: str | torch.device, cache: Path, jobs: int | None = None
) -> list[Path]:
    """As `finetune_many`, but the results stay on the disk: together they may be larger than the memory.

    Returns:
        Their folders, in the order of the recipes.
    """
    device = torch.device(device)
    jobs = joblib.cpu_count() if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"jobs must be an integer >= 1 or None, not {jobs}")
    folders = {recipe: result_folder(recipe, clip, device, cache) for recipe in recipes}
    todo = [recipe for recipe, folder in folders.items() if not folder.is_dir()]
    jobs = min(jobs, len(todo)) if device.type == "cpu" and world() == 1 else 1
    if jobs > 1:
        jobs = min(jobs, budget.processes(clip.name, todo))
    if jobs <= 1:
        running: Iterator[Recipe] = (_fill(folders[recipe], recipe, clip, device) for recipe in todo)
    else:
        pool = joblib.Parallel(n_jobs=jobs, backend="loky", return_as="generator_unordered")
        running = pool(joblib.delayed(_fill)(folders[recipe], recipe, clip, device, False) for recipe in todo)
    with tqdm(
        total=sum(r.gradients for r in todo), desc="fine-tuning", unit="gradient", unit_scale=True, disable=not todo
    ) as bar:  # in units of cost, so that the estimate holds where SAM and AdamW are mixed
        for recipe in running:
            bar.update(recipe.gradients)
    return [folders[recipe] for recipe in recipes]


def _fill(folder: Path, recipe: Recipe, clip: Clip, device: torch.device, show: bool = True) -> Recipe:
    """Train unless the folder is there; only the recipe travels back from another process."""
    there = folder.is_dir()
    wait()  # all processes have looked before one of them writes
    if not there:
        partial_file = folder.with_name(f"{folder.name}.partial.safetensors")
        with alone(device):
            done = train(recipe, clip, device, partial_file, show)
        if rank() == 0:
            result.write(done, clip, folder)
            partial_file.unlink(missing_ok=True)
        wait()
    return recipe
