from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlib import clip, tasks
from samlib.interference import cosine, normalised_accuracy, sign_conflict, xi
from samlib.tasks import Split


class Angle(nn.Module):
    """Two classes: the feature is (cos, sin) of the first pixel, in degrees, plus one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        angle = (images[:, 0, 0, 0].float() / 90 + self.w) * math.pi / 2
        return torch.stack([angle.cos(), angle.sin()], 1)  # (B, 2)


def angles(*degrees: int) -> Split:
    images = torch.tensor(degrees, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    return Split(images, torch.zeros(len(degrees), dtype=torch.int64))


def w(value: float) -> dict[str, Tensor]:
    return {"w": torch.tensor([value], dtype=torch.float32)}


HEAD = torch.eye(2)  # class 0 below 45 degrees, class 1 above, up to 225 degrees


def test_xi_by_hand() -> None:
    """tau_1 turns by 45 degrees, tau_2 by 90; task 1 has images at 10, 20, 30, 80, task 2 at 5 and 60.

    a = (1, 1). Task 1 alone: 55, 65, 75, 125 -> 1 1 1 1; joint: 145, 155, 165, 215 -> 1 1 1 1: 0 of 4 change.
                Task 2 alone: 95, 150 -> 1 1; joint: 140, 195 -> 1 1: 0 of 2.
    a = (1, 0). Task 1: nothing is added. Task 2 alone: 5, 60 -> 0 1; joint: 50, 105 -> 1 1: 1 of 2.
    a = (0, 1). Task 1 alone: 10, 20, 30, 80 -> 0 0 0 1; joint: 100, 110, 120, 170 -> 1 1 1 1: 3 of 4.
                Task 2: nothing is added.
    """
    error = xi(Angle(), w(0), w(0.5), w(1), angles(10, 20, 30, 80), HEAD, angles(5, 60), HEAD, [0, 1], [0, 1])
    assert error.tolist() == [[0.0, 0.75], [0.5, 0.0]]


def test_xi_of_unchanged_models_is_zero(tiny: Any) -> None:
    theta_0 = clip.theta(tiny.encoder)
    warm, cool = tasks.load("warm"), tasks.load("cool")
    heads = [clip.zero_shot_head(tiny, task) for task in (warm, cool)]
    error = xi(tiny.encoder, theta_0, theta_0, theta_0, warm.test, heads[0], cool.test, heads[1], [-2, 0, 2], [-1, 1])
    assert error.shape == (3, 2) and error.dtype == torch.float64 and (error == 0).all()


def test_xi_with_one_zero_task_vector(tiny: Any) -> None:
    """With tau_2 = 0 task 1 is never disturbed and a_2 does not matter; at a_1 = 0 nothing changes."""
    theta_0 = clip.theta(tiny.encoder)
    generator = torch.Generator().manual_seed(0)
    theta_1 = {name: p + torch.randn(p.shape, generator=generator) for name, p in theta_0.items()}
    warm, cool = tasks.load("warm"), tasks.load("cool")
    heads = [clip.zero_shot_head(tiny, task) for task in (warm, cool)]
    grid = [-2.0, 0.0, 2.0]
    error = xi(tiny.encoder, theta_0, theta_1, theta_0, warm.test, heads[0], cool.test, heads[1], grid, grid)

    def predict(a: float) -> Tensor:
        theta = {name: p + a * (theta_1[name] - p) for name, p in theta_0.items()}
        return clip.logits(tiny.encoder, theta, cool.test.images, heads[1]).argmax(1)

    for i, a in enumerate(grid):
        disturbed = (predict(a) != predict(0.0)).double().mean().item()  # task 2 alone
        assert error[i].tolist() == pytest.approx([disturbed] * 3)
    assert (error[1] == 0).all() and error.max() > 0 and error.max() <= 2


def test_xi_divides_by_the_images_used_whatever_the_batches() -> None:
    """A split longer than the evaluation batch, with a last batch that is not full."""
    split = angles(*[10] * 501, *[80] * 100)
    error = xi(Angle(), w(0), w(0), w(1), split, HEAD, angles(10), HEAD, [1], [1])
    assert error.item() == pytest.approx(501 / 601)


def test_xi_is_symmetric_in_the_tasks(tiny: Any) -> None:
    one = (w(0.5), angles(10, 20, 80))
    two = (w(1.0), angles(5, 60))
    forth = xi(Angle(), w(0), one[0], two[0], one[1], HEAD, two[1], HEAD, [-1, 0.5], [0, 1, 2])
    back = xi(Angle(), w(0), two[0], one[0], two[1], HEAD, one[1], HEAD, [0, 1, 2], [-1, 0.5])
    assert torch.equal(forth, back.T)


def test_xi_refuses_empty_input() -> None:
    for grid, split in (([], angles(1)), ([0.0], angles())):
        with pytest.raises(ValueError, match="at least one value in each grid and one image"):
            xi(Angle(), w(0), w(1), w(1), split, HEAD, angles(1), HEAD, grid, [0.0])


def test_normalised_accuracy() -> None:
    assert normalised_accuracy([0.4, 0.9], [0.8, 0.9]) == pytest.approx(0.75)  # (0.5 + 1) / 2, not 1.3 / 1.7
    assert normalised_accuracy([0.7], [0.7]) == 1.0
    for merged, single, message in (
        ([], [], "same length >= 1"),
        ([0.1], [0.1, 0.2], "same length >= 1"),
        ([0.1], [0.0], "above 0"),
        ([70.0], [0.9], r"in \[0, 1\]"),
        ([float("nan")], [0.9], r"in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            normalised_accuracy(merged, single)


def test_cosine_and_sign_conflict_by_hand() -> None:
    tau_1 = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    tau_2 = {"a": torch.tensor([-4.0, 1.0]), "b": torch.tensor([[3.0]])}
    assert cosine(tau_1, tau_1) == pytest.approx(1.0)
    assert cosine(tau_1, tau_2) == pytest.approx(0.0)  # -12 + 12
    assert sign_conflict(tau_1, tau_2) == 0.5  # entry 1 opposes, entry 2 is not shared, entry 3 agrees
    assert sign_conflict(tau_1, tau_1) == 0.0
    zero = {name: torch.zeros_like(t) for name, t in tau_1.items()}
    assert sign_conflict(tau_1, zero) == 0.0
    with pytest.raises(ValueError, match="zero task vector"):
        cosine(tau_1, zero)
    assert cosine(tau_1, {name: F.relu(-t) - F.relu(t) for name, t in tau_1.items()}) == pytest.approx(-1.0)
