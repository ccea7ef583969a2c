"""From flat minima to the merge gap: what is measured of every model, and what predicts its gap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from samlib.data.tasks import subset
from samlib.measure import hessian, sharpness, taylor
from samlib.merge.linear import average
from samlib.model.clip import Clip
from samlib.model.evaluate import losses
from samlib.model.theta import Theta, flat, task_vector
from samlib.model.theta import moved as _moved
from samlib.notebook.run import Run
from samlib.study.arms import recipes
from samlib.study.campaign import Part, once
from samlib.study.scoring import Bench, bench, score
from samlib.train.finetune import Finetuned

SHARPNESS = {"SAM": 0.05, "ASAM": 0.5}  # radii at which every model is probed, whatever it was trained with
TOP = 3  # eigenvalues of each model
PROBES = 8  # random vectors for the trace
SHARES = (0.1, 0.25, 0.5, 1.0)  # of the length of the merging perturbation, at which losses along directions are taken


def arms(run: Run) -> list[str]:
    """AdamW with once and twice the steps, SAM with the radii of the preset, ASAM with its radius and four times it."""
    radii = [f"SAM, rho {rho:g}" for rho in run.preset.radii]
    return ["AdamW", "AdamW, 2x steps", *radii, *(f"ASAM, rho {k * run.preset.rho_asam:g}" for k in (1, 4))]


def measure(run: Run, clip: Clip, arm: str, seed: int, length: float = 1.0) -> dict[str, Any]:
    """Curvature, sharpness, geometry and merge gap of the models of one arm and one seed.

    The merge is the average of the models, which has nothing to choose. Losses and derivatives are those of
    `n_hessian` fixed images of each task's training split with their true labels, the same for every arm and seed;
    names that begin with "test" are of test images.

    Args:
        run: preset, device and cache.
        clip: the pre-trained model.
        arm: one of `arms`.
        seed: as in `arms.recipes`.
        length: multiple of the preset's steps.

    Returns:
        "tasks": by task, what `_of_task` returns.

    Taught in: 07_flatness.
    """
    settings = [run.preset.n_hessian, SHARPNESS, TOP, PROBES, SHARES]
    return once("flatness", _measure, run, clip, recipes(run, arm, seed, length), settings=settings)


def _measure(run: Run, clip: Clip, done: Sequence[Finetuned]) -> dict[str, Any]:
    b = bench(run, clip)
    thetas = [{name: w.to(run.device) for name, w in d.theta.items()} for d in done]
    theta_m = average(b.theta_0, thetas)
    single, single_loss = score(b, thetas, b.tests)
    merged, merged_loss = score(b, [theta_m], b.tests)
    vectors = torch.stack([flat(task_vector(theta, b.theta_0)) for theta in thetas])  # (T, P)
    norms = vectors.norm(dim=1)
    cosines = vectors @ vectors.T / norms.unsqueeze(1) / norms  # (T, T)
    found = {}
    for t, name in enumerate(b.names):
        found[name] = {
            "test gap": merged_loss[t] - single_loss[t],
            "test accuracy": single[t],
            "test accuracy lost": single[t] - merged[t],
            "train loss": done[t].train_loss,
            "norm": float(norms[t]),
            "cosine": float((cosines[t].sum() - 1) / max(1, len(thetas) - 1)),
        } | _of_task(b, t, thetas[t], theta_m, run.preset.n_hessian)
    return {"tasks": found}


def _of_task(b: Bench, t: int, theta_t: Theta, theta_m: Theta, n: int) -> dict[str, Any]:
    """The derivatives of one model's loss, and its rise along several directions.

    Returns:
        `eigenvalues` (TOP largest, descending), `trace`, `trace error`; `gap`, `first`, `second`, `rest`, `length`,
        `slope`, as in `taylor.taylor_terms`, and the same of n test images with "test " before; `along`,
        the curvature eps^T H eps / ||eps||^2 of the merging perturbation; for each name in SHARPNESS `worst` and
        `average`; for the directions "merge" (eps), "SAM" and "ASAM" (climbs on these images) and "random": `energy`
        (share of the squared length within the TOP eigenvectors), `cosine` (with eps; of "random" the absolute value)
        and `rise` (of the loss, at SHARES of the length of eps).
    """
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
        steps = [_moved(theta_t, share * eps.norm() * unit) for share in SHARES]
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
        **terms,
        **{f"test {name}": value for name, value in test_terms.items() if name != "gap"},
        "test gap on few": test_terms["gap"],
        "along": 2 * terms["second"] / terms["length"] ** 2,
        "sharpness": {name: {k: v for k, v in found.items() if k != "loss"} for name, found in sharp.items()},
        "directions": directions,
    }


def table(runs: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Results of `measure` as a table, one row a model.

    Args:
        runs: results of `measure` with `arm`, `seed` and `recipes`, as they are published.

    Returns:
        arm, rho, seed, task; `gap` (of the test loss, nats) and `accuracy lost`; the numbers of `measure` that are
        single numbers; `top eigenvalue`; `SAM sharpness`, `ASAM sharpness` (worst);
        `quadratic` (first + second) and `test along` (curvature along the merging perturbation on test images).

    Taught in: 07_flatness.
    """
    rows = []
    for r in runs:
        for task, found in r["tasks"].items():
            row: dict[str, Any] = {"arm": r["arm"], "rho": r["recipes"][0]["rho"], "seed": r["seed"], "task": task}
            row |= {name: value for name, value in found.items() if isinstance(value, float)}
            row |= {"gap on training images": found["gap"], "gap": found["test gap"]}
            row |= {"accuracy lost": found["test accuracy lost"], "top eigenvalue": found["eigenvalues"][0]}
            row |= {f"{name} sharpness": values["worst"] for name, values in found["sharpness"].items()}
            row |= {"quadratic": found["first"] + found["second"]}
            rows.append(row | {"test along": 2 * found["test second"] / found["length"] ** 2})
    return pd.DataFrame(rows)


def plan(run: Run, seed: int) -> list[Part]:
    """Every arm of `arms`: what `samlib.publish` measures."""
    return [(run, [(arm, seed, 1.0) for arm in arms(run)])]
