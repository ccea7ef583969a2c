"""Published results and the reader's own: where the numbers of a page come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from samlib.model.clip import Clip
from samlib.notebook.run import Run
from samlib.study.arms import ARMS, recipes
from samlib.study.campaign import Measure, measure_many
from samlib.study.central import zero_shot
from samlib.train.recipe import Recipe


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
