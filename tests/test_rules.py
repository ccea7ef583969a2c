from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samlib.rules import check, choice, none, number, whole

ENDS = st.floats(-10, 10)


@given(ENDS, ENDS, st.floats(allow_nan=True, allow_infinity=True), st.booleans(), st.booleans())
def test_a_number_is_in_its_interval(low: float, high: float, value: float, open_low: bool, open_high: bool) -> None:
    """Stated as pairs of conditions; the ends themselves belong to a closed side only."""
    rule = number(low, high, open_low, open_high)
    inside = low <= value <= high and not (open_low and value == low) and not (open_high and value == high)
    assert rule.holds(value) is inside
    assert rule.holds(low) is (low <= high and not open_low and not (open_high and low == high))


@pytest.mark.parametrize(
    ("rule", "text", "right", "wrong"),
    [
        (number(), "a finite number", [-3, 0, 1e300, np.float64(2)], [math.inf, -math.inf, math.nan, True, "1", None]),
        (number(0), "a finite number >= 0", [0, 0.0, 5], [-1e-9, False, math.inf]),
        (number(0, open_low=True), "a finite number > 0", [1e-300, 1], [0, 0.0, -1]),
        (number(0, 1), "a number in [0, 1]", [0, 1, 0.5], [1.1, -0.1, True, math.nan]),
        (number(0, 1, open_high=True), "a number in [0, 1)", [0, math.nextafter(1, 0)], [1, 1.0]),
        (number(0, 1, open_low=True), "a number in (0, 1]", [5e-324, 1], [0, 0.0]),
        (number(-0.5, 1, True, True), "a number in (-0.5, 1)", [0], [-0.5, 1]),
        (number(high=1), "a number in [-inf, 1]", [-1e300, 1], [1.5, -math.inf]),
        (whole(1), "an integer >= 1", [1, 10**30], [0, 1.0, True, "1", None, [1]]),
        (choice("mean", "sum"), "one of mean, sum", ["mean", "sum"], ["Mean", "", None, 0, ["mean"]]),
        (choice(True, False), "one of True, False", [True, False], [1, 0, 1.0, None, "True"]),
        (choice(1), "1", [1], [True, 1.0, "1"]),
        (whole(1) | none, "an integer >= 1 or None", [1, None], [0, False, "None"]),
        (whole(1) | choice("auto") | none, "an integer >= 1 or auto or None", [2, "auto", None], [0, "a", True]),
    ],
)
def test_a_rule_says_and_tests_what_is_allowed(rule: Any, text: str, right: list[Any], wrong: list[Any]) -> None:
    assert rule.text == text
    assert [value for value in right if not rule.holds(value)] == []
    assert [value for value in wrong if rule.holds(value)] == []


def test_the_first_wrong_value_is_told_in_one_sentence() -> None:
    rules = {"density": number(0, 1), "trim": choice("flat", "tensor")}
    check("ties", rules, {"trim": "flat", "density": 1, "other": object()})
    with pytest.raises(ValueError, match=r"^ties: density must be a number in \[0, 1\], not '0.2'$"):
        check("ties", rules, {"density": "0.2", "trim": 3})
    with pytest.raises(ValueError, match="^ties: trim must be one of flat, tensor, not 3$"):
        check("ties", rules, {"density": 0.2, "trim": 3})
