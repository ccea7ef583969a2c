"""The merge gap and its Taylor terms: gradient and curvature along the merge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, jvp

from samlib.data.tasks import Split
from samlib.measure.hessian import second_derivatives
from samlib.model.evaluate import BACKWARD, per_pass
from samlib.model.theta import Theta, dot, task_vector


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
        batch_size: images in one backward pass, None for `evaluate.per_pass`.

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
