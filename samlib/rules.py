"""One dialect for what a value may be: a number in an interval, an integer, one of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def is_whole(value: object, least: int) -> bool:
    """Whether value is an integer (no bool) of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


Rule = tuple[str, Callable[[Any], bool]]  # what a value may be, and whether one is that


def number(low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False) -> Rule:
    """The rule for a finite number in an interval."""
    text = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    if (low, high) == (-math.inf, math.inf):
        text = "a finite number"
    elif high == math.inf:
        text = f"a finite number {'>' if open_low else '>='} {low:g}"

    def holds(value: Any) -> bool:
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return right and (low < value if open_low else low <= value) and (value < high if open_high else value <= high)

    return text, holds


def whole(low: int) -> Rule:
    """The rule for an integer of at least `low`."""
    return f"an integer >= {low}", lambda value: type(value) is int and value >= low


def choice(*values: Any) -> Rule:
    """The rule for one of several values."""
    text = " or ".join([", ".join(map(str, values[:-1])), str(values[-1])])
    return text, lambda value: any(value is v if isinstance(v, bool) else value == v for v in values)


def check_settings(method: str, rules: dict[str, Rule], given: Mapping[str, Any]) -> None:
    """Refuse a setting out of its range.

    Raises:
        ValueError: a value breaks its rule.
    """
    for name, (allowed, holds) in rules.items():
        if not holds(given[name]):
            raise ValueError(f"{method}: {name} must be {allowed}, not {given[name]!r}")
