"""Where does SAM help? Its gain over radius, training length, images and wrong labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from samlib.measure.intervals import bootstrap, mean
from samlib.model.theta import Theta
from samlib.notebook.run import Run
from samlib.study.arms import BASES, Arm, named, recipes
from samlib.study.campaign import Result, Wanted, once
from samlib.study.scoring import Bench, basics
from samlib.train.recipe import Recipe
from samlib.train.result import Finetuned

BETTER = {"single": +1, "averaging": +1, "task arithmetic": +1, "normalised": +1, "gap_average": -1}  # side of zero


def arms(run: Run) -> dict[str, Arm]:
    """The two baselines, and SAM with each radius of the preset."""
    return BASES | named(*(Arm("sam", rho) for rho in run.preset.radii))


def regimes(run: Run) -> Iterator[tuple[Run, float]]:
    """The run with the images and wrong labels of each regime of its preset, and the regime's training length."""
    for length, n_train, label_noise in run.preset.regimes:
        preset = replace(run.preset, n_train=min(n_train, run.preset.n_train or n_train), label_noise=label_noise)
        yield replace(run, preset=preset), length


def measure(run: Run, arm: Arm, seed: int, length: float = 1.0) -> Result:
    """What the map needs of one arm, seed and regime; trained and measured once, then read.

    Args:
        run: of `regimes`.
        arm: one of `arms`.
        seed: as in `arms.recipes`.
        length: multiple of the preset's steps.

    Returns:
        As `scoring.basics`.

    Taught in: 07_flatness.
    """
    return once("where-sam-helps", _compute, run, recipes(run, arm, seed, length), lambdas=run.preset.lambdas)


def _compute(b: Bench, thetas: list[Theta], done: Sequence[Finetuned]) -> Result:
    return basics(b, thetas, done)


def gains(runs: Sequence[Result]) -> pd.DataFrame:
    """SAM against both baselines, seed by seed and task by task.

    Args:
        runs: published results of `measure`, with `arm`, `seed`, `steps` and `recipes`.

    Returns:
        One row a regime, radius, baseline, seed and task: steps, n_train, label_noise, rho, base, seed, task, and the
        differences SAM minus baseline of `single`, `averaging` and `task arithmetic` (test accuracy, in points),
        `normalised` (task arithmetic over single, in points) and `gap_average` (nats); pairs share seed and data order.
    """
    found = {}
    for r in runs:
        recipe = Recipe(**r["recipes"][0])
        found[recipe.n_train, recipe.label_noise, r["steps"], r["seed"], r["arm"]] = r
    rows = []
    for (n_train, noise, steps, seed, arm), mine in found.items():
        for base in BASES if arm not in BASES else ():
            theirs = found.get((n_train, noise, steps, seed, base))
            for task in mine["gap_average"] if theirs else ():
                assert theirs
                line: dict[str, Any] = {"steps": steps, "n_train": n_train, "label_noise": noise}
                line |= {"rho": Recipe(**mine["recipes"][0]).rho, "base": base, "seed": seed, "task": task}
                for model in ("single", "averaging", "task arithmetic"):
                    line[model] = 100 * (mine[model]["accuracy"][task] - theirs[model]["accuracy"][task])
                kept = [r["task arithmetic"]["accuracy"][task] / r["single"]["accuracy"][task] for r in (mine, theirs)]
                line |= {"normalised": 100 * (kept[0] - kept[1])}
                rows.append(line | {"gap_average": mine["gap_average"][task] - theirs["gap_average"][task]})
    return pd.DataFrame(rows)


def cells(gains: pd.DataFrame) -> pd.DataFrame:
    """The map: every gain in every cell, with its interval over seeds and tasks.

    Args:
        gains: of the function of this name.

    Returns:
        One row a regime, radius, baseline and quantity: regime (in words), rho, base, value (key of BETTER), effect (an
        Estimate), mean, and `judged`: +1 where the whole interval lies on SAM's better side, -1 on the other, else 0.
        Regimes with fewer wrong labels come first, then those with more images, then those with fewer steps.

    Taught in: 07_flatness.
    """
    by = ["label_noise", "n_train", "steps", "rho"]
    gains = gains.sort_values(by, ascending=[True, False, True, True], kind="stable")
    rows = []
    for (noise, n, steps, rho, base), part in gains.groupby([*by, "base"], sort=False):
        regime = f"{steps:,} steps, {n:,} images" + (f", {100 * noise:.0f} % wrong" if noise else "")
        for value, better in BETTER.items():
            (effect,) = bootstrap(part, mean(value))
            line = {"regime": regime, "rho": rho, "base": base, "value": value, "effect": effect}
            rows.append(line | {"mean": effect.mean, "judged": better * effect.side()})
    return pd.DataFrame(rows)


def plan(run: Run, seed: int) -> Iterator[list[Wanted]]:
    """Every arm in every regime: what `python -m samlib.study.publish where_sam_helps` measures."""
    for within, length in regimes(run):
        yield [(within, arm, seed, length) for arm in arms(run).values()]
