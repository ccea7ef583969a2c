"""One dialect for what a value may be: `number(0, 1)`, `whole(1) | none`, `choice("mean", "sum")`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value may be, in words that follow "must be", and whether a value is that."""

    text: str
    holds: Callable[[Any], bool]

    def __or__(self, other: Rule) -> Rule:
        return Rule(f"{self.text} or {other.text}", lambda value: self.holds(value) or other.holds(value))


none = Rule("None", lambda value: value is None)


def number(low: float = -math.inf, high: float = math.inf, open_low: bool = False, open_high: bool = False) -> Rule:
    """A finite number, integers included and bools not, in an interval that holds its ends unless they are open."""
    if high < math.inf:
        text = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    else:
        text = "a finite number" + (f" {'>' if open_low else '>='} {low:g}" if low > -math.inf else "")

    def holds(value: Any) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return (low < value if open_low else low <= value) and (value < high if open_high else value <= high)

    return Rule(text, holds)


def whole(least: int) -> Rule:
    """An integer, no bool, of at least `least`."""
    return Rule(
        f"an integer >= {least}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
    )


def choice(*values: Any) -> Rule:
    """One of several values: True is not 1, and 1.0 is not 1, either."""

    def same(value: Any, allowed: Any) -> bool:
        alike = isinstance(value, bool) == isinstance(allowed, bool)
        return alike and isinstance(value, type(allowed)) and value == allowed

    text = ", ".join(map(str, values))
    return Rule(f"one of {text}" if len(values) > 1 else text, lambda value: any(same(value, v) for v in values))


def check(owner: str, rules: Mapping[str, Rule], values: Mapping[str, Any]) -> None:
    """Refuse a value that its rule does not allow.

    Args:
        owner: whose values they are, the first word of the error.
        rules: name -> rule.
        values: of these names, and perhaps others.

    Raises:
        ValueError: the first such name, what it must be, and what it is.
    """
    for name, rule in rules.items():
        if not rule.holds(values[name]):
            raise ValueError(f"{owner}: {name} must be {rule.text}, not {values[name]!r}")
