"""The tasks of a preset as one bench, on which models are scored and merging coefficients are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from samlib.data.tasks import Split, load_task, subset
from samlib.measure.interference import normalised_accuracy
from samlib.merge.lam import accuracy_curve, choose_lambda
from samlib.merge.linear import task_arithmetic
from samlib.model.clip import Clip
from samlib.model.evaluate import logits
from samlib.model.head import zero_shot_head
from samlib.model.theta import Theta, weights_of
from samlib.notebook.run import Run


@dataclass(frozen=True, eq=False)
class Bench:
    """T tasks with what is needed to score models on them.

    Args:
        names: of the tasks.
        encoder: gives the architecture.
        theta_0: pre-trained weights.
        heads: zero-shot heads, (K_t, d) each.
        trains: training images with their true labels, as many as a recipe of the preset trains on.
        validations, tests: images and labels, at most n_eval of the preset.

    Taught in: 05_merging.
    """

    names: tuple[str, ...]
    encoder: nn.Module
    theta_0: Theta
    heads: list[Tensor]
    trains: list[Split]
    validations: list[Split]
    tests: list[Split]


def bench(run: Run, clip: Clip) -> Bench:
    """The tasks of the run's preset."""
    p = run.preset
    loaded = [load_task(name, clip.size) for name in p.tasks]
    return Bench(
        names=p.tasks,
        encoder=clip.encoder,
        theta_0=weights_of(clip.encoder),
        heads=[zero_shot_head(clip, task) for task in loaded],
        trains=[subset(task.train, p.n_train) for task in loaded],
        validations=[subset(task.validation, p.n_eval) for task in loaded],
        tests=[subset(task.test, p.n_eval) for task in loaded],
    )


def score(bench: Bench, thetas: Sequence[Theta], splits: Sequence[Split]) -> tuple[list[float], list[float]]:
    """Accuracy in [0, 1] and mean cross-entropy in nats of the t-th model on the t-th split.

    Args:
        bench: heads and architecture.
        thetas: T models, or one for all splits.
        splits: one a task.

    Raises:
        ValueError: another number of models or splits.
    """
    models = [*thetas] * len(splits) if len(thetas) == 1 else thetas
    accuracies, losses = [], []
    for theta, split, head in zip(models, splits, bench.heads, strict=True):
        outputs = logits(bench.encoder, theta, split.images, head).cpu()  # (N, K)
        accuracies.append((outputs.argmax(1) == split.labels).double().mean().item())
        losses.append(cross_entropy(outputs, split.labels).item())
    return accuracies, losses


def row(bench: Bench, accuracies: Sequence[float], single: Sequence[float]) -> dict[str, Any]:
    """A model's line in a table: `accuracy` by task, their `mean`, and `normalised`, with the single models'."""
    return {
        "accuracy": dict(zip(bench.names, accuracies, strict=True)),
        "mean": sum(accuracies) / len(accuracies),
        "normalised": normalised_accuracy(accuracies, single),
    }


def at_best_lambda(
    bench: Bench, theta_1: Theta, grid: Sequence[float], single: Sequence[float]
) -> tuple[Theta, dict[str, Any]]:
    """The merged model at the lambda that is best on the validation splits.

    Args:
        bench: validation splits and heads.
        theta_1: the merged model at lambda = 1.
        grid: candidates.
        single: validation accuracy of each task's own model, in (0, 1].

    Returns:
        theta_0 + lambda (theta_1 - theta_0), and `lam`, `curve` (mean normalised accuracy at each candidate) and
        `validation` (mean accuracy at the best).

    Raises:
        ValueError: a task's own model is never right, so that nothing can be normalised by it.
    """
    for name, accuracy in zip(bench.names, single, strict=True):
        if accuracy == 0:
            raise ValueError(f"the model of {name} gets no validation image right: raise steps, lr or n_eval")
    curve = accuracy_curve(bench.encoder, bench.theta_0, theta_1, grid, bench.validations, bench.heads)  # (G, T)
    ratios = curve / torch.tensor(single, dtype=torch.float64)
    lam = choose_lambda(ratios, grid)[0]
    facts = {"lam": lam, "curve": ratios.mean(1).tolist(), "validation": curve[list(grid).index(lam)].mean().item()}
    return task_arithmetic(bench.theta_0, [theta_1], lam), facts
