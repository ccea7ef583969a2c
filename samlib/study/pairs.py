"""How two fine-tuned models lie to each other, for every pair of tasks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import combinations

from torch import nn

from samlib.data.tasks import subset
from samlib.measure.interference import cosine, cross_task_linearity, sign_conflict
from samlib.measure.landscape import losses_on_line
from samlib.model.theta import Theta, dot, task_vector
from samlib.notebook.run import Run
from samlib.study.arms import ARMS, Arm, recipes
from samlib.study.campaign import Result, Wanted, once
from samlib.study.scoring import Bench
from samlib.train.result import Finetuned

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)  # places on the line from one model to the other


def blocks(encoder: nn.Module) -> list[str]:
    """Names of the encoder's transformer blocks, from the image upwards; of another encoder, its direct children."""
    found = [name for name, _ in encoder.named_modules() if re.search(r"blocks\.\d+$", name)]
    return found or [name for name, _ in encoder.named_children()]


def measure(run: Run, arm: Arm, seed: int, length: float = 1.0) -> Result:
    """Cross-task linearity, losses in between and angles of all pairs of models of one arm and one seed.

    Args:
        run: preset, device and cache.
        arm: such as one of `arms.ARMS`.
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
    return once("pairs", _compute, run, todo, images=run.preset.n_hessian, grid=GRID)


def _compute(b: Bench, thetas: list[Theta], done: Sequence[Finetuned]) -> Result:
    n = b.preset.n_hessian
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


def plan(run: Run, seed: int) -> Iterator[list[Wanted]]:
    """Every arm: what `python -m samlib.study.publish pairs` measures."""
    yield [(run, arm, seed, 1.0) for arm in ARMS.values()]
