"""The training loop: AdamW, SAM and ASAM on one task, or on several that take turns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlib.data import batches
from samlib.data.augment import augment
from samlib.data.batches import batch_indices
from samlib.data.tasks import Split, load_task, subset
from samlib.model.clip import Clip
from samlib.model.head import zero_shot_head
from samlib.model.theta import Theta
from samlib.train.beside import Average, Looks, Progress, score
from samlib.train.distributed import mean, rank, share, together, world
from samlib.train.recipe import PRECISIONS, Recipe
from samlib.train.sam import MEANS, SAM, norm_parameters
from samlib.train.schedule import lr_at

COLUMNS = ("loss", "loss_perturbed", "grad_norm")  # of the log, measured at every step
RESIDENT = 2**30  # bytes of training images that are kept on the device


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A fine-tuned encoder and how it got there.

    Args:
        recipe: what was asked for.
        theta: the encoder's parameters after the last step (their average, if the recipe asks for one), on the CPU.
        best: those of the look at the validation split with the best accuracy, None without looks.
        log: one row a step: step, loss, loss_perturbed (equal to loss where there is no climb), grad_norm and lr; where
            the recipe diagnoses, cosine (of the gradients before and after the climb) and eps_norm (length of the
            climb); where it looks at the validation split, validation_loss and validation_accuracy.
        seconds: wall time of the steps and of the looks at the validation split.
        train_loss: mean cross-entropy on the training images without augmentation, in nats.
        train_accuracy: accuracy on them, in [0, 1]; both are for the labels trained on, and of several tasks the mean.
        skipped: steps without an update, because a gradient overflowed under fp16.
    """

    recipe: Recipe
    theta: Theta
    best: Theta | None
    log: pd.DataFrame
    seconds: float
    train_loss: float
    train_accuracy: float
    skipped: int


@dataclass(frozen=True, eq=False)
class _Data:
    """A task's training and validation images, and its frozen head (K, d)."""

    train: Split
    validation: Split
    head: Tensor


def train(recipe: Recipe, clip: Clip, device: torch.device, partial_file: Path, show: bool = True) -> Finetuned:
    """Fine-tune; nothing is looked up or kept but a checkpoint.

    Args:
        recipe: what to train.
        clip: the pre-trained model; it is not changed.
        device: where to train.
        partial_file: the checkpoint; training goes on from there if it exists.
        show: draw a bar.

    Raises:
        KeyError: no such task.
        FloatingPointError: the loss or the gradient is not finite.
        ValueError: the batch cannot be shared between the processes, or the checkpoint is no good.

    Taught in: 04_fine_tuning.
    """
    if recipe.batch_size % world():
        raise ValueError(f"batch_size must be a multiple of the {world()} processes, not {recipe.batch_size}")
    tasks = [_data(name, recipe, clip, device) for name in recipe.tasks]
    encoder = copy.deepcopy(clip.encoder).to(device).train().requires_grad_(True)
    model = together(encoder)
    optimizer = _optimizer(recipe, model, encoder, device)
    columns = [*COLUMNS, *MEANS] if recipe.diagnose else [*COLUMNS]
    log = torch.full((recipe.steps, len(columns)), torch.nan, device=device)
    average = Average(recipe, encoder)
    looks = Looks(recipe, average, [(task.validation, task.head) for task in tasks])
    owner = f"{recipe.same()} from {clip.fingerprint[:12]}"
    progress = Progress(recipe, partial_file, owner, optimizer, {"log": log, **average.state(), **looks.state()})

    for step in progress.steps(show):
        torch.manual_seed(batches.generator("dropout", recipe.seed, step, rank()).initial_seed())
        optimizer.base.param_groups[0]["lr"] = lr_at(step, recipe.steps, recipe.lr, recipe.warmup)
        task, turn = tasks[step % len(tasks)], step // len(tasks)  # several tasks take turns
        index = batch_indices(len(task.train), recipe.batch_size, recipe.seed, turn).to(task.train.images.device)
        images, labels = task.train.images[index].to(device), task.train.labels[index].to(device)
        images = augment(images, batches.generator("augment", recipe.seed, step), clip.size)  # (B, 3, H, W)
        losses = _losses(recipe, model, task.head, optimizer.scaler, share(images), share(labels))
        optimizer.step(*losses, shared=recipe.shared_climb)
        log[step] = mean(torch.stack([optimizer.last[name] for name in columns]))
        # a gradient that is not finite skips its step: expected now and then under fp16, else a sign of divergence
        if optimizer.skipped > (recipe.steps / 2 if recipe.precision == "fp16" else 0):
            raise _diverged(recipe, step)
        average.after(step)
        looks.after(step)

    seconds, theta = progress.seconds(), average.theta()
    train_loss, train_accuracy = score(encoder, theta, [(task.train, task.head) for task in tasks])
    if not math.isfinite(train_loss):
        raise _diverged(recipe, recipe.steps)
    table = pd.DataFrame(log.cpu().numpy(), columns=columns)
    table.insert(0, "step", range(recipe.steps))
    table["lr"] = [lr_at(step, recipe.steps, recipe.lr, recipe.warmup) for step in range(recipe.steps)]
    if recipe.validate_every:
        table[["validation_loss", "validation_accuracy"]] = looks.found.numpy()
    theta, best = ({name: w.cpu() for name, w in weights.items()} for weights in (theta, looks.best))
    return Finetuned(recipe, theta, best or None, table, seconds, train_loss, train_accuracy, optimizer.skipped)


