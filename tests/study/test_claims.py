from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from samlib.measure.intervals import correlations
from samlib.notebook.run import PUBLISHED
from samlib.study import claims, evidence
from samlib.study.arms import ARMS, BASES
from samlib.study.claims import CLAIMS, MEASURES

RESULTS = {
    study: json.loads((PUBLISHED / f"{study}.published.json").read_text())["values"]["runs"]
    for study in evidence.STUDIES
}


def test_every_claim_is_about_what_is_measured_and_shown() -> None:
    for claim in CLAIMS:
        assert MEASURES[claim.measure].study in evidence.STUDIES
        assert claim is claims.PREDICTS or (claim.arm in ARMS and claim.base in BASES)
        notebook = (Path(claims.__file__).parents[2] / "notebooks" / f"{claim.chapter}.ipynb").read_text()
        assert not claim.figure or claim.figure in notebook
    assert {c.base for c in CLAIMS if c.number == "C3"} == set(BASES)


def test_an_effect_is_students_interval_of_the_paired_differences() -> None:
    runs = [r for r in RESULTS["central"] if r["steps"] == 768]
    by_seed = {arm: {r["seed"]: 100 * r["TIES"]["mean"] for r in runs if r["arm"] == arm} for arm in ("SAM", "AdamW")}
    differences = [by_seed["SAM"][seed] - by_seed["AdamW"][seed] for seed in sorted(by_seed["SAM"])]
    found = claims.effect("ties", "SAM", "AdamW", runs)
    low, high = stats.t.interval(0.95, len(differences) - 1, np.mean(differences), stats.sem(differences))
    assert found[:3] == pytest.approx((np.mean(differences), low, high))
    assert claims.effect("ties", "AdamW", "AdamW", runs)[:3] == (0, 0, 0)


def test_a_ratio_is_that_of_geometric_means_over_tasks_and_seeds() -> None:
    rows = []
    for seed in range(3):
        for task in ("a", "b"):
            rows += [{"arm": "AdamW", "seed": seed, "task": task, "x": 2.0 + seed}]
            rows += [
                {"arm": "SAM, rho 0.005", "seed": seed, "task": task, "x": (2.0 + seed) / (4 if task == "a" else 1)}
            ]
    models = pd.DataFrame(rows)
    pairs = claims.against("x", "SAM", "AdamW", models)
    assert math.exp(pairs["y"].mean()) == pytest.approx(0.5)  # of 1/4 and 1
    assert len(claims.against("x", "SAM", "AdamW", models.assign(x=-1.0))) == 0  # no ratio of such numbers
    assert claims.against("x", "SAM", "AdamW", models, ratio=False)["y"].min() == 4.0 / 4 - 4.0


def test_the_measures_of_an_arm_follow_from_its_results() -> None:
    r = RESULTS["central"][0]
    tau, lam = r["tau_norm"], r["task arithmetic"]["lam"]
    squared = claims.distances(r)
    for task in tau:
        others = sum(n**2 for name, n in tau.items() if name != task)
        assert squared[task] == pytest.approx((1 - lam) ** 2 * tau[task] ** 2 + lam**2 * others)
    assert claims.samples("xi", [r]) == [pytest.approx(np.mean(list(r["xi"].values())))]
    assert claims.samples("kappa", [r])[0] == pytest.approx(
        np.mean([2 * r["gap_arithmetic"][t] / squared[t] for t in tau])
    )
    pair = {"losses": [[0.0, 0.1, 1.0, 2.0, 3.0], [4.0, 3.0, 1.0, 0.5, 0.0]]}
    assert claims.midway(pair) == pytest.approx(2.0 - (4.0 + 3.0) / 2)
    assert claims._rise(pair) == pytest.approx((1.0 - 0.0 + 1.0 - 0.0) / 2)


