"""What a run will need: memory, computed from the architecture, and hours, from a few steps timed on the device."""

from __future__ import annotations

import copy
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pandas as pd
import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from samlib.model import clip, registry
from samlib.model.clip import Clip
from samlib.train.beside import alone
from samlib.train.recipe import PRECISIONS, Recipe
from samlib.train.sam import SAM

FLOAT = 4  # bytes: weights, gradients and moments are fp32 whatever the precision of the forward pass
SHARE = 0.85  # of the free memory that a run may take
PROCESS = 9e8  # bytes of a process with the libraries before it does anything


@dataclass(frozen=True)
class Size:
    """An architecture in numbers.

    Args:
        encoder: parameters of the image encoder.
        whole: parameters of the whole model, with the text encoder.
        activations: bytes that one image's forward pass keeps for the backward pass, in fp32.
        flops: floating-point operations of one image's forward pass.
        pixels: numbers in one image as the encoder reads it.
    """

    encoder: int
    whole: int
    activations: int
    flops: int
    pixels: int


@dataclass(frozen=True)
class Pace:
    """Seconds on a device, for one batch of one model.

    Args:
        images: in the batch that was timed.
        gradient: forward and backward pass of those images.
        update: what one step of AdamW takes beside its gradient.
        climb: what one step of SAM takes beside its two gradients.
        adaptive: the same of ASAM.
    """

    images: int
    gradient: float
    update: float
    climb: float
    adaptive: float


@lru_cache
def size(model: str) -> Size:
    """Count parameters, activations and operations on the meta device, where nothing is calculated or stored.

    Args:
        model: as `clip.load_clip` knows it.

    Raises:
        ValueError: no such model.

    Taught in: 04_fine_tuning.
    """
    registry.check(model)
    side = registry.image_size(model)
    if model == registry.TESTBED:
        with torch.device("meta"):
            whole = clip.build()[0]
    else:
        import open_clip

        logging.disable(logging.WARNING)  # that the weights are random is just what is wanted
        with torch.device("meta"):
            whole = open_clip.create_model(registry.parts(model)[0], device="meta")
        logging.disable(logging.NOTSET)
    visual = whole.visual.train()
    kept: dict[int, torch.Tensor] = {}  # by storage; the tensors, too, or a later one could have the same address

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    n = 8  # images, so that what a batch keeps once hardly counts
    with saved_tensors_hooks(keep, lambda x: x), FlopCounterMode(display=False) as counter:
        visual(torch.empty(n, 3, side, side, device="meta"))
    own = {p.untyped_storage()._cdata for p in visual.parameters()}
    return Size(
        encoder=sum(p.numel() for p in visual.parameters()),
        whole=sum(p.numel() for p in whole.parameters()),
        activations=sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own) // n,
        flops=counter.get_total_flops() // n,
        pixels=3 * side * side,
    )


