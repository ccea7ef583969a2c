"""Which examples each training step sees, from seeds alone."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The examples of one step: consecutive stretches of one fresh permutation an epoch.

    Args:
        n: number of examples.
        batch_size: B.
        seed, step: decide the batch alone, so that a resumed run sees the same data.

    Returns:
        int64 (B,), each in [0, n).

    Taught in: 04_fine_tuning.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // n, (last - 1) // n + 1)
    order = torch.cat([_permutation(n, seed, epoch) for epoch in epochs])
    return order[first - epochs[0] * n : last - epochs[0] * n]


def mislabel(labels: Tensor, classes: int, share: float, generator: torch.Generator) -> Tensor:
    """Labels of which a share is wrong: each becomes, with this probability, one of the other classes.

    Args:
        labels: int64 (N,), each in [0, classes).
        classes: K >= 2.
        share: probability of a wrong label, in [0, 1).
        generator: source of the randomness, on the CPU.

    Returns:
        int64 (N,), the same labels for share 0; a larger share keeps the wrong labels of a smaller one.

    Source: Zhang et al. 2017, section 2 (there the new class may be the old one).
    Taught in: 07_flatness.
    """
    wrong = torch.rand(len(labels), generator=generator) < share
    step = torch.randint(1, classes, (len(labels),), generator=generator)
    return torch.where(wrong, (labels + step) % classes, labels)


def generator(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone."""
    digest = hashlib.sha256(repr((purpose, *numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator("order", seed, epoch))
