"""Fine-tune the image encoder on one task: one loop for AdamW, SAM and ASAM, cached by content."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import joblib
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from samlib import batches, checkpoint, sam, tasks
from samlib import cache as store
from samlib import clip as clip_module
from samlib.batches import augment, batch_indices, lr_at
from samlib.clip import Clip, Theta
from samlib.recipe import Recipe

COLUMNS = ("loss", "loss_perturbed", "grad_norm")  # of the log, measured at every step
CHECKPOINT_SECONDS = 60.0
CHECK_EVERY = 50  # steps between looks at the losses: each look waits for the device


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A fine-tuned encoder and how it got there.

    Args:
        recipe: what was asked for.
        theta: the encoder's parameters, on the CPU.
        log: one row a step: step, loss, loss_perturbed (equal to loss for AdamW), lr, grad_norm.
        seconds: wall time of the training.
        train_loss: mean cross-entropy on the training images without augmentation, in nats.
        train_accuracy: accuracy on them, in [0, 1].
    """

    recipe: Recipe
    theta: Theta
    log: pd.DataFrame
    seconds: float
    train_loss: float
    train_accuracy: float


def finetune(recipe: Recipe, clip: Clip, device: str | torch.device, cache: Path) -> Finetuned:
    """Fine-tune, or read the result of an earlier run of the same recipe, task, model, device type and code.

    On the CPU a run uses one thread, so that its result does not depend on how many run side by side. An
    interrupted run goes on from its last checkpoint; on the CPU the result is the same bit for bit.

    Args:
        recipe: what to train.
        clip: the pre-trained model; it is not changed.
        device: where to train, such as "cpu" or "cuda".
        cache: folder for results and checkpoints.

    Returns:
        The fine-tuned weights with their log.

    Raises:
        KeyError: no such task.
        FloatingPointError: the loss or the gradient is not finite.
        ValueError: a cached file is damaged.

    Taught in: 04_fine_tuning.
    """
    device = torch.device(device)
    folder = _folder(recipe, clip, device, cache)
    return _read(recipe, _fill(folder, recipe, clip, device))


def finetune_many(
    recipes: Sequence[Recipe], clip: Clip, device: str | torch.device, cache: Path, jobs: int | None = None
) -> list[Finetuned]:
    """Fine-tune several recipes, side by side on the CPU, one after the other on a GPU.

    Args:
        recipes: what to train; equal recipes are trained once.
        clip, device, cache: as in `finetune`.
        jobs: processes on the CPU, >= 1; None for one a core.

    Returns:
        The results in the order of the recipes.

    Raises:
        ValueError: jobs < 1, or as in `finetune`.

    Taught in: 04_fine_tuning.
    """
    device = torch.device(device)
    jobs = joblib.cpu_count() if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"jobs must be an integer >= 1 or None, not {jobs}")
    folders = {recipe: _folder(recipe, clip, device, cache) for recipe in recipes}
    todo = [(folder, recipe, clip, device) for recipe, folder in folders.items() if not folder.is_dir()]
    jobs = min(jobs, len(todo)) if device.type == "cpu" else 1
    if jobs <= 1:
        running: Iterator[Path] = (_fill(*job) for job in todo)
    else:
        pool = joblib.Parallel(n_jobs=jobs, backend="loky", return_as="generator_unordered")
        running = pool(joblib.delayed(_fill)(*job) for job in todo)
    for _ in tqdm(running, total=len(todo), desc="fine-tuning", unit="model", disable=not todo):
        pass
    return [_read(recipe, folders[recipe]) for recipe in recipes]


def _fill(folder: Path, recipe: Recipe, clip: Clip, device: torch.device) -> Path:
    """Train unless the folder is there; only its path travels back from another process."""
    if not folder.is_dir():
        partial_file = folder.with_name(f"{folder.name}.partial.safetensors")
        with _one_thread(device):
            done = _train(recipe, clip, device, partial_file)
        with store.replacing(folder) as scratch:
            _write(done, scratch)
        partial_file.unlink(missing_ok=True)
    return folder


