"""Sharpness-aware minimisation (SAM, ASAM) around any torch optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], object]  # runs backward() and returns the loss


class SAM:
    """Minimise the loss at the worst point of a small ball around the weights.

    Each step measures the gradient g at w, climbs to w + eps with
    eps = rho g / ||g|| (SAM) or eps = rho (|w| + eta)^2 g / ||(|w| + eta) g|| (ASAM),
    measures the gradient there, returns to w exactly and lets the base optimiser use that gradient.
    With rho = 0 there is no second pass and the step is the base optimiser's, bit for bit.

    Args:
        base: optimiser over float32 or float64 parameters. Autocast to bf16 keeps them so, but rounds w + eps in
            the forward pass: a small rho needs full precision.
        rho: radius of the ball, in the weights' L2 norm (SAM) or relative norm (ASAM), >= 0.
        adaptive: True for ASAM, which scales every parameter by |w| + eta.
        eta: floor of that scale, >= 0 (0.01 in Kwon et al., 0 in the merging paper).
        clip_norm: largest L2 norm of the update gradient; the first gradient is never clipped.

    Attributes:
        last: scalar tensors of the last step: `loss` (at w), `loss_perturbed` (at w + eps) and
            `grad_norm` (||g|| at w).

    Raises:
        ValueError: rho, eta or clip_norm out of range, or no parameter that trains.
        TypeError: a parameter in reduced precision, where most of eps would be rounded away.

    Source: Foret et al. 2021, eq. 2-3 (SAM); Kwon et al. 2021, section 3 (ASAM).
    Taught in: 02_deriving_sam.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        rho: float,
        adaptive: bool = False,
        eta: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        if not (rho >= 0 and math.isfinite(rho)):
            raise ValueError(f"rho must be a finite number >= 0, not {rho}")
        if not (eta >= 0 and math.isfinite(eta)):
            raise ValueError(f"eta must be a finite number >= 0, not {eta}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be None or > 0, not {clip_norm}")
        self.base, self.rho, self.adaptive, self.eta, self.clip_norm = base, rho, adaptive, eta, clip_norm
        self.last: dict[str, Tensor] = {}
        self._saved: tuple[list[Tensor], list[Tensor]] | None = None  # (parameters, their values at w)
        parameters = self._parameters()
        if not parameters:
            raise ValueError("the base optimiser has no parameter with requires_grad=True")
        for p in parameters:
            if p.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"SAM needs float32 or float64 parameters (try autocast), not {p.dtype}")

    def step(self, closure: Closure) -> Tensor:
        """One update.

        Args:
            closure: computes the batch loss, calls `backward()` and returns the loss; it runs twice
                (once if rho = 0). Gradients are zeroed before each run.

        Returns:
            The loss at w, before the update, a detached scalar.

        Raises:
            TypeError: the closure returns no tensor.
            FloatingPointError: the first gradient is not finite.
        """
        loss = loss_perturbed = self._measure(closure)
        grads = [p.grad for p in self._parameters() if p.grad is not None]
        if not grads:
            raise ValueError("the closure left no gradient: it must call loss.backward()")
        grad_norm = _norm(grads)
        if self.rho > 0:
            self.perturb()
            try:
                loss_perturbed = self._measure(closure)
            finally:
                self.restore()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters(), self.clip_norm)
        self.base.step()
        self.last = {"loss": loss, "loss_perturbed": loss_perturbed, "grad_norm": grad_norm}
        return loss

    @torch.no_grad()
    def perturb(self) -> None:
        """Move the weights from w to w + eps, with g taken from `.grad`; a zero g moves nothing.

        Raises:
            FloatingPointError: the gradient is not finite.
            RuntimeError: the weights are perturbed already.
        """
        if self._saved is not None:
            raise RuntimeError("the weights are perturbed already: call restore() first")
        params = [p for p in self._parameters() if p.grad is not None]
        direction = [p.grad for p in params if p.grad is not None]
        if self.adaptive:
            scale = list(torch._foreach_abs(params))  # T = |w| + eta
            torch._foreach_add_(scale, self.eta)
            direction = list(torch._foreach_mul(direction, scale))  # T g
            norm = _norm(direction).item()
            torch._foreach_mul_(direction, scale)  # T^2 g
        else:
            norm = _norm(direction).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient at w is not finite (norm {norm})")
        values = [torch.empty_like(p) for p in params]
        torch._foreach_copy_(values, params)
        self._saved = (params, values)
        if norm >= torch.finfo(torch.float32).tiny:
            torch._foreach_add_(params, direction, alpha=self.rho / norm)

    @torch.no_grad()
    def restore(self) -> None:
        """Copy w back, bit for bit and into the same storage.

        Raises:
            RuntimeError: the weights are not perturbed.
        """
        if self._saved is None:
            raise RuntimeError("nothing to restore: call perturb() first")
        params, values = self._saved
        torch._foreach_copy_(params, values)
        self._saved = None

    def state_dict(self) -> dict[str, Any]:
        """The base optimiser's state; SAM itself keeps none between steps."""
        return self.base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned."""
        self.base.load_state_dict(state)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.base.param_groups for p in group["params"] if p.requires_grad]

    def _measure(self, closure: Closure) -> Tensor:
        self.base.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = closure()
        if not isinstance(loss, Tensor):
            raise TypeError(f"the closure must return the loss as a tensor, not {type(loss).__name__}")
        return loss.detach()


def _norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm over all tensors, in their own precision."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
