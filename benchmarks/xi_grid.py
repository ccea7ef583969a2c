"""The map of the disentanglement error: `python -m benchmarks.xi_grid`.

The definition has four predictions a cell: on the images of both tasks, with one task vector and with both. *naive*
makes all of them, in batches of 500 images; *library* is `interference.xi`, which makes each model once, for the images
of both tasks together. Both on the testbed, in turns; printed are seconds and their ratio.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from torch import Tensor

from samlib.data.tasks import load_task, subset
from samlib.measure.interference import xi
from samlib.model.evaluate import logits
from samlib.model.head import zero_shot_head
from samlib.model.theta import task_vector, weights_of
from samlib.notebook.run import begin


def main() -> None:
    """Print the median of the paired ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", type=int, default=9, help="values of each coefficient, from -2 to 2")
    a = parser.parse_args()
    run = begin("xi_grid", {"preset": "published"})
    clip = run.clip
    theta_0 = weights_of(clip.encoder)
    torch.manual_seed(0)
    theta_1, theta_2 = ({n: w + 0.1 * w.std() * torch.randn_like(w) for n, w in theta_0.items()} for _ in range(2))
    loaded = [load_task(name) for name in run.preset.tasks[:2]]
    splits, heads = [subset(task.test, 200) for task in loaded], [zero_shot_head(clip, task) for task in loaded]
    grid = torch.linspace(-2, 2, a.points).tolist()
    taus = task_vector(theta_1, theta_0), task_vector(theta_2, theta_0)

    def predict(a_1: float, a_2: float, t: int) -> Tensor:
        theta = {name: w + a_1 * taus[0][name] + a_2 * taus[1][name] for name, w in theta_0.items()}
        return logits(clip.encoder, theta, splits[t].images, heads[t]).argmax(1)

    def naive() -> Tensor:
        error = torch.zeros(len(grid), len(grid), dtype=torch.float64)
        for i, a_1 in enumerate(grid):
            for j, a_2 in enumerate(grid):
                for t, alone in ((0, (a_1, 0.0)), (1, (0.0, a_2))):
                    error[i, j] += (predict(a_1, a_2, t) != predict(*alone, t)).double().mean()
        return error

    def library() -> Tensor:
        parts = splits[0], heads[0], splits[1], heads[1]
        return xi(clip.encoder, theta_0, theta_1, theta_2, *parts, grid, grid)

    seconds: dict[str, list[float]] = {"naive": [], "library": []}
    found = {}
    for _ in range(a.rounds):
        for way in (naive, library):
            begun = time.perf_counter()
            found[way.__name__] = way()
            seconds[way.__name__].append(time.perf_counter() - begun)
    ratios = [ours / theirs for ours, theirs in zip(seconds["library"], seconds["naive"], strict=True)]
    difference = float((found["naive"] - found["library"]).abs().max())
    print(f"{a.points} x {a.points} cells, {a.rounds} rounds; largest difference {difference:.3f}")
    print(f"naive {median(seconds['naive']):.2f} s, library {median(seconds['library']):.2f} s")
    print(f"library / naive: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