def _train(recipe: Recipe, clip: Clip, device: torch.device, partial_file: Path) -> Finetuned:
    task = tasks.load(recipe.task)
    train = tasks.subset(task.train, recipe.n_train)
    images, labels = train.images.to(device), train.labels.to(device)
    head = clip_module.zero_shot_head(clip, task).to(device)  # (K, d)
    encoder = copy.deepcopy(clip.encoder).to(device).train().requires_grad_(True)
    base = torch.optim.AdamW(encoder.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    optimizer = sam.SAM(base, recipe.rho, recipe.optimizer == "asam", recipe.eta, recipe.clip_norm)
    history = torch.full((recipe.steps, len(COLUMNS)), torch.nan, device=device)
    start, seconds = 0, 0.0
    if partial_file.exists():
        start, seconds = checkpoint.load(partial_file, encoder, optimizer, history)

    def loss_on(batch: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            features = encoder(batch)  # (B, d)
        loss = F.cross_entropy(features.float() @ head.T, target)
        loss.backward()
        return loss

    begun = saved = time.monotonic()
    for step in range(start, recipe.steps):
        for group in base.param_groups:
            group["lr"] = lr_at(step, recipe.steps, recipe.lr, recipe.warmup)
        index = batch_indices(len(labels), recipe.batch_size, recipe.seed, step).to(device)
        batch = augment(images[index], batches.generator("augment", recipe.seed, step))
        try:
            optimizer.step(partial(loss_on, batch, labels[index]))
        except FloatingPointError as error:
            raise _diverged(recipe, step) from error
        history[step] = torch.stack([optimizer.last[name] for name in COLUMNS])
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == recipe.steps:
            bad = (~history[: step + 1].isfinite()).any(1).nonzero()
            if len(bad):
                raise _diverged(recipe, int(bad[0]))
        if time.monotonic() - saved > CHECKPOINT_SECONDS and step + 1 < recipe.steps:
            saved = time.monotonic()
            checkpoint.save(partial_file, encoder, optimizer, history[: step + 1], seconds + saved - begun)

    theta = clip_module.theta(encoder)
    logits = clip_module.logits(encoder, theta, train.images, head).cpu()  # (N, K)
    train_loss = F.cross_entropy(logits, train.labels).item()
    if not math.isfinite(train_loss):
        raise _diverged(recipe, recipe.steps)
    log = pd.DataFrame(history.cpu().numpy(), columns=list(COLUMNS))
    log.insert(0, "step", range(recipe.steps))
    log["lr"] = [lr_at(step, recipe.steps, recipe.lr, recipe.warmup) for step in range(recipe.steps)]
    return Finetuned(
        recipe=recipe,
        theta={name: w.cpu() for name, w in theta.items()},
        log=log,
        seconds=seconds + time.monotonic() - begun,
        train_loss=train_loss,
        train_accuracy=(logits.argmax(1) == train.labels).double().mean().item(),
    )


def _diverged(recipe: Recipe, step: int) -> FloatingPointError:
    return FloatingPointError(
        f"fine-tuning {recipe.task!r} with {recipe.optimizer} gave a loss or gradient that is not finite "
        f"at step {step}: lower lr (now {recipe.lr}) or rho (now {recipe.rho})"
    )


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """One thread on the CPU: sums in another order give other last bits."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _folder(recipe: Recipe, clip: Clip, device: torch.device, cache: Path) -> Path:
    key = store.key(
        {
            "recipe": asdict(recipe),
            "task": tasks.fingerprint(recipe.task),
            "clip": clip.fingerprint,
            "device": device.type,
            "code": store.code("batches", "clip", "finetune", "sam", "tasks"),
        }
    )
    return cache / "finetune" / key


def _write(done: Finetuned, folder: Path) -> None:
    folder.mkdir()
    save_file(done.theta, folder / "theta.safetensors")
    done.log.to_parquet(folder / "log.parquet")
    facts = {name: getattr(done, name) for name in ("seconds", "train_loss", "train_accuracy")}
    store.write_json(folder / "recipe.json", {"recipe": asdict(done.recipe), **facts})


def _read(recipe: Recipe, folder: Path) -> Finetuned:
    file = folder / "theta.safetensors"
    try:
        theta = load_file(file)
        file = folder / "log.parquet"
        log = pd.read_parquet(file)
        file = folder / "recipe.json"
        facts = store.read_json(file)
        return Finetuned(recipe, theta, log, facts["seconds"], facts["train_loss"], facts["train_accuracy"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise store.unreadable(file) from error
