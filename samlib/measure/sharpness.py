"""How far the loss rises within a ball around the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from samlib.data.tasks import Split
from samlib.measure.taylor import gradient
from samlib.model.evaluate import losses
from samlib.model.theta import Theta


def sharpness(
    encoder: nn.Module,
    theta: Theta,
    split: Split,
    head: Tensor,
    rho: float,
    adaptive: bool = False,
    probes: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """How far the loss rises within a ball around the weights: to first order at worst, and at random.

    The worst direction is SAM's: eps = rho g / ||g||, or ASAM's, rho s^2 g / ||s g|| with s = |theta|; the random ones
    are rho z / ||z|| with z normal, or rho s z / ||z||. Here g is the gradient on all images that are given.

    Args:
        encoder, theta, split, head: as for `hessian`.
        rho: radius, > 0.
        adaptive: measure lengths in units of each weight's own size.
        probes: random directions, >= 1.
        seed: of the directions.

    Returns:
        `loss`; `worst` and `average`, rises of the loss in nats.

    Raises:
        ValueError: rho or probes out of range.

    Source: Foret et al. 2021, eq. 2; Kwon et al. 2021, eq. 4; Andriushchenko et al. 2023 (average case).
    Taught in: 07_flatness.
    """
    if not rho > 0 or probes < 1:
        raise ValueError(f"sharpness needs rho > 0 and probes >= 1, not {rho} and {probes}")
    start = {name: w.detach().to(head.device) for name, w in theta.items()}
    loss = losses(encoder, start, [split], [head]).item()
    scale = {name: w.abs() if adaptive else torch.ones_like(w) for name, w in start.items()}
    generator = torch.Generator().manual_seed(seed)

    def rise(direction: Theta) -> float:
        """Of the step rho s (s d) / ||s d||, which is rho s^2 d / ||s d||."""
        scaled = {name: scale[name] * d for name, d in direction.items()}
        length = math.sqrt(sum(float(d.double().square().sum()) for d in scaled.values()))
        moved = {name: w + rho / length * scale[name] * scaled[name] for name, w in start.items()}
        return losses(encoder, moved, [split], [head]).item() - loss

    def random_direction() -> Theta:
        """z / s, so that its scaled version is z."""
        draws = {name: torch.randn(w.shape, generator=generator).to(w.device, w.dtype) for name, w in start.items()}
        return {name: torch.where(scale[name] > 0, z / scale[name], 0) for name, z in draws.items()}

    average = sum(rise(random_direction()) for _ in range(probes)) / probes
    worst = rise(gradient(encoder, start, split, head))
    return {"loss": loss, "worst": worst, "average": average}
