from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import pytorch_optimizer
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.operators import Calls
from samlib.train.sam import SAM, norm_parameters


def sgd(*parameters: Tensor, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr)


def quadratic(w: Tensor, a: Tensor) -> Callable[[], Tensor]:
    """Closure of the loss 1/2 w^T A w, whose gradient is A w."""

    def closure() -> Tensor:
        loss = 0.5 * w @ a @ w
        loss.backward()
        return loss

    return closure


A = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def test_sam_step_on_a_quadratic_is_the_closed_form() -> None:
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    w_0, rho, lr = w.detach().clone(), 0.5, 0.1
    g = A @ w_0  # (1, -3)
    loss = SAM(sgd(w, lr=lr), rho).step(quadratic(w, A))
    expected = w_0 - lr * A @ (w_0 + rho * g / g.norm())
    assert torch.allclose(w, expected, rtol=0, atol=1e-15)
    assert loss.item() == pytest.approx(0.5 * (w_0 @ g).item()) and not loss.requires_grad


@pytest.mark.parametrize("eta", [0.0, 0.01, 1.0])
def test_asam_perturbation_is_the_closed_form(eta: float) -> None:
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    w_0, rho = w.detach().clone(), 0.5
    g, t = A @ w_0, w_0.abs() + eta
    eps = rho * t**2 * g / (t * g).norm()
    assert (eps / t).norm().item() == pytest.approx(rho)  # ||T^-1 eps|| = rho
    optimizer = SAM(sgd(w), rho, adaptive=True, eta=eta)
    quadratic(w, A)()
    optimizer.perturb()
    assert torch.allclose(w, w_0 + eps, rtol=0, atol=1e-15)
    optimizer.restore()
    assert torch.equal(w, w_0)


def test_norm_runs_over_all_parameters_together() -> None:
    u, v = (torch.zeros(1, requires_grad=True) for _ in range(2))
    u.grad, v.grad = torch.tensor([3.0]), torch.tensor([4.0])
    SAM(sgd(u, v), rho=1.0).perturb()
    assert u.item() == pytest.approx(0.6) and v.item() == pytest.approx(0.8)


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def batches(dtype: torch.dtype, steps: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 5, generator=generator).to(dtype), torch.randint(3, (16,), generator=generator))
        for _ in range(steps)
    ]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    return vit.double()


@pytest.mark.parametrize(("adaptive", "rho"), [(False, 0.05), (True, 0.5)])
def test_agrees_with_an_independent_implementation(adaptive: bool, rho: float) -> None:
    ours, theirs = small_vit(), small_vit()
    base = torch.optim.AdamW(
        ours.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-3
    )  # larger, or AdamW blows up the last bits
    optimizer = SAM(base, rho, adaptive)
    oracle = pytorch_optimizer.SAM(
        theirs.parameters(), torch.optim.AdamW, rho=rho, adaptive=adaptive, lr=1e-2, weight_decay=0.1, eps=1e-3
    )
    generator = torch.Generator().manual_seed(1)
    for _, y in batches(torch.float64):
        x = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=generator)
        optimizer.step(lambda x=x, y=y: loss_of(ours, x, y))
        oracle.zero_grad()
        loss_of(theirs, x, y)
        oracle.step(lambda x=x, y=y: loss_of(theirs, x, y))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-8)


