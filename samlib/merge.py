"""Merging fine-tuned weights: averaging, task arithmetic, TIES."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from samlib.clip import Theta


def task_vector(theta_t: Theta, theta_0: Theta) -> Theta:
    """tau_t = theta_t - theta_0.

    Args:
        theta_t: weights fine-tuned on task t.
        theta_0: pre-trained weights, same names, shapes and dtypes.

    Returns:
        tau_t, in the order of theta_0's names.

    Raises:
        ValueError: names, shapes or dtypes differ, or a value is not finite.

    Source: Ilharco et al. 2023, section 2.
    Taught in: 01_why_merging_interferes.
    """
    _check([theta_0, theta_t])
    return {name: theta_t[name] - w for name, w in theta_0.items()}


def average(thetas: Sequence[Theta]) -> Theta:
    """Weight averaging: (1/T) sum_t theta_t.

    Args:
        thetas: T >= 1 sets of weights with the same names, shapes and dtypes.

    Returns:
        The mean weights.

    Raises:
        ValueError: empty list, names, shapes or dtypes differ, or a value is not finite.

    Source: Wortsman et al. 2022, section 2 (uniform soup).
    Taught in: 05_merging.
    """
    _check(thetas)
    return {name: torch.stack([theta[name] for theta in thetas]).mean(0) for name in thetas[0]}


def task_arithmetic(theta_0: Theta, thetas: Sequence[Theta], lam: float) -> Theta:
    """theta_0 + lam sum_t tau_t.

    Args:
        theta_0: pre-trained weights.
        thetas: T >= 1 fine-tuned weights.
        lam: merging coefficient, any finite number; 1/T gives the average.

    Returns:
        The merged weights.

    Raises:
        ValueError: lam not finite, empty list, mismatched weights, or a value that is not finite.

    Source: Ilharco et al. 2023, section 4.
    Taught in: 05_merging.
    """
    _check_lam(lam)
    _check([theta_0, *thetas], least=2)
    return {name: w + lam * sum(theta[name] - w for theta in thetas) for name, w in theta_0.items()}


def ties(theta_0: Theta, thetas: Sequence[Theta], lam: float = 1.0, density: float = 0.2) -> Theta:
    """TIES: trim small entries, elect a sign per entry, average the task vectors that agree with it.

    Each task vector, flat over all P parameters, keeps exactly int(density P) entries of largest magnitude
    (of equal ones the first). The elected sign is that of the sum of what was kept; an entry whose sum is
    zero stays at theta_0.

    Args:
        theta_0: pre-trained weights.
        thetas: T >= 1 fine-tuned weights.
        lam: coefficient of the merged task vector, any finite number.
        density: fraction of entries kept, in (0, 1].

    Returns:
        The merged weights.

    Raises:
        ValueError: lam or density out of range, empty list, mismatched weights, or a value not finite.

    Source: Yadav et al. 2023, algorithm 1.
    Taught in: 05_merging.
    """
    _check_lam(lam)
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], not {density}")
    _check([theta_0, *thetas], least=2)
    flat_0 = _flat(theta_0, theta_0)  # (P,)
    k = int(density * len(flat_0))
    taus = torch.stack([_trim(_flat(theta, theta_0) - flat_0, k) for theta in thetas])  # (T, P)
    sign = taus.sum(0).sign()  # (P,)
    agree = (taus.sign() == sign) & (sign != 0)  # (T, P)
    tau = (taus * agree).sum(0) / agree.sum(0).clamp(min=1)  # (P,), disjoint mean
    merged = (flat_0 + lam * tau).split([w.numel() for w in theta_0.values()])
    return {name: m.view_as(w).to(w.dtype) for (name, w), m in zip(theta_0.items(), merged, strict=True)}


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


def _trim(tau: Tensor, k: int) -> Tensor:
    """Zero all but the k largest magnitudes of tau (P,), the first of equal ones."""
    if k == 0:
        return torch.zeros_like(tau)
    size = tau.abs()
    threshold = size.kthvalue(size.numel() - k + 1).values
    keep = size > threshold
    ties_kept = (size == threshold).nonzero().squeeze(1)[: k - int(keep.sum())]
    keep[ties_kept] = True
    return tau * keep


def _flat(theta: Theta, names: Iterable[str]) -> Tensor:
    """One vector, in the order of the names: files return their tensors in another order than models."""
    return torch.cat([theta[name].reshape(-1) for name in names])


def _check_lam(lam: float) -> None:
    if not math.isfinite(lam):
        raise ValueError(f"lam must be a finite number, not {lam}")


def _check(thetas: Sequence[Theta], least: int = 1) -> None:
    """Refuse an empty list and weights that differ in names, shapes or dtypes or are not finite."""
    if len(thetas) < least:
        raise ValueError("the list of weights to merge is empty: give at least one")
    first = thetas[0]
    for i, theta in enumerate(thetas):
        if theta.keys() != first.keys():
            odd = sorted(theta.keys() ^ first.keys())
            raise ValueError(f"weights 0 and {i} hold different tensors: {odd[0]!r} is in one of them only")
        for name, w in theta.items():
            want = first[name]
            if w.shape != want.shape or w.dtype != want.dtype:
                have, need = f"{tuple(w.shape)} {w.dtype}", f"{tuple(want.shape)} {want.dtype}"
                raise ValueError(f"{name!r} is {have} in weights {i} but {need} in weights 0")
            if not w.is_floating_point():
                raise ValueError(f"{name!r} of weights {i} is {w.dtype}: only floating point can be merged")
            if not torch.isfinite(w).all():
                raise ValueError(f"{name!r} of weights {i} holds NaN or infinity")
