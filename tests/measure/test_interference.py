from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlib.data.tasks import Split, load_task
from samlib.measure.interference import (
    cosine,
    cross_task_linearity,
    effective_rank,
    normalised_accuracy,
    sign_conflict,
    xi,
)
from samlib.model import evaluate
from samlib.model.head import zero_shot_head
from samlib.model.theta import weights_of


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
    theta_0 = weights_of(tiny.encoder)
    warm, cool = load_task("warm"), load_task("cool")
    heads = [zero_shot_head(tiny, task) for task in (warm, cool)]
    error = xi(tiny.encoder, theta_0, theta_0, theta_0, warm.test, heads[0], cool.test, heads[1], [-2, 0, 2], [-1, 1])
    assert error.shape == (3, 2) and error.dtype == torch.float64 and (error == 0).all()


def test_xi_with_one_zero_task_vector(tiny: Any) -> None:
    """With tau_2 = 0 task 1 is never disturbed and a_2 does not matter; at a_1 = 0 nothing changes."""
    theta_0 = weights_of(tiny.encoder)
    generator = torch.Generator().manual_seed(0)
    theta_1 = {name: p + torch.randn(p.shape, generator=generator) for name, p in theta_0.items()}
    warm, cool = load_task("warm"), load_task("cool")
    heads = [zero_shot_head(tiny, task) for task in (warm, cool)]
    grid = [-2.0, 0.0, 2.0]
    error = xi(tiny.encoder, theta_0, theta_1, theta_0, warm.test, heads[0], cool.test, heads[1], grid, grid)

    def predict(a: float) -> Tensor:
        theta = {name: p + a * (theta_1[name] - p) for name, p in theta_0.items()}
        return evaluate.logits(tiny.encoder, theta, cool.test.images, heads[1]).argmax(1)

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


# ---- along lines, and block by block


class Linear(nn.Module):
    """Features that are linear in the weights, or, with a bend, are not."""

    def __init__(self, bend: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(12, 4, bias=False)
        self.second = nn.Linear(4, 3, bias=False) if bend else nn.Identity()
        self.bend = bend

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images.flatten(1))
        return self.second(hidden.tanh() if self.bend else hidden)  # type: ignore[no-any-return]


def random_theta(encoder: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(w.shape, generator=generator) for name, w in encoder.named_parameters()}


def test_xi_is_that_of_four_predictions_a_cell(tiny: Any) -> None:
    theta_0 = weights_of(tiny.encoder)
    torch.manual_seed(0)
    theta_1, theta_2 = ({n: w + w.std() * torch.randn_like(w) for n, w in theta_0.items()} for _ in range(2))
    loaded = [load_task("warm"), load_task("cool")]
    heads = [zero_shot_head(tiny, task) for task in loaded]
    grid = [-1.0, 0.0, 0.5, 2.0]
    parts = (loaded[0].test, heads[0], loaded[1].test, heads[1])
    found = xi(tiny.encoder, theta_0, theta_1, theta_2, *parts, grid, grid)
    for i, a_1 in enumerate(grid):
        for j, a_2 in enumerate(grid):
            expected = 0.0
            for t, alone in ((0, (a_1, 0.0)), (1, (0.0, a_2))):
                both = []
                for b_1, b_2 in (alone, (a_1, a_2)):
                    theta = {n: w + b_1 * (theta_1[n] - w) + b_2 * (theta_2[n] - w) for n, w in theta_0.items()}
                    both.append(evaluate.logits(tiny.encoder, theta, loaded[t].test.images, heads[t]).argmax(1))
                expected += float((both[0] != both[1]).double().mean())
            assert found[i, j] == pytest.approx(expected, abs=1e-12)
    assert (found[1] > 0).any() and found[1, 1] == 0


def test_a_network_that_is_linear_in_its_weights_is_cross_task_linear() -> None:
    images = torch.rand(20, 3, 2, 2)
    encoder = Linear()
    found = cross_task_linearity(encoder, random_theta(encoder, 0), random_theta(encoder, 1), images, ["first"], 0.3)
    assert found["first"]["distance"] == pytest.approx(0, abs=1e-6)
    assert found["first"]["coefficient"] == pytest.approx(1, abs=1e-6)
    assert found["first"]["baseline"] > 0.1


def test_cross_task_linearity_is_that_of_a_direct_loop() -> None:
    encoder = Linear(bend=True)
    images = torch.rand(7, 3, 2, 2)
    theta_1, theta_2 = random_theta(encoder, 0), random_theta(encoder, 1)
    found = cross_task_linearity(encoder, theta_1, theta_2, images, ["first", "second"], 0.3, batch_size=3)

    def features(theta: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(encoder, theta, (image[None],))[0].double()

    middle = {name: 0.3 * theta_1[name] + 0.7 * theta_2[name] for name in theta_1}
    distance, coefficient, baseline = [], [], []
    for image in images:
        one, two, A = (features(theta, image) for theta in (theta_1, theta_2, middle))
        B = 0.3 * one + 0.7 * two
        distance.append(float(1 - A @ B / (A.norm() * B.norm())))
        coefficient.append(float(A @ B / (B @ B)))
        baseline.append(float(1 - one @ two / (one.norm() * two.norm())))
    for name, values in (("distance", distance), ("coefficient", coefficient), ("baseline", baseline)):
        assert found["second"][name] == pytest.approx(sum(values) / 7, rel=1e-5)
    assert found["second"]["distance"] > 1e-3  # it bends
    with pytest.raises(ValueError, match=r"unknown: \['third'\]"):
        cross_task_linearity(encoder, theta_1, theta_2, images, ["third"])


def test_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.outer(torch.arange(1.0, 4), torch.ones(6))) == pytest.approx(1, abs=1e-5)
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    assert effective_rank(torch.diag(4 * p)) == pytest.approx(math.exp(float(-(p * p.log()).sum())))
    with pytest.raises(ValueError, match="not zero"):
        effective_rank(torch.zeros(2, 2))
