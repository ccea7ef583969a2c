from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from samlib.data.tasks import Split
from samlib.measure import hessian, sharpness, taylor
from samlib.measure import hessian as curvature
from samlib.model.theta import Theta, flat, weights_of


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Theta, Split, Tensor]:
    """An encoder of 67 weights in fp64, thirty images, and a head of two classes."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    split = Split(torch.rand(30, 3, 2, 2, dtype=torch.float64), torch.arange(30) % 2)
    return encoder, weights_of(encoder), split, torch.randn(2, 3, dtype=torch.float64)


def loss_of(small: tuple[nn.Module, Theta, Split, Tensor], v: Tensor) -> Tensor:
    """The loss as a function of one vector of all weights."""
    encoder, like, split, head = small
    names = sorted(like)
    parts = v.split([like[name].numel() for name in names])
    weights = {name: part.view(like[name].shape) for name, part in zip(names, parts, strict=True)}
    return F.cross_entropy(functional_call(encoder, weights, (split.images,)) @ head.T, split.labels)


@pytest.fixture(scope="module")
def dense(small: tuple[nn.Module, Theta, Split, Tensor]) -> Tensor:
    """The whole Hessian, (67, 67)."""
    found: Tensor = torch.func.hessian(lambda v: loss_of(small, v))(flat(small[1]))
    return found


def test_the_operator_is_the_hessian_whatever_the_batch_size(
    small: tuple[nn.Module, Theta, Split, Tensor], dense: Tensor
) -> None:
    encoder, weights, split, head = small
    before = copy.deepcopy(encoder.state_dict())
    for batch_size in (30, 7):
        operator = hessian.hessian(encoder, weights, split, head, batch_size)
        torch.testing.assert_close(operator @ torch.eye(67, dtype=torch.float64), dense, rtol=1e-8, atol=1e-10)
    shifted = {name: w + 0.1 for name, w in weights.items()}
    other = hessian.hessian(encoder, shifted, split, head) @ torch.eye(67, dtype=torch.float64)
    assert (other - dense).abs().max() > 1e-3  # it is taken at the weights that are given
    assert all(torch.equal(w, before[name]) for name, w in encoder.state_dict().items())
    with pytest.raises(ValueError, match="at least one image"):
        hessian.hessian(encoder, weights, Split(split.images[:0], split.labels[:0]), head)


def test_top_eigenvalues_and_vectors_agree_with_dense_algebra(
    small: tuple[nn.Module, Theta, Split, Tensor], dense: Tensor
) -> None:
    operator = hessian.hessian(*small)
    values, vectors = hessian.top_eigenvalues(operator, 3, tol=1e-8)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(dense).flip(0)[:3], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(dense @ vectors, vectors * values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match=r"k must be an integer in \[1, 67\), not 67"):
        hessian.top_eigenvalues(operator, 67)


def test_trace_is_within_its_own_error(small: tuple[nn.Module, Theta, Split, Tensor], dense: Tensor) -> None:
    operator = hessian.hessian(*small)
    estimate, error = hessian.trace(operator, 200, seed=1)
    assert abs(estimate - float(dense.trace())) < 4 * error
    off = dense - dense.diag().diag()
    expected = (2 * off.square().sum() / 200).sqrt()  # variance of v^T H v for signs: 2 sum of squares off the diagonal
    assert error == pytest.approx(float(expected), rel=0.2)
    assert hessian.trace(operator, 5, seed=1) == hessian.trace(operator, 5, seed=1)
    with pytest.raises(ValueError, match="at least two probes"):
        hessian.trace(operator, 1)


def test_density_has_the_moments_of_its_probes_and_finds_the_spectrum(
    small: tuple[nn.Module, Theta, Split, Tensor], dense: Tensor
) -> None:
    operator = hessian.hessian(*small)
    points, weights = hessian.spectral_density(operator, steps=4, probes=1, seed=2)
    v = torch.randn(67, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    v /= v.norm()
    power = v
    for k in range(8):  # Gauss quadrature with m points is exact up to degree 2 m - 1
        assert float((weights * points**k).sum()) == pytest.approx(float(v @ power), rel=1e-6, abs=1e-12)
        power = dense @ power
    points, weights = hessian.spectral_density(dense, steps=67, probes=300)  # the same products, without the network
    assert float(weights.sum()) == pytest.approx(1)
    values = torch.linalg.eigvalsh(dense)
    assert points.max().item() == pytest.approx(values.max().item(), rel=1e-6)
    above = float(weights[points > 0.01].sum())  # share of the directions with that curvature
    assert above == pytest.approx(float((values > 0.01).double().mean()), abs=0.03)
    with pytest.raises(ValueError, match="steps must be in"):
        hessian.spectral_density(operator, steps=68)


def test_large_models_keep_fewer_vectors_and_find_the_same(
    small: tuple[nn.Module, Theta, Split, Tensor], dense: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a memory for two vectors of the 67 weights: the same share of curved directions, the same eigenvalues."""
    monkeypatch.setattr(curvature, "BASIS", 5 * 67 * 4)
    operator = hessian.hessian(*small)
    values = torch.linalg.eigvalsh(dense)
    points, weights = hessian.spectral_density(dense, steps=60, probes=100)
    assert float(weights.sum()) == pytest.approx(1)
    above = float(weights[points > 0.01].sum())
    assert above == pytest.approx(float((values > 0.01).double().mean()), abs=0.05)
    assert points.max().item() == pytest.approx(values.max().item(), rel=1e-6)
    assert float(hessian.top_eigenvalues(operator, 2)[0][1]) == pytest.approx(float(values[-2]), rel=1e-3)


