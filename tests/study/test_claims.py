from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from samlib.measure.intervals import correlations
from samlib.study import claims


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
