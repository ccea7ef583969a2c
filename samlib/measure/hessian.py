"""The Hessian of the loss as an operator: eigenvalues, trace, spectral density, curvature along a direction.

All of it in evaluation mode and fp32 (or fp64, if the weights are), on the images that are given. The Hessian needs
second derivatives, which fused attention and group norm do not have: `second_derivatives` puts plain ones in place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from samlib.data.tasks import Split
from samlib.model.evaluate import BACKWARD, per_pass
from samlib.model.theta import Theta, flat

if TYPE_CHECKING:
    from curvlinops import HessianLinearOperator

BASIS = 2 * 10**9  # bytes of vectors that Lanczos' method may keep


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


def hessian(
    encoder: nn.Module, theta: Theta, split: Split, head: Tensor, batch_size: int | None = None
) -> HessianLinearOperator:
    """The Hessian of the mean cross-entropy, as an operator that multiplies vectors without being formed.

    Args:
        encoder: gives the architecture.
        theta: weights by name, P numbers in all; rows and columns are in the order of `flat`.
        split: images and labels.
        head: (K, d).
        batch_size: images in one backward pass, None for `evaluate.per_pass`; it does not change the result.

    Returns:
        A linear operator (P, P); products outside of this module go under `second_derivatives()`.

    Raises:
        ValueError: no image.

    Source: Pearlmutter 1994 (products with the Hessian).
    Taught in: 07_flatness.
    """
    from curvlinops import HessianLinearOperator  # slow to import, and with a warning of PyTorch's

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
