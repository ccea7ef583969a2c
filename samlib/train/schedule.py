"""The learning rate of each step."""

from __future__ import annotations

import math


def lr_at(step: int, steps: int, lr: float, warmup: float) -> float:
    """Learning rate of one step: linear warm-up to lr, then a cosine to zero.

    Args:
        step: in [0, steps).
        steps: length of the run.
        lr: peak.
        warmup: fraction of the steps that rise, in [0, 1).

    Source: Loshchilov and Hutter 2017, eq. 5 (cosine).
    Taught in: 04_fine_tuning.
    """
    rise = int(warmup * steps)
    if step < rise:
        return lr * (step + 1) / rise
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))
