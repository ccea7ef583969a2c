"""Fine-tune the image encoder on one task: one loop for AdamW, SAM and ASAM, cached by content."""

from __future__ import annotations

import copy
import json
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
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from samlib.data import batches, tasks
from samlib.data.augment import augment
from samlib.data.batches import batch_indices
from samlib.data.tasks import Split, load_task, subset
from samlib.model import evaluate
from samlib.model.clip import Clip
from samlib.model.head import zero_shot_head
from samlib.model.theta import Theta, weights_of
from samlib.store import checkpoint, keys, provenance
from samlib.store.files import read_json, replacing, unreadable, write_json
from samlib.train import budget, sam
from samlib.train.recipe import PRECISIONS, SWA_SHARE, Recipe
from samlib.train.schedule import lr_at

COLUMNS = ("loss", "loss_perturbed", "grad_norm")  # of the log, measured at every step
FACTS = ("seconds", "train_loss", "train_accuracy", "skipped")  # of a result, beside weights and log
CHECKPOINT_SECONDS = 60.0
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
class _Source:
    """A task's training images on the device, its validation images, and its head (K, d)."""

    train: Split
    validation: Split
    head: Tensor


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
    folder = result_folder(recipe, clip, device, cache)
    _fill(folder, recipe, clip, device)
    return _read(recipe, folder)


def finetune_many(
    recipes: Sequence[Recipe], clip: Clip, device: str | torch.device, cache: Path, jobs: int | None = None
) -> list[Finetuned]:
    """Fine-tune several recipes, side by side on the CPU, one after the other on a GPU.

    Args:
        recipes: what to train; equal recipes are trained once.
        clip, device, cache: as in `finetune`.
        jobs: processes on the CPU, >= 1; None for one a core. Fewer where the free memory does not suffice.

    Returns:
        The results in the order of the recipes.

    Raises:
        ValueError: jobs < 1, or as in `finetune`.

    Taught in: 04_fine_tuning.
    """
    folders = train_many(recipes, clip, device, cache, jobs)
    return [_read(recipe, folder) for recipe, folder in zip(recipes, folders, strict=True)]


def train_many(
    recipes: Sequence[Recipe], clip: Clip, device: str | torch.device, cache: Path, jobs: int | None = None
) -> list[Path]:
    """As `finetune_many`, but the results stay on the disk: together they may be larger than the memory.

    Returns:
        Their folders, in the order of the recipes.
    """
    device = torch.device(device)
    jobs = joblib.cpu_count() if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"jobs must be an integer >= 1 or None, not {jobs}")
    folders = {recipe: result_folder(recipe, clip, device, cache) for recipe in recipes}
    todo = [recipe for recipe, folder in folders.items() if not folder.is_dir()]
    jobs = min(jobs, len(todo)) if device.type == "cpu" and _processes() == 1 else 1
    if jobs > 1:
        jobs = min(jobs, budget.processes(clip.name, todo))
    if jobs <= 1:
        running: Iterator[Recipe] = (_fill(folders[recipe], recipe, clip, device) for recipe in todo)
    else:
        pool = joblib.Parallel(n_jobs=jobs, backend="loky", return_as="generator_unordered")
        running = pool(joblib.delayed(_fill)(folders[recipe], recipe, clip, device, False) for recipe in todo)
    with tqdm(
        total=sum(r.gradients for r in todo), desc="fine-tuning", unit="gradient", unit_scale=True, disable=not todo
    ) as bar:  # in units of cost, so that the estimate holds where SAM and AdamW are mixed
        for recipe in running:
            bar.update(recipe.gradients)
    return [folders[recipe] for recipe in recipes]


def _fill(folder: Path, recipe: Recipe, clip: Clip, device: torch.device, show: bool = True) -> Recipe:
    """Train unless the folder is there; only the recipe travels back from another process."""
    there = folder.is_dir()
    _wait()  # all processes have looked before one of them writes
    if not there:
        partial_file = folder.with_name(f"{folder.name}.partial.safetensors")
        with _alone(device):
            done = _train(recipe, clip, device, partial_file, show)
        if rank() == 0:
            with replacing(folder) as scratch:
                _write(done, clip, scratch)
            partial_file.unlink(missing_ok=True)
        _wait()
    return recipe


