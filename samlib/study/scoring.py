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
from samlib.merge.linear import average, task_arithmetic
from samlib.model.evaluate import logits
from samlib.model.head import zero_shot_head
from samlib.model.theta import Theta, task_vector, weights_of
from samlib.notebook.presets import Preset
from samlib.notebook.run import Run
from samlib.train.result import Finetuned


@dataclass(frozen=True, eq=False)
class Bench:
    """T tasks with what is needed to score models on them.

    Args:
        preset: its sizes, grids and the names of its tasks.
        encoder: gives the architecture.
        theta_0: pre-trained weights.
        heads: frozen heads, (K_t, d) each.
        trains: training images with their true labels, as many as a recipe of the preset trains on.
        validations, tests: images and labels, at most n_eval of the preset.

    Taught in: 05_merging.
    """

    preset: Preset
    encoder: nn.Module
    theta_0: Theta
    heads: list[Tensor]
    trains: list[Split]
    validations: list[Split]
    tests: list[Split]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks."""
        return self.preset.tasks

    def by_task(self, values: Sequence[Any]) -> dict[str, Any]:
        """One value a task, by the tasks' names."""
        return dict(zip(self.names, values, strict=True))


def bench(run: Run) -> Bench:
    """The tasks of the run's preset."""
    p, clip = run.preset, run.clip
    loaded = [load_task(name, clip.size) for name in p.tasks]
    return Bench(
        preset=p,
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


def zero_shot(run: Run) -> dict[str, float]:
    """Test accuracy of the pre-trained model on each of the preset's tasks, in [0, 1]."""
    b = bench(run)
    return b.by_task(score(b, [b.theta_0], b.tests)[0])


def row(bench: Bench, accuracies: Sequence[float], single: Sequence[float]) -> dict[str, Any]:
    """A model's line in a table: `accuracy` by task, their `mean`, and `normalised`, with the single models'."""
    return {
        "accuracy": bench.by_task(accuracies),
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


def basics(bench: Bench, thetas: Sequence[Theta], done: Sequence[Finetuned]) -> dict[str, Any]:
    """What every comparison asks of one arm's models.

    Args:
        bench: splits and heads.
        thetas: the T fine-tuned models, on the bench's device.
        done: their results, which know the training loss.

    Returns:
        By task: `train_loss`, `train_accuracy`, `test_loss`, `tau_norm`, and the merge gaps `gap_average` and
        `gap_arithmetic` (rise of the test loss from the task's own model to the average, and to task arithmetic at its
        lambda). `single`, `averaging`, `task arithmetic`: as `row`, the last with `lam` and `curve`. `validation`: mean
        accuracy of the single models and of the one merged by task arithmetic.
    """
    b = bench
    single, single_loss = score(b, thetas, b.tests)
    own, _ = score(b, thetas, b.validations)
    arithmetic, chosen = at_best_lambda(b, task_arithmetic(b.theta_0, thetas, 1.0), b.preset.lambdas, own)
    averaged, averaged_loss = score(b, [average(b.theta_0, thetas)], b.tests)
    merged, merged_loss = score(b, [arithmetic], b.tests)
    vectors = [task_vector(theta, b.theta_0) for theta in thetas]
    return {
        "single": row(b, single, single),
        "averaging": row(b, averaged, single),
        "task arithmetic": row(b, merged, single) | chosen,
        "validation": {"single": sum(own) / len(own), "task arithmetic": chosen["validation"]},
        "test_loss": b.by_task(single_loss),
        "gap_average": b.by_task([m - s for s, m in zip(single_loss, averaged_loss, strict=True)]),
        "gap_arithmetic": b.by_task([m - s for s, m in zip(single_loss, merged_loss, strict=True)]),
        "tau_norm": b.by_task([torch.cat([w.flatten() for w in tau.values()]).norm().item() for tau in vectors]),
        "train_loss": b.by_task([d.train_loss for d in done]),
        "train_accuracy": b.by_task([d.train_accuracy for d in done]),
    }
