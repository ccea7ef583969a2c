"""Means, paired differences and their 95 % intervals, over seeds alone or over tasks and seeds at once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats


class Estimate(NamedTuple):
    """A number with its 95 % interval, which writes itself: f"{e:+.1f points}" is "+0.3 points (−0.2 to +0.8)".

    The format is that of a float, and after its letter a unit; a single sample writes "(one seed)", and nothing ever
    writes a negative zero.

    Args:
        mean: the estimate.
        low, high: ends of the interval, NaN where nobody knows them.
        n: number of samples, such as seeds.

    Taught in: 05_merging.
    """

    mean: float
    low: float
    high: float
    n: int

    def side(self, centre: float = 0.0) -> int:
        """+1 if the whole interval lies above the centre, -1 if below, 0 if it holds the centre or is unknown."""
        return int(self.low > centre) - int(self.high < centre)

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing function of what was estimated, such as a ratio from its logarithm."""
        mean, low, high = (float(function(x)) for x in self[:3])
        return Estimate(mean, low, high, self.n)

    def __format__(self, spec: str) -> str:
        number, unit = re.fullmatch(r"([^a-z]*[a-z]?)(.*)", spec or ".3g").groups()  # type: ignore[union-attr]
        mean, low, high = (signed(x, number) for x in self[:3])
        known = not math.isnan(self.low)
        return f"{mean}{unit and ' ' + unit.strip()} ({f'{low} to {high}' if known else 'one seed'})"


def signed(value: float, spec: str) -> str:
    """A number as text with a real minus sign, and without one where it rounds to zero."""
    text = format(value, spec)
    rounds_to_zero = not re.search("[1-9]|[a-df-z]", text)
    return (format(0.0, spec) if rounds_to_zero else text).replace("-", "−")


def estimate(samples: Sequence[float], scale: float = 1.0) -> Estimate:
    """Mean and Student-t 95 % confidence interval.

    Args:
        samples: n >= 1 finite numbers, one a seed.
        scale: factor, such as 100 for per cent.

    Raises:
        ValueError: no sample, or a number that is not finite.

    Source: Student 1908.
    Taught in: 05_merging.
    """
    numbers = scale * np.asarray(samples, dtype=np.float64)
    n = len(numbers)
    if not n or not np.isfinite(numbers).all():
        raise ValueError(f"an interval needs at least one number, all of them finite, not {list(samples)}")
    mean = float(numbers.mean())
    if n == 1:
        return Estimate(mean, math.nan, math.nan, n)
    half = float(scipy.stats.t.ppf(0.975, n - 1) * scipy.stats.sem(numbers))
    return Estimate(mean, mean - half, mean + half, n)


def paired(a: Sequence[float], b: Sequence[float], scale: float = 1.0) -> Estimate:
    """Mean and 95 % interval of a - b, seed by seed.

    Args:
        a, b: n >= 1 numbers each, the same seeds in the same order.
        scale: factor, such as 100 for points.

    Raises:
        ValueError: different lengths, or as in `estimate`.

    Source: Student 1908.
    Taught in: 05_merging.
    """
    if len(a) != len(b):
        raise ValueError(f"paired samples must have the same length, not {len(a)} and {len(b)}")
    return estimate([x - y for x, y in zip(a, b, strict=True)], scale)


Counts = np.ndarray  # float64, one number a row
Statistic = Callable[[pd.DataFrame, Counts], np.ndarray | float]


