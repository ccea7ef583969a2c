"""What the library does on a GPU: `python -m benchmarks.gpu`.

With CLIP's ViT-B/32 at random weights and batches of 128: what steps of AdamW, SAM and ASAM cost, beside their floor
and beside what `estimate` predicts; micro-batches; fp16; a run that is killed and goes on; merging; curvature; and the
testbed's experiment for one seed. It takes at most eight minutes and rewrites book/published/gpu.json after each part.
A part that fails is recorded with its error, and the exit status is 1. `--tiny` takes the embedded model and no GPU,
about two minutes on one core; it writes only where `--out` says.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.operators import Calls
from samlib.data.batches import generator
from samlib.data.tasks import load_task, subset
from samlib.measure.hessian import hessian, second_derivatives, top_eigenvalues
from samlib.merge import task_arithmetic, ties, tsv_m
from samlib.model import registry
from samlib.model.clip import Clip, load_clip
from samlib.model.head import zero_shot_head
from samlib.model.theta import Theta, weights_of
from samlib.notebook.run import PUBLISHED, begin
from samlib.store import provenance
from samlib.store.files import write_json
from samlib.study import campaign, central
from samlib.study.arms import ARMS
from samlib.train import beside, budget
from samlib.train.device import find_device
from samlib.train.finetune import finetune
from samlib.train.recipe import PRECISIONS, Recipe
from samlib.train.result import Finetuned, result_folder
from samlib.train.sam import SAM

MODEL = "ViT-B-32/random"
TASK = "digits"  # embedded; the ViT reads it enlarged
RHO = {"AdamW": 0.0, "SAM": 0.05, "ASAM": 0.5}
FLOOR = {"AdamW": "one gradient + step", "SAM": "two gradients + step", "ASAM": "two gradients + step"}
REPEAT = 3  # steps timed together on a GPU, so that their launches run ahead of it as they do in a loop
TOLERANCE = {"loss": 1e-3, "way": 0.2}  # of micro-batches: sums in another order turn some of Adam's first signs
MATRICES = 6  # merged by TSV-M, for which a whole ViT would take minutes: the first block's and two others
SHARE = 1 / 3  # of the budget that one part may take
T = TypeVar("T")
Step = Callable[[], object]
Found = dict[str, Any]


@dataclass(frozen=True)
class Bed:
    """The model, which alone stays on the device, and how much is done with it."""

    device: str
    clip: Clip
    tiny: bool
    batch: int  # images a step
    part: int  # images of a micro-batch
    steps: int  # of a fine-tuning
    rounds: int  # of steps taken in turns
    images: int  # for the Hessian

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    def recipe(self, arm: str = "SAM", **changes: Any) -> Recipe:
        """A short fine-tuning."""
        usual: Found = {"steps": self.steps, "lr": 1e-5, "batch_size": self.batch, "n_train": 2 * self.batch}
        return Recipe((TASK,), arm.lower(), rho=RHO[arm], **usual | changes)

    def train(self, recipe: Recipe, cache: Path) -> Finetuned:
        """Fine-tune on the device, or read what the cache has."""
        return finetune(recipe, self.clip, self.device, cache)

    def start(self) -> Theta:
        """The pre-trained weights on the CPU."""
        return {name: w.cpu() for name, w in weights_of(self.clip.encoder).items()}

    def seconds(self, work: Callable[..., T], *arguments: Any) -> tuple[float, T]:
        """How long a call takes, and what it returns."""
        wait = torch.cuda.synchronize if self.cuda else lambda: None
        wait()
        begun = time.perf_counter()
        result = work(*arguments)
        wait()
        return time.perf_counter() - begun, result

    def step_seconds(self, step: Step) -> float:
        """Of one step; on a GPU between two of its own events."""
        if not self.cuda:
            return self.seconds(step)[0]
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(REPEAT):
            step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / REPEAT

    def ways(self, precision: str) -> dict[str, Step]:
        """Steps and floors, all on one network and one batch of noise; the base optimiser is AdamW throughout."""
        encoder = copy.deepcopy(self.clip.encoder).train().requires_grad_(True)
        images = torch.rand(self.batch, 3, self.clip.size, self.clip.size, device=self.device)
        labels = torch.arange(self.batch, device=self.device) % 10
        head = zero_shot_head(self.clip, load_task(TASK))  # (10, d)

        def gradient() -> Tensor:
            with torch.autocast(self.device, torch.bfloat16, enabled=precision == "bf16"):
                features = encoder(images)
            loss = F.cross_entropy(features.float() @ head.T, labels)
            loss.backward()
            return loss

        def adamw() -> torch.optim.AdamW:
            return torch.optim.AdamW(encoder.parameters(), lr=1e-6, fused=True)

        base = adamw()

        def floor(gradients: int) -> None:
            for _ in range(gradients):
                base.zero_grad()
                gradient()
            base.step()

        floors = {"one gradient + step": partial(floor, 1), "two gradients + step": partial(floor, 2)}
        return floors | {arm: partial(SAM(adamw(), rho, arm == "ASAM").step, gradient) for arm, rho in RHO.items()}


def steps(bed: Bed, cache: Path) -> Found:
    """Seconds of a step, in turns round by round, and the paired ratios; each as quartiles."""
    found: Found = {}
    for precision in ("fp32", "tf32", "bf16") if bed.cuda else ("fp32", "bf16"):
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        ways = bed.ways(precision)
        rounds = [{way: bed.step_seconds(step) for way, step in ways.items()} for _ in range(bed.rounds + 2)][2:]
        found[precision] = {way: {"seconds": _quartiles([r[way] for r in rounds])} for way in ways}
        for way, floor in FLOOR.items():
            found[precision][way] |= {
                "images per second": bed.batch / found[precision][way]["seconds"][1],
                "time / floor": _quartiles([r[way] / r[floor] for r in rounds]),
                "time / AdamW": _quartiles([r[way] / r["AdamW"] for r in rounds]),
            }
    return found


def estimates(bed: Bed, cache: Path) -> Found:
    """Peak memory (of a GPU only) and seconds a step of fine-tuning, predicted and measured."""
    micro: Found = {"micro_batch": bed.part, "shared_climb": True}
    found: Found = {}
    for precision in ("fp32", "bf16"):
        bed.train(bed.recipe(steps=2, precision=precision), cache)  # warms up
        paces = {images: budget.pace(bed.clip, bed.device, images, precision) for images in (bed.batch, bed.part)}
        for arm, changes in ("AdamW", {}), ("SAM", {}), ("ASAM", {}), ("SAM", micro):
            recipe = bed.recipe(arm, precision=precision, **changes)
            if bed.cuda:
                gc.collect()
                torch.cuda.reset_peak_memory_stats()
            done = bed.train(recipe, cache)
            found[f"{arm}{', micro-batches' if changes else ''}, {precision}"] = {
                "bytes, predicted": sum(budget.memory(bed.clip.name, recipe).values()),
                "bytes, measured": torch.cuda.max_memory_allocated() if bed.cuda else None,
                "seconds a step, predicted": budget.seconds(paces[recipe.per_pass], recipe) / recipe.steps,
                "seconds a step, measured": done.seconds / recipe.steps,
            }
    return found


def launches(bed: Bed, cache: Path) -> Found:
    """Kernels a step on a GPU, operators on the CPU, and how many of them are beyond the floor's."""
    found: Found = {"counted": "kernels" if bed.cuda else "operators"}
    for precision in ("fp32", "bf16"):
        counts = {way: _launches(bed, step) for way, step in bed.ways(precision).items()}
        found[precision] = counts | {f"{way} - floor": counts[way] - counts[floor] for way, floor in FLOOR.items()}
    return found


