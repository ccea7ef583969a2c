"""TIES: trim, elect a sign, merge; with an exact threshold over all tensors that never holds them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from samlib.merge.linear import LAM
from samlib.merge.method import Combine, Weights, choice, data_free, number
from samlib.merge.method import taus as task_vectors

DIGIT = 16  # bits of a magnitude that one pass over the weights settles


@data_free(
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
        theta_0: pre-trained weights.
        thetas: T >= 1 fine-tuned weights.
        lam: coefficient of the merged task vector, any finite number.
        density: fraction of entries kept, in (0, 1].
        trim: "flat" keeps that share of the whole task vector, "tensor" of each tensor by itself.
        merge: "mean" over the tasks that agree (the paper's disjoint mean), or their "sum".

    Returns:
        The merged weights.

    Raises:
        ValueError: a setting out of range, empty list, mismatched weights, or a value not finite.

    Source: Yadav et al. 2023, algorithm 1.
    Taught in: 05_merging.
    """
    kept = _keep_flat(theta_0, thetas, density) if trim == "flat" else _keep_per_tensor(density)

    def combine(name: str, taus: Tensor) -> Tensor:
        taus = taus * kept(name, taus.abs())
        sign = taus.sum(0).sign()
        agree = taus * sign > 0  # (T, *shape)
        total = (taus * agree).sum(0).mul_(lam)
        return total if merge == "sum" else total / agree.sum(0).clamp(min=1)

    return combine


Keep = Callable[[str, Tensor], Tensor]  # name, magnitudes (T, *shape) -> which to keep


def _keep_per_tensor(density: float) -> Keep:
    def keep(name: str, sizes: Tensor) -> Tensor:
        rows = sizes.reshape(len(sizes), -1)
        thresholds, surplus = kth_largest(lambda: [rows], int(density * rows.shape[1]))
        equal = (rows == thresholds[:, None]).sum(1)
        return _mask(sizes, thresholds, equal - surplus)

    return keep


def _keep_flat(theta_0: Weights, thetas: Sequence[Weights], density: float) -> Keep:
    T, names = len(thetas), sorted(theta_0)  # a file may hold its tensors in another order than the model

    def sizes() -> Iterable[Tensor]:
        return (task_vectors(theta_0, thetas, name).abs_().reshape(T, -1) for name in names)

    thresholds, surplus = kth_largest(sizes, int(density * sum(w.numel() for w in theta_0.values())))
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


def kth_largest(chunks: Callable[[], Iterable[Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest of many numbers, exactly, in several rows at once, without holding the numbers.

    The bit patterns of floats >= 0 sort like integers. A pass over the numbers counts how often each value of the
    highest 16 bits occurs, which settles these bits of the answer; the next pass settles the next 16, among the numbers
    that share the first.

    Args:
        chunks: called once a pass; yields the numbers, (T, n) of float32 or float64, >= 0, with any n.
        k: rank, from 0 (infinity) to their number.

    Returns:
        The number of that rank, (T,) of their dtype, and how many that equal it have a higher rank, (T,).
    """
    first = next(iter(chunks()))
    rows, dtype = len(first), first.dtype
    surplus = torch.zeros(rows, dtype=torch.int64)
    if k == 0:
        return torch.full((rows,), torch.inf, dtype=dtype, device=first.device), surplus.to(first.device)
    integer, bits = (torch.int32, 32) if dtype == torch.float32 else (torch.int64, 64)
    prefix, rank = [0] * rows, [k] * rows  # the answer's bits so far, and its rank among the numbers that have them
    for shift in range(bits - DIGIT, -1, -DIGIT):
        counts = torch.zeros(rows, 1 << DIGIT, dtype=torch.int64)
        for chunk in chunks():
            for row, numbers in enumerate(chunk.view(integer)):
                if shift < bits - DIGIT:
                    numbers = numbers[numbers >> (shift + DIGIT) == prefix[row]]
                digit = numbers >> shift & (1 << DIGIT) - 1
                counts[row] += torch.bincount(digit, minlength=1 << DIGIT).cpu()
        for row in range(rows):
            above = counts[row].flip(0).cumsum(0)  # numbers with a digit of at least 65535, 65534, ...
            place = int((above >= rank[row]).nonzero()[0])
            rank[row] -= int(above[place - 1]) if place else 0
            digit_found = (1 << DIGIT) - 1 - place
            surplus[row] = int(counts[row, digit_found]) - rank[row]
            prefix[row] = prefix[row] << DIGIT | digit_found
    return torch.tensor(prefix, dtype=integer).view(dtype).to(first.device), surplus.to(first.device)
