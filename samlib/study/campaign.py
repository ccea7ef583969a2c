"""Measuring many arms and seeds: each trained and measured once, side by side, then read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import joblib
from tqdm.auto import tqdm

from samlib.model.theta import Theta
from samlib.notebook.run import Run
from samlib.store import keys
from samlib.study.arms import Arm, recipes
from samlib.study.scoring import Bench, bench
from samlib.train.finetune import finetune_many, train_many
from samlib.train.recipe import Recipe
from samlib.train.result import Finetuned

Result = dict[str, Any]  # JSON-able
Wanted = tuple[Run, Arm, int, float]  # run, arm, seed, length: arguments of a measure
Measure = Callable[[Run, Arm, int, float], Result]
Compute = Callable[[Bench, list[Theta], Sequence[Finetuned]], Result]  # of the models of one arm and seed


def once(name: str, compute: Compute, run: Run, todo: Sequence[Recipe], **decides: Any) -> Result:
    """What `compute` finds of the models of some recipes; trained and computed once, then read.

    Args:
        name: readable part of the stored file's name.
        compute: the bench of the run, fine-tuned weights on its device, and their results -> JSON-able.
        run: preset, device and cache.
        todo: what to fine-tune.
        decides: JSON-able; with the recipes, the preset's n_eval and the code of `compute` it must decide the value.
    """

    def computed() -> Result:
        done = finetune_many(todo, run.clip, run.device, run.cache, jobs=1)
        thetas = [{name: w.to(run.device) for name, w in d.theta.items()} for d in done]
        return compute(bench(run), thetas, done)

    decides |= {"recipes": [asdict(r.same()) for r in todo], "clip": run.clip.fingerprint}
    decides |= {"n_eval": run.preset.n_eval, "code": keys.code_of(compute)}
    value: Result = run.cached(name, decides, computed)
    return value


def measure_many(measure: Measure, wanted: Sequence[Wanted]) -> list[Result]:
    """`measure` for several (run, arm, seed, length): all fine-tuning first, then the merging, side by side on a CPU.

    Args:
        measure: of a module of this package, such as `central.measure`.
        wanted: what to measure, in the order of the answer; all runs with the same model, device and cache.

    Returns:
        The results, each with its `arm` (by name), `seed`, `steps` (of AdamW at this length) and `recipes`.
    """
    if not wanted:
        return []
    run, todo = wanted[0][0], [recipes(*one) for one in wanted]
    train_many([recipe for one in todo for recipe in one], run.clip, run.device, run.cache, run.preset.jobs)
    jobs = min(run.preset.jobs or joblib.cpu_count(), len(wanted)) if run.device == "cpu" else 1
    pool = joblib.Parallel(n_jobs=jobs, return_as="generator")
    found = tqdm(
        pool(joblib.delayed(measure)(*one) for one in wanted),
        total=len(wanted),
        desc="merging and measuring",
        unit="model",
    )
    return [identity(*one) | result for one, result in zip(wanted, found, strict=True)]


def identity(run: Run, arm: Arm, seed: int, length: float = 1.0) -> Result:
    """What a result is of: `arm`, `seed`, `steps` and `recipes`, as published."""
    steps = recipes(run, Arm("adamw"), seed, length)[0].steps
    used = [asdict(recipe.same()) for recipe in recipes(run, arm, seed, length)]
    return {"arm": str(arm), "seed": seed, "steps": steps, "recipes": used}