def micro_batches(bed: Bed, cache: Path) -> Found:
    """SAM with the batch in one pass, and in parts with one climb for all of them."""

    def trained(images: int) -> Finetuned:
        own = cache / str(images)  # in a common folder one would be read in place of the other
        bed.train(bed.recipe(steps=2, shared_climb=True, micro_batch=images), own)  # warms up
        return bed.train(bed.recipe(shared_climb=True, micro_batch=images), own)

    one, other = trained(bed.batch), trained(bed.part)
    loss = float(((one.log["loss"] - other.log["loss"]).abs() / one.log["loss"]).max())
    way = _distance(one.theta, other.theta) / _distance(one.theta, bed.start())
    largest = max(float(w.abs().max()) for w in one.theta.values())
    return {
        "images": [bed.batch, bed.part],
        "steps": bed.steps,
        "loss, largest relative difference": loss,
        "weights, largest difference / largest weight": _largest(one.theta, other.theta) / largest,
        "weights, distance / way from the start": way,
        "tolerance": TOLERANCE,
        "within": loss <= TOLERANCE["loss"] and way <= TOLERANCE["way"],
        "seconds, parts / whole": other.seconds / one.seconds,
    }


def precisions(bed: Bed, cache: Path) -> Found:
    """The same fine-tuning in fp32, in bf16, and in fp16 with a scaled loss: its end, and the steps skipped."""
    found: Found = {"steps": 2 * bed.steps}
    for name in PRECISIONS:
        done = bed.train(bed.recipe(steps=found["steps"], precision=name), cache)
        last = float(done.log["loss"].iloc[-1])
        found[name] = {"last loss": last, "training loss": done.train_loss, "skipped": done.skipped}
    return found