def bootstrap(
    frame: pd.DataFrame,
    statistic: Statistic,
    clusters: Sequence[str] = ("seed", "task"),
    draws: int = 400,
    seed: int = 0,
) -> list[Estimate]:
    """A statistic with a 95 % interval, where rows share seeds and tasks.

    The values of one cluster column are drawn anew with replacement, all rows of a value together; the variance of the
    statistic over the draws, times n / (n - 1) for n values, is what this column contributes. Contributions of the
    columns are added, which counts what they have in common twice and so errs on the wide side, and the interval is
    Student's, with the degrees of freedom of Welch and Satterthwaite: few tasks or seeds make it wide.

    Args:
        frame: one row an observation.
        statistic: of the frame and of the rows' weights, a number or an array of S numbers; of rows that are drawn
            once each (weights of 1) it is the estimate.
        clusters: columns whose values are drawn.
        draws: for each column, >= 100.
        seed: of the draws.

    Returns:
        An estimate for each of the S numbers, one for a statistic that is a number; low and high are NaN if a column
        has a single value, of which nobody knows how much others would differ. n counts the first column's values.

    Raises:
        ValueError: an empty frame, or too few draws.

    Source: Efron 1979 (bootstrap); Cameron et al. 2011, section 2 (adding clusters' variances); Satterthwaite 1946.
    Taught in: 07_flatness.
    """
    if frame.empty or draws < 100:
        raise ValueError(f"bootstrap needs at least one row and 100 draws, not {len(frame)} and {draws}")
    found = np.atleast_1d(np.asarray(statistic(frame, np.ones(len(frame))), dtype=np.float64))
    size = frame[clusters[0]].nunique()
    variances, freedoms = [], []
    rng = np.random.default_rng(seed)
    for name in clusters:
        code = pd.factorize(frame[name])[0]
        n = int(code.max()) + 1
        if n < 2:
            return [Estimate(float(x), math.nan, math.nan, size) for x in found]
        counts = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)  # (draws, n)
        draws_of = np.stack([np.atleast_1d(statistic(frame, weights)) for weights in counts[:, code]])
        variances.append(np.nanvar(draws_of.astype(np.float64), axis=0) * n / (n - 1))
        freedoms.append(n - 1)
    total = np.sum(variances, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = total**2 / np.sum([v**2 / df for v, df in zip(variances, freedoms, strict=True)], axis=0)
    half = scipy.stats.t.ppf(0.975, np.nan_to_num(freedom, nan=min(freedoms))) * np.sqrt(total)
    return [Estimate(float(x), float(x - h), float(x + h), size) for x, h in zip(found, half, strict=True)]


def mean(column: str) -> Statistic:
    """The mean of a column."""
    return lambda frame, weights: float(np.average(frame[column], weights=weights))


def correlations(target: str, columns: Sequence[str], within: str | None = None) -> Statistic:
    """Correlation of each column with the target.

    Args:
        target, columns: names of numeric columns.
        within: take away the mean of each group with the same value here, so that only differences within groups count.

    Returns:
        A statistic with one number a column; NaN where a column or the target does not vary.

    Taught in: 07_flatness.
    """

    def statistic(frame: pd.DataFrame, weights: Counts) -> np.ndarray:
        values = _centred(frame, [target, *columns], weights, within)
        y, x = values[:, :1], values[:, 1:]
        sums = [(weights[:, None] * a * b).sum(0) for a, b in ((x, y), (x, x), (y, y))]
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[0] / np.sqrt(sums[1] * sums[2])

    return statistic


def coefficients(target: str, columns: Sequence[str], within: str | None = None) -> Statistic:
    """Least-squares coefficients of all columns together, in units of standard deviations; last the share explained.

    Args:
        target, columns, within: as for `correlations`; with `within`, every group has a level of its own.

    Returns:
        A statistic with one number a column, and R^2, the share of the (within-group) variance that is explained.

    Taught in: 07_flatness.
    """

    def statistic(frame: pd.DataFrame, weights: Counts) -> np.ndarray:
        values = _centred(frame, [target, *columns], weights, within)
        with np.errstate(invalid="ignore", divide="ignore"):
            values = values / np.sqrt(np.average(values**2, axis=0, weights=weights))
        root = np.sqrt(weights)[:, None]
        y, x = root * values[:, :1], root * values[:, 1:]
        if not np.isfinite(values).all():
            return np.full(len(columns) + 1, np.nan)
        found = np.linalg.lstsq(x, y, rcond=None)[0]
        explained = 1 - float(((y - x @ found) ** 2).sum() / (y**2).sum())
        return np.append(found[:, 0], explained)

    return statistic


def _centred(frame: pd.DataFrame, columns: Sequence[str], weights: Counts, within: str | None) -> np.ndarray:
    """Columns without their weighted mean, or without that of each group."""
    values = frame[list(columns)].to_numpy(dtype=np.float64)
    groups = np.zeros(len(frame), dtype=int) if within is None else pd.factorize(frame[within])[0]
    out = values.copy()
    for group in np.unique(groups):
        rows = groups == group
        if weights[rows].any():
            out[rows] -= np.average(values[rows], axis=0, weights=weights[rows])
    return out