def test_curvature_along_a_direction(small: tuple[nn.Module, Theta, Split, Tensor], dense: Tensor) -> None:
    operator = hessian.hessian(*small)
    torch.manual_seed(4)
    direction = {name: torch.randn_like(w) for name, w in small[1].items()}
    v = flat(direction)
    assert hessian.quadratic_form(operator, direction) == pytest.approx(float(v @ dense @ v / (v @ v)), rel=1e-8)
    backwards = dict(reversed(direction.items()))  # a task vector may have its names in another order
    assert hessian.quadratic_form(operator, backwards) == hessian.quadratic_form(operator, direction)
    with pytest.raises(ValueError, match="zero vector"):
        hessian.quadratic_form(operator, {name: torch.zeros_like(w) for name, w in direction.items()})


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_at_worst_and_on_average(small: tuple[nn.Module, Theta, Split, Tensor], adaptive: bool) -> None:
    w = flat(small[1])
    g = torch.func.grad(lambda v: loss_of(small, v))(w)
    s = w.abs() if adaptive else torch.ones_like(w)
    found = sharpness.sharpness(*small, rho=0.1, adaptive=adaptive, probes=3, seed=5)
    base = loss_of(small, w)
    assert found["loss"] == pytest.approx(float(base))
    worst = loss_of(small, w + 0.1 * s**2 * g / (s * g).norm()) - base
    assert found["worst"] == pytest.approx(float(worst), rel=1e-6)
    generator = torch.Generator().manual_seed(5)
    rises = []
    for _ in range(3):
        z = flat({name: torch.randn(p.shape, generator=generator) for name, p in small[1].items()})
        rises.append(float(loss_of(small, w + 0.1 * s * z / z.norm()) - base))
    assert found["average"] == pytest.approx(sum(rises) / 3, rel=1e-5)
    with pytest.raises(ValueError, match="rho > 0"):
        sharpness.sharpness(*small, rho=0.0)


def test_taylor_terms_agree_with_dense_algebra(small: tuple[nn.Module, Theta, Split, Tensor], dense: Tensor) -> None:
    encoder, weights, split, head = small
    torch.manual_seed(6)
    eps = {name: 0.05 * torch.randn_like(w) for name, w in weights.items()}
    merged = {name: w + eps[name] for name, w in weights.items()}
    v, w = flat(eps), flat(weights)
    g = torch.func.grad(lambda x: loss_of(small, x))(w)
    for batch_size in (30, 7):
        found = taylor.taylor_terms(encoder, weights, merged, split, head, batch_size)
        gap = float(loss_of(small, w + v) - loss_of(small, w))
        assert found["gap"] == pytest.approx(gap, rel=1e-8)
        assert found["first"] == pytest.approx(float(g @ v), rel=1e-8)
        assert found["second"] == pytest.approx(float(v @ dense @ v) / 2, rel=1e-8)
        assert found["rest"] == pytest.approx(gap - float(g @ v) - float(v @ dense @ v) / 2, abs=1e-12)
        assert (found["length"], found["slope"]) == (pytest.approx(float(v.norm())), pytest.approx(float(g.norm())))


def test_networks_with_group_norm_and_attention_have_a_hessian() -> None:
    """Against reverse mode twice, which PyTorch's own group norm has."""
    torch.manual_seed(7)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, 4)
            self.last = nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            x = self.norm(images)  # (B, 4, 2, 2)
            tokens = x.flatten(2).transpose(1, 2)  # (B, 4, 4)
            return self.last(F.scaled_dot_product_attention(tokens, tokens, tokens).mean(1))  # type: ignore[no-any-return]

    encoder = Net().double()
    small = (
        encoder,
        weights_of(encoder),
        Split(torch.randn(6, 4, 2, 2).double(), torch.arange(6) % 2),
        torch.randn(2, 3).double(),
    )
    operator = hessian.hessian(*small)
    size = operator.shape[0]
    with hessian.second_derivatives():
        found = operator @ torch.eye(size, dtype=torch.float64)
        inside = encoder(small[2].images)
    torch.testing.assert_close(inside, encoder(small[2].images))  # the same network
    expected = torch.autograd.functional.hessian(lambda v: loss_of(small, v), flat(small[1]))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    merged = {name: w + 0.1 for name, w in small[1].items()}
    v = torch.full((size,), 0.1, dtype=torch.float64)
    terms = taylor.taylor_terms(*small[:2], merged, *small[2:])
    assert terms["second"] == pytest.approx(float(v @ expected @ v) / 2, rel=1e-8)


def test_the_gradient_is_that_of_all_images(small: tuple[nn.Module, Theta, Split, Tensor]) -> None:
    found = taylor.gradient(*small, batch_size=7)
    expected = torch.func.grad(lambda v: loss_of(small, v))(flat(small[1]))
    assert list(found) == list(small[1])
    torch.testing.assert_close(flat(found), expected, rtol=1e-8, atol=1e-12)
