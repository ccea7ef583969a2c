"""The paper's claims as data: what is measured, of which arm against which, and what is predicted.

The tables and the figure of the results page and the numbers that chapters 5 to 7 hand to their prose are made from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from samlib.measure.intervals import Estimate, Statistic, bootstrap, correlations, estimate, mean, paired
from samlib.measure.landscape import above_chord
from samlib.notebook.page import claim as verdict_on
from samlib.notebook.page import glue, verdict
from samlib.notebook.presets import PRESETS
from samlib.notebook.run import PUBLISHED
from samlib.store.files import read_json
from samlib.study import flatness_chain
from samlib.study.arms import ARMS, BASES
from samlib.study.campaign import Result
from samlib.study.pairs import GRID

SHORT = {"AdamW": "adamw", "AdamW, 2x steps": "adamw2x", "SAM": "sam", "ASAM": "asam"}  # in the names of glued values


@dataclass(frozen=True)
class Measure:
    """What is compared between arms.

    Args:
        title: on the page.
        study: in whose results it is, a key of `evidence.STUDIES`.
        value: of one result, a number a seed; or a column of `flatness_chain.table`, a number a task and seed.
        better: +1 where more of it is better, -1 where less is: the side that the paper's claims predict for SAM.
        spec: how a value is written.
        unit: of a difference between two arms.
        ratio: True compares by the ratio of geometric means.
        rank: True asks for the rank correlation of the column with the merge gap instead, among the models of one task.
    """

    title: str
    study: str
    value: Callable[[Result], float] | str
    better: int
    spec: str
    unit: str = ""
    ratio: bool = False
    rank: bool = False

    @property
    def centre(self) -> float:
        """The effect that is none."""
        return 1.0 if self.ratio else 0.0

    @property
    def difference(self) -> str:
        """How an effect is written."""
        number = self.spec.split(" ")[0]
        return number if self.ratio else f"+{number} {self.unit}".rstrip()


def over_tasks(name: str) -> Callable[[Result], float]:
    """The mean over tasks, or pairs of them, of what a result has by task."""
    return lambda r: sum(r[name].values()) / len(r[name])


def over_pairs(value: Callable[[dict[str, object]], float]) -> Callable[[Result], float]:
    """The mean over pairs of tasks of a number that is made of what `pairs.measure` found."""
    return lambda r: sum(value(pair) for pair in r["pairs"].values()) / len(r["pairs"])


def _percent(model: str, value: str = "mean") -> Callable[[Result], float]:
    return lambda r: 100 * float(r[model][value])


def distances(r: Result) -> dict[str, float]:
    """Squared distance from each task's model to the merge by task arithmetic, as if task vectors were orthogonal."""
    lam, lengths = r["task arithmetic"]["lam"], r["tau_norm"]
    total = sum(n**2 for n in lengths.values())
    return {t: (1 - lam) ** 2 * n**2 + lam**2 * (total - n**2) for t, n in lengths.items()}


def _kappa(r: Result) -> float:
    """Effective curvature: twice the gap over the squared distance, mean over tasks."""
    found = distances(r)
    return sum(2 * r["gap_arithmetic"][t] / d for t, d in found.items()) / len(found)


def _last(pair: dict[str, object]) -> dict[str, float]:
    """What was found at the last block."""
    return list(pair["blocks"].values())[-1]  # type: ignore[attr-defined]


