"""The central experiment: fine-tune every task by each arm, merge, and measure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import joblib
import pandas as pd
import torch
from tqdm.auto import tqdm

from samlib import tasks
from samlib.bench import at_best_lambda, bench, row, score
from samlib.clip import Clip
from samlib.finetune import Finetuned, Recipe, finetune_many, train_many
from samlib.interference import xi
from samlib.merge import average, task_arithmetic, task_vector, ties
from samlib.run import Run, interval, paired_interval

ARMS = ("AdamW", "AdamW, 2x steps", "SAM", "ASAM")
JOINT = "AdamW, all tasks"  # one model trained on all tasks: what merging would like to reach
Part = tuple[Run, list[tuple[str, int, float]]]  # of a plan: a run, and which (arm, seed, length) to measure in it
Measure = Callable[[Run, Clip, str, int, float], dict[str, Any]]  # run, clip, arm, seed, length -> JSON-able
ROWS = ("single", "averaging", "task arithmetic", "TIES")


def recipes(run: Run, arm: str, seed: int, length: float = 1.0) -> list[Recipe]:
    """One recipe a task: what the arm trains with this seed. Of JOINT, one recipe for all tasks.

    Args:
        run: its preset gives tasks, steps, radii and learning rate.
        arm: one of ARMS, or JOINT. SAM and ASAM take two gradients a step, so that "AdamW, 2x steps" costs what they
            do; "SAM, rho 0.02" has another radius than the preset's. JOINT makes as many updates as AdamW does for all
            tasks together.
        seed: of data order and augmentation; equal seeds are paired between arms.
        length: multiple of the preset's steps, > 0.

    Raises:
        ValueError: no such arm.

    Taught in: 04_fine_tuning.
    """
    base, _, radius = arm.partition(", rho ")
    if base not in (*ARMS, JOINT) or (radius and base not in ("SAM", "ASAM")):
        raise ValueError(f"arm must be one of {'; '.join((*ARMS, JOINT))} or such as 'SAM, rho 0.02', not {arm!r}")
    p = run.preset
    names = ("+".join(p.tasks),) if arm == JOINT else p.tasks
    steps = max(1, round(p.steps * length * (2 if arm == "AdamW, 2x steps" else 1)))
    optimizer = {"SAM": "sam", "ASAM": "asam"}.get(base, "adamw")
    rho = float(radius or {"SAM": p.rho_sam, "ASAM": p.rho_asam}.get(base, 0.0))
    return [
        Recipe(
            task=task,
            optimizer=optimizer,
            steps=steps * len(p.tasks) if arm == JOINT else steps,
            rho=rho,
            lr=p.lr,
            batch_size=p.batch_size,
            n_train=p.n_train,
            label_noise=p.label_noise,
            seed=seed,
            precision=p.precision,
            micro_batch=p.micro_batch if isinstance(p.micro_batch, int) else None,
            shared_climb=p.micro_batch is not None,  # then the size of the micro-batches does not change the result
        )
        for task in names
    ]


def measure(run: Run, clip: Clip, arm: str, seed: int, length: float = 1.0) -> dict[str, Any]:
    """Everything the book's table needs of one arm and one seed; trained and measured once, then read.

    The one lambda of a merged model is the one with the best mean normalised accuracy on the validation
    splits; all accuracies returned are those of the test splits.

    Args:
        run: preset, device and cache.
        clip: the pre-trained model.
        arm: one of ARMS.
        seed: as in `recipes`.
        length: as in `recipes`.

    Returns:
        `train_loss`, `train_accuracy`, `test_loss`, `tau_norm` (by task); `single`, `averaging`,
        `task arithmetic`, `TIES` (each: `accuracy` by task, `mean`, `normalised`, and `lam`, `curve` where a
        lambda was chosen); `gap` (merge gap by task: rise of the test loss from the fine-tuned model to the
        model merged by task arithmetic); `xi` (by pair of tasks, at a_1 = a_2 = 1); `validation` (mean
        validation accuracy, of the single models and of the one merged by task arithmetic).

    Taught in: 05_merging.
    """
    lambdas = [run.preset.lambdas, run.preset.lambdas_wide]
    return once("measure", _measure, run, clip, recipes(run, arm, seed, length), lambdas=lambdas)


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
    decides |= {"n_eval": run.preset.n_eval, "code": inspect.getsource(compute)}
    value: dict[str, Any] = run.cached(
        name, decides, lambda: compute(run, clip, finetune_many(todo, clip, run.device, run.cache, jobs=1))
    )
    return value


def _measure(run: Run, clip: Clip, done: Sequence[Finetuned]) -> dict[str, Any]:
    p, b = run.preset, bench(run, clip)
    thetas = [{name: w.to(run.device) for name, w in d.theta.items()} for d in done]
    single, single_loss = score(b, thetas, b.tests)
    own, _ = score(b, thetas, b.validations)
    arithmetic, chosen = at_best_lambda(b, task_arithmetic(b.theta_0, thetas, 1.0), p.lambdas, own)
    trimmed, chosen_ties = at_best_lambda(b, ties(b.theta_0, thetas), p.lambdas_wide, own)
    merged, merged_loss = score(b, [arithmetic], b.tests)
    vectors = [task_vector(theta, b.theta_0) for theta in thetas]
    few = [tasks.subset(split, 100) for split in b.tests]
    return {
        "single": row(b, single, single),
        "averaging": row(b, score(b, [average(b.theta_0, thetas)], b.tests)[0], single),
        "task arithmetic": row(b, merged, single) | chosen,
        "TIES": row(b, score(b, [trimmed], b.tests)[0], single) | chosen_ties,
        "validation": {"single": sum(own) / len(own), "task arithmetic": chosen["validation"]},
        "test_loss": dict(zip(p.tasks, single_loss, strict=True)),
        "gap": {name: m - s for name, s, m in zip(p.tasks, single_loss, merged_loss, strict=True)},
        "tau_norm": {
            name: torch.cat([w.flatten() for w in tau.values()]).norm().item()
            for name, tau in zip(p.tasks, vectors, strict=True)
        },
        "xi": {
            f"{p.tasks[i]}, {p.tasks[j]}": xi(
                b.encoder, b.theta_0, thetas[i], thetas[j], few[i], b.heads[i], few[j], b.heads[j], [1.0], [1.0]
            ).item()
            for i, j in combinations(range(len(thetas)), 2)
        },
        "train_loss": {d.recipe.task: d.train_loss for d in done},
        "train_accuracy": {d.recipe.task: d.train_accuracy for d in done},
        "seconds": sum(d.seconds for d in done),
    }


def measure_many(
    run: Run, clip: Clip, wanted: Sequence[tuple[str, int, float]], measure: Measure = measure
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


def zero_shot(run: Run, clip: Clip) -> dict[str, float]:
    """Test accuracy of the pre-trained model on each of the preset's tasks, in [0, 1]."""
    b = bench(run, clip)
    return dict(zip(b.names, score(b, [b.theta_0], b.tests)[0], strict=True))