def _train(recipe: Recipe, clip: Clip, device: torch.device, partial_file: Path, show: bool) -> Finetuned:
    if recipe.batch_size % _processes():
        raise ValueError(f"batch_size must be a multiple of the {_processes()} processes, not {recipe.batch_size}")
    sources = [_source(name, recipe, clip, device) for name in recipe.tasks]
    encoder = copy.deepcopy(clip.encoder).to(device).train().requires_grad_(True)
    model = DistributedDataParallel(encoder) if _processes() > 1 else encoder
    optimizer = _optimizer(recipe, model, encoder, device)
    averaged = _averaged(recipe, encoder)
    best = {f"best/{name}": w for name, w in weights_of(encoder).items()} if recipe.validate_every else {}
    columns = [*COLUMNS, *sam.MEANS] if recipe.diagnose else [*COLUMNS]
    history = torch.full((recipe.steps, len(columns)), torch.nan, device=device)
    tensors = {"history": history, **best}
    tensors |= {f"theta/{name}": p for name, p in encoder.named_parameters()}
    tensors |= {f"average/{name}": p for name, p in averaged.module.named_parameters()} if averaged else {}
    owner = f"{recipe.same()} from {clip.fingerprint[:12]}"
    start, seconds = 0, 0.0
    looks: list[dict[str, float]] = []
    if partial_file.exists():
        facts = checkpoint.load(partial_file, owner, tensors, optimizer.base)
        optimizer.load_state_dict({"base": optimizer.base.state_dict(), **facts["optimizer"]})
        start, seconds, looks = optimizer.steps, facts["seconds"], facts["looks"]
        if averaged:
            averaged.n_averaged.fill_(facts["averaged"])

    dtype = getattr(torch, PRECISIONS[recipe.precision])

    def loss_on(head: Tensor, batch: Tensor, target: Tensor, share: float) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=recipe.precision != "fp32"):
            features = model(batch)  # (B, d)
        loss = F.cross_entropy(features.float() @ head.T, target) * share
        (optimizer.scaler.scale(loss) if optimizer.scaler else loss).backward()
        return loss

    def look(step: int) -> None:
        """Accuracy on the validation split, without augmentation; keep the best weights."""
        accuracy, loss = _score(encoder, averaged, [(one.validation, one.head) for one in sources])
        encoder.train()
        if accuracy > max((one["accuracy"] for one in looks), default=-1.0):
            for name, value in _theta(encoder, averaged).items():
                best[f"best/{name}"].copy_(value)
        looks.append({"step": step, "accuracy": accuracy, "loss": loss})

    begun = saved = time.monotonic()
    title = f"{recipe.task}, {recipe.optimizer}"
    steps = tqdm(range(start, recipe.steps), title, recipe.steps, False, initial=start, disable=not show or rank() > 0)
    for step in steps:
        torch.manual_seed(batches.generator("dropout", recipe.seed, step, rank()).initial_seed())
        for group in optimizer.base.param_groups:
            group["lr"] = lr_at(step, recipe.steps, recipe.lr, recipe.warmup)
        one, turn = sources[step % len(sources)], step // len(sources)  # several tasks take turns
        index = batch_indices(len(one.train), recipe.batch_size, recipe.seed, turn).to(one.train.images.device)
        whole = one.train.images[index].to(device), one.train.labels[index].to(device)
        batch = augment(whole[0], batches.generator("augment", recipe.seed, step), clip.size)
        x, y = (part.chunk(_processes())[rank()] for part in (batch, whole[1]))  # this process's part
        size = recipe.micro_batch or len(y)
        parts = zip(x.split(size), y.split(size), strict=True)
        calls = (partial(loss_on, one.head, *part, len(part[1]) / len(y)) for part in parts)
        optimizer.step(*calls, shared=recipe.shared_climb)
        last = step + 1 == recipe.steps
        if averaged and (recipe.average == "ema" or step >= (1 - SWA_SHARE) * recipe.steps or last):
            averaged.update_parameters(encoder)
        history[step] = torch.stack([optimizer.last[name] for name in columns])
        if _processes() > 1:
            torch.distributed.all_reduce(history[step])
            history[step] /= _processes()
        # a gradient that is not finite skips its step: expected now and then under fp16, else a sign of divergence
        if optimizer.skipped > (recipe.steps / 2 if recipe.precision == "fp16" else 0):
            raise _diverged(recipe, step)
        if recipe.validate_every and ((step + 1) % recipe.validate_every == 0 or last):
            look(step)
        if time.monotonic() - saved > CHECKPOINT_SECONDS and not last and rank() == 0:
            saved = time.monotonic()
            facts = {"seconds": seconds + saved - begun, "looks": looks}
            facts["optimizer"] = {name: x for name, x in optimizer.state_dict().items() if name != "base"}
            facts["averaged"] = int(averaged.n_averaged) if averaged else 0
            checkpoint.save(partial_file, owner, tensors, optimizer.base, facts)

    seconds += time.monotonic() - begun
    train_accuracy, train_loss = _score(encoder, averaged, [(one.train, one.head) for one in sources])
    if not math.isfinite(train_loss):
        raise _diverged(recipe, recipe.steps)
    log = pd.DataFrame(history.cpu().numpy(), columns=columns)
    log.insert(0, "step", range(recipe.steps))
    log["lr"] = [lr_at(step, recipe.steps, recipe.lr, recipe.warmup) for step in range(recipe.steps)]
    for what in ("loss", "accuracy") if looks else ():
        log[f"validation_{what}"] = pd.Series({int(one["step"]): one[what] for one in looks})
    return Finetuned(
        recipe=recipe,
        theta={name: w.cpu() for name, w in _theta(encoder, averaged).items()},
        best={name.removeprefix("best/"): w.cpu() for name, w in best.items()} or None,
        log=log,
        seconds=seconds,
        train_loss=train_loss,
        train_accuracy=train_accuracy,
        skipped=optimizer.skipped,
    )


