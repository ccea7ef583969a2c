"""Every merging method on the models of every arm, beside a model trained on all tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from samlib import merge
from samlib.model.theta import Theta
from samlib.notebook.run import Run
from samlib.study.arms import ARMS, JOINT, Arm, recipes
from samlib.study.campaign import Result, Wanted, once
from samlib.study.scoring import Bench, at_best_lambda, row, score
from samlib.train.result import Finetuned


@dataclass(frozen=True)
class Merge:
    """A method of the table.

    Args:
        function: its name in `samlib.merge.METHODS`.
        grid: field of the preset that holds the candidates for lam; None where the method has none.
        settings: hyper-parameters that differ from the method's defaults.
    """

    function: str
    grid: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


MERGES: dict[str, Merge] = {
    "averaging": Merge("average"),
    "task arithmetic": Merge("task_arithmetic", "lambdas"),
    "DARE": Merge("dare", "lambdas"),
    "Consensus": Merge("consensus", "lambdas"),
    "TIES": Merge("ties", "lambdas_wide"),
    "Model Stock": Merge("model_stock", "lambdas_wide"),
    "TSV-M": Merge("tsv_m", "lambdas_wide"),
    "Iso-C": Merge("iso_c", "lambdas_wide"),
    "Iso-CTS": Merge("iso_cts", "lambdas_wide"),
    "WUDI": Merge("wudi", "lambdas_wide", {"lr": 1e-3}),  # with 1e-5 the objective has not fallen far after 300 steps
    "Fisher": Merge("fisher"),
    "RegMean": Merge("regmean"),
    "AdaMerging": Merge("adamerging"),
    "KL to the experts": Merge("adamerging", settings={"objective": "kl", "lr": 1e-2}),
    "KL, SAM at the merge": Merge("adamerging", settings={"objective": "kl", "lr": 1e-2, "rho": 0.05}),
}


def measure(run: Run, arm: Arm, seed: int, length: float = 1.0) -> Result:
    """Merge the models of one arm and one seed by every method; trained and measured once, then read.

    Where a method has a lambda, it is the one with the best mean normalised accuracy on the validation splits. Methods
    that need images see those of the validation splits, without labels. All accuracies returned are those of the test
    splits.

    Args:
        run: preset, device and cache.
        arm: such as one of `arms.ARMS`, or `arms.JOINT`, of which there is nothing to merge.
        seed: of the fine-tuning, and of the methods that draw at random.
        length: multiple of the preset's steps.

    Returns:
        "single" and each name in MERGES -> `accuracy` by task, `mean`, `normalised`, `seconds` of the merge, and `lam`,
        `curve` where a lambda was chosen. Of JOINT, "single" only.

    Taught in: 05_merging.
    """
    grids = [run.preset.lambdas, run.preset.lambdas_wide]
    merges = {name: asdict(m) for name, m in MERGES.items()}
    return once("all-methods", _compute, run, recipes(run, arm, seed, length), grids=grids, merges=merges)


def _compute(b: Bench, thetas: list[Theta], done: Sequence[Finetuned]) -> Result:
    images = [split.images for split in b.validations]
    single, own = (score(b, thetas, splits)[0] for splits in (b.tests, b.validations))
    rows = {"single": row(b, single, single)}
    for name, method in MERGES.items() if len(done) > 1 else ():
        begun = time.monotonic()
        function = getattr(merge, method.function)
        rules = merge.METHODS[method.function].rules
        settings = method.settings | ({"seed": done[0].recipe.seed} if "seed" in rules else {})
        if merge.METHODS[method.function].plan is None:
            merged = function(b.encoder, b.theta_0, thetas, images, b.heads, **settings)
        else:
            merged = function(b.theta_0, thetas, **settings, **({"lam": 1.0} if method.grid else {}))
        extra: dict[str, Any] = {"seconds": time.monotonic() - begun}
        if method.grid:
            merged, chosen = at_best_lambda(b, merged, getattr(b.preset, method.grid), own)
            extra |= chosen
        rows[name] = row(b, score(b, [merged], b.tests)[0], single) | extra
    return rows


def plan(run: Run, seed: int) -> Iterator[list[Wanted]]:
    """Every arm, and the model of all tasks: what `python -m samlib.study.publish all_methods` measures."""
    yield [(run, arm, seed, 1.0) for arm in (*ARMS.values(), JOINT)]
