"""The choice of lambda for every data-free method: `python -m benchmarks.lambda_grid`.

On the testbed, with the grids of the preset `published` and its validation splits, three ways to the same accuracies
are timed side by side: *naive* merges anew for every lambda and evaluates each model with `evaluate.accuracy`; *line*
merges once and walks along the line with `merge.accuracy_curve`; *batched* merges once and puts all models of the grid
through the network together, with torch.func.vmap over stacked weights. Printed are seconds and ratios to naive, of the
median round. Nothing is stopped early: that is sound only once a model would lose even if it got all remaining images
right, and one with 40 % right must see 5/6 of the images before it can be ruled out beside one with 50 %.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import pandas as pd
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from samlib import merge
from samlib.data.tasks import load_task
from samlib.model.evaluate import accuracy
from samlib.model.head import zero_shot_head
from samlib.model.theta import Theta, weights_of
from samlib.notebook.run import begin
from samlib.study.all_methods import MERGES
from samlib.study.arms import Arm, recipes
from samlib.train.finetune import finetune_many


def main() -> None:
    """Print one row a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    run = begin("lambda_grid", {"preset": "published", "steps": 4})  # the time does not depend on how good a model is
    clip = run.clip
    encoder, theta_0 = clip.encoder, weights_of(clip.encoder)
    thetas = [done.theta for done in finetune_many(recipes(run, Arm("adamw"), 0), clip, run.device, run.cache)]
    loaded = [load_task(name) for name in run.preset.tasks]
    splits, heads = [task.validation for task in loaded], [zero_shot_head(clip, task) for task in loaded]

    def naive(function: Callable[..., Theta], grid: Sequence[float], settings: dict[str, object]) -> Tensor:
        rows = []
        for lam in grid:
            theta = function(theta_0, thetas, lam=lam, **settings)
            rows.append([accuracy(encoder, theta, split, head) for split, head in zip(splits, heads, strict=True)])
        return torch.tensor(rows, dtype=torch.float64)

    def line(function: Callable[..., Theta], grid: Sequence[float], settings: dict[str, object]) -> Tensor:
        theta_1 = function(theta_0, thetas, lam=1.0, **settings)
        return merge.accuracy_curve(encoder, theta_0, theta_1, grid, splits, heads)

    @torch.no_grad()
    def batched(function: Callable[..., Theta], grid: Sequence[float], settings: dict[str, object]) -> Tensor:
        theta_1 = function(theta_0, thetas, lam=1.0, **settings)
        models = {name: torch.stack([w + lam * (theta_1[name] - w) for lam in grid]) for name, w in theta_0.items()}
        forward = vmap(lambda theta, images: functional_call(encoder, theta, (images,)), (0, None))
        columns = []
        for split, head in zip(splits, heads, strict=True):
            outputs = [forward(models, part) @ head.T for part in split.images.split(50)]  # (G, B, K)
            columns.append((torch.cat(outputs, 1).argmax(2) == split.labels).double().mean(1))
        return torch.stack(columns, 1)

    rows: dict[str, dict[str, float]] = {}
    for name, method in MERGES.items():
        if method.grid is None:
            continue
        function, grid = getattr(merge, method.function), getattr(run.preset, method.grid)
        seconds: dict[str, list[float]] = {}
        found = {}
        for _ in range(rounds):
            for way in (naive, line, batched):
                begun = time.perf_counter()
                found[way.__name__] = way(function, grid, method.settings)
                seconds.setdefault(way.__name__, []).append(time.perf_counter() - begun)
        rows[name] = {"models": len(grid)} | {f"{way}, s": median(times) for way, times in seconds.items()}
        for way in ("line", "batched"):
            ratios = [a / b for a, b in zip(seconds[way], seconds["naive"], strict=True)]
            rows[name][f"{way} / naive"] = median(ratios)
        rows[name]["largest difference"] = max(float((found[w] - found["naive"]).abs().max()) for w in found)
    frame = pd.DataFrame(rows).T
    totals = frame.sum()
    for way in ("line", "batched"):
        totals[f"{way} / naive"] = totals[f"{way}, s"] / totals["naive, s"]
    totals["largest difference"] = frame["largest difference"].max()
    frame.loc["all"] = totals
    print(frame.round(3).to_string())


if __name__ == "__main__":
    main()
