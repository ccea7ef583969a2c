from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import pytorch_optimizer
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from samlib.sam import SAM


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


@pytest.mark.parametrize(("adaptive", "rho"), [(False, 0.05), (True, 0.5)])
def test_agrees_with_an_independent_implementation(adaptive: bool, rho: float) -> None:
    ours, theirs = network(torch.float64), network(torch.float64)
    base = torch.optim.AdamW(ours.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer = SAM(base, rho, adaptive)
    oracle = pytorch_optimizer.SAM(
        theirs.parameters(), torch.optim.AdamW, rho=rho, adaptive=adaptive, lr=1e-2, weight_decay=0.1
    )
    for x, y in batches(torch.float64):
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
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(bad: float) -> None:
    w = torch.ones(2, requires_grad=True)

    def closure() -> Tensor:
        loss = (w * bad).sum()
        loss.backward()
        return loss

    with pytest.raises(FloatingPointError, match="gradient at w is not finite"):
        SAM(sgd(w), rho=0.1).step(closure)
    assert torch.equal(w, torch.ones(2))


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
        return model, SAM(torch.optim.AdamW(model.parameters(), lr=1e-2), rho=0.05)

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


def test_bad_arguments_are_named() -> None:
    w = torch.ones(2, requires_grad=True)
    for arguments, word in (
        ({"rho": -0.1}, "rho"),
        ({"rho": float("nan")}, "rho"),
        ({"rho": 0.1, "eta": -1.0}, "eta"),
        ({"rho": 0.1, "clip_norm": 0.0}, "clip_norm"),
    ):
        with pytest.raises(ValueError, match=f"{word} must be"):
            SAM(sgd(w), **arguments)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        SAM(sgd(torch.ones(2)), rho=0.1)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match=f"float32 or float64.*{dtype}"):
            SAM(sgd(torch.ones(2, dtype=dtype, requires_grad=True)), rho=0.1)


def test_misuse_is_named() -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer = SAM(sgd(w), rho=0.1)
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