def resumed(bed: Bed, cache: Path) -> Found:
    """A run that is killed after its first checkpoint and goes on, beside two that nobody disturbs."""
    recipe = bed.recipe()
    folder = result_folder(recipe, bed.clip, torch.device(bed.device), cache / "killed")
    file = folder.with_name(f"{folder.name}.partial.safetensors")
    arguments = (recipe, bed.clip.name, bed.device, cache / "killed")
    child = multiprocessing.get_context("spawn").Process(target=_train_until_killed, args=arguments)
    child.start()
    try:
        while child.is_alive() and not file.exists():
            time.sleep(0.002)
    finally:
        child.kill()
        child.join()
    with safe_open(file, "pt") as stored:  # fails if the run was done, or failed, before
        before = json.loads(stored.metadata()["facts"])["optimizer"]["steps"]
    whole, again, after = (bed.train(recipe, cache / name).theta for name in ("whole", "again", "killed"))
    return {
        "steps before the kill": before,
        "steps": recipe.steps,
        "largest difference": _largest(whole, after),
        "largest difference of two undisturbed runs": _largest(whole, again),
    }


def _train_until_killed(recipe: Recipe, model: str, device: str, cache: Path) -> None:
    beside.CHECKPOINT_SECONDS = -1.0  # after every step
    finetune(recipe, load_clip(device, model), device, cache)


def merges(bed: Bed, cache: Path) -> Found:
    """The model with four kinds of noise added, merged on the device and on the CPU."""
    start, draw = bed.start(), generator("merges", 0)
    noisy = ({name: w + 1e-3 * torch.randn(w.shape, generator=draw) for name, w in start.items()} for _ in range(4))
    models = [start, *noisy]
    matrices = [name for name, w in start.items() if w.ndim == 2][:MATRICES]
    found: Found = {}
    for method, names in ((task_arithmetic, [*start]), (ties, [*start]), (tsv_m, matrices)):
        here = [{name: theta[name] for name in names} for theta in models]
        there = [{name: w.to(bed.device) for name, w in theta.items()} for theta in here]
        first = [{matrices[0]: theta[matrices[0]]} for theta in there]
        method(first[0], first[1:])  # warms up
        seconds, merged = bed.seconds(method, there[0], there[1:])
        cpu_seconds, expected = bed.seconds(method, here[0], here[1:])
        found[method.__name__] = {
            "tensors": len(names),
            "seconds": seconds,
            "seconds on the CPU": cpu_seconds,
            "largest difference": _largest({name: w.cpu() for name, w in merged.items()}, expected),
            "largest change of a weight": _largest(expected, start),
        }
    return found


def eigenvalue(bed: Bed, cache: Path) -> Found:
    """The largest of the Hessian; and the testbed's on the device, beside the CPU's."""
    operator = _hessian(bed.clip, bed.images)
    vector = torch.ones(operator.shape[0], device=operator.device, dtype=operator.dtype)
    with second_derivatives():
        product = [bed.seconds(operator.__matmul__, vector)[0] for _ in range(2)][1]  # the first warms up
    seconds, (values, _) = bed.seconds(top_eigenvalues, operator, 1, 1e-2)
    places = {"CPU": ("cpu", True), "device": (bed.device, True), "device, no TF32": (bed.device, False)}
    small = {}
    for where, (device, tf32) in places.items():
        torch.backends.cudnn.allow_tf32 = tf32  # in convolutions, where PyTorch takes it unless told otherwise
        operator = _hessian(load_clip(device), bed.images)
        small[where] = float(top_eigenvalues(operator, 1, 1e-6)[0])
    return {
        "images": bed.images,
        "value": float(values[0]),
        "seconds": seconds,
        "seconds of a product": product,
        "the testbed's": small,
        "relative differences": {where: abs(value / small["CPU"] - 1) for where, value in small.items()},
    }


