from __future__ import annotations

import math

import torch
from torch.nn.functional import normalize

from samlib.data.batches import generator
from samlib.model import clip
from tools import pretrain


def test_contrastive_loss_counts_equal_captions_as_positives() -> None:
    draw = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(3, 4, generator=draw, dtype=torch.float64), dim=1)
    text = normalize(torch.randn(3, 4, generator=draw, dtype=torch.float64), dim=1)
    caption = torch.tensor([5, 9, 5])
    scale = torch.tensor(3.0, dtype=torch.float64)
    logits = [[3 * float(image[i] @ text[j]) for j in range(3)] for i in range(3)]
    positives = {0: (0, 2), 1: (1,), 2: (0, 2)}

    def one_way(z: list[list[float]]) -> float:
        total = 0.0
        for i, mates in positives.items():
            log_sum = math.log(sum(math.exp(value) for value in z[i]))
            total += sum(log_sum - z[i][j] for j in mates) / len(mates)
        return total / 3

    transposed = [list(column) for column in zip(*logits, strict=True)]
    expected = (one_way(logits) + one_way(transposed)) / 2
    found = clip.contrastive_loss(image, text, caption, scale)
    assert abs(found.item() - expected) < 1e-6  # targets are float32


def test_augmented_views_depend_on_the_draw_alone_and_stay_in_range() -> None:
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mono = torch.tensor([True, False] * 3)
    first, again, other = (pretrain.augment(images, mono, generator("view", 0, step)) for step in (3, 3, 4))
    assert first.shape == images.shape and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_one_colour_drawings_get_ink_and_paper_that_differ() -> None:
    drawing = torch.ones(200, 3, 32, 32)
    drawing[:, :, 8:24, 8:24] = 0  # a black square on white paper
    views = pretrain.augment(drawing, torch.ones(200, dtype=torch.bool), generator("view", 0))
    contrast = (views[:, :, 16, 16] - views[:, :, 0, 0]).abs().amax(1)
    assert (contrast > 0.05).float().mean() > 0.95  # a few corners lose their paper to the affine view
    assert views[:, :, 16, 16].std(0).min() > 0.1  # and the inks vary