def table(results: dict[str, list[dict[str, Any]]], value: str = "mean") -> pd.DataFrame:
    """Mean and 95 % interval over seeds.

    Args:
        results: arm -> one result of `measure` a seed.
        value: "mean" (accuracy) or "normalised".

    Returns:
        One row a (arm, model): mean, low, high, n.

    Taught in: 05_merging.
    """
    rows = []
    for arm, runs in results.items():
        for model in ROWS:
            rows.append((arm, model, *interval([r[model][value] for r in runs]), len(runs)))
    return pd.DataFrame(rows, columns=["arm", "model", "mean", "low", "high", "n"]).set_index(["arm", "model"])


def gains(results: dict[str, list[dict[str, Any]]], base: str, value: str = "mean") -> pd.DataFrame:
    """What each arm gains over `base`, seed by seed: mean and 95 % interval of the paired differences.

    Args:
        results: arm -> one result of `measure` a seed, seeds in the same order.
        base: the arm to compare with.
        value: "mean" or "normalised".

    Taught in: 05_merging.
    """
    rows = []
    for arm in (a for a in results if a != base):
        for model in ROWS:
            a, b = ([r[model][value] for r in results[name]] for name in (arm, base))
            rows.append((arm, model, *paired_interval(a, b), len(a)))
    return pd.DataFrame(rows, columns=["arm", "model", "gain", "low", "high", "n"]).set_index(["arm", "model"])


