"""The weights of an encoder as a dictionary, and task vectors between two of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

Theta = dict[str, Tensor]  # weights by name
Weights = Mapping[str, Tensor]  # the same, or `Lazy`


class Lazy(Mapping[str, Tensor]):
    """Weights that are made when they are asked for, one tensor at a time, and not kept.

    Args:
        names: of the tensors, in their order.
        make: name -> tensor.
    """

    def __init__(self, names: Collection[str], make: Callable[[str], Tensor]) -> None:
        self.names, self.make = names, make

    def __getitem__(self, name: str) -> Tensor:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def weights_of(encoder: nn.Module) -> Theta:
    """The encoder's parameters as detached copies, by name."""
    return {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}


def task_vector(theta_t: Weights, theta_0: Weights) -> Theta:
    """tau_t = theta_t - theta_0.

    Args:
        theta_t: weights fine-tuned on task t.
        theta_0: pre-trained weights, same names, shapes and dtypes.

    Returns:
        tau_t, in the order of theta_0's names.

    Raises:
        ValueError: names, shapes or dtypes differ, or a value is not finite.

    Source: Ilharco et al. 2023, section 2.
    Taught in: 01_why_merging_interferes.
    """
    check_fit([theta_0, theta_t])
    check_values([theta_0, theta_t])
    return {name: theta_t[name] - w for name, w in theta_0.items()}


def dot(tau_1: Theta, tau_2: Theta) -> float:
    """The inner product of two sets of weights, name by name, in float64."""
    return sum(float((tau_1[name].double() * tau_2[name].double()).sum()) for name in tau_1)


def flat(theta: Theta) -> Tensor:
    """All weights as one vector, float64 (P,), in the order of their names, whatever order the dictionary has."""
    return torch.cat([theta[name].detach().double().reshape(-1) for name in sorted(theta)])


def moved(theta: Theta, step: Tensor) -> Theta:
    """The weights after a step.

    Args:
        theta: where it begins.
        step: (P,), of all weights, ordered as by `flat`.

    Returns:
        theta + step, in the dtypes of theta and the order of its names.
    """
    names = sorted(theta)
    parts = step.split([theta[name].numel() for name in names])
    return {
        name: theta[name] + part.view(theta[name].shape).to(theta[name])
        for name, part in zip(names, parts, strict=True)
    }


def wide(w: Tensor) -> Tensor:
    """The tensor in at least fp32."""
    return w.float() if w.dtype in (torch.float16, torch.bfloat16) else w


def check_fit(weights: Sequence[Weights], labels: Sequence[str] | None = None) -> None:
    """Refuse an empty list and weights that differ in names, shapes or dtypes.

    Args:
        weights: theta_0 first; anything with names, and tensors that have shape and dtype.
        labels: what to call them in the error, such as their files; theta_0, thetas[0], ... by default.

    Raises:
        ValueError: what differs, and where.
    """
    if len(weights) < 2:
        raise ValueError("the list of weights to merge is empty: give at least one fine-tuned model beside theta_0")
    labels = labels or _labels(weights)
    first = weights[0]
    if not first:
        raise ValueError(f"{labels[0]} holds no tensor")
    for label, theta in zip(labels, weights, strict=True):
        for name in sorted(theta.keys() ^ first.keys()):
            has, lacks = (label, labels[0]) if name in theta else (labels[0], label)
            raise ValueError(f"tensor {name!r} is in {has} but not in {lacks}: all models need the same tensors")
        for name, w in theta.items():
            want = first[name]
            if w.shape != want.shape or w.dtype != want.dtype:
                have, need = f"{tuple(w.shape)} {w.dtype}", f"{tuple(want.shape)} {want.dtype}"
                raise ValueError(f"tensor {name!r} is {have} in {label} but {need} in {labels[0]}")
            if not w.dtype.is_floating_point:
                raise ValueError(f"tensor {name!r} of {label} is {w.dtype}: only floating point can be merged")


def check_values(weights: Sequence[Weights], labels: Sequence[str] | None = None) -> None:
    """Refuse NaN and infinity.

    Args:
        weights, labels: as for `check_fit`.

    Raises:
        ValueError: the tensor and where it is.
    """
    for label, theta in zip(labels or _labels(weights), weights, strict=True):
        for name, w in theta.items():
            if not torch.isfinite(w).all():
                raise ValueError(f"tensor {name!r} of {label} holds NaN or infinity")


def _labels(weights: Sequence[Weights]) -> list[str]:
    return ["theta_0", *(f"thetas[{i}]" for i in range(len(weights) - 1))]