def test_rho_zero_is_the_base_optimiser_bit_for_bit() -> None:
    ours, plain = network(torch.float32), network(torch.float32)
    optimizer = SAM(torch.optim.AdamW(ours.parameters(), lr=1e-2), rho=0.0)
    base = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    calls = 0
    for x, y in batches(torch.float32):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            nonlocal calls
            calls += 1
            return loss_of(ours, x, y)

        optimizer.step(closure)
        base.zero_grad()
        loss_of(plain, x, y)
        base.step()
    assert calls == 20
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_gradient_is_zeroed_before_each_pass() -> None:
    """A loop that never zeroes the gradient gives other weights: the step must not."""
    clean, dirty = network(torch.float64), network(torch.float64)
    optimizer = SAM(sgd(*clean.parameters()), rho=0.05)
    accumulating = SAM(sgd(*dirty.parameters()), rho=0.05)
    accumulating.base.zero_grad = lambda set_to_none=True: None
    for x, y in batches(torch.float64, 3):
        before = copy.deepcopy(clean)
        optimizer.step(lambda x=x, y=y: loss_of(clean, x, y))
        accumulating.step(lambda x=x, y=y: loss_of(dirty, x, y))
        loss_of(before, x, y)
        g = [p.grad for p in before.parameters()]
        norm = torch.cat([v.flatten() for v in g if v is not None]).norm()
        assert optimizer.last["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-12)
    gap = max((p - q).abs().max().item() for p, q in zip(clean.parameters(), dirty.parameters(), strict=True))
    assert gap > 1e-3


def test_adamw_that_never_zeroes_its_gradient_is_another_optimiser() -> None:
    """The slip of the released code, where every clipped gradient stays in the sum; our loop does not make it."""
    data = batches(torch.float64, 40)
    models = {name: network(torch.float64) for name in ("zeroed", "never zeroed", "ours")}
    bases = {name: torch.optim.AdamW(model.parameters(), lr=1e-2) for name, model in models.items()}
    optimizer = SAM(bases["ours"], rho=0.0, clip_norm=1.0)
    for x, y in data:
        optimizer.step(lambda x=x, y=y: loss_of(models["ours"], x, y))
        for name in ("zeroed", "never zeroed"):
            parameters = list(models[name].parameters())
            old = [None if p.grad is None or name == "zeroed" else p.grad.clone() for p in parameters]
            bases[name].zero_grad()
            loss_of(models[name], x, y)
            fresh = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            for p, leftover in zip(parameters, old, strict=True):
                if leftover is not None and p.grad is not None:
                    p.grad += leftover
            nn.utils.clip_grad_norm_(parameters, 1.0)
            bases[name].step()
    stale = torch.cat([p.grad.flatten() for p in models["never zeroed"].parameters() if p.grad is not None])
    assert nn.functional.cosine_similarity(stale, fresh, dim=0) < 0.9  # old batches are in it
    weights = {name: torch.cat([p.detach().flatten() for p in model.parameters()]) for name, model in models.items()}
    assert torch.equal(weights["ours"], weights["zeroed"])
    assert (weights["never zeroed"] - weights["zeroed"]).norm() > 0.1 * weights["zeroed"].norm()


def test_restores_bit_for_bit_when_the_second_pass_raises() -> None:
    model = network(torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    storage = [p.data_ptr() for p in model.parameters()]
    optimizer = SAM(sgd(*model.parameters()), rho=0.3)
    (x, y), passes = batches(torch.float32, 1)[0], 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        if passes == 2:
            assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            raise KeyboardInterrupt
        return loss_of(model, x, y)

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == storage


def test_a_parameter_with_a_gradient_in_one_pass_only_comes_back() -> None:
    first, second = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer, passes = SAM(sgd(first, second, lr=1.0), rho=1.0), 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        loss = (first if passes == 1 else second).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(first, torch.ones(2))  # perturbed, restored, no update gradient
    assert torch.equal(second, torch.zeros(2))  # not perturbed, updated


def test_zero_gradient_moves_nothing() -> None:
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    SAM(sgd(w), rho=1.0).step(quadratic(w, A))
    assert torch.equal(w, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("rho", "bad_pass"), [(0.0, 1), (0.1, 1), (0.1, 2)])
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(rho: float, bad: float, bad_pass: int) -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer, passes = SAM(torch.optim.AdamW([w], lr=0.1), rho), 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        loss = (w * (bad if passes == bad_pass else 1.0)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(w, torch.ones(2)) and passes == bad_pass
    assert (optimizer.steps, optimizer.skipped) == (1, 1) and not optimizer.base.state
    optimizer.step(closure)
    assert optimizer.skipped == 1 and not torch.equal(w, torch.ones(2))


def test_clipping_touches_the_update_gradient_only() -> None:
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    w_0, rho, lr, clip = w.detach().clone(), 0.5, 0.1, 0.01
    g = A @ w_0
    optimizer = SAM(sgd(w, lr=lr), rho, clip_norm=clip)
    optimizer.step(quadratic(w, A))
    update = A @ (w_0 + rho * g / g.norm())  # the ascent still has length rho
    assert torch.allclose(w, w_0 - lr * clip * update / update.norm(), rtol=0, atol=1e-8)
    assert optimizer.last["grad_norm"].item() == pytest.approx(g.norm().item())
    worst = w_0 + rho * g / g.norm()
    assert optimizer.last["loss_perturbed"].item() == pytest.approx((0.5 * worst @ A @ worst).item())


def test_state_dict_resumes_exactly() -> None:
    data = batches(torch.float32, 10)

    def run(model: nn.Module, optimizer: SAM, part: list[tuple[Tensor, Tensor]]) -> None:
        for x, y in part:
            optimizer.step(lambda x=x, y=y: loss_of(model, x, y))

    def new() -> tuple[nn.Module, SAM]:
        model = network(torch.float32)
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, SAM(base, lambda step: 0.05 + 0.01 * step, every=3)  # both depend on the steps done

    model, optimizer = new()
    run(model, optimizer, data[:5])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, data[5:])
    again, resumed = new()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    run(again, resumed, data[5:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@given(
    w=st.lists(st.floats(-3, 3), min_size=2, max_size=2),
    rho=st.floats(1e-3, 2),
    adaptive=st.booleans(),
)
def test_perturbation_has_length_rho_and_climbs(w: list[float], rho: float, adaptive: bool) -> None:
    """||T^-1 eps|| = rho with T = 1 (SAM) or |w| + eta (ASAM), and the loss of a convex function rises."""
    theta = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    w_0, eta = theta.detach().clone(), 0.1
    optimizer = SAM(sgd(theta), rho, adaptive, eta if adaptive else 0.0)
    loss = quadratic(theta, A)()
    if (A @ w_0).norm() < 1e-6:
        return
    optimizer.perturb()
    t = w_0.abs() + eta if adaptive else torch.ones(2)
    assert ((theta - w_0) / t).norm().item() == pytest.approx(rho, rel=1e-9)
    assert (0.5 * theta @ A @ theta > loss).item()


@pytest.mark.parametrize("eta", [0.0, 0.01])
def test_biases_are_scaled_or_not(eta: float) -> None:
    model = network(torch.float64)
    (x, y), rho = batches(torch.float64, 1)[0], 0.5
    for scale_biases in (True, False):
        loss_of(model, x, y)
        before = [p.detach().clone() for p in model.parameters()]
        g = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        t = [w.abs() + eta if scale_biases or w.ndim > 1 else torch.ones_like(w) for w in before]
        norm = torch.cat([(a * b).flatten() for a, b in zip(t, g, strict=True)]).norm()
        optimizer = SAM(sgd(*model.parameters()), rho, adaptive=True, eta=eta, scale_biases=scale_biases)
        optimizer.perturb()
        for p, w, a, b in zip(model.parameters(), before, t, g, strict=True):
            torch.testing.assert_close(p.detach(), w + rho * a**2 * b / norm, rtol=0, atol=1e-14)
        optimizer.restore()
        model.zero_grad()


def test_only_the_norm_layers_climb_when_asked() -> None:
    model = network(torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SAM(sgd(*model.parameters()), 0.5, only=norm_parameters(model))
    loss_of(model, *batches(torch.float64, 1)[0])
    optimizer.perturb()
    moved = {name for (name, p), w in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, w)}
    assert moved == {"2.weight", "2.bias"}
    eps = torch.cat([p.detach() - w for p, w in zip(model.parameters(), before, strict=True) if w.shape == (8,)])
    assert eps.norm().item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="only must name at least one parameter"):
        SAM(sgd(*model.parameters()), 0.5, only=[torch.ones(1)])


def counted(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Callable[[], Tensor], list[int]]:
    calls = [0]

    def closure() -> Tensor:
        calls[0] += 1
        return loss_of(model, x, y)

    return closure, calls


def test_every_third_step_climbs_and_the_others_are_the_base_optimisers() -> None:
    ours, slow = network(torch.float64), network(torch.float64)
    optimizer = SAM(torch.optim.AdamW(ours.parameters(), lr=1e-2), rho=0.1, every=3)
    base = torch.optim.AdamW(slow.parameters(), lr=1e-2)
    sharp, plain = SAM(base, rho=0.1), SAM(base, rho=0.0)
    total = 0
    for step, (x, y) in enumerate(batches(torch.float64, 9)):
        closure, calls = counted(ours, x, y)
        optimizer.step(closure)
        (sharp if step % 3 == 0 else plain).step(lambda x=x, y=y: loss_of(slow, x, y))
        total += calls[0]
    assert total == 9 + 3  # 1 + 1/k gradients a step
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), slow.parameters(), strict=True))