def _hessian(clip: Clip, images: int) -> Any:
    task = load_task(TASK, clip.size)
    theta, head = weights_of(clip.encoder), zero_shot_head(clip, task)
    return hessian(clip.encoder, theta, subset(task.test, images), head)


def testbed(bed: Bed, cache: Path) -> Found:
    """The central experiment for one seed, to be put beside the CPU's."""
    preset, arms = ("smoke", ["SAM"]) if bed.tiny else ("laptop", ["AdamW", "SAM"])
    run = replace(begin("gpu", {"preset": preset, "device": bed.device}), cache=cache)
    wanted = [(run, ARMS[arm], 0, 1.0) for arm in arms]
    seconds, found = bed.seconds(campaign.measure_many, central.measure, wanted)
    means = {one["arm"]: {row: one[row]["mean"] for row in central.ROWS} for one in found}
    return {"preset": preset, "seed": 0, "seconds": seconds, "means": means}


PARTS: dict[str, Callable[[Bed, Path], Found]] = {
    part.__name__: part
    for part in (steps, estimates, launches, micro_batches, precisions, resumed, merges, eigenvalue, testbed)
}


def _launches(bed: Bed, step: Step) -> int:
    step()  # warms up
    if not bed.cuda:
        with Calls() as counter:
            step()
        return counter.count
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        bed.seconds(step)
    on_device = [e for e in profiler.events() or () if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    count = sum(not e.name.startswith(("Memcpy", "Memset")) for e in on_device)
    if not count:
        raise RuntimeError("the profiler saw no kernel")
    return count


def _quartiles(numbers: Sequence[float]) -> list[float]:
    return statistics.quantiles(numbers, n=4, method="inclusive")


def _largest(a: Theta, b: Theta) -> float:
    return max(float((w - b[name]).abs().max()) for name, w in a.items())


def _distance(a: Theta, b: Theta) -> float:
    return sum(float((w - b[name]).double().square().sum()) for name, w in a.items()) ** 0.5


def _measured(part: str, bed: Bed, seconds: float) -> Found:
    """What a part finds, or its error; it is stopped when its time is over."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with tempfile.TemporaryDirectory() as cache:
            found = PARTS[part](bed, Path(cache))
        json.dumps(found, allow_nan=False)
        return found
    except Exception as error:  # the other parts go on
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _stop(*_: object) -> None:
    raise TimeoutError("the time for this part was over")


def _stamp(bed: Bed, begun: float, commit: str | None) -> Found:
    """As `run.Run.stamp`, with the versions of CUDA and of the driver."""
    driver = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
    stamp = {
        "device": provenance.device(bed.device),
        "model": bed.clip.name,
        "cuda": torch.version.cuda if bed.cuda else None,
        "driver": subprocess.getoutput(driver) if bed.cuda else None,
        "seconds": round(time.monotonic() - begun, 1),
        **provenance.software(),
    }
    return stamp | ({"commit": commit} if commit else {})


def main() -> None:
    """Measure part after part; print and write what is found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins later; a third of them for each")
    parser.add_argument("--tiny", action="store_true", help="the embedded model and few steps")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="file to write, by default that of the book if there is a GPU")
    parser.add_argument("--commit", help="for the stamp, where the code is no checkout")
    a = parser.parse_args()
    begun, device, values = time.monotonic(), find_device(a.device), {}
    out = a.out or (PUBLISHED / "gpu.json" if device == "cuda" and not a.tiny else None)
    signal.signal(signal.SIGALRM, _stop)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("SAMLIB_CACHE", folder)  # for decoded images: nothing else is read from there
        clip = load_clip(device, registry.TESTBED if a.tiny else MODEL)
        bed = Bed(device, clip, a.tiny, *((16, 4, 4, 3, 4) if a.tiny else (128, 32, 12, 10, 8)))
        for part in a.parts:
            spent = time.monotonic() - begun
            print(f"[{spent:5.1f} s] {part} ...", flush=True)
            left = 60 * a.minutes - spent
            values[part] = {"skipped": "the time was over"}
            if left > 0:
                values[part] = _measured(part, bed, min(left, SHARE * 60 * a.minutes))
            gc.collect()
            if bed.cuda:
                torch.cuda.empty_cache()
            print(f"[{time.monotonic() - begun:5.1f} s] {part}: {json.dumps(values[part])}", flush=True)
            if out:
                write_json(out, {"values": values, "stamp": _stamp(bed, begun, a.commit)})
    sys.exit(any("error" in found for found in values.values()))


if __name__ == "__main__":
    main()