def _source(name: str, recipe: Recipe, clip: Clip, device: torch.device) -> _Source:
    task = load_task(name, clip.size)
    train = subset(task.train, recipe.n_train)
    noise = batches.generator("labels", recipe.seed)
    labels = batches.mislabel(train.labels, len(task.classes), recipe.label_noise, noise)
    if train.images.nbytes < RESIDENT:  # larger ones stay on the disk, and come a batch at a time
        train = Split(train.images.to(device), labels.to(device))
    else:
        train = Split(train.images, labels)
    return _Source(train, task.validation, zero_shot_head(clip, task).to(device))


def _optimizer(recipe: Recipe, model: nn.Module, encoder: nn.Module, device: torch.device) -> sam.SAM:
    own = 0 if recipe.shared_climb else rank()
    return sam.SAM(
        torch.optim.AdamW(encoder.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True),
        recipe.rho,
        recipe.optimizer == "asam",
        recipe.eta,
        scale_biases=recipe.scale_biases,
        every=recipe.every,
        only=sam.norm_parameters(encoder) if recipe.norms_only else None,
        clip_norm=recipe.clip_norm,
        scaler=torch.amp.GradScaler(device.type) if recipe.precision == "fp16" else None,
        model=model,
        synchronise=recipe.shared_climb,
        noise=partial(batches.generator, "noise", recipe.seed, own) if recipe.optimizer == "rwp" else None,
        same_noise=True,
        diagnose=recipe.diagnose,
    )


def _averaged(recipe: Recipe, encoder: nn.Module) -> AveragedModel | None:
    """Izmailov et al. 2018 (SWA): a plain mean; or an exponential moving average."""
    if recipe.average == "none":
        return None
    return AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(recipe.decay) if recipe.average == "ema" else None)


def _theta(encoder: nn.Module, averaged: AveragedModel | None) -> Theta:
    return weights_of(averaged.module if averaged and averaged.n_averaged else encoder)


def _score(
    encoder: nn.Module, averaged: AveragedModel | None, parts: Sequence[tuple[Split, Tensor]]
) -> tuple[float, float]:
    """Accuracy and mean cross-entropy on splits as they are, each with its head: the mean over the splits."""
    accuracies, losses = [], []
    for split, head in parts:
        outputs = evaluate.logits(encoder, _theta(encoder, averaged), split.images, head).cpu()  # (N, K)
        labels = split.labels.cpu()
        accuracies.append((outputs.argmax(1) == labels).double().mean().item())
        losses.append(F.cross_entropy(outputs, labels).item())
    return sum(accuracies) / len(parts), sum(losses) / len(parts)


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Of this process among those that train together, 0 if it is alone."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _wait() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _diverged(recipe: Recipe, step: int) -> FloatingPointError:
    return FloatingPointError(
        f"fine-tuning {recipe.task!r} with {recipe.optimizer} gave a loss or gradient that is not finite "
        f"at step {step}: lower lr (now {recipe.lr}) or rho (now {recipe.rho})"
    )


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Torch's random state for ourselves, and on the CPU one thread: sums in another order give other last bits."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)


def result_folder(recipe: Recipe, clip: Clip, device: torch.device, cache: Path) -> Path:
    """Where a result is, or will be; the name follows all that decides it."""
    key = keys.key(
        {
            "recipe": asdict(recipe.same()),
            "task": [tasks.fingerprint(name, clip.size) for name in recipe.tasks],
            "clip": clip.fingerprint,
            "device": device.type,
            "processes": _processes(),
            "code": keys.code_of(_train),
        }
    )
    return cache / "finetune" / key


def _write(done: Finetuned, clip: Clip, folder: Path) -> None:
    folder.mkdir()
    recipe = json.dumps(asdict(done.recipe))
    data = [load_task(name, clip.size).revision or tasks.fingerprint(name, clip.size) for name in done.recipe.tasks]
    header = {"model": clip.name, "task": done.recipe.task, "recipe": recipe, "revision": "+".join(data)}
    header |= provenance.software()
    save_file(done.theta, folder / "theta.safetensors", header)
    if done.best:
        save_file(done.best, folder / "best.safetensors", header)
    done.log.to_parquet(folder / "log.parquet")
    facts = {name: getattr(done, name) for name in FACTS}
    write_json(folder / "recipe.json", {"recipe": asdict(done.recipe), **facts})


def _read(recipe: Recipe, folder: Path) -> Finetuned:
    file = folder / "theta.safetensors"
    try:
        theta = load_file(file)
        file = folder / "best.safetensors"
        best = load_file(file) if recipe.validate_every else None
        file = folder / "log.parquet"
        log = pd.read_parquet(file)
        file = folder / "recipe.json"
        facts = read_json(file)
        return Finetuned(recipe=recipe, theta=theta, best=best, log=log, **{name: facts[name] for name in FACTS})
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise unreadable(file) from error
