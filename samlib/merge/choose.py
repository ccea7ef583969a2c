"""The choice of the one coefficient of a merged model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def choose_lambda(score: Callable[[float], float], grid: Sequence[float]) -> tuple[float, list[float]]:
    """The coefficient with the best score, the first one if several share it.

    Args:
        score: lam -> number, larger is better; measured on validation data.
        grid: candidates, not empty.

    Returns:
        The best lam and the scores in the order of the grid.

    Raises:
        ValueError: the grid is empty or a score is not finite.

    Source: Ilharco et al. 2023, section 2 (one lam for all tasks).
    Taught in: 05_merging.
    """
    if not len(grid):
        raise ValueError("the grid of lam is empty: give at least one value")
    scores = [float(score(lam)) for lam in grid]
    for lam, value in zip(grid, scores, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"the score at lam = {lam} is {value}: scores must be finite")
    return grid[scores.index(max(scores))], scores
