"""Where does SAM help? Its gain over radius, training length, images and wrong labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from samlib.merge.linear import average, task_arithmetic
from samlib.model.clip import Clip
from samlib.model.theta import dot, task_vector
from samlib.notebook.run import Run
from samlib.study.arms import recipes
from samlib.study.campaign import Part, once
from samlib.study.scoring import at_best_lambda, bench, row, score
from samlib.train.finetune import Finetuned
from samlib.train.recipe import Recipe

BASES = ("AdamW", "AdamW, 2x steps")  # at equal steps, and at equal gradient evaluations


def arms(run: Run) -> list[str]:
    """The two baselines, and SAM with each radius of the preset."""
    return [*BASES, *(f"SAM, rho {rho:g}" for rho in run.preset.radii)]


def regimes(run: Run) -> Iterator[tuple[Run, float]]:
    """The run with the images and wrong labels of each regime of its preset, and the regime's training length."""
    for length, n_train, label_noise in run.preset.regimes:
        preset = replace(run.preset, n_train=min(n_train, run.preset.n_train or n_train), label_noise=label_noise)
        yield replace(run, preset=preset), length


def measure(run: Run, clip: Clip, arm: str, seed: int, length: float = 1.0) -> dict[str, Any]:
    """What the map needs of one arm, seed and regime; trained and measured once, then read.

    Args:
        run: of `regimes`.
        clip: the pre-trained model.
        arm: one of `arms`.
        seed: as in `arms.recipes`.
        length: multiple of the preset's steps.

    Returns:
        `train_loss`, `train_accuracy`, `tau_norm` by task; `single`, `averaging`, `task arithmetic`, as in
        `central.measure`; `gap`, the rise of the test loss by averaging, in nats, by task; `gap at lam`, the same
        for task arithmetic with its chosen lambda.

    Taught in: 07_flatness.
    """
    todo = recipes(run, arm, seed, length)
    return once("regime", _measure, run, clip, todo, lambdas=run.preset.lambdas)


def _measure(run: Run, clip: Clip, done: Sequence[Finetuned]) -> dict[str, Any]:
    b = bench(run, clip)
    thetas = [{name: w.to(run.device) for name, w in d.theta.items()} for d in done]
    single, single_loss = score(b, thetas, b.tests)
    own, _ = score(b, thetas, b.validations)
    arithmetic, chosen = at_best_lambda(b, task_arithmetic(b.theta_0, thetas, 1.0), run.preset.lambdas, own)
    averaged, averaged_loss = score(b, [average(b.theta_0, thetas)], b.tests)
    merged, merged_loss = score(b, [arithmetic], b.tests)
    vectors = [task_vector(theta, b.theta_0) for theta in thetas]

    def by_task(values: Sequence[float]) -> dict[str, float]:
        return dict(zip(b.names, values, strict=True))

    return {
        "train_loss": by_task([d.train_loss for d in done]),
        "train_accuracy": by_task([d.train_accuracy for d in done]),
        "tau_norm": by_task([dot(tau, tau) ** 0.5 for tau in vectors]),
        "single": row(b, single, single),
        "averaging": row(b, averaged, single),
        "task arithmetic": row(b, merged, single) | chosen,
        "gap": by_task([m - s for s, m in zip(single_loss, averaged_loss, strict=True)]),
        "gap at lam": by_task([m - s for s, m in zip(single_loss, merged_loss, strict=True)]),
    }


def gains(runs: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """SAM against both baselines, seed by seed and task by task.

    Args:
        runs: published results of `measure`, with `arm`, `seed`, `steps` and `recipes`.

    Returns:
        One row a regime, radius, baseline, seed and task: steps, n_train, label_noise, rho, base, seed, task, and the
        differences SAM minus baseline of `single`, `averaging` and `task arithmetic` (test accuracy, in points),
        `normalised` (task arithmetic over single, in points) and `gap` (nats); pairs share seed and data order.
    """
    found = {}
    for r in runs:
        recipe = Recipe(**r["recipes"][0])
        found[recipe.n_train, recipe.label_noise, r["steps"], r["seed"], r["arm"]] = r
    rows = []
    for (n_train, noise, steps, seed, arm), mine in found.items():
        for base in BASES if arm not in BASES else ():
            if (n_train, noise, steps, seed, base) not in found:
                continue
            theirs = found[n_train, noise, steps, seed, base]
            for task in mine["gap"]:
                line: dict[str, Any] = {"steps": steps, "n_train": n_train, "label_noise": noise}
                line |= {"rho": Recipe(**mine["recipes"][0]).rho, "base": base, "seed": seed, "task": task}
                for model in ("single", "averaging", "task arithmetic"):
                    line[model] = 100 * (mine[model]["accuracy"][task] - theirs[model]["accuracy"][task])
                kept = [r["task arithmetic"]["accuracy"][task] / r["single"]["accuracy"][task] for r in (mine, theirs)]
                rows.append(
                    line | {"normalised": 100 * (kept[0] - kept[1]), "gap": mine["gap"][task] - theirs["gap"][task]}
                )
    return pd.DataFrame(rows)


def plan(run: Run, seed: int) -> list[Part]:
    """Every arm in every regime: what `samlib.publish` measures."""
    return [(within, [(arm, seed, length) for arm in arms(run)]) for within, length in regimes(run)]