def midway(pair: dict[str, object]) -> float:
    """The deviation of two tasks' joint loss from its chord in the middle between their models, in nats."""
    joint = np.asarray(pair["losses"]).sum(0)
    import torch

    return float(above_chord(torch.from_numpy(joint), GRID)[len(joint) // 2])


def _rise(pair: dict[str, object]) -> float:
    """The rise of each task's loss from its own model to the middle, mean of the two, in nats."""
    (s_own, *_, s_far), (t_far, *_, t_own) = pair["losses"]  # type: ignore[misc]
    s_mid, t_mid = (losses[len(losses) // 2] for losses in pair["losses"])  # type: ignore[attr-defined]
    return float((s_mid - s_own + t_mid - t_own) / 2)


_NAMES = {"single": "single", "averaging": "average", "task arithmetic": "arithmetic", "TIES": "ties"}
_AFTER = {"single": "of single models"}
MEASURES: dict[str, Measure] = {
    short: Measure(f"accuracy {_AFTER.get(model, f'after {model}')}", "central", _percent(model), +1, ".1f %", "points")
    for model, short in _NAMES.items()
}
MEASURES |= {
    f"{short}_norm": Measure(
        f"normalised accuracy after {model}", "central", _percent(model, "normalised"), +1, ".1f %", "points"
    )
    for model, short in _NAMES.items()
    if model != "single"
}
MEASURES |= {
    "xi": Measure(r"$\xi$", "central", over_tasks("xi"), -1, ".3f"),
    "gap": Measure("merge gap of task arithmetic, nats", "central", over_tasks("gap_arithmetic"), -1, ".3f"),
    "norm": Measure("length of the task vector", "central", over_tasks("tau_norm"), -1, ".2f"),
    "distance": Measure(
        "squared distance to the merge", "central", lambda r: float(np.mean(list(distances(r).values()))), -1, ".2f"
    ),
    "kappa": Measure("effective curvature", "central", _kappa, -1, ".3f"),
    "ctl": Measure(
        "distance from cross-task linearity, last block", "pairs", over_pairs(lambda p: _last(p)["distance"]), -1, ".4f"
    ),
    "ctl_share": Measure(
        "distance from cross-task linearity, last block, as a share of the distance between the models",
        "pairs",
        over_pairs(lambda p: _last(p)["distance"] / _last(p)["baseline"]),
        -1,
        ".3f",
    ),
    "joint": Measure("deviation from joint-task linearity, nats", "pairs", over_pairs(midway), -1, ".3f"),
    "delta": Measure("its size, nats", "pairs", over_pairs(lambda p: abs(midway(p))), -1, ".3f"),
    "rise": Measure("rise of the loss midway between two models, nats", "pairs", over_pairs(_rise), -1, ".3f"),
    "cosine": Measure("cosine between task vectors", "pairs", over_pairs(lambda p: float(p["cosine"])), -1, ".3f"),  # type: ignore[arg-type]
    "conflict": Measure("sign conflict", "pairs", over_pairs(lambda p: float(p["sign conflict"])), -1, ".3f"),  # type: ignore[arg-type]
    "flatter": Measure("largest eigenvalue, ratio", "flatness_chain", "top eigenvalue", -1, ".2f", ratio=True),
    "along": Measure("curvature along the merge, ratio", "flatness_chain", "along", -1, ".2f", ratio=True),
    "gap_average": Measure("merge gap of averaging, nats", "flatness_chain", "gap_average", -1, ".2f"),
    "predicts": Measure(
        "largest eigenvalue and merge gap within tasks, rank correlation",
        "flatness_chain",
        "top eigenvalue",
        +1,
        ".2f",
        rank=True,
    ),
    "lost": Measure("accuracy lost by averaging, points", "flatness_chain", "points lost", -1, ".2f", "points"),
}


@dataclass(frozen=True)
class Claim:
    """One line of the results page.

    Args:
        number: of the paper's claim, such as "C1".
        measure: key of MEASURES.
        arm, base: names of the arms that are compared.
        figure: label of the figure that shows it, or nothing.
        chapter: where it is measured.
    """

    number: str
    measure: str
    arm: str
    base: str
    chapter: str
    figure: str = ""


_CHAPTERS = {"C1": "06_interference", "C2": "05_merging", "C3": "05_merging", "C5": "07_flatness"}
_ASKED = {  # claim -> its measures, with the figure that shows each
    "C1": {"xi": "fig-nb06-measures", "gap": "fig-nb06-measures", "ctl_share": "fig-nb06-ctl", "rise": ""},
    "C2": {"single": ""},
    "C3": {"average": "", "arithmetic": "", "ties": ""},
    "C5": {"flatter": "fig-nb07-flat", "along": "fig-nb07-flat", "gap_average": "", "lost": ""},
}
PREDICTS = Claim("C5", "predicts", "all arms", "", _CHAPTERS["C5"], "fig-nb07-predictors")
CLAIMS = tuple(
    Claim(number, measure, "SAM", base, _CHAPTERS[number], figure)
    for number, asked in _ASKED.items()
    for base in BASES
    for measure, figure in asked.items()
) + (PREDICTS,)
DETAILS = {"C1": ("xi", "gap", "arithmetic_norm"), "C2": ("single",), "C3": ("average", "arithmetic", "ties")}


def samples(measure: str, results: Iterable[Result]) -> list[float]:
    """One number a seed."""
    value = MEASURES[measure].value
    assert callable(value), f"{measure} has one number a task and seed"
    return [value(r) for r in results]


def effect(measure: str, arm: str, base: str, results: Sequence[Result]) -> Estimate:
    """What an arm changes, with its interval: over seeds, or where it is measured by task over tasks and seeds.

    Args:
        measure: key of MEASURES.
        arm, base: names of two arms.
        results: of the measure's study, of all arms; seeds (and tasks) are paired.
    """
    m = MEASURES[measure]
    if callable(m.value):
        pair = ({r["seed"]: m.value(r) for r in results if r["arm"] == a} for a in (arm, base))
        mine, theirs = pair
        both = [seed for seed in mine if seed in theirs]
        return paired([mine[seed] for seed in both], [theirs[seed] for seed in both])
    models = flatness_chain.table(results)
    if m.rank:
        return predicts(models, m.value)
    return change(m.value, arm, base, models, m.ratio)


def change(column: str, arm: str, base: str, models: pd.DataFrame, ratio: bool = True) -> Estimate:
    """What an arm changes in a column, with its interval over tasks and seeds: geometric mean of ratios, or mean.

    Args:
        column, arm, base, models, ratio: as for `against`.

    Returns:
        The estimate; all NaN where no pair has a ratio.

    Taught in: 07_flatness.
    """
    pairs = against(column, arm, base, models, ratio)
    if pairs.empty:
        return Estimate(math.nan, math.nan, math.nan, 0)
    (found,) = bootstrap(pairs, mean("y"))
    return found.map(math.exp) if ratio else found


def against(column: str, arm: str, base: str, models: pd.DataFrame, ratio: bool = True) -> pd.DataFrame:
    """Models of two arms side by side, paired by task and seed.

    Args:
        column: of `models`.
        arm, base: names of two arms; where there are several radii, SAM and ASAM stand for the published one.
        models: as `flatness_chain.table`.
        ratio: compare by the logarithm of the ratio; pairs that have none are left out.

    Returns:
        One row a pair, with `y`: the logarithm of the ratio, or the difference.
    """
    sides = (models[models.arm == plain(name, models)] for name in (arm, base))
    both = pd.merge(*sides, on=["task", "seed"], suffixes=("", "_base"))
    a, b = both[column], both[f"{column}_base"]
    if not ratio:
        return both.assign(y=a - b)
    both = both[(a > 0) & (b > 0)]
    return both.assign(y=np.log(both[column] / both[f"{column}_base"]))


def plain(arm: str, models: pd.DataFrame) -> str:
    """The arm's name among models with several radii: of SAM and ASAM with the published preset's, else the first."""
    preset, there = PRESETS["published"], list(dict.fromkeys(models.arm))
    rho = {"SAM": preset.rho_sam, "ASAM": preset.rho_asam}.get(arm)
    if rho is None or arm in there:
        return arm
    radii = [name for name in there if name.startswith(f"{arm}, rho ")]
    return next((name for name in radii if name == f"{arm}, rho {rho:g}"), radii[0] if radii else arm)


def compared(measure: str, runs: Mapping[str, Sequence[Result]], prefix: str = "") -> pd.DataFrame:
    """A measure of every arm, and what SAM and ASAM change beside both baselines, in words.

    Args:
        measure: key of MEASURES, with one number a seed.
        runs: arm -> one result a seed.
        prefix: of the chapter, such as "nb06": then all of it is glued, too: prefix_measure_arm,
            prefix_measure_arm_vs_base, and the latter with _verdict and _claim.

    Returns:
        One row an arm.

    Taught in: 06_interference.
    """
    m, rows = MEASURES[measure], {}
    results = [r for some in runs.values() for r in some]
    for arm in (arm for arm in ARMS if arm in runs):
        rows[arm] = {m.title: format(estimate(samples(measure, runs[arm])), m.spec)}
        name = f"{prefix}_{measure}_{SHORT[arm]}"
        if prefix:
            glue(name, rows[arm][m.title])
        for base in BASES if arm not in BASES else ():
            found = effect(measure, arm, base, results)
            rows[arm][f"minus {base}"] = format(found, m.difference)
            if prefix:
                glue(f"{name}_vs_{SHORT[base]}", found, m.difference)
                glue(f"{name}_vs_{SHORT[base]}_verdict", verdict(found))
                glue(f"{name}_vs_{SHORT[base]}_claim", verdict_on(found, m.better))
    return pd.DataFrame(rows).T.fillna("")


def predicts(models: pd.DataFrame, column: str = "top eigenvalue") -> Estimate:
    """Rank correlation of a column with the merge gap, among the models of one task.

    Args:
        models: as `flatness_chain.table`.
        column: of it.
    """
    ranked = models[["task", "seed", "arm"]].copy()
    for name in ("gap_average", column):
        ranked[name] = models.groupby("task")[name].rank()
    (found,) = bootstrap(ranked, correlations("gap_average", [column], within="task"))
    return found.map(lambda x: float(np.clip(x, -1, 1)))


def shuffled(statistic: Statistic, frame: pd.DataFrame, column: str, draws: int = 200, seed: int = 0) -> np.ndarray:
    """A statistic by chance: a column is shuffled among the arms, the same way for all tasks and seeds.

    Args:
        statistic: such as `intervals.coefficients` makes.
        frame: one row a model, with task, seed and arm.
        column: to be shuffled; a row is left out where the other arm has no model of its task and seed.
        draws: how often.
        seed: of the draws.

    Returns:
        (draws, S).

    Taught in: 07_flatness.
    """
    rng, arms = np.random.default_rng(seed), list(dict.fromkeys(frame.arm))
    there, found = frame.set_index(["task", "seed", "arm"])[column], []
    for _ in range(draws):
        other = frame.arm.map(dict(zip(arms, rng.permutation(arms), strict=True)))
        values = there.reindex(pd.MultiIndex.from_arrays([frame.task, frame.seed, other]))
        moved = frame.assign(**{column: values.to_numpy()}).dropna(subset=[column])
        found.append(np.atleast_1d(statistic(moved, np.ones(len(moved)))))
    return np.stack(found)


def judged(folder: Path = PUBLISHED, claims: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """Every claim with its effect and verdict, from published results.

    Args:
        folder: of the published files.
        claims: which.

    Returns:
        One row a claim: claim, measure, arm, against, effect (an Estimate), written (in words), verdict, chapter,
        figure, and centre and better of the measure.

    Taught in: 07_flatness.
    """
    results = {study: _published(folder, study) for study in {MEASURES[c.measure].study for c in claims}}
    rows = []
    for c in claims:
        m = MEASURES[c.measure]
        found = effect(c.measure, c.arm, c.base, results[m.study])
        line = {"claim": c.number, "measure": m.title, "arm": c.arm, "against": c.base, "effect": found}
        line |= {"written": format(found, m.difference), "verdict": verdict_on(found, m.better, m.centre)}
        rows.append(line | {"chapter": c.chapter, "figure": c.figure, "centre": m.centre, "better": m.better})
    return pd.DataFrame(rows)


def chain(verdicts: Iterable[str]) -> str:
    """The verdict on a chain of links: not supported if one is not, supported if all are, otherwise undecided."""
    found = set(verdicts)
    return "not supported" if "not supported" in found else "supported" if found == {"supported"} else "undecided"


def overview(folder: Path = PUBLISHED) -> str:
    """The table of all claims, in Markdown.

    Args:
        folder: of the published files.
    """
    table = judged(folder)
    rows = [("claim", "measure", "against", "verdict", "effect, 95 % interval", "figure"), ("---",) * 6]
    for r in table.itertuples():
        where = f"{{numref}}`{r.figure}`" if r.figure else f"[chapter {int(r.chapter[:2])}](../notebooks/{r.chapter})"
        rows.append((r.claim, r.measure, r.against or r.arm, r.verdict, r.written, where))
    links = table[table.claim == "C5"]
    rows.append(("C5", "the whole chain", "", chain(links.verdict), "", ""))
    return _markdown(rows)


def details(number: str, folder: Path = PUBLISHED) -> str:
    """What one claim's measures say of SAM and ASAM beside both baselines, in Markdown.

    Args:
        number: key of DETAILS.
        folder: of the published files.
    """
    asked = [Claim(number, m, a, b, "") for m in DETAILS[number] for a in ("SAM", "ASAM") for b in BASES]
    rows = [("measure", "arm", "is ...", "that of", "difference"), ("---",) * 5]
    for r in judged(folder, asked).itertuples():
        rows.append((r.measure, r.arm, verdict(r.effect, r.centre), r.against, r.written))
    return _markdown(rows)


def _markdown(rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _published(folder: Path, study: str) -> list[Result]:
    """Results of a study: of the length with the most seeds, of several the longest."""
    runs: list[Result] = read_json(folder / f"{study}.published.json")["values"]["runs"]
    seeds = {steps: len({r["seed"] for r in runs if r["steps"] == steps}) for steps in {r["steps"] for r in runs}}
    steps = max(seeds, key=lambda s: (seeds[s], s))
    return [r for r in runs if r["steps"] == steps]
