"""How much merged tasks disturb each other: accuracy and loss lost, predictions, features and signs changed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity

from samlib.data.tasks import Split
from samlib.model.evaluate import outputs
from samlib.model.theta import Theta, dot, task_vector


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

    @cache
    def predict(a_1: float, a_2: float) -> list[Tensor]:  # (N_1,) and (N_2,)
        """Each model once, and on the axes too: there it is what a row or column is compared with."""
        theta = {name: w + a_1 * tau_1[name] + a_2 * tau_2[name] for name, w in theta_0.items()}
        return [z.argmax(1) for z in outputs(encoder, theta, (split_1, split_2), (head_1, head_2))]

    error = torch.zeros(len(grid_1), len(grid_2), dtype=torch.float64)
    for i, a_1 in enumerate(grid_1):
        for j, a_2 in enumerate(grid_2):
            alone = predict(a_1, 0.0)[0], predict(0.0, a_2)[1]
            for here, there in zip(predict(a_1, a_2), alone, strict=True):
                error[i, j] += (here != there).double().mean().item()
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
    norm = dot(tau_1, tau_1) ** 0.5 * dot(tau_2, tau_2) ** 0.5
    if norm == 0:
        raise ValueError("a zero task vector has no direction")
    return dot(tau_1, tau_2) / norm


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


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the normalised singular values: how many directions a matrix really has.

    Args:
        matrix: (m, n), not zero.

    Returns:
        A number in [1, min(m, n)].

    Raises:
        ValueError: not a matrix, or zero.

    Source: Roy and Vetterli 2007.
    Taught in: 06_interference.
    """
    if matrix.ndim != 2 or not matrix.any():
        raise ValueError(f"effective_rank needs a matrix that is not zero, not one of shape {tuple(matrix.shape)}")
    s = torch.linalg.svdvals(matrix.double())
    p = s / s.sum()
    return float(torch.special.entr(p).sum().exp())


def cross_task_linearity(
    encoder: nn.Module,
    theta_1: Theta,
    theta_2: Theta,
    images: Tensor,
    blocks: Sequence[str],
    a: float = 0.5,
    batch_size: int = 100,
) -> dict[str, dict[str, float]]:
    """Whether the features of an interpolated model are the interpolated features, block by block.

    A = h(x; a theta_1 + (1 - a) theta_2) is compared with B = a h(x; theta_1) + (1 - a) h(x; theta_2), image by image.

    Args:
        encoder: gives the architecture; put it and the weights on one device.
        theta_1, theta_2: weights of two tasks.
        images: (N, 3, H, W).
        blocks: names of modules of the encoder whose outputs are the features h.
        a: place between the two, in (0, 1).
        batch_size: images in one forward pass.

    Returns:
        block -> `distance` (1 - cosine of A and B), `coefficient` (<A, B> / ||B||^2, the length of A's projection on B
        over that of B), and `baseline` (1 - cosine of h(x; theta_1) and h(x; theta_2)), beside which the distance is
        small or not.

    Raises:
        ValueError: a out of range, no image, mismatched weights, or no such module.

    Source: Zhou et al. 2024, section 3.
    Taught in: 06_interference.
    """
    modules = dict(encoder.named_modules())
    unknown = [name for name in blocks if name not in modules]
    if unknown or not 0 < a < 1 or not len(images):
        raise ValueError(
            f"cross_task_linearity needs blocks of the encoder (unknown: {unknown}), a in (0, 1) and images; "
            f"a is {a}, and there are {len(images)} images"
        )
    way = task_vector(theta_1, theta_2)
    between = {name: w + a * way[name] for name, w in theta_2.items()}
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in blocks}
    features: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        features[name] = output.flatten(1).double()  # (B, everything of one image)

    hooks = [modules[name].register_forward_hook(partial(keep, name)) for name in blocks]
    encoder.eval()
    try:
        with torch.no_grad():
            for part in images.split(batch_size):
                found = []
                for theta in (between, theta_1, theta_2):
                    functional_call(encoder, dict(theta), (part.to(next(iter(theta.values())).device),))
                    found.append(dict(features))
                for name in blocks:
                    A, one, two = (each[name] for each in found)
                    B = a * one + (1 - a) * two
                    terms = (
                        1 - cosine_similarity(A, B),
                        (A * B).sum(1) / B.square().sum(1),
                        1 - cosine_similarity(one, two),
                    )
                    sums[name] += torch.stack([term.sum() for term in terms]).cpu()
    finally:
        for hook in hooks:
            hook.remove()
    columns = ("distance", "coefficient", "baseline")
    return {name: dict(zip(columns, (total / len(images)).tolist(), strict=True)) for name, total in sums.items()}
