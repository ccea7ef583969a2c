from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from samlib.measure.intervals import bootstrap, coefficients, correlations, mean


def table(seed: int, tasks: int, seeds: int) -> pd.DataFrame:
    """x and z drawn at random, y = 2 x - z + a level of each task + little noise."""
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame([(t, s, k) for t in range(tasks) for s in range(seeds) for k in range(3)])
    frame = rows.set_axis(["task", "seed", "arm"], axis=1)
    frame["x"], frame["z"] = rng.standard_normal((2, len(frame)))
    frame["y"] = 2 * frame.x - frame.z + 10 * frame.task + 0.01 * rng.standard_normal(len(frame))
    return frame


def test_an_interval_of_the_mean_is_as_wide_as_theory_says() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"seed": range(400), "y": rng.standard_normal(400)})
    estimate, low, high = bootstrap(frame, mean("y"), clusters=["seed"])
    assert estimate == pytest.approx(frame.y.mean())
    assert high - low == pytest.approx(2 * 1.96 * frame.y.std() / 20, rel=0.06)


def test_rows_of_one_cluster_stay_together() -> None:
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"seed": np.repeat(range(30), 50), "y": np.repeat(rng.standard_normal(30), 50)})
    _, low, high = bootstrap(frame, mean("y"), clusters=["seed"])
    assert high - low == pytest.approx(2 * 1.96 * np.std(frame.y[::50], ddof=1) / 30**0.5, rel=0.15)
    single = frame[frame.seed == 0]
    assert np.isnan(bootstrap(single, mean("y"), clusters=["seed"])[1:]).all()
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
    estimate, low, high = bootstrap(frame, coefficients("y", ["x", "z"], within="task"), draws=200)
    assert estimate == pytest.approx(found)
    assert (low[:2] <= estimate[:2]).all() and (estimate[:2] <= high[:2]).all() and (high - low > 0).all()
