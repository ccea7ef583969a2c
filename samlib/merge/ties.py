"""TIES: trim, elect a sign, merge; with an exact threshold over all tensors that never holds them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from samlib.merge.method import LAM, Combine, planned, task_vectors
from samlib.merge.radix import kth_largest
from samlib.model.theta import Weights
from samlib.rules import choice, number

Keep = Callable[[str, Tensor], Tensor]  # name, magnitudes (T, *shape) -> which to keep


@planned(
    "Yadav et al. 2023, algorithm 1",
    lam=LAM,
    density=number(0, 1, open_low=True),
    trim=choice("flat", "tensor"),
    merge=choice("mean", "sum"),
)
def ties(
    theta_0: Weights,
    thetas: Sequence[Weights],
    lam: float = 1.0,
    density: float = 0.2,
    trim: str = "flat",
    merge: str = "mean",
) -> Combine:
    """TIES: trim small entries, elect a sign per entry, average the task vectors that agree with it.

    Each task vector keeps exactly int(density P) entries of largest magnitude, P counting all parameters; of equal
    ones the first, tensors in alphabetical order. The elected sign is that of the sum of what was kept; an entry
    whose sum is zero stays at theta_0.

    Args:
        lam: coefficient of the merged task vector, any finite number.
        density: fraction of entries kept, in (0, 1].
        trim: "flat" keeps that share of the whole task vector, "tensor" of each tensor by itself.
        merge: "mean" over the tasks that agree (the paper's disjoint mean), or their "sum".
    """
    T, names = len(thetas), sorted(theta_0)  # a file may hold its tensors in another order than the model

    def sizes() -> Iterable[Tensor]:
        return (task_vectors(theta_0, thetas, name).abs_().reshape(T, -1) for name in names)

    def kept_of_one(name: str, size: Tensor) -> Tensor:
        return _largest([name], lambda: [size.reshape(T, -1)], int(density * size[0].numel()))(name, size)

    kept: Keep = kept_of_one
    if trim == "flat":
        kept = _largest(names, sizes, int(density * sum(w.numel() for w in theta_0.values())))

    def combine(name: str, taus: Tensor) -> Tensor:
        taus = taus * kept(name, taus.abs())
        sign = taus.sum(0).sign()
        agree = taus * sign > 0  # (T, *shape)
        total = (taus * agree).sum(0).mul_(lam)
        return total if merge == "sum" else total / agree.sum(0).clamp(min=1)

    return combine


def _largest(names: Sequence[str], sizes: Callable[[], Iterable[Tensor]], k: int) -> Keep:
    """Which are the k largest entries of every row of several tensors together; of equal ones the first."""
    thresholds, surplus = kth_largest(sizes, k)
    if not surplus.any():
        return lambda name, size: size >= thresholds.view(-1, *[1] * (size.ndim - 1))
    equal = {name: (size == thresholds[:, None]).sum(1) for name, size in zip(names, sizes(), strict=True)}
    left = torch.stack(list(equal.values())).sum(0) - surplus
    quota = {}  # how many entries of exactly the threshold's magnitude each tensor keeps: the first ones
    for name, count in equal.items():
        quota[name] = torch.minimum(count, left)
        left = left - quota[name]
    return lambda name, size: _mask(size, thresholds, quota[name])


def _mask(sizes: Tensor, thresholds: Tensor, quota: Tensor) -> Tensor:
    """The entries above the threshold and the first `quota` of those that equal it."""
    rows = sizes.reshape(len(sizes), -1)
    keep = rows > thresholds[:, None]
    for row, n in enumerate(quota.tolist()):
        keep[row, (rows[row] == thresholds[row]).nonzero()[:n, 0]] = True
    return keep.view(sizes.shape)
