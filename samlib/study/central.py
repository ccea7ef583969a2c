"""The central experiment: fine-tune every task by each arm, merge, and measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import pandas as pd

from samlib.data.tasks import subset
from samlib.measure.interference import xi
from samlib.measure.intervals import estimate, paired
from samlib.merge.ties import ties
from samlib.model.theta import Theta
from samlib.notebook.run import Run
from samlib.study.arms import ARMS, Arm, recipes
from samlib.study.campaign import Result, Wanted, once
from samlib.study.scoring import Bench, at_best_lambda, basics, row, score
from samlib.train.result import Finetuned

ROWS = ("single", "averaging", "task arithmetic", "TIES")
FEW = 100  # test images of each task on which xi is counted


def measure(run: Run, arm: Arm, seed: int, length: float = 1.0) -> Result:
    """Everything the book's table needs of one arm and one seed; trained and measured once, then read.

    The one lambda of a merged model is the one with the best mean normalised accuracy on the validation
    splits; all accuracies returned are those of the test splits.

    Args:
        run: preset, device and cache.
        arm: such as one of ARMS.
        seed: as in `arms.recipes`.
        length: as in `arms.recipes`.

    Returns:
        What `scoring.basics` returns; `TIES`, a row with `lam` and `curve`; `xi` (by pair of tasks, at a_1 = a_2 = 1);
        `seconds` of fine-tuning.

    Taught in: 05_merging.
    """
    lambdas = [run.preset.lambdas, run.preset.lambdas_wide]
    return once("central", _compute, run, recipes(run, arm, seed, length), lambdas=lambdas)


def _compute(b: Bench, thetas: list[Theta], done: Sequence[Finetuned]) -> Result:
    own, _ = score(b, thetas, b.validations)
    found = basics(b, thetas, done)
    single = [found["single"]["accuracy"][name] for name in b.names]
    trimmed, chosen = at_best_lambda(b, ties(b.theta_0, thetas), b.preset.lambdas_wide, own)
    few = [subset(split, FEW) for split in b.tests]
    return found | {
        "TIES": row(b, score(b, [trimmed], b.tests)[0], single) | chosen,
        "xi": {
            f"{b.names[i]}, {b.names[j]}": xi(
                b.encoder, b.theta_0, thetas[i], thetas[j], few[i], b.heads[i], few[j], b.heads[j], [1.0], [1.0]
            ).item()
            for i, j in combinations(range(len(thetas)), 2)
        },
        "seconds": sum(d.seconds for d in done),
    }


def table(results: Mapping[str, Sequence[Result]], value: str = "mean") -> pd.DataFrame:
    """Mean and 95 % interval over seeds.

    Args:
        results: arm -> one result of `measure` a seed.
        value: "mean" (accuracy) or "normalised".

    Returns:
        One row a (arm, model): mean, low, high, n.

    Taught in: 05_merging.
    """
    found = {(arm, model): estimate([r[model][value] for r in runs]) for arm, runs in results.items() for model in ROWS}
    return _frame(found)


def gains(results: Mapping[str, Sequence[Result]], base: str, value: str = "mean") -> pd.DataFrame:
    """What each arm gains over `base`, seed by seed: mean and 95 % interval of the paired differences.

    Args:
        results: arm -> one result of `measure` a seed, seeds in the same order.
        base: the arm to compare with.
        value: "mean" or "normalised".

    Returns:
        As `table`.

    Taught in: 05_merging.
    """
    found = {}
    for arm in (a for a in results if a != base):
        for model in ROWS:
            mine, theirs = ([r[model][value] for r in results[name]] for name in (arm, base))
            found[arm, model] = paired(mine, theirs)
    return _frame(found)


def _frame(found: Mapping[tuple[str, str], tuple[float, float, float, int]]) -> pd.DataFrame:
    frame = pd.DataFrame(list(found.values()), columns=["mean", "low", "high", "n"])
    frame.index = pd.MultiIndex.from_tuples(list(found), names=["arm", "model"])
    return frame


def plan(run: Run, seed: int) -> Iterator[list[Wanted]]:
    """Every arm, one training length after the other: what `python -m samlib.study.publish central` measures."""
    for length in run.preset.lengths:
        yield [(run, arm, seed, length) for arm in ARMS.values()]
