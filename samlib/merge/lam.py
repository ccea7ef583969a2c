"""The choice of the one coefficient of a merged model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from samlib.model.theta import Theta

if TYPE_CHECKING:
    from samlib.data.tasks import Split

BATCH = 100  # images in one forward pass: their activations fit a processor's cache


@torch.no_grad()
def accuracy_curve(
    encoder: nn.Module,
    theta_0: Theta,
    theta_1: Theta,
    grid: Sequence[float],
    splits: Sequence[Split],
    heads: Sequence[Tensor],
) -> Tensor:
    """Accuracy on every task along the line theta_0 + lam (theta_1 - theta_0).

    The merge theta_1 is calculated once, by any data-free method at lam = 1; its models at other coefficients lie on
    that line, and are made in one place in memory, one after the other.

    Args:
        encoder: gives the architecture.
        theta_0: pre-trained weights.
        theta_1: merged weights at lam = 1.
        grid: G values of lam, not empty.
        splits: images and labels of T tasks; those on which a coefficient is chosen are validation splits.
        heads: one head a task, (K, d).

    Returns:
        float64 (G, T), in [0, 1], on the CPU.

    Raises:
        ValueError: an empty grid, or not one head for each split.

    Taught in: 05_merging.
    """
    if not len(grid) or not len(splits) or len(splits) != len(heads):
        raise ValueError(
            f"accuracy_curve needs at least one lam and one head for each split, and has {len(grid)} values of lam, "
            f"{len(splits)} splits and {len(heads)} heads"
        )
    from samlib.model.evaluate import logits  # reads images, for which `python -m samlib.merge` has no use

    device = heads[0].device
    start = {name: w.to(device) for name, w in theta_0.items()}
    direction = {name: theta_1[name].to(device) - w for name, w in start.items()}
    model = {name: torch.empty_like(w) for name, w in start.items()}
    curve = torch.empty(len(grid), len(splits), dtype=torch.float64)
    for i, lam in enumerate(grid):
        for name, w in start.items():
            torch.add(w, direction[name], alpha=lam, out=model[name])
        for t, (split, head) in enumerate(zip(splits, heads, strict=True)):
            predicted = logits(encoder, model, split.images, head, BATCH).argmax(1)
            curve[i, t] = (predicted.cpu() == split.labels.cpu()).double().mean()
    return curve


def choose_lambda(
    scores: Tensor | Sequence[Sequence[float]], grid: Sequence[float], rule: str | float = "shared"
) -> tuple[float, ...]:
    """The coefficient for each task, by one of three rules; of equally good ones the first.

    Args:
        scores: (G, T), of every lam and task, larger is better: validation accuracy over that of the task's own model.
        grid: the G values of lam.
        rule: "shared" for the one lam with the best mean over the tasks; "per task" for the best of each, which makes T
            models out of one; a number for that lam, whatever the scores are.

    Returns:
        T values of lam.

    Raises:
        ValueError: no scores, not one row a lam, a score that is not finite, or no such rule.

    Source: Ilharco et al. 2023, section 2 (one lam for all tasks).
    Taught in: 05_merging.
    """
    scores = torch.as_tensor(scores, dtype=torch.float64)
    if scores.ndim != 2 or not scores.numel() or len(scores) != len(grid):
        raise ValueError(f"scores must be (G, T) with a row for each of {len(grid)} lam, not {tuple(scores.shape)}")
    if not scores.isfinite().all():
        row, task = (~scores.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"the score of task {task} at lam = {grid[row]} is {scores[row, task]}: scores must be finite")
    T = scores.shape[1]
    if rule == "shared":
        best = [int(scores.mean(1).argmax())] * T
    elif rule == "per task":
        best = scores.argmax(0).tolist()
    elif isinstance(rule, (int, float)) and math.isfinite(rule):
        return (float(rule),) * T
    else:
        raise ValueError(f"rule must be 'shared', 'per task' or a finite number, not {rule!r}")
    return tuple(grid[i] for i in best)
