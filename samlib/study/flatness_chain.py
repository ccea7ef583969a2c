"""From flat minima to the merge gap: what is measured of every model, and what predicts its gap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch

from samlib.data.tasks import subset
from samlib.measure import hessian, sharpness, taylor
from samlib.merge.linear import average
from samlib.model.evaluate import losses
from samlib.model.theta import Theta, flat, moved, task_vector
from samlib.notebook.run import Run
from samlib.study.arms import BASES, Arm, named, recipes
from samlib.study.campaign import Result, Wanted, once
from samlib.study.scoring import Bench, score
from samlib.train.result import Finetuned

SHARPNESS = {"SAM": 0.05, "ASAM": 0.5}  # radii at which every model is probed, whatever it was trained with
TOP = 3  # eigenvalues of each model
PROBES = 8  # random vectors for the trace
SHARES = (0.1, 0.25, 0.5, 1.0)  # of the length of the merging perturbation, at which losses along directions are taken
CANDIDATES = {  # columns of `table` that might predict the merge gap, with their names on the page
    "top eigenvalue": "largest eigenvalue",
    "trace": "trace",
    "SAM sharpness": "sharpness, SAM's",
    "ASAM sharpness": "sharpness, ASAM's",
    "along": "curvature along the merge",
    "test along": "the same on test images",
    "quadratic": "first and second order",
    "slope": "length of the gradient",
    "train loss": "training loss",
    "norm": "length of the task vector",
    "length": "distance to the merge",
    "cosine": "cosine with other task vectors",
}
FLATNESS = tuple(CANDIDATES)[:5]  # those of them that say how flat a minimum is


def arms(run: Run) -> dict[str, Arm]:
    """AdamW with once and twice the steps, SAM with the radii of the preset, ASAM with its radius and four times it."""
    radii = [Arm("sam", rho) for rho in run.preset.radii]
    return BASES | named(*radii, *(Arm("asam", k * run.preset.rho_asam) for k in (1, 4)))


def measure(run: Run, arm: Arm, seed: int, length: float = 1.0) -> Result:
    """Curvature, sharpness, geometry and merge gap of the models of one arm and one seed.

    The merge is the average of the models, which has nothing to choose. Losses and derivatives are those of
    `n_hessian` fixed images of each task's training split with their true labels, the same for every arm and seed;
    names that begin with "test" are of test images.

    Args:
        run: preset, device and cache.
        arm: such as one of `arms`.
        seed: as in `arms.recipes`.
        length: multiple of the preset's steps.

    Returns:
        "tasks": by task `gap_average` (rise of the test loss from the task's own model to the average of all, nats),
        `test accuracy`, `test accuracy lost`, `train loss`, `norm` (of the task vector), `cosine` (mean over the other
        task vectors), and what `_of_task` returns.

    Taught in: 07_flatness.
    """
    settings = [run.preset.n_hessian, SHARPNESS, TOP, PROBES, SHARES]
    return once("flatness-chain", _compute, run, recipes(run, arm, seed, length), settings=settings)


def _compute(b: Bench, thetas: list[Theta], done: Sequence[Finetuned]) -> Result:
    theta_m = average(b.theta_0, thetas)
    single, single_loss = score(b, thetas, b.tests)
    merged, merged_loss = score(b, [theta_m], b.tests)
    vectors = torch.stack([flat(task_vector(theta, b.theta_0)) for theta in thetas])  # (T, P)
    norms = vectors.norm(dim=1)
    cosines = vectors @ vectors.T / norms.unsqueeze(1) / norms  # (T, T)
    found = {}
    for t, name in enumerate(b.names):
        found[name] = {
            "gap_average": merged_loss[t] - single_loss[t],
            "test accuracy": single[t],
            "test accuracy lost": single[t] - merged[t],
            "train loss": done[t].train_loss,
            "norm": float(norms[t]),
            "cosine": float((cosines[t].sum() - 1) / max(1, len(thetas) - 1)),
        } | _of_task(b, t, thetas[t], theta_m)
    return {"tasks": found}


def _of_task(b: Bench, t: int, theta_t: Theta, theta_m: Theta) -> Result:
    """The derivatives of one model's loss, and its rise along several directions.

    Returns:
        `eigenvalues` (TOP largest, descending), `trace`, `trace error`; `gap_train`, `first`, `second`, `rest`,
        `length`, `slope`, as in `taylor.taylor_terms`, and the same of n test images with "test " before; `along`,
        the curvature eps^T H eps / ||eps||^2 of the merging perturbation; for each name in SHARPNESS `worst` and
        `average`; for the directions "merge" (eps), "SAM" and "ASAM" (climbs on these images) and "random": `energy`
        (share of the squared length within the TOP eigenvectors), `cosine` (with eps; of "random" the absolute value)
        and `rise` (of the loss, at SHARES of the length of eps).
    """
    n = b.preset.n_hessian
    split, head = subset(b.trains[t], n), b.heads[t]
    held_out = subset(b.tests[t], n)
    operator = hessian.hessian(b.encoder, theta_t, split, head)
    values, top = hessian.top_eigenvalues(operator, TOP, tol=1e-2)
    trace, error = hessian.trace(operator, PROBES)
    terms = taylor.taylor_terms(b.encoder, theta_t, theta_m, split, head)
    test_terms = taylor.taylor_terms(b.encoder, theta_t, theta_m, held_out, head)
    eps = flat(task_vector(theta_m, theta_t))
    g = flat(taylor.gradient(b.encoder, theta_t, split, head))
    w = flat(theta_t)
    noise = torch.randn(len(w), generator=torch.Generator().manual_seed(t)).to(w)
    start = losses(b.encoder, theta_t, [split], [head]).item()
    directions = {}
    for name, d in {"merge": eps, "SAM": g, "ASAM": w.square() * g, "random": noise}.items():
        unit = d / d.norm()
        steps = [moved(theta_t, share * eps.norm() * unit) for share in SHARES]
        cosine = float(unit @ eps / eps.norm())
        directions[name] = {
            "energy": float((top.to(unit.device).T @ unit).square().sum()),
            "cosine": abs(cosine) if name == "random" else cosine,
            "rise": [losses(b.encoder, theta, [split], [head]).item() - start for theta in steps],
        }
    sharp = {
        name: sharpness.sharpness(b.encoder, theta_t, split, head, rho, adaptive=name == "ASAM", probes=5)
        for name, rho in SHARPNESS.items()
    }
    return {
        "eigenvalues": values.tolist(),
        "trace": trace,
        "trace error": error,
        "gap_train": terms.pop("gap"),
        **terms,
        **{f"test {name}": value for name, value in test_terms.items()},
        "along": 2 * terms["second"] / terms["length"] ** 2,
        "sharpness": {name: {k: v for k, v in found.items() if k != "loss"} for name, found in sharp.items()},
        "directions": directions,
    }


def table(runs: Sequence[Result]) -> pd.DataFrame:
    """Results of `measure` as a table, one row a model.

    Args:
        runs: results of `measure` with `arm`, `seed` and `recipes`, as they are published.

    Returns:
        arm, rho, seed, task; the numbers of `measure` that are single numbers; `points lost` (of test accuracy);
        `top eigenvalue` and `last eigenvalue` (the first and last of TOP); `energy` (of the merging perturbation within
        their eigenvectors); `SAM sharpness`, `ASAM sharpness` (worst); `quadratic` and `test quadratic` (first +
        second); `test along` (curvature along the merging perturbation on test images).

    Taught in: 07_flatness.
    """
    rows = []
    for r in runs:
        for task, found in r["tasks"].items():
            row: dict[str, Any] = {"arm": r["arm"], "rho": r["recipes"][0]["rho"], "seed": r["seed"], "task": task}
            row |= {name: value for name, value in found.items() if isinstance(value, float)}
            row |= {"points lost": 100 * found["test accuracy lost"]}
            row |= {"top eigenvalue": found["eigenvalues"][0], "last eigenvalue": found["eigenvalues"][-1]}
            row |= {"energy": found["directions"]["merge"]["energy"]}
            row |= {f"{name} sharpness": values["worst"] for name, values in found["sharpness"].items()}
            row |= {"quadratic": found["first"] + found["second"]}
            row |= {"test quadratic": found["test first"] + found["test second"]}
            rows.append(row | {"test along": 2 * found["test second"] / found["length"] ** 2})
    return pd.DataFrame(rows)


def walks(runs: Sequence[Result]) -> pd.DataFrame:
    """What `measure` found along its four directions, one row a model, direction and share of the way.

    Args:
        runs: as for `table`.

    Returns:
        arm, seed, task, direction, share, `rise` (of the loss, in nats); `energy` and `cosine` (its absolute value),
        the same for every share.

    Taught in: 07_flatness.
    """
    rows = []
    for r in runs:
        for task, found in r["tasks"].items():
            for name, values in found["directions"].items():
                line = {"arm": r["arm"], "seed": r["seed"], "task": task, "direction": name}
                line |= {"energy": values["energy"], "cosine": abs(values["cosine"])}
                rows += [line | {"share": s, "rise": x} for s, x in zip(SHARES, values["rise"], strict=True)]
    return pd.DataFrame(rows)


def plan(run: Run, seed: int) -> Iterator[list[Wanted]]:
    """Every arm of `arms`: what `python -m samlib.study.publish flatness_chain` measures."""
    yield [(run, arm, seed, 1.0) for arm in arms(run).values()]
