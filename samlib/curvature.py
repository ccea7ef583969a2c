"""How curved the loss is at a model: eigenvalues, trace and spectral density of the Hessian, sharpness, Taylor terms.

All of it in evaluation mode and fp32 (or fp64, if the weights are), on the images that are given. The Hessian needs
second derivatives, which fused attention and group norm do not have: `second_derivatives` puts plain ones in place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from curvlinops import HessianLinearOperator
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from samlib.clip import Theta, per_pass
from samlib.landscape import dot, losses
from samlib.merge import task_vector
from samlib.tasks import Split

BASIS = 2 * 10**9  # bytes of vectors that Lanczos' method may keep
BACKWARD = 2**20  # numbers in the pixels of the images of one backward pass


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Attention and group norm from operations that PyTorch can differentiate twice; the values stay the same.

    Taught in: 07_flatness.
    """
    with sdpa_kernel(SDPBackend.MATH), _PlainGroupNorm():
        yield


class _PlainGroupNorm(TorchFunctionMode):
    """Group norm by way of layer norm, whose backward pass has a forward derivative."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_group_norm if func is F.group_norm else func)(*args, **(kwargs or {}))


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    groups = x.reshape(len(x), num_groups, -1)
    normal = F.layer_norm(groups, groups.shape[2:], eps=eps).view(x.shape)
    each = (-1, *(1,) * (x.ndim - 2))  # one number a channel
    normal = normal if weight is None else normal * weight.view(each)
    return normal if bias is None else normal + bias.view(each)


class Classifier(nn.Module):
    """An image encoder with a fixed head: images (B, 3, H, W) -> logits (B, K)."""

    def __init__(self, encoder: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("head", head)

    def forward(self, images: Tensor) -> Tensor:
        """Features times head."""
        logits: Tensor = self.encoder(images) @ self.head.T
        return logits


def flat(theta: Theta) -> Tensor:
    """All weights as one vector, float64 (P,), in the order of their names, whatever order the dictionary has."""
    return torch.cat([theta[name].detach().double().reshape(-1) for name in sorted(theta)])


def hessian(
    encoder: nn.Module, theta: Theta, split: Split, head: Tensor, batch_size: int | None = None
) -> HessianLinearOperator:
    """The Hessian of the mean cross-entropy, as an operator that multiplies vectors without being formed.

    Args:
        encoder: gives the architecture.
        theta: weights by name, P numbers in all; rows and columns are in the order of `flat`.
        split: images and labels.
        head: (K, d).
        batch_size: images in one backward pass, None for `clip.per_pass`; it does not change the result.

    Returns:
        A linear operator (P, P); products outside of this module go under `second_derivatives()`.

    Raises:
        ValueError: no image.

    Source: Pearlmutter 1994 (products with the Hessian).
    Taught in: 07_flatness.
    """
    if not len(split):
        raise ValueError("the Hessian needs at least one image")
    model = Classifier(copy.deepcopy(encoder), head).to(head.device).eval()
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            parameter.data = theta[name].detach().clone().to(head.device)
    parameters = dict(model.encoder.named_parameters())
    images, labels = split.images.to(head.device), split.labels.to(head.device)
    batch_size = batch_size or per_pass(encoder, 100, BACKWARD)
    data = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    loss = nn.CrossEntropyLoss(reduction="mean")
    ordered = [parameters[name] for name in sorted(theta)]
    return HessianLinearOperator(model, loss, ordered, data, check_deterministic=False)


def top_eigenvalues(
    operator: HessianLinearOperator, k: int = 1, tol: float = 1e-3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues and their eigenvectors, by implicitly restarted Lanczos.

    Args:
        operator: symmetric, (P, P).
        k: how many, in [1, P).
        tol: relative accuracy of the eigenvalues.
        seed: of the vector that the iteration starts from.

    Returns:
        Eigenvalues (k,), largest first, and unit eigenvectors (P, k), float64.

    Raises:
        ValueError: k out of range.

    Source: Lehoucq et al. 1998 (ARPACK, through scipy).
    Taught in: 07_flatness.
    """
    size = operator.shape[0]
    if not 1 <= k < size:
        raise ValueError(f"k must be an integer in [1, {size}), not {k}")
    start = np.random.default_rng(seed).standard_normal(size)
    kept = min(size, max(k + 2, min(max(2 * k + 1, 20), BASIS // (4 * size))))  # vectors; fewer of them, more restarts
    with second_derivatives():
        values, vectors = eigsh(operator.to_scipy(), k=k, which="LA", tol=tol, v0=start, ncv=kept)
    order = np.argsort(values)[::-1].copy()
    return torch.from_numpy(values[order]).double(), torch.from_numpy(vectors[:, order]).double()


def trace(operator: HessianLinearOperator, probes: int = 20, seed: int = 0) -> tuple[float, float]:
    """The trace and its standard error, from random vectors of signs.

    Args:
        operator: symmetric, (P, P).
        probes: number of vectors, >= 2; the standard error falls with its square root.
        seed: of the vectors.

    Returns:
        The estimate and its standard error.

    Raises:
        ValueError: fewer than two probes.

    Source: Hutchinson 1989.
    Taught in: 07_flatness.
    """
    if probes < 2:
        raise ValueError(f"trace needs at least two probes to know its error, not {probes}")
    generator = torch.Generator().manual_seed(seed)
    found = []
    with second_derivatives():
        for _ in range(probes):
            signs = torch.randint(0, 2, (operator.shape[0],), generator=generator) * 2.0 - 1.0
            signs = signs.to(operator.device, operator.dtype)
            found.append(float(signs.double() @ (operator @ signs).double()))
    samples = torch.tensor(found, dtype=torch.float64)
    return samples.mean().item(), samples.std().item() / math.sqrt(probes)


def quadratic_form(operator: HessianLinearOperator, direction: Theta) -> float:
    """v^T H v / ||v||^2, the curvature along a direction.

    Args:
        operator: of `hessian`.
        direction: v, shaped as the weights, not zero.

    Raises:
        ValueError: the direction is zero.

    Taught in: 07_flatness.
    """
    v = flat(direction).to(operator.device, operator.dtype)
    length = float(v.double().square().sum())
    if length == 0:
        raise ValueError("a zero vector has no direction")
    with second_derivatives():
        return float(v.double() @ (operator @ v).double()) / length


def spectral_density(
    operator: HessianLinearOperator, steps: int = 30, probes: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The spectrum as point masses, by stochastic Lanczos quadrature.

    The sum of w f(x) over the points estimates (1/P) sum_i f(lambda_i), exactly in expectation for polynomials f of a
    degree below 2 steps.

    Args:
        operator: symmetric, (P, P).
        steps: m Lanczos steps for each probe, in [1, P].
        probes: n random vectors.
        seed: of the vectors.

    Returns:
        Points and weights, float64, (n m,) each or fewer where an iteration ends early; the weights sum to 1.

    Raises:
        ValueError: steps or probes out of range.

    Source: Ubaru et al. 2017; Ghorbani et al. 2019 (networks).
    Taught in: 07_flatness.
    """
    size = operator.shape[0]
    if not 1 <= steps <= size or probes < 1:
        raise ValueError(f"steps must be in [1, {size}] and probes >= 1, not {steps} and {probes}")
    generator = torch.Generator().manual_seed(seed)
    points, weights = [], []
    with second_derivatives():
        for _ in range(probes):
            v = torch.randn(size, generator=generator, dtype=torch.float64)
            alphas, betas = _lanczos(operator, v / v.norm(), steps)
            matrix = torch.diag(alphas) + torch.diag(betas, 1) + torch.diag(betas, -1)
            values, vectors = torch.linalg.eigh(matrix)
            points.append(values)
            weights.append(vectors[0].square() / probes)
    return torch.cat(points), torch.cat(weights)


def _lanczos(operator: HessianLinearOperator, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The tridiagonal matrix of a Krylov space: its diagonal (m,) and off-diagonal (m - 1,).

    Reorthogonalised against all vectors, or against as many of the last ones as may be kept; then eigenvalues that have
    converged may appear again, with a share of their weight each, and the density stays what it is (Greenbaum 1989).
    """
    kept = max(2, BASIS // (2 * v.nbytes))  # there is a copy of them
    basis, alphas, betas = [v], [], []
    for step in range(steps):
        w = (operator @ basis[-1].to(operator.device, operator.dtype)).cpu().double()
        alphas.append(w @ basis[-1])
        for _ in range(2):  # twice is enough (Parlett 1998)
            q = torch.stack(basis, 1)  # (P, step + 1)
            w = w - q @ (q.T @ w)
        beta = w.norm()
        if step + 1 == steps or beta < 1e-10 * max(1.0, float(torch.stack(alphas).abs().max())):
            break
        betas.append(beta)
        basis = [*basis[-kept + 1 :], w / beta]
    return torch.stack(alphas), torch.stack(betas) if betas else torch.zeros(0, dtype=torch.float64)


def gradient(encoder: nn.Module, theta: Theta, split: Split, head: Tensor, batch_size: int | None = None) -> Theta:
    """The gradient of the mean cross-entropy on all images, shaped as the weights. Arguments as for `hessian`.

    Taught in: 07_flatness.
    """
    encoder.eval()
    start = {name: w.detach().to(head.device).requires_grad_() for name, w in theta.items()}
    images, labels = split.images.to(head.device), split.labels.to(head.device)
    batch_size = batch_size or per_pass(encoder, 100, BACKWARD)
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        outputs = functional_call(encoder, start, (x,)) @ head.T  # (B, K)
        (F.cross_entropy(outputs, y, reduction="sum") / len(labels)).backward()
    return {name: w.grad for name, w in start.items() if w.grad is not None}


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


def taylor_terms(
    encoder: nn.Module, theta_t: Theta, theta_m: Theta, split: Split, head: Tensor, batch_size: int | None = None
) -> dict[str, float]:
    """The merge gap L(theta_m) - L(theta_t), and its parts around theta_t.

    Args:
        encoder: gives the architecture.
        theta_t: fine-tuned weights.
        theta_m: merged weights.
        split: images and labels of the task.
        head: (K, d).
        batch_size: images in one backward pass, None for `clip.per_pass`.

    Returns:
        `gap`; `first` = g . eps; `second` = eps^T H eps / 2; `rest` = gap - first - second; all in nats, with eps =
        theta_m - theta_t, g and H the gradient and Hessian at theta_t; `length` = ||eps||; `slope` = ||g||.

    Raises:
        ValueError: mismatched weights, or no image.

    Source: Lee et al. 2025, section 3 (the merged model as a perturbation).
    Taught in: 07_flatness.
    """
    if not len(split):
        raise ValueError("taylor_terms needs at least one image")
    eps = task_vector(theta_m, theta_t)
    theta_t = {name: w.detach() for name, w in theta_t.items()}
    images, labels = split.images.to(head.device), split.labels.to(head.device)
    encoder.eval()
    batch_size = batch_size or per_pass(encoder, 100, BACKWARD)
    totals = dict.fromkeys(("gap", "first", "second"), 0.0)
    gradient = {name: torch.zeros_like(w) for name, w in theta_t.items()}
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):

        def loss(theta: Theta, x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(functional_call(encoder, theta, (x,)) @ head.T, y, reduction="sum") / len(labels)

        with second_derivatives():
            there, along = jvp(grad_and_value(loss), (theta_t,), (eps,))[:2]
        (g, value), (curved, slope) = there, along  # gradient and loss; H eps and g . eps
        with torch.no_grad():
            totals["gap"] += float(loss({name: w + eps[name] for name, w in theta_t.items()}) - value)
        totals["first"] += float(slope)
        totals["second"] += dot(curved, eps) / 2
        for name, part in g.items():
            gradient[name] += part
    totals["rest"] = totals["gap"] - totals["first"] - totals["second"]
    return totals | {"length": dot(eps, eps) ** 0.5, "slope": dot(gradient, gradient) ** 0.5}
