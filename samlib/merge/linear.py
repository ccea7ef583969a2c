"""Sums of task vectors: averaging, task arithmetic, Model Stock, Consensus, DARE."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from samlib.merge.method import LAM, METHODS, Combine, per_tensor, planned, task_vectors
from samlib.model.theta import Lazy, Weights, wide
from samlib.rules import choice, number, whole

TINY = 1e-30  # a squared length below which a task did not move a tensor


@per_tensor("Wortsman et al. 2022, section 2 (uniform soup)")
def average(taus: Tensor) -> Tensor:
    """Weight averaging: (1/T) sum_t theta_t, as theta_0 + (1/T) sum_t tau_t."""
    return taus.mean(0)


@per_tensor("Ilharco et al. 2023, section 4", lam=LAM)
def task_arithmetic(taus: Tensor, lam: float = 0.3) -> Tensor:
    """theta_0 + lam sum_t tau_t.

    Args:
        lam: merging coefficient, any finite number; 1/T gives the average.
    """
    return lam * taus.sum(0)


@per_tensor("Jang et al. 2024 (layer-wise ratio)", lam=LAM)
def model_stock(taus: Tensor, lam: float = 1.0) -> Tensor:
    """Model Stock: the average, pulled back towards theta_0 the more, the less the task vectors agree.

    Per tensor t = T c / (1 + (T - 1) c), where c is the mean cosine between two task vectors, T >= 2, and the merged
    task vector is lam t (1/T) sum_t tau_t. Where 1 + (T - 1) c vanishes, the tensor stays at theta_0. It is made for
    models that agree: where c is negative the factor is, too, and is not bounded.

    Args:
        lam: extra factor, any finite number; the method itself has 1.
    """
    T = len(taus)
    if T < 2:
        raise ValueError("model_stock needs at least two fine-tuned models: it measures the angle between them")
    flat = taus.reshape(T, -1)  # (T, n)
    gram = (flat @ flat.T).double()
    i, j = torch.triu_indices(T, T, 1)
    c = (gram[i, j] / (gram[i, i] * gram[j, j]).sqrt().clamp(min=TINY)).mean().clamp(-1, 1).item()
    floor = 1 + (T - 1) * c
    return taus.mean(0) * (lam * T * c / floor if abs(floor) > 1e-6 else 0.0)


@per_tensor("Wang et al. 2024 (TALL-masks, consensus)", lam=LAM, mask_lam=number(0), agree=whole(1))
def consensus(taus: Tensor, lam: float = 0.3, mask_lam: float = 0.4, agree: int = 2) -> Tensor:
    """Consensus task arithmetic: keep the entries of sum_t tau_t that at least `agree` tasks need.

    Task t needs an entry where |tau_t| >= mask_lam |sum_s tau_s - tau_t|.

    Args:
        lam: coefficient of the masked sum, any finite number.
        mask_lam: how much larger than the rest an entry must be, >= 0 (0.2 to 0.6 in the paper).
        agree: tasks that need an entry for it to stay, >= 1; 1 drops what no task needs; more than T drop everything.
    """
    total = taus.sum(0)
    needs = taus.abs() >= mask_lam * (total - taus).abs()  # (T, *shape)
    return lam * (total * (needs.sum(0) >= agree))


@planned(
    "Yu et al. 2024 (DARE)",
    lam=LAM,
    drop=number(0, 1, open_high=True),
    seed=whole(0),
    then=choice("task_arithmetic", "ties", "consensus"),
)
def dare(
    theta_0: Weights,
    thetas: Sequence[Weights],
    lam: float = 0.3,
    drop: float = 0.9,
    seed: int = 0,
    then: str = "task_arithmetic",
) -> Combine:
    """DARE: drop entries of the task vectors at random, rescale the others by 1 / (1 - drop), and merge.

    Args:
        lam: coefficient of the method that merges.
        drop: probability of an entry to be dropped, in [0, 1).
        seed: of the draw, >= 0; it depends on the seed, the task's place and the tensor's name only.
        then: the method that merges: task_arithmetic, ties or consensus, with its defaults. (TIES keeps 20 % of the
            entries; with drop > 0.8 fewer are left, and it only elects and merges.)
    """
    left = [dropped(theta_0, theta, drop, f"{seed}/{t}") for t, theta in enumerate(thetas)]
    plan = METHODS[then].plan
    assert plan is not None
    combine = plan(theta_0, left, lam=lam)
    return lambda name, taus: combine(name, task_vectors(theta_0, left, name))


def dropped(theta_0: Weights, theta: Weights, drop: float, seed: str) -> Weights:
    """theta_0 plus a task vector of which DARE has dropped entries, made tensor by tensor."""

    def make(name: str) -> Tensor:
        w = wide(theta_0[name])
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        kept = torch.rand(w.shape, generator=draw).to(w.device) >= drop
        return w + (wide(theta[name]) - w) * kept / (1 - drop)

    return Lazy(theta_0, make)
