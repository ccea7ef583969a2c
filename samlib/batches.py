"""What each training step sees: its learning rate, its examples and their augmentation."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


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


def augment(images: Tensor, generator: torch.Generator, size: int | None = None) -> Tensor:
    """Random resized crop of 90 to 100 % of the area, one an image; no flips, they would change digits.

    Args:
        images: uint8 (B, 3, H, W).
        generator: source of the randomness, on the CPU.
        size: pixels a side of the crops, >= 1, None for those of the images.

    Returns:
        float32 (B, 3, size, size) in [0, 1].

    Source: Ilharco et al. 2021 (open_clip), the training transform's scale (0.9, 1).
    Taught in: 04_fine_tuning.
    """
    u = torch.rand(4, len(images), generator=generator)
    area = 0.9 + 0.1 * u[0]
    ratio = area ** (2 * u[1] - 1)  # between area and 1 / area: the crop stays inside the image
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
    affine = torch.zeros(len(images), 2, 3)  # in units where the image spans [-1, 1]
    affine[:, 0, 0], affine[:, 1, 1] = width, height
    affine[:, 0, 2], affine[:, 1, 2] = (2 * u[2] - 1) * (1 - width), (2 * u[3] - 1) * (1 - height)
    shape = [*images.shape[:2], size, size] if size else list(images.shape)
    grid = F.affine_grid(affine.to(images.device), shape, align_corners=False)  # (B, size, size, 2)
    mode = "bicubic" if size and size != images.shape[-1] else "bilinear"  # bicubic to enlarge, as in the encoder
    return F.grid_sample(images.float() / 255, grid, mode, padding_mode="border", align_corners=False).clamp(0, 1)


def generator(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone."""
    digest = hashlib.sha256(repr((purpose, *numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator("order", seed, epoch))