def published_lengths(
    run: Run, name: str = "experiment.published", arms: Sequence[str] = ARMS
) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """The book's own results by training length.

    Args:
        run: where the published file is.
        name: of that file, as in `Run.published_values`.
        arms: what a seed must have.

    Returns:
        AdamW's steps -> arm -> one result of `measure` a seed, with its `arm`, `seed`, `steps` and `recipes`, for
        the seeds that all arms have; shorter lengths first.
    """
    runs = (run.published_values(name) or {}).get("runs", [])
    lengths = {}
    for steps in sorted({r["steps"] for r in runs}):
        by_arm = {arm: {r["seed"]: r for r in runs if (r["arm"], r["steps"]) == (arm, steps)} for arm in arms}
        complete = sorted(set.intersection(*(set(found) for found in by_arm.values())))
        if complete:
            lengths[steps] = {arm: [found[seed] for seed in complete] for arm, found in by_arm.items()}
    return lengths


def published(
    run: Run, steps: int | None = None, name: str = "experiment.published", arms: Sequence[str] = ARMS
) -> dict[str, list[dict[str, Any]]]:
    """The results that the book reports: of the length with the most seeds; of several, the longest.

    Args:
        run, name, arms: as in `published_lengths`.
        steps: AdamW's steps; where a length with as many is published, its results instead.

    Returns:
        arm -> one result a seed, as in `published_lengths`; empty if nothing is published.

    Taught in: 05_merging.
    """
    lengths = published_lengths(run, name, arms)
    if steps in lengths:
        return lengths[steps]
    return lengths[max(lengths, key=lambda steps: (len(lengths[steps][arms[0]]), steps))] if lengths else {}


def publish_runs(run: Run, clip: Clip, measure: Measure, wanted: Sequence[tuple[str, int, float]]) -> None:
    """Measure, and rewrite the published values of the run's notebook.

    What is published with the same recipes is not measured again, what has others is replaced.

    Args:
        run: preset, device, cache, and where the published file is.
        clip: the pre-trained model.
        measure, wanted: as in `measure_many`.
    """
    done = run.published_values(run.published_file.stem) or {"runs": []}
    runs = {_identity(r): r for r in done["runs"]}
    missing = {}
    for arm, seed, length in wanted:
        todo = recipes(run, arm, seed, length)
        steps = recipes(run, "AdamW", seed, length)[0].steps
        own = {"arm": arm, "seed": seed, "steps": steps, "recipes": [asdict(r.same()) for r in todo]}
        there = [Recipe(**r).same() for r in runs.get(_identity(own), {}).get("recipes", [])]
        if there != [r.same() for r in todo]:
            missing[arm, seed, length] = own
    if missing:
        for own, found in zip(missing.values(), measure_many(run, clip, list(missing), measure), strict=True):
            runs[_identity(own)] = own | found
        run.publish({"zero-shot": zero_shot(run, clip), "runs": list(runs.values())})
        print(f"{', '.join(map(str, missing))}: written to {run.published_file}", flush=True)


def _identity(published: dict[str, Any]) -> tuple[Any, ...]:
    """Arm, seed and regime of a published run: of two with the same, the later one replaces the earlier."""
    recipe = Recipe(**published["recipes"][0])
    return published["arm"], published["seed"], published["steps"], recipe.n_train, recipe.label_noise


def plan(run: Run, seed: int) -> list[Part]:
    """Every arm, one training length after the other: what `samlib.publish` measures."""
    return [(run, [(arm, seed, length) for arm in ARMS]) for length in run.preset.lengths]
