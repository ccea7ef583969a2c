"""Measuring many arms and seeds: each trained and measured once, side by side, then read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import joblib
from tqdm.auto import tqdm

from samlib.model.clip import Clip
from samlib.notebook.run import Run
from samlib.store import keys
from samlib.study.arms import recipes
from samlib.train.finetune import Finetuned, finetune_many, train_many
from samlib.train.recipe import Recipe

Part = tuple[Run, list[tuple[str, int, float]]]  # of a plan: a run, and which (arm, seed, length) to measure in it
Measure = Callable[[Run, Clip, str, int, float], dict[str, Any]]  # run, clip, arm, seed, length -> JSON-able


def once(
    name: str,
    compute: Callable[[Run, Clip, Sequence[Finetuned]], dict[str, Any]],
    run: Run,
    clip: Clip,
    todo: Sequence[Recipe],
    **decides: Any,
) -> dict[str, Any]:
    """What `compute` finds of the models of some recipes; trained and computed once, then read.

    Args:
        name: readable part of the stored file's name.
        compute: run, clip and fine-tuned models -> JSON-able.
        run: preset, device and cache.
        clip: the pre-trained model.
        todo: what to fine-tune.
        decides: JSON-able; with the recipes, the preset's n_eval and the code of `compute` it must decide the value.
    """
    decides |= {"recipes": [asdict(r.same()) for r in todo], "clip": clip.fingerprint}
    decides |= {"n_eval": run.preset.n_eval, "code": keys.code_of(compute)}
    value: dict[str, Any] = run.cached(
        name, decides, lambda: compute(run, clip, finetune_many(todo, clip, run.device, run.cache, jobs=1))
    )
    return value


def measure_many(
    run: Run, clip: Clip, wanted: Sequence[tuple[str, int, float]], measure: Measure
) -> list[dict[str, Any]]:
    """`measure` for several (arm, seed, length): all fine-tuning first, then the merging, side by side on a CPU.

    Args:
        run: preset, device and cache.
        clip: the pre-trained model.
        wanted: what to measure, in the order of the answer.
        measure: this module's, or that of another module, such as `compare`.
    """
    todo = [recipe for arm, seed, length in wanted for recipe in recipes(run, arm, seed, length)]
    train_many(todo, clip, run.device, run.cache, run.preset.jobs)
    jobs = min(run.preset.jobs or joblib.cpu_count(), len(wanted)) if run.device == "cpu" else 1
    pool = joblib.Parallel(n_jobs=jobs, return_as="generator")
    calls = (joblib.delayed(measure)(run, clip, *what) for what in wanted)
    return list(tqdm(pool(calls), total=len(wanted), desc="merging and measuring", unit="model"))
