"""From results to the page: glued numbers, verdicts in words, your run beside the published one, the stamp."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

import pandas as pd

from samlib.measure.intervals import interval, paired_interval
from samlib.notebook.run import Run


def glue(name: str, value: float | str) -> None:
    """Hand a value to the prose of the book, as {glue:text}`name`; outside the book's environment do nothing.

    Args:
        name: unique in the book.
        value: a number or a word.
    """
    value = value if isinstance(value, (str, int)) else float(value)  # numpy's own floats cannot be formatted there
    if importlib.util.find_spec("myst_nb") is not None:
        from myst_nb import glue as hand_over

        hand_over(name, value, display=False)


def count(n: int, word: str) -> str:
    """A number of things in words, such as "2 seeds"."""
    return f"{n} {word}{'s' if n != 1 else ''}"


def glue_interval(name: str, samples: Sequence[float], scale: float = 1.0) -> None:
    """Glue `name` (mean), `name`_low and `name`_high (95 % interval) and `name`_n (number of seeds).

    Args:
        name: unique in the book.
        samples: one number a seed; a single one has no interval, and its bounds read "unknown".
        scale: factor, such as 100 for per cent.
    """
    mean, low, high = interval([scale * s for s in samples])
    glue(name, mean)
    for bound, value in (("low", low), ("high", high)):
        glue(f"{name}_{bound}", "unknown" if math.isnan(value) else f"{value:.1f}")
    glue(f"{name}_n", str(len(samples)))


def verdict(a: Sequence[float], b: Sequence[float]) -> str:
    """Whether a is above b, judged by the 95 % interval of the paired differences.

    Args:
        a, b: one number a seed, the same seeds in the same order.

    Returns:
        "higher than", "lower than", "not distinguishable from", or "not comparable (one seed) with".

    Taught in: 05_merging.
    """
    return side(*paired_interval(a, b)[1:])


def side(low: float, high: float, centre: float = 0.0) -> str:
    """The words of `verdict` for an interval.

    Args:
        low, high: of the interval; NaN where there is none.
        centre: value of no effect, such as 0 for a difference and 1 for a ratio.
    """
    if math.isnan(low):
        return "not comparable (one seed) with"
    return "higher than" if low > centre else "lower than" if high < centre else "not distinguishable from"


def claim(low: float, high: float, predicted: int, centre: float = 0.0) -> str:
    """What an interval says about a claim.

    Args:
        low, high: of the interval; NaN where there is none.
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
    below, above = high < centre, low > centre
    if not (below or above):
        return "undecided"
    return "supported" if above == (predicted == 1) else "not supported"


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
        rows.append((value, *(interval(samples) if len(samples) else (math.nan,) * 3), len(samples)))
    columns = ["yours", "published", "low", "high", "seeds"]
    return pd.DataFrame(rows, index=pd.Index(yours, name="value"), columns=columns)


def stamp(run: Run) -> pd.DataFrame:
    """The provenance of this run as a table: commit, versions, preset, parameters, seeds, device, time."""
    facts = run.stamp()
    facts["parameters"] = ", ".join(f"{name}={value}" for name, value in facts["parameters"].items())
    return pd.DataFrame({"this run": {name: str(fact) for name, fact in facts.items()}})
