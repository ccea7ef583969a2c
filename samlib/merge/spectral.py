"""Methods that look at singular vectors: TSV-M, Iso-C, Iso-CTS; and WUDI, which looks at row spaces.

They treat the matrices (tensors with two dimensions) and average the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samlib.merge.method import LAM, per_tensor
from samlib.rules import number, whole


@per_tensor("Gargiulo et al. 2025 (TSV-Merge)", lam=LAM)
def tsv_m(taus: Tensor, lam: float = 1.0) -> Tensor:
    """TSV-M: keep the leading singular triplets of every task, decorrelate them, and add.

    Of each task's matrix the first int(r/T) triplets are kept, r = min(rows, columns). The kept left vectors side
    by side are replaced by the nearest matrix with orthonormal columns, the right ones likewise. A triplet whose
    singular value is zero takes no part. With more tasks than rows or columns nothing is kept of a matrix.

    Args:
        lam: coefficient of the merged task vector, any finite number; the method itself has 1.
    """
    if taus.ndim != 3:
        return lam * taus.mean(0)
    share = min(taus.shape[1:]) // len(taus)
    triplets = [_alive(*_svd(tau, share)) for tau in taus]
    u = torch.cat([u for u, _, _ in triplets], 1)  # (m, T share)
    s = torch.cat([s for _, s, _ in triplets])
    vh = torch.cat([vh for _, _, vh in triplets])  # (T share, n)
    return lam * (orthonormal(u) * s @ orthonormal(vh))


@per_tensor("Marczak et al. 2025 (Iso-C)", lam=LAM)
def iso_c(taus: Tensor, lam: float = 1.0) -> Tensor:
    """Iso-C: the sum of the task matrices with all singular values replaced by their mean.

    Args:
        lam: as for `tsv_m`; the paper chooses lam on validation data.
    """
    if taus.ndim != 3:
        return lam * taus.mean(0)
    u, s, vh = _svd(taus.sum(0))
    return lam * (s.mean() * (u @ vh))


@per_tensor("Marczak et al. 2025 (Iso-CTS)", lam=LAM, common=number(0, 1))
def iso_cts(taus: Tensor, lam: float = 1.0, common: float = 0.8) -> Tensor:
    """Iso-CTS: Iso-C whose weakest common directions give way to directions of single tasks.

    The first `common` share of the singular triplets of the sum spans the common space. Each task adds as many
    leading triplets of what it has outside of the common left space as fill the rest, shared equally. All left and
    right vectors are then made orthonormal, all singular values replaced by their mean. Of matrices without enough
    directions, arbitrary ones fill the rest.

    Args:
        lam: as for `tsv_m`.
        common: share of the common directions, in [0, 1].
    """
    if taus.ndim != 3:
        return lam * taus.mean(0)
    T, r = len(taus), min(taus.shape[1:])
    each = round((r - int(r * common)) / T)  # directions of one task
    each -= each * T > r
    shared = r - each * T
    u, s, vh = _svd(taus.sum(0), shared)
    own = [_svd(tau - u @ (u.T @ tau), each) for tau in taus]
    u = torch.cat([*(one[0] for one in own), u], 1)
    s = torch.cat([*(one[1] for one in own), s])
    vh = torch.cat([*(one[2] for one in own), vh])
    return lam * (s.mean() * (orthonormal(u) @ orthonormal(vh)))


@per_tensor("Cheng et al. 2025 (WUDI-Merging)", lam=LAM, steps=whole(0), lr=number(0, open_low=True))
def wudi(taus: Tensor, lam: float = 1.0, steps: int = 300, lr: float = 1e-5) -> Tensor:
    """WUDI: the merged matrix that disturbs each task least in the row space of its own task matrix.

    Minimises sum_t ||(tau - tau_t) tau_t^T||_F^2 / ||tau_t||_F^2 by Adam, from tau = sum_t tau_t.

    Args:
        lam: as for `tsv_m`.
        steps: of Adam, >= 0.
        lr: of Adam, > 0.
    """
    if taus.ndim != 3:
        return lam * taus.mean(0)
    weights = taus.square().sum((1, 2), keepdim=True)
    weights = torch.where(weights > 0, 1 / weights, 0)
    grams = weights * taus.mT @ taus  # (T, n, n)
    gram, pull = grams.sum(0), (taus @ grams).sum(0)  # the gradient is 2 (tau gram - pull)
    tau = taus.sum(0)
    adam = torch.optim.Adam([tau], lr=lr)
    for _ in range(steps):
        tau.grad = 2 * (tau @ gram - pull)
        adam.step()
    return lam * tau


def _svd(matrix: Tensor, share: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,), V^T (k, n): the leading `share` singular triplets, by default all."""
    if matrix.shape[0] < matrix.shape[1]:  # LAPACK takes twice as long for a wide matrix as for its transpose
        v, s, uh = _svd(matrix.mT, share)
        return uh.mT, s, v.mT
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :share], s[:share], vh[:share]


def _alive(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets without the vectors of singular value zero, which are arbitrary: they become zero, too."""
    keep = s > s[:1] * max(len(u), vh.shape[1]) * torch.finfo(s.dtype).eps
    return u * keep, s, vh * keep[:, None]


def orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (of a tall matrix) or rows (of a wide one), (m, n) -> (m, n).

    It is unique at full rank; of a rank-deficient matrix, one of the nearest.

    Source: Schoenemann 1966 (orthogonal Procrustes problem).
    """
    u, _, vh = _svd(matrix)
    return u @ vh