def _data(name: str, recipe: Recipe, clip: Clip, device: torch.device) -> _Data:
    task = load_task(name, clip.size)
    train = subset(task.train, recipe.n_train)
    noise = batches.generator("labels", recipe.seed)
    labels = batches.mislabel(train.labels, len(task.classes), recipe.label_noise, noise)
    if train.images.nbytes < RESIDENT:  # larger ones stay on the disk, and come a batch at a time
        train = Split(train.images.to(device), labels.to(device))
    else:
        train = Split(train.images, labels)
    return _Data(train, task.validation, zero_shot_head(clip, task).to(device))


def _optimizer(recipe: Recipe, model: nn.Module, encoder: nn.Module, device: torch.device) -> SAM:
    own = 0 if recipe.shared_climb else rank()
    return SAM(
        torch.optim.AdamW(encoder.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True),
        recipe.rho,
        recipe.optimizer == "asam",
        recipe.eta,
        scale_biases=recipe.scale_biases,
        every=recipe.every,
        only=norm_parameters(encoder) if recipe.norms_only else None,
        clip_norm=recipe.clip_norm,
        scaler=torch.amp.GradScaler(device.type) if recipe.precision == "fp16" else None,
        model=model,
        synchronise=recipe.shared_climb,
        noise=partial(batches.generator, "noise", recipe.seed, own) if recipe.optimizer == "rwp" else None,
        same_noise=True,
        diagnose=recipe.diagnose,
    )


def _losses(
    recipe: Recipe, model: nn.Module, head: Tensor, scaler: torch.amp.GradScaler, x: Tensor, y: Tensor
) -> list[Callable[[], Tensor]]:
    """For each micro-batch a function that runs both passes; their losses add up to the mean over the batch."""
    dtype = getattr(torch, PRECISIONS[recipe.precision])

    def loss(x: Tensor, y: Tensor, weight: float) -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=recipe.precision != "fp32"):
            features = model(x)  # (B, d)
        loss = F.cross_entropy(features.float() @ head.T, y) * weight
        scaler.scale(loss).backward()
        return loss

    size = recipe.micro_batch or len(y)
    parts = zip(x.split(size), y.split(size), strict=True)
    return [partial(loss, *part, len(part[1]) / len(y)) for part in parts]


def _diverged(recipe: Recipe, step: int) -> FloatingPointError:
    return FloatingPointError(
        f"fine-tuning {'+'.join(recipe.tasks)!r} with {recipe.optimizer} gave a loss or gradient that is not finite "
        f"at step {step}: lower lr (now {recipe.lr}) or rho (now {recipe.rho})"
    )
