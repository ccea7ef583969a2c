from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from samlib.measure.intervals import Estimate, bootstrap, coefficients, correlations, estimate, mean, paired


def table(seed: int, tasks: int, seeds: int) -> pd.DataFrame:
    """x and z drawn at random, y = 2 x - z + a level of each task + little noise."""
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame([(t, s, k) for t in range(tasks) for s in range(seeds) for k in range(3)])
    frame = rows.set_axis(["task", "seed", "arm"], axis=1)
    frame["x"], frame["z"] = rng.standard_normal((2, len(frame)))
    frame["y"] = 2 * frame.x - frame.z + 10 * frame.task + 0.01 * rng.standard_normal(len(frame))
    return frame


def test_students_interval_by_hand() -> None:
    mean, low, high, n = estimate([1.0, 2.0, 3.0])  # s = 1, t = 4.302653 for 2 degrees of freedom
    assert (mean, n) == (2.0, 3)
    assert (high - low) / 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6) and (low + high) / 2 == mean
    assert estimate([0.5]).mean == 0.5 and all(math.isnan(bound) for bound in estimate([0.5])[1:3])
    assert estimate([0.2, 0.2, 0.2])[:3] == pytest.approx((0.2, 0.2, 0.2))  # such as the same lambda with every seed
    assert estimate([0.01, 0.02, 0.03], 100) == pytest.approx(estimate([1.0, 2.0, 3.0]))
    for bad in ([], [math.nan]):
        with pytest.raises(ValueError, match="at least one number"):
            estimate(bad)


def test_a_paired_interval_is_that_of_the_differences() -> None:
    assert paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == estimate([1.0, 2.0, 3.0])
    assert paired([0.1, 0.9], [0.1, 0.9]) == (0.0, 0.0, 0.0, 2)
    with pytest.raises(ValueError, match="same length"):
        paired([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("value", "spec", "written"),
    [
        (Estimate(66.53, 66.21, 66.94, 5), ".1f %", "66.5 % (66.2 to 66.9)"),
        (Estimate(0.31, -0.24, 0.83, 5), "+.1f points", "+0.3 points (−0.2 to +0.8)"),
        (Estimate(-0.04, -0.5, 0.0, 3), "+.1f", "+0.0 (−0.5 to +0.0)"),  # never a negative zero
        (Estimate(-0.0, -0.0, -0.0, 2), ".0f", "0 (0 to 0)"),
        (Estimate(0.43, math.nan, math.nan, 1), ".2f", "0.43 (one seed)"),
        (Estimate(1234.5, 1000.0, 1469.0, 4), ",.0f", "1,234 (1,000 to 1,469)"),
        (Estimate(0.123456, 0.1, 0.2, 4), "", "0.123 (0.1 to 0.2)"),
    ],
)
def test_an_estimate_writes_itself(value: Estimate, spec: str, written: str) -> None:
    assert format(value, spec) == written


def test_the_side_of_an_estimate_is_that_of_its_whole_interval() -> None:
    assert [Estimate(1, low, high, 3).side(1.0) for low, high in ((1.1, 2), (0.2, 0.9), (0.9, 1.1))] == [1, -1, 0]
    assert Estimate(2, math.nan, math.nan, 1).side() == 0
    assert Estimate(0.0, -1.0, 1.0, 4).map(math.exp) == (1.0, math.exp(-1), math.e, 4)


def test_an_interval_of_the_mean_is_as_wide_as_theory_says() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"seed": range(400), "y": rng.standard_normal(400)})
    ((found, low, high, n),) = bootstrap(frame, mean("y"), clusters=["seed"])
    assert found == pytest.approx(frame.y.mean()) and n == 400
    assert high - low == pytest.approx(2 * 1.96 * frame.y.std() / 20, rel=0.06)


def test_rows_of_one_cluster_stay_together() -> None:
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"seed": np.repeat(range(30), 50), "y": np.repeat(rng.standard_normal(30), 50)})
    ((_, low, high, _),) = bootstrap(frame, mean("y"), clusters=["seed"])
    assert high - low == pytest.approx(2 * 1.96 * np.std(frame.y[::50], ddof=1) / 30**0.5, rel=0.15)
    single = frame[frame.seed == 0]
    assert np.isnan(bootstrap(single, mean("y"), clusters=["seed"])[0][1:3]).all()
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap(frame[:0], mean("y"))


def test_correlations_across_and_within() -> None:
    frame = table(2, tasks=6, seeds=3)
    ones = np.ones(len(frame))
    across = correlations("y", ["x", "task"])(frame, ones)
    assert across == pytest.approx([stats.pearsonr(frame.y, frame[c])[0] for c in ("x", "task")])
    assert across[1] > 0.95 > 0.5 > abs(across[0])  # the levels of the tasks hide x
    centred = frame[["x", "y"]] - frame.groupby("task")[["x", "y"]].transform("mean")
    within = correlations("y", ["x", "task"], within="task")(frame, ones)
    assert within[0] == pytest.approx(stats.pearsonr(centred.x, centred.y)[0]) and np.isnan(within[1])
    twice = pd.concat([frame, frame[frame.seed == 0]])
    weights = 1.0 + (frame.seed == 0)
    expected = correlations("y", ["x"], within="task")(twice, np.ones(len(twice)))
    assert correlations("y", ["x"], within="task")(frame, weights.to_numpy()) == pytest.approx(expected)


def test_coefficients_are_those_of_a_regression_with_a_level_for_each_task() -> None:
    frame = table(3, tasks=5, seeds=4)
    found = coefficients("y", ["x", "z"], within="task")(frame, np.ones(len(frame)))
    design = np.column_stack([frame.x, frame.z, pd.get_dummies(frame.task).to_numpy(float)])
    slopes = np.linalg.lstsq(design, frame.y, rcond=None)[0][:2]
    spread = (frame - frame.groupby("task").transform("mean").assign(task=0)).std(ddof=0)
    assert found[:2] == pytest.approx(slopes * spread[["x", "z"]].to_numpy() / spread["y"])
    assert slopes == pytest.approx([2, -1], abs=0.02) and found[2] > 0.999
    estimates = bootstrap(frame, coefficients("y", ["x", "z"], within="task"), draws=200)
    assert [e.mean for e in estimates] == pytest.approx(found)
    assert all(e.low < e.mean < e.high for e in estimates[:2]) and all(e.high > e.low for e in estimates)