def memory(model: str, recipe: Recipe) -> dict[str, int]:
    """Bytes on the device while a recipe is trained, item by item; their sum is the peak.

    Beside them a GPU holds the training images, as long as those of a task take less than `loop.RESIDENT`.

    Args:
        model: as `clip.load_clip` knows it.
        recipe: its micro-batch, optimiser, precision and averages count.

    Raises:
        ValueError: no such model.

    Taught in: 04_fine_tuning.
    """
    s = size(model)
    several = recipe.per_pass < recipe.batch_size and not recipe.shared_climb  # climbs: gradients are summed elsewhere
    copies = (recipe.rho > 0) + (recipe.average != "none") + bool(recipe.validate_every) + several
    copies += recipe.diagnose + (recipe.optimizer == "rwp")
    half = recipe.precision != "fp32"
    return {
        "the pre-trained model": FLOAT * s.whole,
        "weights": FLOAT * s.encoder + (FLOAT * s.encoder // 2 if half else 0),
        "gradient": FLOAT * s.encoder,
        "two moments of AdamW": 2 * FLOAT * s.encoder,
        "weights to come back to": copies * FLOAT * s.encoder,
        "weights handed back": FLOAT * s.encoder,
        "the batch": 2 * recipe.batch_size * FLOAT * s.pixels,
        "activations": recipe.per_pass * s.activations // (2 if half else 1),
    }


def peak(model: str, recipe: Recipe) -> int:
    """Bytes on the device at most: the sum of `memory`."""
    return sum(memory(model, recipe).values())


def micro_batch(model: str, batch_size: int, device: str | torch.device, precision: str = "fp32") -> int:
    """The most images that fit into the free memory with SAM, a batch halved as often as needed.

    Args:
        model: as `clip.load_clip` knows it.
        batch_size: images a step.
        device: "cpu" or "cuda".
        precision: of the forward pass.

    Raises:
        MemoryError: not even one image fits.

    Taught in: 04_fine_tuning.
    """
    free, images = SHARE * free_memory(device), batch_size
    asked = Recipe(("",), "sam", 1, 1.0, batch_size=batch_size, shared_climb=True, precision=precision)
    while (needed := peak(model, replace(asked, micro_batch=images))) > free:
        if images == 1:
            raise MemoryError(f"{model} needs {needed / 1e9:.1f} GB to be trained, {free / 1e9:.1f} GB are free")
        images = -(-images // 2)
    return images


def processes(model: str, recipes: Sequence[Recipe]) -> int:
    """How many processes, each with a model of its own, can train side by side in the CPU's free memory; at least 1.

    Args:
        model: as `clip.load_clip` knows it.
        recipes: what they train, one after the other; the largest counts.
    """
    largest = PROCESS + max(peak(model, recipe) for recipe in recipes)
    return max(1, int(SHARE * free_memory("cpu") // largest))


def free_memory(device: str | torch.device) -> int:
    """Bytes that tensors could still have on a device; on the CPU within the limit of a container (of cgroup v2)."""
    device = torch.device(device)
    if device.type == "cpu":
        return min([int(psutil.virtual_memory().available), *_left_in_container()])
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, free for tensors
    return int(torch.cuda.mem_get_info(device)[0] + idle)


def _left_in_container(group: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes up to a container's limit, or nothing if there is none; files that can be read again count as free."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        files = re.findall(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no such group here, or "max"
        return []
    return [max(0, limit - used + sum(map(int, files)))]


def used_memory(device: str | torch.device) -> int:
    """Bytes that this process has on a device: of a GPU what its tensors take, of the CPU all that is resident."""
    device = torch.device(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def peak_memory(device: str | torch.device) -> int:
    """The most bytes that `used_memory` would have said since the process began."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says would be that of the parent, if that was larger
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(peak) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # macOS has it, Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pace(clip: Clip, device: str | torch.device, images: int, precision: str = "fp32", rounds: int = 3) -> Pace:
    """Time the steps of AdamW, SAM and ASAM on noise, as `finetune` takes them.

    Args:
        clip: the model; it is not changed.
        device: where it is.
        images: in one micro-batch; on the CPU at most 8 are timed, where more of them take proportionally longer.
        precision: of the forward pass.
        rounds: steps of which the fastest counts, after one that does not; only one where that took a second or more.

    Taught in: 04_fine_tuning.
    """
    device = torch.device(device)
    images = min(images, 8) if device.type == "cpu" else images
    dtype = getattr(torch, PRECISIONS[precision])

    def fastest(step: Callable[[], object]) -> float:
        taken: list[float] = []
        while len(taken) <= rounds and not (len(taken) == 2 and taken[0] > 1):
            begun = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - begun)
        return min(taken[1:])

    def timed(rho: float, adaptive: bool = False) -> tuple[float, float]:
        """Seconds of a step, and of its gradient alone."""
        encoder = copy.deepcopy(clip.encoder).train().requires_grad_(True)
        optimizer = SAM(torch.optim.AdamW(encoder.parameters(), 0.0, fused=True), rho, adaptive, clip_norm=1.0)

        def gradient() -> torch.Tensor:
            with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
                loss = encoder(x).float().square().sum()
            loss.backward()
            return loss

        return fastest(lambda: optimizer.step(gradient)), fastest(gradient)

    with alone(device):  # one thread a process, as in fine-tuning
        x = torch.rand(images, 3, clip.size, clip.size, device=device)
        steps = [timed(0.0), timed(1e-3), timed(1e-3, True)]
    once = min(gradient for _, gradient in steps)
    beside = [max(0.0, step - passes * once) for (step, _), passes in zip(steps, (1, 2, 2), strict=True)]
    return Pace(images, once, *beside)


def seconds(pace: Pace, recipe: Recipe) -> float:
    """Of the training of a recipe, without its looks at the data.

    Args:
        pace: of the model and the device.
        recipe: what to train.
    """
    share = recipe.batch_size / pace.images
    beside = {"adamw": pace.update, "asam": pace.adaptive}.get(recipe.optimizer, pace.climb)
    return recipe.gradients * share * pace.gradient + recipe.steps * beside


def table(clip: Clip, device: str | torch.device, arms: dict[str, Sequence[Recipe]]) -> pd.DataFrame:
    """What the fine-tuning of each arm takes, if none of it is stored yet.

    Args:
        clip: the pre-trained model.
        device: where it will be trained.
        arms: name -> recipes, all with the same batches.

    Returns:
        One row an arm: models, gradients, hours (of one process, at the pace of a few steps taken just now), peak
        memory on the device and disk space in GB (1e9 bytes).

    Taught in: 04_fine_tuning.
    """
    recipe = next(iter(arms.values()))[0]
    measured = pace(clip, device, recipe.per_pass, recipe.precision)
    stored = FLOAT * size(clip.name).encoder / 1e9
    rows = {
        arm: {
            "models": len(recipes),
            "gradients": sum(r.gradients for r in recipes),
            "hours": sum(seconds(measured, r) for r in recipes) / 3600,
            "memory (GB)": max(peak(clip.name, r) for r in recipes) / 1e9,
            "disk (GB)": stored * sum(1 + bool(r.validate_every) for r in recipes),
        }
        for arm, recipes in arms.items()
    }
    return pd.DataFrame(rows).T.astype({"models": int, "gradients": int})


def summary(clip: Clip, device: str | torch.device, arms: dict[str, Sequence[Recipe]]) -> str:
    """`table` in one sentence, for the top of a chapter."""
    t = table(clip, device, arms)
    recipe = next(iter(arms.values()))[0]
    return (
        f"Fine-tuning, if nothing is stored: {t.models.sum()} models of {clip.name}, {t.gradients.sum():,} gradients "
        f"of {recipe.batch_size} images ({recipe.per_pass} in one pass, {recipe.precision}), about "
        f"{t.hours.sum():.2g} hours of one process on {device}, {t['memory (GB)'].max():.2g} of "
        f"{free_memory(device) / 1e9:.0f} GB of memory, {t['disk (GB)'].sum():.2g} GB on the disk."
    )
