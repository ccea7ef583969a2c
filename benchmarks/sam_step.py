"""What a step of SAM costs beyond its two gradients: `python -m benchmarks.sam_step`.

The floor is two forward and backward passes and one step of AdamW. Every implementation takes its step in turn with
the floor, round by round; printed is the median of the paired ratios, to the floor and to one plain step of AdamW.
Launches are operators called beyond the floor's; memory is the peak of a fresh process beyond the floor's, in units of
one copy of the parameters.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import pandas as pd
import pytorch_optimizer
import torch
from torch import Tensor, nn

from benchmarks.operators import Calls
from samlib.model import clip
from samlib.train.sam import SAM

EVERY = 4  # of the variant that climbs in every k-th step only
RHO, ETA = 0.05, 0.01
Step = Callable[[], object]


def network(name: str, batch_size: int) -> tuple[nn.Module, Tensor]:
    """A randomly initialised image encoder and a batch of noise."""
    torch.manual_seed(0)
    if name == "testbed":
        return clip.build()[1].train(), torch.rand(batch_size, 3, 32, 32)
    return open_clip.create_model("ViT-B-32", pretrained=None).visual.train(), torch.rand(batch_size, 3, 224, 224)


def steps(name: str, batch_size: int) -> tuple[dict[str, Step], nn.Module]:
    """The ways to take a step, all on one network; the base optimiser is AdamW throughout."""
    model, images = network(name, batch_size)

    def gradient() -> Tensor:
        loss = model(images).square().mean()
        loss.backward()
        return loss

    def adamw() -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    floor_base, plain_base = adamw(), adamw()

    def floor() -> None:
        for _ in range(2):
            floor_base.zero_grad()
            gradient()
        floor_base.step()

    def one_gradient() -> None:
        floor_base.zero_grad()
        gradient()
        floor_base.step()

    @torch.no_grad()
    def per_tensor() -> None:
        """SAM the obvious way: one tensor after the other."""
        parameters = list(model.parameters())
        plain_base.zero_grad()
        with torch.enable_grad():
            gradient()
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        kept = []
        for p in parameters:
            kept.append(p.clone())
            if p.grad is not None:
                p.add_(p.grad * (RHO / (norm + 1e-12)))
        plain_base.zero_grad()
        with torch.enable_grad():
            gradient()
        for p, w in zip(parameters, kept, strict=True):
            p.copy_(w)
        plain_base.step()

    theirs = pytorch_optimizer.SAM(model.parameters(), torch.optim.AdamW, rho=RHO, lr=1e-6, fused=True)

    def library() -> None:
        theirs.zero_grad()
        gradient()
        theirs.step(gradient)  # type: ignore[arg-type]

    ours, adaptive = SAM(adamw(), RHO), SAM(adamw(), RHO, adaptive=True, eta=ETA)
    seldom = SAM(adamw(), RHO, every=EVERY)
    watched = SAM(adamw(), RHO, diagnose=True)
    ways: dict[str, Step] = {
        "floor": floor,
        "AdamW": one_gradient,
        "samlib SAM": lambda: ours.step(gradient),
        "samlib ASAM": lambda: adaptive.step(gradient),
        "samlib SAM, diagnosed": lambda: watched.step(gradient),
        f"samlib SAM, every {EVERY}": lambda: [seldom.step(gradient) for _ in range(EVERY)],
        "pytorch_optimizer SAM": library,
        "one tensor at a time": per_tensor,
    }
    return ways, model


def peak(name: str, batch_size: int, way: str) -> int:
    """Peak memory in bytes of two steps in a process of their own (Linux only)."""
    step = steps(name, batch_size)[0][way]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, that of building the network
    for _ in range(2):
        step()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def timings(name: str, batch_size: int, rounds: int) -> pd.DataFrame:
    """One row a way of taking a step: time and launches."""
    ways, model = steps(name, batch_size)
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for n in range(rounds + 1):  # the first warms up
        for way, step in ways.items():
            begun = time.perf_counter()
            step()
            if n:
                spent[way].append(time.perf_counter() - begun)
    calls = {}
    for way, step in ways.items():
        with Calls() as counter:
            step()
        calls[way] = counter.count
    print(f"\n{name}, {len(list(model.parameters()))} tensors, batch of {batch_size}, ", end="")
    print(f"floor {statistics.median(spent['floor']):.3f} s a step")
    rows = {}
    for way in ways:
        fewer = EVERY if "every" in way else 1
        ratios = [a / b / fewer for a, b in zip(spent[way], spent["floor"], strict=True)]
        plain = [a / b / fewer for a, b in zip(spent[way], spent["AdamW"], strict=True)]
        rows[way] = {
            "time / floor": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "time / AdamW": statistics.median(plain),
            "launches - floor": calls[way] - calls["floor"] if fewer == 1 else None,
        }
    return pd.DataFrame(rows).T


def memory(name: str, batch_size: int) -> pd.Series[float]:
    """Peak of each way beyond the floor's, in copies of the parameters."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        ways, model = steps(name, batch_size)
        peaks = {way: fresh.apply(peak, (name, batch_size, way)) for way in ways}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return pd.Series({way: (value - peaks["floor"]) / size for way, value in peaks.items()})


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    a = parser.parse_args()
    networks = (("ViT-B-32", 16), ("testbed", 32))
    for name, batch_size in networks:
        print(timings(name, batch_size, a.rounds).round(3).to_string(), flush=True)
    print(f"(every {EVERY}: a step costs at least {1 + 1 / EVERY} times one of AdamW)")
    for name, batch_size in networks:
        print(f"\n{name}: peak memory beyond the floor's, in copies of the parameters")
        print(memory(name, batch_size).round(2).to_string(), flush=True)


if __name__ == "__main__":
    main()
