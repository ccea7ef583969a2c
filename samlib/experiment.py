"""The central experiment: fine-tune every task by each arm, merge, and measure: `python -m samlib.experiment`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import joblib
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from samlib import clip as clip_module
from samlib import tasks
from samlib.clip import Clip, Theta, accuracy, logits, zero_shot_head
from samlib.finetune import Recipe, finetune_many
from samlib.interference import normalised_accuracy, xi
from samlib.merge import accuracy_curve, average, choose_lambda, task_arithmetic, task_vector, ties
from samlib.run import Run, begin, interval, paired_interval

ARMS = ("AdamW", "AdamW, 2x steps", "SAM", "ASAM")
JOINT = "AdamW, all tasks"  # one model trained on all tasks: what merging would like to reach
Measure = Callable[[Run, Clip, str, int, float], dict[str, Any]]  # run, clip, arm, seed, length -> JSON-able
ROWS = ("single", "averaging", "task arithmetic", "TIES")


def recipes(run: Run, arm: str, seed: int, length: float = 1.0) -> list[Recipe]:
    """One recipe a task: what the arm trains with this seed. Of JOINT, one recipe for all tasks.

    Args:
        run: its preset gives tasks, steps, radii and learning rate.
        arm: one of ARMS, or JOINT. SAM and ASAM take two gradients a step, so that "AdamW, 2x steps" costs what they
            do; JOINT makes as many updates as AdamW does for all tasks together.
        seed: of data order and augmentation; equal seeds are paired between arms.
        length: multiple of the preset's steps, > 0.

    Raises:
        ValueError: no such arm.

    Taught in: 04_fine_tuning.
    """
    if arm not in (*ARMS, JOINT):
        raise ValueError(f"arm must be one of {'; '.join((*ARMS, JOINT))}, not {arm!r}")
    p = run.preset
    names = ("+".join(p.tasks),) if arm == JOINT else p.tasks
    steps = max(1, round(p.steps * length * (2 if arm == "AdamW, 2x steps" else 1)))
    optimizer = {"SAM": "sam", "ASAM": "asam"}.get(arm, "adamw")
    rho = {"SAM": p.rho_sam, "ASAM": p.rho_asam}.get(arm, 0.0)
    return [
        Recipe(
            task=task,
            optimizer=optimizer,
            steps=steps * len(p.tasks) if arm == JOINT else steps,
            rho=rho,
            lr=p.lr,
            batch_size=p.batch_size,
            n_train=p.n_train,
            seed=seed,
            precision=p.precision,
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
    todo = recipes(run, arm, seed, length)

    def compute() -> dict[str, Any]:
        done = finetune_many(todo, clip, run.device, run.cache, jobs=1)
        return _measure(run, clip, [d.theta for d in done]) | {
            "train_loss": {d.recipe.task: d.train_loss for d in done},
            "train_accuracy": {d.recipe.task: d.train_accuracy for d in done},
            "seconds": sum(d.seconds for d in done),
        }

    p = run.preset
    decides = {
        "recipes": [asdict(r) for r in todo],
        "lambdas": [p.lambdas, p.lambdas_wide],
        "n_eval": p.n_eval,
        "code": inspect.getsource(_measure),
    }
    value: dict[str, Any] = run.cached("measure", decides, compute)
    return value


def _measure(run: Run, clip: Clip, thetas: Sequence[Theta]) -> dict[str, Any]:
    p, encoder = run.preset, clip.encoder
    loaded = [tasks.load(name) for name in p.tasks]
    heads = [zero_shot_head(clip, task) for task in loaded]
    tests = [tasks.subset(task.test, p.n_eval) for task in loaded]
    validations = [tasks.subset(task.validation, p.n_eval) for task in loaded]
    theta_0 = clip_module.theta(encoder)
    thetas = [{name: w.to(run.device) for name, w in theta.items()} for theta in thetas]

    def score(models: Sequence[Theta], splits: list[tasks.Split]) -> tuple[list[float], list[float]]:
        """Accuracy and loss of the t-th model on the t-th split."""
        accuracies, losses = [], []
        for theta, split, head in zip(models, splits, heads, strict=True):
            outputs = logits(encoder, theta, split.images, head).cpu()  # (N, K)
            accuracies.append((outputs.argmax(1) == split.labels).double().mean().item())
            losses.append(cross_entropy(outputs, split.labels).item())
        return accuracies, losses

    single, single_loss = score(thetas, tests)
    single_validation, _ = score(thetas, validations)

    def row(theta: Theta) -> tuple[dict[str, Any], list[float]]:
        accuracies, losses = score([theta] * len(tests), tests)
        return {
            "accuracy": dict(zip(p.tasks, accuracies, strict=True)),
            "mean": sum(accuracies) / len(accuracies),
            "normalised": normalised_accuracy(accuracies, single),
        }, losses

    def chosen(theta_1: Theta, grid: Sequence[float]) -> tuple[dict[str, Any], list[float], float]:
        """The row, the test losses and the mean validation accuracy at the lambda that is best on validation."""
        curve = accuracy_curve(encoder, theta_0, theta_1, grid, validations, heads)  # (G, T)
        ratios = curve / torch.tensor(single_validation, dtype=torch.float64)
        lam = choose_lambda(ratios, grid)[0]
        found, losses = row(task_arithmetic(theta_0, [theta_1], lam))
        found |= {"lam": lam, "curve": ratios.mean(1).tolist()}
        return found, losses, curve[grid.index(lam)].mean().item()

    arithmetic, merged_loss, merged_validation = chosen(task_arithmetic(theta_0, thetas, 1.0), p.lambdas)
    trimmed, _, _ = chosen(ties(theta_0, thetas), p.lambdas_wide)
    vectors = [task_vector(theta, theta_0) for theta in thetas]
    few = [tasks.subset(split, 100) for split in tests]
    return {
        "single": {
            "accuracy": dict(zip(p.tasks, single, strict=True)),
            "mean": sum(single) / len(single),
            "normalised": 1.0,
        },
        "averaging": row(average(theta_0, thetas))[0],
        "task arithmetic": arithmetic,
        "TIES": trimmed,
        "validation": {"single": sum(single_validation) / len(thetas), "task arithmetic": merged_validation},
        "test_loss": dict(zip(p.tasks, single_loss, strict=True)),
        "gap": {name: b - a for name, a, b in zip(p.tasks, single_loss, merged_loss, strict=True)},
        "tau_norm": {
            name: torch.cat([w.flatten() for w in tau.values()]).norm().item()
            for name, tau in zip(p.tasks, vectors, strict=True)
        },
        "xi": {
            f"{p.tasks[i]}, {p.tasks[j]}": xi(
                encoder, theta_0, thetas[i], thetas[j], few[i], heads[i], few[j], heads[j], [1.0], [1.0]
            ).item()
            for i, j in combinations(range(len(thetas)), 2)
        },
    }


def measure_many(
    run: Run, clip: Clip, wanted: Sequence[tuple[str, int, float]], measure: Measure = measure
) -> list[dict[str, Any]]:
    """`measure` for several (arm, seed, length): all fine-tuning first, then the merging, side by side on a CPU.

    Args:
        run: preset, device and cache.
        clip: the pre-trained model.
        wanted: what to measure, in the order of the answer.
        measure: this module's, or `compare.merge_all`.
    """
    todo = [recipe for arm, seed, length in wanted for recipe in recipes(run, arm, seed, length)]
    finetune_many(todo, clip, run.device, run.cache, run.preset.jobs)
    jobs = min(run.preset.jobs or joblib.cpu_count(), len(wanted)) if run.device == "cpu" else 1
    pool = joblib.Parallel(n_jobs=jobs, return_as="generator")
    calls = (joblib.delayed(measure)(run, clip, *what) for what in wanted)
    return list(tqdm(pool(calls), total=len(wanted), desc="merging and measuring", unit="model"))


def zero_shot(run: Run, clip: Clip) -> dict[str, float]:
    """Test accuracy of the pre-trained model on each of the preset's tasks, in [0, 1]."""
    theta_0 = clip_module.theta(clip.encoder)
    loaded = [tasks.load(name) for name in run.preset.tasks]
    return {
        task.name: accuracy(
            clip.encoder, theta_0, tasks.subset(task.test, run.preset.n_eval), zero_shot_head(clip, task)
        )
        for task in loaded
    }


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
        for row in ROWS:
            rows.append((arm, row, *interval([r[row][value] for r in runs]), len(runs)))
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
        for row in ROWS:
            a, b = ([r[row][value] for r in results[name]] for name in (arm, base))
            rows.append((arm, row, *paired_interval(a, b), len(a)))
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
    runs = {(r["arm"], r["seed"], r["steps"]): r for r in done["runs"]}
    facts = {}
    for arm, seed, length in wanted:
        steps = recipes(run, "AdamW", seed, length)[0].steps
        todo = recipes(run, arm, seed, length)
        known = [Recipe(**r) for r in runs.get((arm, seed, steps), {}).get("recipes", [])]
        if known != todo:
            own = {"arm": arm, "seed": seed, "steps": steps, "recipes": [asdict(r) for r in todo]}
            facts[arm, seed, length] = own
    if facts:
        for own, found in zip(facts.values(), measure_many(run, clip, list(facts), measure), strict=True):
            runs[own["arm"], own["seed"], own["steps"]] = own | found
        run.publish({"zero-shot": zero_shot(run, clip), "runs": list(runs.values())})
        print(f"{', '.join(map(str, facts))}: written to {run.published_file}", flush=True)


def main() -> None:
    """Measure every arm, seed after seed, and rewrite the published values after each."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--preset", default="published")
    parser.add_argument("--lengths", type=float, nargs="+", help="multiples of the preset's steps, in this order")
    a = parser.parse_args()
    run = begin("experiment", preset=a.preset)
    clip = clip_module.load(run.device)
    for length in a.lengths or run.preset.lengths:
        for seed in run.preset.seeds:
            publish_runs(run, clip, measure, [(arm, seed, length) for arm in ARMS])


if __name__ == "__main__":
    from samlib import experiment

    experiment.main()  # by its own name, under which worker processes can import what they run
