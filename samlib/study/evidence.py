"""Published results and the reader's own: where the numbers of a page come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samlib.notebook.page import count
from samlib.notebook.run import Run
from samlib.study import all_methods, central, flatness_chain, pairs, where_sam_helps
from samlib.study.arms import ARMS, Arm
from samlib.study.campaign import Result, Wanted, identity, measure_many
from samlib.study.scoring import zero_shot
from samlib.train.recipe import Recipe

STUDIES: dict[str, Any] = {  # modules with a `measure` and a `plan`, by the name of their published file
    "central": central,
    "all_methods": all_methods,
    "pairs": pairs,
    "flatness_chain": flatness_chain,
    "where_sam_helps": where_sam_helps,
}


@dataclass(frozen=True)
class Evidence:
    """What a page quotes: the published run where there is one, else the reader's own, which it always has too.

    Args:
        results: each with `arm`, `seed`, `steps` and `recipes`.
        mine: those of this page's run.
        published: whether `results` are the published ones.

    Taught in: 05_merging.
    """

    results: list[Result]
    mine: list[Result]
    published: bool

    @property
    def runs(self) -> dict[str, list[Result]]:
        """Arm -> one result a seed."""
        return by_arm(self.results)

    @property
    def own(self) -> dict[str, list[Result]]:
        """Arm -> one result a seed, of this page's run."""
        return by_arm(self.mine)

    @property
    def steps(self) -> int:
        """Of AdamW."""
        return int(self.results[0]["steps"])

    @property
    def seeds(self) -> int:
        """How many."""
        return len({r["seed"] for r in self.results})

    @property
    def source(self) -> str:
        """In words, such as "the published run: 5 seeds, 768 steps"."""
        whose = "the published run" if self.published else "this run"
        return f"{whose}: {count(self.seeds, 'seed')}, {self.steps:,} steps"


def by_arm(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results in groups, in the order in which their arms appear."""
    found: dict[str, list[Result]] = {}
    for r in results:
        found.setdefault(r["arm"], []).append(r)
    return found


def evidence(
    run: Run,
    study: str = "central",
    arms: Mapping[str, Arm] = ARMS,
    seeds: Sequence[int] | None = None,
    mine: Sequence[Wanted] | None = None,
    every: bool = False,
) -> Evidence:
    """Results of a study, published and of this run, which is measured if it is not stored.

    Args:
        run: preset, device, cache, and where the published file is.
        study: key of STUDIES.
        arms: what to measure here, and what a published seed must have.
        seeds: to measure here; None for the preset's.
        mine: what to measure here instead of `arms` with `seeds`.
        every: True takes all that is published; False the length with the most seeds (of several, the longest), and of
            it the seeds that all of `arms` have.

    Taught in: 05_merging.
    """
    seeds = run.preset.seeds if seeds is None else seeds
    wanted = [(run, arm, seed, 1.0) for seed in seeds for arm in arms.values()] if mine is None else list(mine)
    own = measure_many(STUDIES[study].measure, wanted)
    if every:
        theirs = published_runs(run, study)
    else:
        theirs = [r for runs in published(run, study, arms).values() for r in runs]
    return Evidence(theirs or own, own, bool(theirs))


def published_runs(run: Run, study: str) -> list[Result]:
    """All that is published of a study."""
    return list((run.published_values(f"{study}.published") or {}).get("runs", []))


def published_lengths(
    run: Run, study: str = "central", arms: Iterable[str] = ARMS
) -> dict[int, dict[str, list[Result]]]:
    """The book's own results by training length.

    Args:
        run: where the published file is.
        study: key of STUDIES.
        arms: names of those that a seed must have.

    Returns:
        AdamW's steps -> arm -> one result of `measure` a seed, for the seeds that all arms have; shorter lengths first.
    """
    runs, arms = published_runs(run, study), list(arms)
    lengths = {}
    for steps in sorted({r["steps"] for r in runs}):
        found = {arm: {r["seed"]: r for r in runs if (r["arm"], r["steps"]) == (arm, steps)} for arm in arms}
        complete = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
        if complete:
            lengths[steps] = {arm: [by_seed[seed] for seed in complete] for arm, by_seed in found.items()}
    return lengths


def published(
    run: Run, study: str = "central", arms: Iterable[str] = ARMS, steps: int | None = None
) -> dict[str, list[Result]]:
    """The results that the book reports: of the length with the most seeds; of several, the longest.

    Args:
        run, study, arms: as in `published_lengths`.
        steps: AdamW's steps; where a length with as many is published, its results instead.

    Returns:
        arm -> one result a seed; empty if nothing is published.

    Taught in: 05_merging.
    """
    arms = list(arms)
    lengths = published_lengths(run, study, arms)
    if steps in lengths:
        return lengths[steps]
    return lengths[max(lengths, key=lambda steps: (len(lengths[steps][arms[0]]), steps))] if lengths else {}


def published_zero_shot(run: Run, study: str = "central") -> dict[str, float] | None:
    """Accuracy before fine-tuning, by task, as published; None where nothing is."""
    return (run.published_values(f"{study}.published") or {}).get("zero-shot")


def publish_runs(run: Run, study: str, wanted: Sequence[Wanted]) -> None:
    """Measure, and rewrite the published values of the study.

    What is published with the same recipes is not measured again, what has others is replaced.

    Args:
        run: whose notebook is the study: preset, device, cache, and where the published file is.
        study: key of STUDIES.
        wanted: what to measure.
    """
    runs = {_identity(r): r for r in (run.published_values(run.published_file.stem) or {"runs": []})["runs"]}
    missing = []
    for one in wanted:
        own = identity(*one)
        there = [Recipe(**r).same() for r in runs.get(_identity(own), {}).get("recipes", [])]
        if there != [Recipe(**r) for r in own["recipes"]]:
            missing.append(one)
    if missing:
        for found in measure_many(STUDIES[study].measure, missing):
            runs[_identity(found)] = found
        run.publish({"zero-shot": zero_shot(run), "runs": list(runs.values())})
        told = ", ".join(f"{arm}, seed {seed}, length {length:g}" for _, arm, seed, length in missing)
        print(f"{told}: written to {run.published_file}", flush=True)


def _identity(published: Result) -> tuple[Any, ...]:
    """Arm, seed and regime of a published run: of two with the same, the later one replaces the earlier."""
    recipe = Recipe(**published["recipes"][0])
    return published["arm"], published["seed"], published["steps"], recipe.n_train, recipe.label_noise
