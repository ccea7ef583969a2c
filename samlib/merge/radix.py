"""The k-th largest of many numbers, exactly, without holding them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

DIGIT = 16  # bits of a magnitude that one pass over the weights settles


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
