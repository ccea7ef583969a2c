"""The loss along lines and over planes in the space of weights, as arrays ready to plot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samlib.data.tasks import Split
from samlib.model.evaluate import losses
from samlib.model.theta import Theta, dot, task_vector


def losses_on_line(
    encoder: nn.Module,
    theta_a: Theta,
    theta_b: Theta,
    grid: Sequence[float],
    splits: Sequence[Split],
    heads: Sequence[Tensor],
) -> Tensor:
    """Mean cross-entropy of T tasks at (1 - a) theta_a + a theta_b.

    Args:
        encoder: gives the architecture.
        theta_a, theta_b: weights of the same names and shapes.
        grid: values of a; outside of [0, 1] the line goes on.
        splits, heads: images with labels, and head (K_t, d), of each task.

    Returns:
        float64 (T, len(grid)), in nats.

    Raises:
        ValueError: mismatched weights, or as many heads as splits are needed.

    Taught in: 06_interference.
    """
    way = task_vector(theta_b, theta_a)
    line = ({name: w + a * way[name] for name, w in theta_a.items()} for a in grid)
    return torch.stack([losses(encoder, theta, splits, heads) for theta in line], 1)


def above_chord(losses: Tensor, grid: Sequence[float]) -> Tensor:
    """How far a curve lies above the straight line between its ends: L(a) - (1 - a) L(0) - a L(1).

    Of the loss of one task between two of its models, the largest value is the barrier; of the sum of two tasks' losses
    from theta_s to theta_t, it is the deviation from joint-task loss linearity.

    Args:
        losses: (G,) at the values of the grid.
        grid: a from 0 to 1, ascending; its first is 0 and its last is 1.

    Returns:
        (G,), zero at both ends.

    Raises:
        ValueError: the grid does not go from 0 to 1, or has another length.

    Source: Entezari et al. 2022, definition 2.1 (barriers).
    Taught in: 06_interference.
    """
    if len(grid) != len(losses) or len(grid) < 2 or grid[0] != 0 or grid[-1] != 1 or list(grid) != sorted(grid):
        raise ValueError("above_chord needs one loss for each a of an ascending grid from 0 to 1")
    a = torch.as_tensor(grid, dtype=losses.dtype)
    return losses - (1 - a) * losses[0] - a * losses[-1]


def linearity_bound(a: Sequence[float], beta_s: float, beta_t: float, distance: float) -> Tensor:
    """The bound on joint-task loss linearity: a (1 - a) (beta_s + beta_t) ||theta_s - theta_t||^2 / 2.

    It leaves out what is of third order, and supposes that no eigenvalue lies below -beta, as at a minimum; gradients
    cancel.

    Args:
        a: places on the line, in [0, 1].
        beta_s, beta_t: largest eigenvalue of each task's Hessian, at its own model.
        distance: ||theta_s - theta_t||, >= 0.

    Returns:
        float64 (len(a),), in nats.

    Taught in: 06_interference.
    """
    x = torch.as_tensor(a, dtype=torch.float64)
    return x * (1 - x) * (beta_s + beta_t) * distance**2 / 2


def random_directions(theta: Theta, seed: int = 0) -> tuple[Theta, Theta]:
    """Two random directions whose every row or filter is as long as the model's own.

    Without that, a network whose weights are larger would look flatter than it is. Biases and the weights of norm
    layers, which have one axis only, are not moved.

    Args:
        theta: weights by name; not changed.
        seed: of the directions.

    Returns:
        Two directions shaped as theta. In so many dimensions they are almost, not exactly, orthogonal.

    Source: Li et al. 2018, section 4 (filter normalisation).
    Taught in: 07_flatness.
    """
    generator = torch.Generator().manual_seed(seed)

    def filters(w: Tensor) -> Tensor:
        if w.ndim == 1:
            return torch.zeros_like(w)
        d = torch.randn(w.shape, generator=generator).to(w.device, w.dtype).flatten(1)
        return (d * (w.flatten(1).norm(dim=1) / d.norm(dim=1)).unsqueeze(1)).view(w.shape)

    first, second = ({name: filters(w) for name, w in theta.items()} for _ in range(2))
    return first, second


def plane(origin: Theta, theta_a: Theta, theta_b: Theta) -> tuple[Theta, Theta, Tensor]:
    """The plane through three models: two unit vectors at right angles, and where the models lie.

    Args:
        origin, theta_a, theta_b: three models that do not lie on one line, such as theta_0, theta_s, theta_t.

    Returns:
        u, along theta_a - origin; v, at right angles to it; and the coordinates (3, 2) of the three models, in units
        of length, so that distances and angles in the picture are those of weight space.

    Raises:
        ValueError: the three lie on one line.

    Source: Garipov et al. 2018, appendix (the plane through three models).
    Taught in: 07_flatness.
    """
    tau_a, tau_b = task_vector(theta_a, origin), task_vector(theta_b, origin)
    length, reach = dot(tau_a, tau_a) ** 0.5, dot(tau_b, tau_b) ** 0.5
    across = dot(tau_a, tau_b) / length if length else 0.0
    left = {name: w - (across / length) * tau_a[name] for name, w in tau_b.items()} if length else tau_b
    height = dot(left, left) ** 0.5
    if not length or height <= 1e-6 * reach:
        raise ValueError("three models on one line span no plane")
    u = {name: w / length for name, w in tau_a.items()}
    v = {name: w / height for name, w in left.items()}
    return u, v, torch.tensor([[0.0, 0.0], [length, 0.0], [across, height]], dtype=torch.float64)


def losses_on_plane(
    encoder: nn.Module,
    origin: Theta,
    u: Theta,
    v: Theta,
    xs: Sequence[float],
    ys: Sequence[float],
    splits: Sequence[Split],
    heads: Sequence[Tensor],
) -> Tensor:
    """Mean cross-entropy of T tasks at origin + x u + y v; each model is made once for all tasks.

    Args:
        encoder: gives the architecture.
        origin, u, v: a point and two directions.
        xs, ys: coordinates.
        splits, heads: images with labels, and head (K_t, d), of each task.

    Returns:
        float64 (T, len(ys), len(xs)), in nats.

    Raises:
        ValueError: as many heads as splits are needed.

    Taught in: 07_flatness.
    """
    points = ({name: w + x * u[name] + y * v[name] for name, w in origin.items()} for y in ys for x in xs)
    found = torch.stack([losses(encoder, theta, splits, heads) for theta in points], 1)
    return found.view(len(splits), len(ys), len(xs))
