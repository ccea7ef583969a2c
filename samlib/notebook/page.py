"""From results to the page: glued numbers, verdicts in words, your run beside the published one, the stamp."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

import pandas as pd

from samlib.measure.intervals import Estimate, estimate, signed
from samlib.notebook.run import Run


def glue(name: str, value: Estimate | float | str, spec: str = "") -> None:
    """Hand a value to the prose of the book, as {glue:text}`name`; outside the book's environment do nothing.

    Args:
        name: unique in the book.
        value: a number or a word; or an estimate, which is written with its interval.
        spec: how to write it, such as ".1f", or "+.1f points" for an estimate; without it a number stays one.
    """
    if isinstance(value, Estimate):
        value = format(value, spec)
    elif not isinstance(value, (str, int)):
        value = signed(float(value), spec) if spec else float(value)  # numpy's own floats cannot be formatted there
    if importlib.util.find_spec("myst_nb") is not None:
        from myst_nb import glue as hand_over

        hand_over(name, value, display=False)


def count(n: int, word: str) -> str:
    """A number of things in words, such as "2 seeds"."""
    return f"{n} {word}{'s' if n != 1 else ''}"


def verdict(difference: Estimate, centre: float = 0.0) -> str:
    """In words, whether one thing is above another, judged by the 95 % interval of their difference or ratio.

    Args:
        difference: of the two, such as `intervals.paired` estimates it.
        centre: value of no effect, 0 for a difference and 1 for a ratio.

    Returns:
        "higher than", "lower than", "not distinguishable from", or "not comparable (one seed) with".

    Taught in: 05_merging.
    """
    if math.isnan(difference.low):
        return "not comparable (one seed) with"
    return {1: "higher than", -1: "lower than", 0: "not distinguishable from"}[difference.side(centre)]


def claim(effect: Estimate, predicted: int, centre: float = 0.0) -> str:
    """What an interval says about a claim.

    Args:
        effect: estimated.
        predicted: side of the centre that the claim predicts, +1 for above, -1 for below.
        centre: value of no effect, such as 0 for a difference and 1 for a ratio.

    Returns:
        "supported" if the whole interval lies on the predicted side, "not supported" if it lies on the other one,
        "undecided" if it holds the centre, or if there is no interval.

    Raises:
        ValueError: predicted is neither -1 nor +1.

    Taught in: 07_flatness.
    """
    if predicted not in (-1, 1):
        raise ValueError(f"predicted must be -1 or +1, not {predicted!r}")
    return {predicted: "supported", -predicted: "not supported", 0: "undecided"}[effect.side(centre)]


def compare(yours: dict[str, float], published: dict[str, Sequence[float]]) -> pd.DataFrame:
    """Your run beside the published one.

    Args:
        yours: name -> number of this run.
        published: name -> one number a seed; a name may be missing.

    Returns:
        One row a name: yours, published mean, low and high of its 95 % interval, number of seeds.
    """
    rows = []
    for name, value in yours.items():
        samples = published.get(name, [])
        rows.append((value, *(estimate(samples) if len(samples) else (math.nan, math.nan, math.nan, 0))))
    columns = ["yours", "published", "low", "high", "seeds"]
    return pd.DataFrame(rows, index=pd.Index(yours, name="value"), columns=columns)


def stamp(run: Run) -> pd.DataFrame:
    """The provenance of this run as a table: commit, versions, preset, parameters, seeds, device, time."""
    facts = run.stamp()
    facts["parameters"] = ", ".join(f"{name}={value}" for name, value in facts["parameters"].items())
    return pd.DataFrame({"this run": {name: str(fact) for name, fact in facts.items()}})