def test_tables_say_what_is_judged() -> None:
    table = claims.judged()
    assert len(table) == len(CLAIMS) and set(table.verdict) <= {"supported", "not supported", "undecided"}
    for row in table.itertuples():
        side = row.effect.side(row.centre)
        assert row.verdict == ("undecided" if side == 0 else "supported" if side == row.better else "not supported")
    text = claims.overview()
    assert len(text.splitlines()) == len(CLAIMS) + 3 and all(row.written in text for row in table.itertuples())
    assert text.count("| C5 | the whole chain |") == 1
    assert len(claims.details("C3").splitlines()) == 2 + 3 * 2 * 2
    assert claims.chain(["supported"]) == "supported"
    assert claims.chain(["supported", "undecided"]) == "undecided"
    assert claims.chain(["undecided", "not supported"]) == "not supported"


def test_compared_has_a_line_for_every_arm() -> None:
    runs = evidence.by_arm(r for r in RESULTS["central"] if r["steps"] == 768)
    table = claims.compared("xi", runs)
    assert list(table.index) == list(ARMS) and list(table.columns)[1:] == [f"minus {base}" for base in BASES]
    assert (table.loc[list(BASES)].iloc[:, 1:] == "").all().all()
    assert table.loc["SAM", "minus AdamW"] == format(
        claims.effect("xi", "SAM", "AdamW", sum(runs.values(), [])), "+.3f"
    )


def models(**arms: float) -> pd.DataFrame:
    """Two tasks and seeds; the value of an arm is a factor on what the task and seed have."""
    rows = [
        {"arm": arm, "seed": seed, "task": task, "value": factor * (1 + seed) * 10**task}
        for arm, factor in arms.items()
        for seed in (0, 1)
        for task in (0, 1)
    ]
    return pd.DataFrame(rows)


def test_a_change_is_a_ratio_or_a_difference_of_pairs() -> None:
    ratio = claims.change("value", "SAM", "AdamW", models(AdamW=1.0, SAM=3.0))
    assert ratio[:3] == pytest.approx((3.0, 3.0, 3.0)) and ratio.n == 2  # the same for all: no width
    difference = claims.change("value", "SAM", "AdamW", models(AdamW=1.0, SAM=3.0), ratio=False)
    assert difference.mean == pytest.approx(2 * (1 + 2 + 10 + 20) / 4)
    assert difference.low < difference.mean < difference.high


def test_pairs_without_a_ratio_are_left_out() -> None:
    frame = models(AdamW=1.0, SAM=3.0)
    frame.loc[(frame.arm == "SAM") & (frame.task == 0), "value"] *= -5
    assert claims.change("value", "SAM", "AdamW", frame).mean == pytest.approx(3.0)
    none = claims.change("value", "SAM", "AdamW", models(AdamW=1.0, SAM=-3.0))
    assert math.isnan(none.mean) and none.side(1.0) == none.n == 0


def test_of_several_radii_the_published_one_stands_for_the_optimiser() -> None:
    several = models(**{"AdamW": 1, "SAM, rho 0.02": 1, "SAM, rho 0.005": 1, "ASAM, rho 0.2": 1})
    assert claims.plain("SAM", several) == "SAM, rho 0.005"
    assert claims.plain("ASAM", several) == "ASAM, rho 0.2"  # the published one is not there
    assert claims.plain("AdamW", several) == "AdamW"
    assert claims.plain("SAM", models(AdamW=1, SAM=1)) == "SAM"


def test_a_column_is_shuffled_among_arms_in_the_same_way_everywhere() -> None:
    frame = models(a=1.0, b=2.0).assign(there=lambda f: np.where(f.arm == "a", -1.0, 1.0))
    frame["gap"] = frame["there"]
    found = claims.shuffled(correlations("gap", ["there"]), frame, "gap", draws=40)
    assert found.shape == (40, 1)
    assert {round(x, 6) for x in found[:, 0]} == {-1.0, 1.0}  # either all arms as they are, or all exchanged
    assert (found == claims.shuffled(correlations("gap", ["there"]), frame, "gap", draws=40)).all()


def test_what_the_other_arm_lacks_is_left_out_of_a_shuffle() -> None:
    frame = models(a=1.0, b=2.0).iloc[:-1]  # b has no model of the last task and seed
    sizes = claims.shuffled(lambda rows, weights: float(len(rows)), frame, "value", draws=20)
    assert set(sizes[:, 0]) == {7.0, 6.0}  # as they are; exchanged