def test_rho_may_follow_a_schedule() -> None:
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = SAM(sgd(w), rho=lambda step: 0.1 * step, diagnose=True)
    for step in range(3):
        optimizer.step(quadratic(w, A))
        assert optimizer.last["eps_norm"].item() == pytest.approx(0.1 * step)
    with pytest.raises(ValueError, match="rho must be a finite number >= 0, not -1"):
        SAM(sgd(w), rho=lambda step: -1.0).step(quadratic(w, A))


def test_micro_batches_climb_each_for_itself_or_all_together() -> None:
    """Both modes against their definitions, computed parameter by parameter with autograd."""
    rho, lr, parts = 0.3, 0.1, batches(torch.float64, 3)

    def gradient(model: nn.Module, chosen: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        loss = sum(nn.functional.cross_entropy(model(x), y) / len(parts) for x, y in chosen)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    def at_worst(chosen: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        model = network(torch.float64)
        g = gradient(model, chosen)
        norm = torch.cat([v.flatten() for v in g]).norm()
        with torch.no_grad():
            for p, v in zip(model.parameters(), g, strict=True):
                p += rho * v / norm
        return gradient(model, chosen)

    wanted = {True: at_worst(parts), False: [sum(gs) for gs in zip(*(at_worst([b]) for b in parts), strict=True)]}
    for shared, update in wanted.items():
        model = network(torch.float64)
        before = [p.detach().clone() for p in model.parameters()]

        def closure(x: Tensor, y: Tensor, model: nn.Module = model) -> Tensor:
            loss = nn.functional.cross_entropy(model(x), y) / len(parts)
            loss.backward()
            return loss

        optimizer = SAM(sgd(*model.parameters(), lr=lr), rho)
        loss = optimizer.step(*(partial(closure, x, y) for x, y in parts), shared=shared)
        for p, w, g in zip(model.parameters(), before, update, strict=True):
            torch.testing.assert_close(p.detach(), w - lr * g, rtol=0, atol=1e-14)
        whole = sum(nn.functional.cross_entropy(network(torch.float64)(x), y) for x, y in parts) / len(parts)
        assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
    gap = max((a - b).abs().max().item() for a, b in zip(wanted[True], wanted[False], strict=True))
    assert gap > 1e-3  # the two modes are two algorithms


def test_second_pass_draws_the_same_dropout_mask_on_request() -> None:
    masks: list[Tensor] = []

    class Drop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = nn.functional.dropout(x, 0.5, training=True)
            masks.append((out != 0).detach())
            return out

    model = nn.Sequential(nn.Linear(5, 64), Drop(), nn.Linear(64, 3))
    x, y = batches(torch.float32, 1)[0]
    for same in (True, False):
        masks.clear()
        optimizer = SAM(sgd(*model.parameters()), 0.05, same_noise=same)
        optimizer.step(lambda: loss_of(model, x, y))
        optimizer.step(lambda: loss_of(model, x, y))
        assert torch.equal(masks[0], masks[1]) == same and not torch.equal(masks[0], masks[2])


def test_running_statistics_see_the_first_pass_only() -> None:
    def new() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    sharp, plain = new(), new()
    x, y = batches(torch.float32, 1)[0]
    SAM(sgd(*sharp.parameters()), 0.5, model=sharp).step(lambda: loss_of(sharp, x, y))
    loss_of(plain, x, y)
    for name, value in plain[1].named_buffers():
        assert torch.equal(value, dict(sharp[1].named_buffers())[name]), name
    assert sharp[1].track_running_stats and sharp[1].num_batches_tracked == 1


def test_diagnostics_of_a_fitted_batch_are_finite() -> None:
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # the minimum: both gradients vanish
    optimizer = SAM(sgd(w), 0.1, diagnose=True)
    optimizer.step(quadratic(w, A))
    assert {name: value.item() for name, value in optimizer.last.items()} == dict.fromkeys(optimizer.last, 0.0)


def test_the_norm_of_micro_batches_is_the_mean_of_their_norms() -> None:
    parts = batches(torch.float64, 2)
    model = network(torch.float64)
    norms = []
    for x, y in parts:
        model.zero_grad()
        loss_of(model, x, y)
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item())

    def half(x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y) / 2
        loss.backward()
        return loss

    optimizer = SAM(sgd(*model.parameters()), 0.1)
    optimizer.step(*(partial(half, x, y) for x, y in parts))
    assert optimizer.last["grad_norm"].item() == pytest.approx(sum(norms) / 2, rel=1e-12)


def test_diagnostics_are_the_quantities_they_name() -> None:
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    w_0, rho, eta = w.detach().clone(), 0.5, 0.1
    optimizer = SAM(sgd(w), rho, adaptive=True, eta=eta, diagnose=True)
    optimizer.step(quadratic(w, A))
    g, t = A @ w_0, w_0.abs() + eta
    eps = rho * t**2 * g / (t * g).norm()
    update = A @ (w_0 + eps)
    last = {name: value.item() for name, value in optimizer.last.items()}
    assert last["grad_norm"] == pytest.approx(g.norm().item())
    assert last["eps_norm"] == pytest.approx(eps.norm().item())
    assert last["cosine"] == pytest.approx((g @ update / g.norm() / update.norm()).item())
    assert last["loss_perturbed"] == pytest.approx((0.5 * (w_0 + eps) @ A @ (w_0 + eps)).item())


@pytest.mark.parametrize("scale_biases", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
def test_the_ascent_takes_at_most_twelve_kernel_launches_for_144_tensors(adaptive: bool, scale_biases: bool) -> None:
    parameters = [torch.randn(3, *[2] * (i % 2), requires_grad=True) for i in range(144)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = SAM(sgd(*parameters), 0.1, adaptive, scale_biases=scale_biases)
    with Calls() as launches:
        optimizer.perturb()
        optimizer.restore()
    assert 0 < launches.count <= 12


def test_fp16_scaling_changes_no_step_and_an_overflow_lowers_the_scale() -> None:
    """The scaler's arithmetic on the CPU: powers of two scale exactly, so the weights agree bit for bit."""
    ours, plain = network(torch.float32), network(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = SAM(torch.optim.AdamW(ours.parameters(), lr=1e-2), 0.125, clip_norm=0.5, scaler=scaler)
    reference = SAM(torch.optim.AdamW(plain.parameters(), lr=1e-2), 0.125, clip_norm=0.5)

    def scaled(x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        loss = nn.functional.cross_entropy(ours(x), y)
        (scaler.scale(loss) * factor).backward()
        return loss

    for x, y in batches(torch.float32, 5):
        optimizer.step(partial(scaled, x, y))
        reference.step(partial(loss_of, plain, x, y))
        assert optimizer.last["grad_norm"].item() == reference.last["grad_norm"].item()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    weights = [p.detach().clone() for p in ours.parameters()]
    optimizer.step(partial(scaled, x, y, float("inf")))
    assert scaler.get_scale() == 2.0**15 and optimizer.skipped == 1
    assert all(torch.equal(p, w) for p, w in zip(ours.parameters(), weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_full_precision_weights(dtype: torch.dtype) -> None:
    model = network(torch.float32)
    optimizer = SAM(torch.optim.AdamW(model.parameters(), lr=1e-2), 0.05, diagnose=True)
    losses = []
    for x, y in batches(torch.float32, 2) * 20:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            with torch.autocast("cpu", dtype):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    assert losses[-1] < losses[0] and all(p.dtype == torch.float32 for p in model.parameters())
    assert optimizer.last["eps_norm"].item() == pytest.approx(0.05, rel=1e-4)


def test_bad_arguments_are_named() -> None:
    w = torch.ones(2, requires_grad=True)
    for arguments, word in (
        ({"rho": -0.1}, "rho"),
        ({"rho": float("nan")}, "rho"),
        ({"rho": 0.1, "eta": -1.0}, "eta"),
        ({"rho": 0.1, "clip_norm": 0.0}, "clip_norm"),
        ({"rho": 0.1, "every": 0}, "every"),
        ({"rho": 0.1, "every": 1.5}, "every"),
    ):
        with pytest.raises(ValueError, match=f"{word} must be"):
            SAM(sgd(w), **arguments)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        SAM(sgd(torch.ones(2)), rho=0.1)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match=f"float32 or float64.*{dtype}"):
            SAM(sgd(torch.ones(2, dtype=dtype, requires_grad=True)), rho=0.1)


def test_parameters_on_two_devices_are_refused() -> None:
    there = torch.ones(2, device="meta", requires_grad=True)
    with pytest.raises(ValueError, match="on one device, not on cpu, meta"):
        SAM(sgd(torch.ones(2, requires_grad=True), there), rho=0.1)


def test_misuse_is_named() -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer = SAM(sgd(w), rho=0.1)
    with pytest.raises(ValueError, match="at least one closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="no state of SAM"):
        optimizer.load_state_dict(optimizer.base.state_dict())
    with pytest.raises(ValueError, match="with a scaler and is loaded without"):
        optimizer.load_state_dict(optimizer.state_dict() | {"scaler": {"scale": 2.0}, "steps": 9})
    assert optimizer.steps == 0
    with pytest.raises(TypeError, match="must return the loss as a tensor, not NoneType"):
        optimizer.step(lambda: None)
    with pytest.raises(ValueError, match=r"must call loss.backward\(\)"):
        optimizer.step(lambda: w.sum())
    with pytest.raises(RuntimeError, match="nothing to restore"):
        optimizer.restore()
    w.grad = torch.ones(2)
    optimizer.perturb()
    with pytest.raises(RuntimeError, match="perturbed already"):
        optimizer.perturb()
