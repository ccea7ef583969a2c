"""How much merged tasks disturb each other: accuracy lost, predictions changed, task vectors opposed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samlib.clip import Theta, logits
from samlib.merge import task_vector
from samlib.tasks import Split


def normalised_accuracy(merged: Sequence[float], single: Sequence[float]) -> float:
    """Mean over tasks of the merged model's accuracy over the fine-tuned model's own.

    Args:
        merged: accuracy of the merged model on each of T tasks, in [0, 1].
        single: accuracy of each task's fine-tuned model on the same split, in (0, 1].

    Returns:
        The plain mean of the T ratios; 1 means that merging cost nothing.

    Raises:
        ValueError: different lengths, no task, or a value out of range.

    Source: Ilharco et al. 2023, section 4.
    Taught in: 05_merging.
    """
    if len(merged) != len(single) or not len(merged):
        raise ValueError(f"merged and single need the same length >= 1, not {len(merged)} and {len(single)}")
    if not all(0 <= m <= 1 for m in merged) or not all(0 < s <= 1 for s in single):
        raise ValueError("accuracies must be in [0, 1], those of the single models above 0")
    return sum(m / s for m, s in zip(merged, single, strict=True)) / len(merged)


def xi(
    encoder: nn.Module,
    theta_0: Theta,
    theta_1: Theta,
    theta_2: Theta,
    split_1: Split,
    head_1: Tensor,
    split_2: Split,
    head_2: Tensor,
    grid_1: Sequence[float],
    grid_2: Sequence[float],
) -> Tensor:
    """Weight disentanglement error: how often adding the other task vector changes a prediction.

    xi(a_1, a_2) = sum over t in {1, 2} of the fraction of task t's images on which the model at
    theta_0 + a_t tau_t and the model at theta_0 + a_1 tau_1 + a_2 tau_2 predict different classes.

    Args:
        encoder: image encoder whose parameters are replaced.
        theta_0, theta_1, theta_2: pre-trained weights and those fine-tuned on tasks 1 and 2.
        split_1, split_2: images of the two tasks; labels are not used.
        head_1, head_2: zero-shot heads, (K_t, d).
        grid_1, grid_2: values of a_1 and a_2.

    Returns:
        float64 (len(grid_1), len(grid_2)), each in [0, 2].

    Raises:
        ValueError: mismatched weights, an empty grid or split.

    Source: Ortiz-Jimenez et al. 2023, section 4.
    Taught in: 06_interference.
    """
    if not (len(grid_1) and len(grid_2) and len(split_1) and len(split_2)):
        raise ValueError("xi needs at least one value in each grid and one image in each split")
    tau_1, tau_2 = task_vector(theta_1, theta_0), task_vector(theta_2, theta_0)

    def predict(a_1: float, a_2: float, split: Split, head: Tensor) -> Tensor:  # (N,)
        theta = {name: w + a_1 * tau_1[name] + a_2 * tau_2[name] for name, w in theta_0.items()}
        return logits(encoder, theta, split.images, head).argmax(1)

    alone_1 = [predict(a_1, 0.0, split_1, head_1) for a_1 in grid_1]
    alone_2 = [predict(0.0, a_2, split_2, head_2) for a_2 in grid_2]
    error = torch.zeros(len(grid_1), len(grid_2), dtype=torch.float64)
    for i, a_1 in enumerate(grid_1):
        for j, a_2 in enumerate(grid_2):
            changed_1 = predict(a_1, a_2, split_1, head_1) != alone_1[i]
            changed_2 = predict(a_1, a_2, split_2, head_2) != alone_2[j]
            error[i, j] = changed_1.double().mean() + changed_2.double().mean()
    return error


def cosine(tau_1: Theta, tau_2: Theta) -> float:
    """Cosine of the angle between two task vectors.

    Args:
        tau_1, tau_2: task vectors with the same tensors, neither zero.

    Returns:
        A number in [-1, 1].

    Raises:
        ValueError: a task vector is zero.

    Source: Ilharco et al. 2023 (cosines between task vectors).
    Taught in: 01_why_merging_interferes.
    """
    norm = _dot(tau_1, tau_1) ** 0.5 * _dot(tau_2, tau_2) ** 0.5
    if norm == 0:
        raise ValueError("a zero task vector has no direction")
    return _dot(tau_1, tau_2) / norm


def sign_conflict(tau_1: Theta, tau_2: Theta) -> float:
    """Fraction of the entries that both task vectors change and change in opposite directions.

    Args:
        tau_1, tau_2: task vectors with the same tensors.

    Returns:
        A number in [0, 1]; 0 if they share no entry.

    Source: Yadav et al. 2023, section 3 (sign interference).
    Taught in: 01_why_merging_interferes.
    """
    products = torch.cat([(tau_1[name].sign() * tau_2[name].sign()).reshape(-1) for name in tau_1])
    shared = int((products != 0).sum())
    return int((products < 0).sum()) / shared if shared else 0.0


def _dot(tau_1: Theta, tau_2: Theta) -> float:
    return sum(float((tau_1[name].double() * tau_2[name].double()).sum()) for name in tau_1)
