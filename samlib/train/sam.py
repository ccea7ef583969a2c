"""Sharpness-aware minimisation (SAM, ASAM) around any torch optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DistributedDataParallel

MEANS = ("cosine", "eps_norm")  # of what is measured: averaged over the climbs of a step, not summed
Closure = Callable[[], object]  # runs backward() and returns the loss
Radius = float | Callable[[int], float]  # fixed, or by the number of steps done


class SAM:
    """Minimise the loss at the worst point of a small ball around the weights.

    Each step measures the gradient g at w, climbs to w + eps with
    eps = rho g / ||g|| (SAM) or eps = rho T^2 g / ||T g||, T = |w| + eta (ASAM),
    measures the gradient there, returns to w exactly and lets the base optimiser use that gradient.
    With rho = 0 there is no second pass and the step is the base optimiser's, bit for bit.

    Args:
        base: optimiser over float32 or float64 parameters. Autocast to bf16 keeps them so, but rounds w + eps in the
            forward pass: a small rho needs full precision.
        rho: radius of the ball, in the weights' L2 norm (SAM) or relative norm (ASAM), >= 0; or a function from the
            number of steps done to the radius.
        adaptive: True for ASAM.
        eta: floor of T, >= 0 (0.01 in Kwon et al., 0 in the merging paper).
        scale_biases: False leaves T = 1 for biases and norm layers (parameters with at most one dimension), as Kwon et
            al. do; True scales everything, as the merging paper's code does.
        every: climb in every k-th step only, >= 1; the steps between are the base optimiser's. Costs 1 + 1/k
            gradients a step.
        only: the parameters that climb, None for all; `norm_parameters` gives those of the norm layers.
        clip_norm: largest L2 norm of the update gradient; the first gradient is never clipped.
        scaler: for fp16 autocast; the closure then scales its loss before backward().
        model: what the closure runs. Needed for batch normalisation, whose running statistics stand still in the second
            pass, and for distributed data parallelism, which averages gradients in the second pass only and agrees on
            whether they are finite.
        synchronise: average the first gradient over the processes, too. By default each process climbs along its own,
            the m-sharpness of Foret et al.
        noise: climb along Gaussian noise in place of g: random weight perturbation, the control that asks whether the
            direction matters. A function from the number of steps done to the generator (on the CPU) of the noise.
        same_noise: draw dropout masks and the like in the second pass as in the first.
        diagnose: also measure `cosine` and `eps_norm`, for the memory of one more gradient.

    Attributes:
        last: scalar tensors of the last step: `loss` (at w), `loss_perturbed` (at w + eps, or at w where there was no
            climb), `grad_norm` (||g|| at w); on request `cosine` (between g and the gradient at w + eps, 0 if one of
            them is; with data parallelism between the process's own g and the averaged gradient at w + eps) and
            `eps_norm` (||eps||). Of several climbs a step the first three are summed, and so are means over the
            micro-batches since each closure divides by n; the others are averaged.
        steps, skipped: steps done, and those among them without an update, because a gradient was not finite.

    Raises:
        ValueError: rho, eta, every or clip_norm out of range, no parameter that trains, or several devices.
        TypeError: a parameter in reduced precision, where most of eps would be rounded away.

    Source: Foret et al. 2021, eq. 2-3 (SAM); Kwon et al. 2021, section 3 (ASAM).
    Taught in: 02_deriving_sam.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        rho: Radius,
        adaptive: bool = False,
        eta: float = 0.0,
        *,
        scale_biases: bool = True,
        every: int = 1,
        only: Iterable[Tensor] | None = None,
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        model: nn.Module | None = None,
        synchronise: bool = False,
        noise: Callable[[int], torch.Generator] | None = None,
        same_noise: bool = False,
        diagnose: bool = False,
    ) -> None:
        if not (eta >= 0 and math.isfinite(eta)):
            raise ValueError(f"eta must be a finite number >= 0, not {eta}")
        if type(every) is not int or every < 1:
            raise ValueError(f"every must be an integer >= 1, not {every!r}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be None or > 0, not {clip_norm}")
        self.base, self.rho, self.adaptive, self.eta, self.scale_biases = base, rho, adaptive, eta, scale_biases
        self.every, self.clip_norm, self.model = every, clip_norm, model
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.synchronise, self.noise, self.same_noise, self.diagnose = synchronise, noise, same_noise, diagnose
        if not callable(rho):
            self._radius()
        self.last: dict[str, Tensor] = {}
        self.steps, self.skipped = 0, 0
        self._draw: torch.Generator | None = None
        self._saved: tuple[list[Tensor], list[Tensor]] | None = None  # (parameters, their values at w)
        self._room: dict[Tensor, Tensor] = {}  # for those values; kept, since new memory costs more than a copy
        parameters = self._parameters()
        if not parameters:
            raise ValueError("the base optimiser has no parameter with requires_grad=True")
        for p in parameters:
            if p.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"SAM needs float32 or float64 parameters (try autocast), not {p.dtype}")
        devices = {p.device for p in parameters}
        if len(devices) > 1:
            raise ValueError(f"the parameters must be on one device, not on {', '.join(sorted(map(str, devices)))}")
        self.device = devices.pop()
        self._only = None if only is None else set(only)  # tensors hash by identity
        if self._only is not None and not self._only & set(parameters):
            raise ValueError("only must name at least one parameter of the base optimiser that trains")

    def step(self, *closures: Closure, shared: bool = False) -> Tensor:
        """One update.

        Args:
            closures: each computes the loss of one micro-batch, calls `backward()` on it (on the scaled loss with a
                scaler) and returns it, unscaled. Their losses and gradients are summed, so with n micro-batches
                each divides by n. Each runs twice, or once where there is no climb.
            shared: with several micro-batches, True climbs once, along the gradient of all, and replays all of them
                there; False climbs for each along its own gradient (the m-sharpness of Foret et al.).

        Returns:
            The loss at w, before the update, a detached scalar.

        Raises:
            TypeError: a closure returns no tensor.
            ValueError: no closure, or one that leaves no gradient, or a rho of the schedule is out of range.
        """
        if not closures:
            raise ValueError("step needs at least one closure")
        rho = 0.0 if self.steps % self.every else self._radius()
        self._draw = self.noise(self.steps) if self.noise else None  # one stream for all climbs of the step
        groups = [closures] if shared else [(closure,) for closure in closures]
        found: list[dict[str, Tensor]] = []
        total: dict[Tensor, Tensor] = {}
        for group in groups:
            finite, measured = self._gradient(group, rho)
            found.append(measured)
            if not finite:
                break
            if len(groups) > 1:
                for p, g in self._gradients().items():
                    total[p] = total[p].add_(g) if p in total else g.clone()
        for p, g in total.items():
            p.grad = g
        self._update(finite)
        self.steps += 1
        self.last = {
            name: torch.stack([one[name] for one in found]).mean() * (1 if name in MEANS else len(found))
            for name in found[-1]
        }
        return self.last["loss"]

    @torch.no_grad()
    def perturb(self, rho: float | None = None) -> None:
        """Move the weights from w to w + eps, with g taken from `.grad`; a zero g moves nothing.

        ASAM leaves T^2 g in `.grad`, which spares a copy of the parameters; the second pass clears it.

        Args:
            rho: radius, by default that of the schedule.

        Raises:
            FloatingPointError: the gradient is not finite.
            RuntimeError: the weights are perturbed already.
        """
        if self._saved is not None:
            raise RuntimeError("the weights are perturbed already: call restore() first")
        rho = self._radius() if rho is None else rho
        g = {p: x for p, x in self._gradients().items() if self._only is None or p in self._only}
        if self.noise:
            draw = self._draw or self.noise(self.steps)
            g = {p: torch.randn(p.shape, dtype=p.dtype, generator=draw).to(p.device) for p in g}
        self._room |= {p: torch.empty_like(p) for p in g if p not in self._room}
        T = {p: self._room[p] for p in g if self.adaptive and (self.scale_biases or p.ndim > 1)}  # elsewhere T = 1
        if T:  # where w will be kept there is room for T first
            scales = list(T.values())
            torch._foreach_copy_(scales, list(T))
            torch._foreach_abs_(scales)
            torch._foreach_add_(scales, self.eta)  # T = |w| + eta
        direction, norm = ascent(g, T)
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient at w is not finite (norm {norm})")
        w, kept = list(g), [self._room[p] for p in g]
        if w:
            torch._foreach_copy_(kept, w)
        self._saved = (w, kept)
        if norm >= torch.finfo(torch.float32).tiny:
            torch._foreach_add_(w, direction, alpha=rho / norm)  # w + eps, where eps = rho T^2 g / ||T g||

    @torch.no_grad()
    def restore(self) -> None:
        """Copy w back, bit for bit and into the same storage.

        Raises:
            RuntimeError: the weights are not perturbed.
        """
        if self._saved is None:
            raise RuntimeError("nothing to restore: call perturb() first")
        params, values = self._saved
        if params:
            torch._foreach_copy_(params, values)
        self._saved = None

    def state_dict(self) -> dict[str, Any]:
        """The base optimiser's state, the steps done and skipped, and the scaler's state."""
        mine = {"steps": self.steps, "skipped": self.skipped, "scaler": self.scaler.state_dict()}
        return {"base": self.base.state_dict(), **mine}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned.

        Raises:
            ValueError: it is the state of another optimiser.
        """
        if set(state) != {"base", "steps", "skipped", "scaler"}:
            raise ValueError(f"this is no state of SAM, which has base, steps, skipped and scaler, not {list(state)}")
        if bool(state["scaler"]) != self.scaler.is_enabled():
            raise ValueError("the state was saved with a scaler and is loaded without one, or the other way round")
        self.base.load_state_dict(state["base"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps, self.skipped = state["steps"], state["skipped"]

    def _gradient(self, closures: Sequence[Closure], rho: float) -> tuple[bool, dict[str, Tensor]]:
        """Leave in `.grad` the gradient that updates; say whether it is finite, and what was measured on the way."""
        climbs, devices = rho > 0, [self.device] if self.device.type == "cuda" else []
        apart = self.model if isinstance(self.model, DistributedDataParallel) and not self.synchronise else None
        with torch.random.fork_rng(devices, enabled=climbs and self.same_noise):  # the second pass draws the same
            with apart.no_sync() if apart and climbs else nullcontext():
                loss = self._measure(closures)
        norm = _norm(self._gradients().values())
        measured = {"loss": loss, "loss_perturbed": loss, "grad_norm": norm / self.scaler.get_scale()}
        if self.diagnose:
            measured |= {"cosine": torch.ones_like(norm), "eps_norm": torch.zeros_like(norm)}
        finite = self._finite_everywhere(norm)
        if not finite or not climbs:
            return finite, measured
        first = {p: g.clone() for p, g in self._gradients().items()} if self.diagnose else {}
        try:
            self.perturb(rho)
            if self.diagnose and self._saved and self._saved[0]:
                with torch.no_grad():
                    measured["eps_norm"] = _norm(torch._foreach_sub(*self._saved))
            with self._second_pass():
                measured["loss_perturbed"] = self._measure(closures)
        finally:
            if self._saved is not None:
                self.restore()
        second = self._gradients()
        norm = _norm(second.values())
        if self.diagnose:
            product = sum(((first[p] * g).sum() for p, g in second.items() if p in first), torch.zeros_like(norm))
            lengths = norm * _norm(first.values())
            measured["cosine"] = product / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
        return self._finite_everywhere(norm), measured

    def _measure(self, closures: Sequence[Closure]) -> Tensor:
        self.base.zero_grad(set_to_none=True)
        losses = []
        for closure in closures:
            with torch.enable_grad():
                loss = closure()
            if not isinstance(loss, Tensor):
                raise TypeError(f"the closure must return the loss as a tensor, not {type(loss).__name__}")
            losses.append(loss.detach())
        if not self._gradients():
            raise ValueError("the closure left no gradient: it must call loss.backward()")
        return torch.stack(losses).sum()

    def _update(self, finite: bool) -> None:
        if not finite:  # also on a process whose own gradient was finite: the scales must stay equal
            next(iter(self._gradients().values())).fill_(math.inf)
        self.scaler.unscale_(self.base)
        if finite:
            if self.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self._parameters(), self.clip_norm)
            self.scaler.step(self.base)
        self.skipped += not finite
        self.scaler.update()

    @contextmanager
    def _second_pass(self) -> Iterator[None]:
        """Running statistics stand still: batches are normalised by themselves, as in training, and not recorded."""
        modules = self.model.modules() if self.model else ()
        tracked = {m: m.track_running_stats for m in modules if isinstance(m, _BatchNorm)}
        try:
            for m in tracked:
                m.track_running_stats = False
            yield
        finally:
            for m, track in tracked.items():
                m.track_running_stats = track

    def _finite_everywhere(self, norm: Tensor) -> bool:
        """Whether a norm is finite, on every process: all take the second pass together, or none does."""
        finite = norm.isfinite()
        if isinstance(self.model, DistributedDataParallel):
            finite = finite.int()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        return bool(finite)

    def _radius(self) -> float:
        rho = self.rho(self.steps) if callable(self.rho) else self.rho
        if not (rho >= 0 and math.isfinite(rho)):
            raise ValueError(f"rho must be a finite number >= 0, not {rho}")
        return rho

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.base.param_groups for p in group["params"] if p.requires_grad]

    def _gradients(self) -> dict[Tensor, Tensor]:
        return {p: p.grad for p in self._parameters() if p.grad is not None}


def ascent(g: dict[Tensor, Tensor], T: dict[Tensor, Tensor]) -> tuple[list[Tensor], float]:
    """The direction T^2 g of a climb, and the norm ||T g|| that belongs to it: eps = rho T^2 g / ||T g||.

    Args:
        g: gradient by parameter; T^2 g takes its place, which spares a copy.
        T: scale by parameter, for some of them or none; elsewhere T = 1, as everywhere in SAM.

    Source: Foret et al. 2021, eq. 2 (SAM); Kwon et al. 2021, section 3 (ASAM).
    """
    direction, scaled, scales = list(g.values()), [g[p] for p in T], list(T.values())
    if T:
        torch._foreach_mul_(scaled, scales)  # T g
    norm = _norm(direction).item() if g else 0.0
    if T:
        torch._foreach_mul_(scaled, scales)  # T^2 g
    return direction, norm


def norm_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters of the normalisation layers, for SAM's `only`.

    Source: Mueller et al. 2023 (SAM-ON), where perturbing them alone does as well as perturbing everything.
    """
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
    return [p for m in model.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)]


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm over all tensors, in their own precision."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
