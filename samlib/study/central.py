"""The central experiment: fine-tune every task by each arm, merge, and measure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pandas as pd
import torch

from samlib.data.tasks import subset
from samlib.measure.interference import xi
from samlib.measure.intervals import interval, paired_interval
from samlib.merge.linear import average, task_arithmetic
from samlib.merge.ties import ties
from samlib.model.clip import Clip
from samlib.model.theta import task_vector
from samlib.notebook.run import Run
from samlib.study.arms import ARMS, recipes
from samlib.study.campaign import Part, once
from samlib.study.scoring import at_best_lambda, bench, row, score
from samlib.train.finetune import Finetuned

ROWS = ("single", "averaging", "task arithmetic", "TIES")


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


def _measure(run: Run, clip: Clip, done: Sequence[Finetuned]) -> dict[str, Any]:
    p, b = run.preset, bench(run, clip)
    thetas = [{name: w.to(run.device) for name, w in d.theta.items()} for d in done]
    single, single_loss = score(b, thetas, b.tests)
    own, _ = score(b, thetas, b.validations)
    arithmetic, chosen = at_best_lambda(b, task_arithmetic(b.theta_0, thetas, 1.0), p.lambdas, own)
    trimmed, chosen_ties = at_best_lambda(b, ties(b.theta_0, thetas), p.lambdas_wide, own)
    merged, merged_loss = score(b, [arithmetic], b.tests)
    vectors = [task_vector(theta, b.theta_0) for theta in thetas]
    few = [subset(split, 100) for split in b.tests]
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


def plan(run: Run, seed: int) -> list[Part]:
    """Every arm, one training length after the other: what `samlib.publish` measures."""
    return [(run, [(arm, seed, length) for arm in ARMS]) for length in run.preset.lengths]
