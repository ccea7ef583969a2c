"""What training does to its images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
