"""How two fine-tuned models lie to each other, for every pair of tasks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from torch import nn

from samlib.data.tasks import subset
from samlib.measure.interference import cosine, cross_task_linearity, sign_conflict
from samlib.measure.landscape import losses_on_line
from samlib.model.clip import Clip
from samlib.model.theta import dot, task_vector
from samlib.notebook.run import Run
from samlib.study.arms import ARMS, recipes
from samlib.study.campaign import Part, once
from samlib.study.scoring import bench
from samlib.train.finetune import Finetuned

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)  # places on the line from one model to the other


def blocks(encoder: nn.Module) -> list[str]:
    """Names of the encoder's transformer blocks, from the image upwards; of another encoder, its direct children."""
    found = [name for name, _ in encoder.named_modules() if re.search(r"blocks\.\d+$", name)]
    return found or [name for name, _ in encoder.named_children()]


def measure(run: Run, clip: Clip, arm: str, seed: int, length: float = 1.0) -> dict[str, Any]:
    """Cross-task linearity, losses in between and angles of all pairs of models of one arm and one seed.

    Args:
        run: preset, device and cache.
        clip: the pre-trained model.
        arm: as in `arms.recipes`.
        seed: as in `arms.recipes`.
        length: multiple of the preset's steps.

    Returns:
        "pairs": by "s, t": `blocks` (block -> distance, coefficient, baseline of `cross_task_linearity` at 1/2, on
        n_hessian test images of each of the two tasks); `losses` (of both tasks at GRID, from theta_s to theta_t, on
        n_hessian training images of each, in nats); `distance` (||theta_s - theta_t||); `cosine` and `sign conflict`
        (of the task vectors).

    Taught in: 06_interference.
    """
    todo = recipes(run, arm, seed, length)
    return once("pairs", _measure, run, clip, todo, images=run.preset.n_hessian, grid=GRID)


def _measure(run: Run, clip: Clip, done: Sequence[Finetuned]) -> dict[str, Any]:
    b, n = bench(run, clip), run.preset.n_hessian
    thetas = [{name: w.to(run.device) for name, w in d.theta.items()} for d in done]
    taus = [task_vector(theta, b.theta_0) for theta in thetas]
    seen, unseen = ([subset(split, n) for split in splits] for splits in (b.trains, b.tests))
    found = {}
    for s, t in combinations(range(len(thetas)), 2):
        linear = [
            cross_task_linearity(b.encoder, thetas[s], thetas[t], unseen[k].images, blocks(b.encoder)) for k in (s, t)
        ]
        line = losses_on_line(
            b.encoder, thetas[s], thetas[t], GRID, [seen[s], seen[t]], [b.heads[s], b.heads[t]]
        )  # (2, G)
        apart = task_vector(thetas[s], thetas[t])
        found[f"{b.names[s]}, {b.names[t]}"] = {
            "blocks": {
                block: {name: (value + linear[1][block][name]) / 2 for name, value in values.items()}
                for block, values in linear[0].items()
            },
            "losses": line.tolist(),
            "distance": dot(apart, apart) ** 0.5,
            "cosine": cosine(taus[s], taus[t]),
            "sign conflict": sign_conflict(taus[s], taus[t]),
        }
    return {"pairs": found}


def plan(run: Run, seed: int) -> list[Part]:
    """Every arm: what `samlib.publish` measures."""
    return [(run, [(arm, seed, 1.0) for arm in ARMS])]
