"""What stands beside the training loop: averages of the weights, looks at the validation split, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from samlib.data.tasks import Split
from samlib.model import evaluate
from samlib.model.theta import Theta, weights_of
from samlib.store import checkpoint
from samlib.train.distributed import rank
from samlib.train.recipe import SWA_SHARE, Recipe
from samlib.train.sam import SAM

CHECKPOINT_SECONDS = 60.0


class Average:
    """The weights that a run hands back: the last ones, or an average along the way.

    Source: Izmailov et al. 2018 (SWA: a plain mean over the end of the run).
    """

    def __init__(self, recipe: Recipe, encoder: nn.Module) -> None:
        self.encoder = encoder
        self.averaged: AveragedModel | None = None
        self.first = min((1 - SWA_SHARE) * recipe.steps, recipe.steps - 1) if recipe.average == "swa" else 0
        if recipe.average != "none":
            ema = get_ema_multi_avg_fn(recipe.decay) if recipe.average == "ema" else None
            self.averaged = AveragedModel(encoder, multi_avg_fn=ema)

    def after(self, step: int) -> None:
        """Take the encoder's weights in, if it is time."""
        if self.averaged and step >= self.first:
            self.averaged.update_parameters(self.encoder)

    def theta(self) -> Theta:
        """A copy of the average, or of the encoder's weights as long as there is none."""
        return weights_of(self.averaged.module if self.averaged and self.averaged.n_averaged else self.encoder)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        tensors: dict[str, Tensor] = {f"theta/{name}": p for name, p in self.encoder.named_parameters()}
        if self.averaged:
            tensors |= {f"average/{name}": p for name, p in self.averaged.module.named_parameters()}
            tensors["averaged"] = self.averaged.n_averaged
        return tensors


class Looks:
    """Loss and accuracy on the validation split along the way, and the weights of the best look.

    Args:
        recipe: says when to look.
        average: what to look at.
        parts: validation split and head (K, d) of each task.
    """

    def __init__(self, recipe: Recipe, average: Average, parts: Sequence[tuple[Split, Tensor]]) -> None:
        self.recipe, self.average, self.parts = recipe, average, parts
        self.found = torch.full((recipe.steps, 2), torch.nan, dtype=torch.float64)  # loss, accuracy
        self.best = weights_of(average.encoder) if recipe.validate_every else {}

    def after(self, step: int) -> None:
        """Look, if it is time: in every k-th step and in the last."""
        every, done = self.recipe.validate_every, step + 1
        if not every or (done % every and done < self.recipe.steps):
            return
        theta = self.average.theta()
        loss, accuracy = score(self.average.encoder, theta, self.parts)
        self.average.encoder.train()
        if accuracy > self.found[:, 1].nan_to_num(-1.0).max():
            for name, w in self.best.items():
                w.copy_(theta[name])
        self.found[step] = torch.tensor([loss, accuracy], dtype=torch.float64)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {"looks": self.found} | {f"best/{name}": w for name, w in self.best.items()}


class Progress:
    """How far a run is, with a checkpoint now and then, from which a run that was cut off goes on.

    Args:
        recipe: says how many steps there are.
        file: the checkpoint; if it is there, `tensors` and the optimiser take its values.
        owner: what the checkpoint belongs to.
        optimizer: counts the steps done.
        tensors: all that a run changes, beside the optimiser's state.

    Raises:
        ValueError: the checkpoint is damaged or belongs to another owner.
    """

    def __init__(self, recipe: Recipe, file: Path, owner: str, optimizer: SAM, tensors: dict[str, Tensor]) -> None:
        self.recipe, self.file, self.owner, self.optimizer, self.tensors = recipe, file, owner, optimizer, tensors
        spent = 0.0
        if file.exists():
            facts = checkpoint.load(file, owner, tensors, optimizer.base)
            optimizer.load_state_dict({"base": optimizer.base.state_dict(), **facts["optimizer"]})
            spent = facts["seconds"]
        self.begun = time.monotonic() - spent

    def seconds(self) -> float:
        """Spent so far, before and after an interruption."""
        return time.monotonic() - self.begun

    def steps(self, show: bool) -> Iterator[int]:
        """The steps that are left, with a bar; between two of them there may be a checkpoint."""
        saved, start, steps = time.monotonic(), self.optimizer.steps, self.recipe.steps
        title = f"{'+'.join(self.recipe.tasks)}, {self.recipe.optimizer}"
        hidden = not show or rank() > 0
        for step in tqdm(range(start, steps), title, steps, leave=False, initial=start, disable=hidden):
            yield step
            if time.monotonic() - saved > CHECKPOINT_SECONDS and step + 1 < steps and rank() == 0:
                saved = time.monotonic()
                state = {name: value for name, value in self.optimizer.state_dict().items() if name != "base"}
                facts = {"seconds": self.seconds(), "optimizer": state}
                checkpoint.save(self.file, self.owner, self.tensors, self.optimizer.base, facts)


def score(encoder: nn.Module, theta: Theta, parts: Sequence[tuple[Split, Tensor]]) -> tuple[float, float]:
    """Mean cross-entropy and accuracy on images as they are: the mean over several splits, each with its head."""
    losses, accuracies = [], []
    for split, head in parts:
        outputs, labels = evaluate.logits(encoder, theta, split.images, head).cpu(), split.labels.cpu()  # (N, K), (N,)
        losses.append(cross_entropy(outputs, labels).item())
        accuracies.append((outputs.argmax(1) == labels).double().mean().item())
    return sum(losses) / len(parts), sum(accuracies) / len(parts)


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """Torch's random state for ourselves, and on the CPU one thread: sums in another order give other last bits."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)
