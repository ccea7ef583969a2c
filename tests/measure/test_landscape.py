from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from samlib.data.tasks import Split
from samlib.measure.landscape import (
    above_chord,
    linearity_bound,
    losses_on_line,
    losses_on_plane,
    plane,
    random_directions,
)
from samlib.model.evaluate import losses, outputs
from samlib.model.theta import Theta, weights_of


@pytest.fixture
def net() -> tuple[nn.Module, list[Split], list[Tensor]]:
    """A network that bends, and two tasks of 9 and 4 images with two and three classes."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3))
    splits = [Split(torch.rand(9, 3, 2, 2), torch.arange(9) % 2), Split(torch.rand(4, 3, 2, 2), torch.arange(4) % 3)]
    return encoder, splits, [torch.randn(2, 3), torch.randn(3, 3)]


def drawn(encoder: nn.Module, seed: int) -> Theta:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(w.shape, generator=generator) for name, w in encoder.named_parameters()}


def direct(encoder: nn.Module, weights: Theta, split: Split, head: Tensor) -> float:
    return F.cross_entropy(functional_call(encoder, weights, (split.images,)) @ head.T, split.labels).item()


def test_one_pass_gives_each_task_its_own_outputs(net: tuple[nn.Module, list[Split], list[Tensor]]) -> None:
    encoder, splits, heads = net
    weights = drawn(encoder, 1)
    found = outputs(encoder, weights, splits, heads, batch_size=5)  # a batch that holds images of both
    for z, split, head in zip(found, splits, heads, strict=True):
        torch.testing.assert_close(z, (functional_call(encoder, weights, (split.images,)) @ head.T).detach())
    expected = [direct(encoder, weights, *pair) for pair in zip(splits, heads, strict=True)]
    assert losses(encoder, weights, splits, heads).tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="zip"):
        outputs(encoder, weights, splits, heads[:1])


def test_losses_on_a_line_are_those_of_a_direct_loop(net: tuple[nn.Module, list[Split], list[Tensor]]) -> None:
    encoder, splits, heads = net
    theta_a, theta_b = drawn(encoder, 2), drawn(encoder, 3)
    grid = [0.0, 0.25, 1.0, 1.5]
    found = losses_on_line(encoder, theta_a, theta_b, grid, splits, heads)
    assert found.shape == (2, 4)
    for i, a in enumerate(grid):
        weights = {name: (1 - a) * w + a * theta_b[name] for name, w in theta_a.items()}
        for t in (0, 1):
            assert found[t, i] == pytest.approx(direct(encoder, weights, splits[t], heads[t]), rel=1e-5)


def test_above_chord_is_zero_at_both_ends() -> None:
    assert above_chord(torch.tensor([1.0, 4.0, 2.0]), [0.0, 0.5, 1.0]).tolist() == [0.0, 2.5, 0.0]
    for grid in ([0.0, 0.5], [0.0, 0.5, 1.5], [0.0, 1.0, 0.5]):
        with pytest.raises(ValueError, match="ascending grid from 0 to 1"):
            above_chord(torch.tensor([1.0, 4.0, 2.0]), grid)


def test_two_round_bowls_reach_the_linearity_bound() -> None:
    """L_s = beta_s |theta - theta_s|^2 / 2: along the line the sum lies below its chord, by exactly the bound."""
    a = torch.linspace(0, 1, 11, dtype=torch.float64)
    distance, beta_s, beta_t = 3.0, 0.5, 2.0
    joint = beta_t * (a * distance) ** 2 / 2 + beta_s * ((1 - a) * distance) ** 2 / 2  # a = 0 at theta_t
    delta = above_chord(joint, a.tolist())
    torch.testing.assert_close(-delta, linearity_bound(a.tolist(), beta_s, beta_t, distance))


def test_a_loss_that_is_linear_in_the_weights_is_its_own_chord() -> None:
    """An output linear in the weights, under a loss that is linear too."""
    theta_a, theta_b = (torch.randn(7, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    grid = [0.0, 0.2, 0.9, 1.0]
    values = torch.stack([((1 - a) * theta_a + a * theta_b).sum() for a in grid])
    torch.testing.assert_close(above_chord(values, grid), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_random_directions_have_the_length_of_every_filter() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 5, 2), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(5, 4))
    weights = weights_of(encoder)
    weights["0.weight"][2] = 0  # a filter that is not there stays where it is
    first, second = random_directions(weights, seed=3)
    for d in (first, second):
        for name in ("0.weight", "3.weight"):
            torch.testing.assert_close(d[name].flatten(1).norm(dim=1), weights[name].flatten(1).norm(dim=1))
        assert all(not d[name].any() for name in ("0.bias", "1.weight", "1.bias", "3.bias"))
    assert not torch.equal(first["3.weight"], second["3.weight"])
    again = random_directions(weights, seed=3)
    assert all(torch.equal(first[name], again[0][name]) for name in weights)


def test_a_plane_keeps_lengths_and_angles(net: tuple[nn.Module, list[Split], list[Tensor]]) -> None:
    encoder, splits, heads = net
    models = [drawn(encoder, s) for s in range(3)]
    u, v, points = plane(*models)
    vectors = torch.stack([torch.cat([w.flatten() for w in model.values()]) for model in models]).double()
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(vectors, vectors), rtol=1e-5, atol=1e-5)
    flat_u, flat_v = (torch.cat([w.flatten() for w in d.values()]) for d in (u, v))
    assert float(flat_u @ flat_v) == pytest.approx(0, abs=1e-5)
    for model, (x, y) in zip(models, points.tolist(), strict=True):
        for name, w in model.items():
            torch.testing.assert_close(models[0][name] + x * u[name] + y * v[name], w, rtol=1e-4, atol=1e-4)
    xs, ys = [0.0, points[1, 0].item()], [0.0, -1.0, 2.0]
    found = losses_on_plane(encoder, models[0], u, v, xs, ys, splits, heads)
    assert found.shape == (2, 3, 2)
    assert found[1, 0, 1].item() == pytest.approx(direct(encoder, models[1], splits[1], heads[1]), rel=1e-4)
    below = {name: w - v[name] for name, w in models[0].items()}
    assert found[0, 1, 0].item() == pytest.approx(direct(encoder, below, splits[0], heads[0]), rel=1e-4)


def test_a_line_is_no_plane() -> None:
    a = {"w": torch.tensor([0.0, 0.0])}
    b = {"w": torch.tensor([1.0, 2.0])}
    c = {"w": torch.tensor([2.0, 4.0])}
    for models in ((a, b, c), (a, a, b), (a, b, a)):
        with pytest.raises(ValueError, match="on one line"):
            plane(*models)
    assert math.isclose(plane(a, b, {"w": torch.tensor([0.0, 5.0])})[2][2, 0], 10 / 5**0.5, rel_tol=1e-6)
