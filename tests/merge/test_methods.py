from __future__ import annotations

import inspect
import itertools
import math
import re
import typing
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import samlib.merge
from samlib.data.tasks import load_task
from samlib.merge import (
    METHODS,
    accuracy_curve,
    average,
    choose_lambda,
    dare,
    iso_c,
    model_stock,
    task_arithmetic,
    ties,
    tsv_m,
)
from samlib.merge.radix import kth_largest
from samlib.model import evaluate
from samlib.model.head import zero_shot_head
from samlib.model.theta import task_vector, weights_of

Theta = dict[str, Tensor]


def theta(*values: float) -> Theta:
    """Six numbers as a 2 x 2 matrix and a bias of 2."""
    v = torch.tensor(values, dtype=torch.float32)
    return {"weight": v[:4].reshape(2, 2), "bias": v[4:]}


def flat(weights: Theta) -> list[float]:
    return torch.cat([w.flatten() for w in weights.values()]).tolist()


# numbers that add up without rounding, so that equalities are exact
quarters = st.integers(-16, 16).map(lambda n: n / 4)
vectors = st.lists(quarters, min_size=6, max_size=6).map(lambda v: theta(*v))
tasks = st.lists(vectors, min_size=1, max_size=3)


def test_ties_on_a_worked_example() -> None:
    """Six parameters, three tasks, density 0.5: k = 3 entries a task.

    tau_1       5    -4     1     3     2     0   -> trimmed   5  -4   .   3   .   .
    tau_2      -2    -6     3     1     0     4   -> trimmed   .  -6   3   .   .   4
    tau_3       3     2    -5     1    -3     1   -> trimmed   3   .  -5   .  -3   .   (|3| twice: both fit)
    sum         8   -10    -2     3    -3     4
    sign        +     -     -     +     -     +
    mean of the agreeing  (5+3)/2  (-4-6)/2  -5   3  -3   4
    """
    theta_0 = theta(1, 1, 1, 1, 1, 1)
    taus = [(5, -4, 1, 3, 2, 0), (-2, -6, 3, 1, 0, 4), (3, 2, -5, 1, -3, 1)]
    thetas = [theta(*(1 + t for t in tau)) for tau in taus]
    merged = ties(theta_0, thetas, lam=1.0, density=0.5)
    assert flat(merged) == [1 + 4, 1 - 5, 1 - 5, 1 + 3, 1 - 3, 1 + 4]
    half = ties(theta_0, thetas, lam=0.5, density=0.5)
    assert flat(half) == [1 + 2, 1 - 2.5, 1 - 2.5, 1 + 1.5, 1 - 1.5, 1 + 2]


def test_the_order_of_the_tensors_does_not_matter() -> None:
    """Files give tensors back sorted by name, models in the order of their layers."""
    theta_0, thetas = theta(1, 2, 3, 4, 5, 6), [theta(2, 0, 3, 4, 9, 6), theta(1, 5, 3, 3, 5, 8)]
    other = [dict(sorted(weights.items())) for weights in thetas]  # "bias" first
    assert list(other[0]) != list(theta_0)
    methods = (lambda t: average(theta_0, t), lambda t: task_arithmetic(theta_0, t, 0.5), lambda t: ties(theta_0, t))
    for method in methods:
        merged, expected = method(other), method(thetas)
        assert list(merged) == list(theta_0) and all(torch.equal(merged[name], expected[name]) for name in theta_0)


def test_ties_keeps_exactly_k_the_first_of_equal_magnitudes() -> None:
    """ "bias" comes before "weight"."""
    merged = ties(theta(0, 0, 0, 0, 0, 0), [theta(1, -1, 1, 2, -1, 0)], density=0.5)
    assert flat(merged) == [1, 0, 0, 2, -1, 0]


def test_ties_leaves_a_tied_vote_alone_and_trims_over_all_tensors_together() -> None:
    zero = theta(0, 0, 0, 0, 0, 0)
    opposed = [theta(2, 1, 0, 0, 0, 0), theta(-2, 1, 0, 0, 0, 0)]
    assert flat(ties(zero, opposed, density=0.4)) == [0, 1, 0, 0, 0, 0]
    assert flat(ties(zero, [theta(1, 1, 1, 1, 5, 6)], density=0.34)) == [0, 0, 0, 0, 5, 6]  # the bias only


def test_density_one_and_one_task_give_the_task_back() -> None:
    theta_0, theta_1 = theta(1, 2, 3, 4, 5, 6), theta(0, 3, 3, -4, 5, 8)
    assert flat(ties(theta_0, [theta_1], density=1.0)) == flat(theta_1)
    assert flat(ties(theta_0, [theta_1], density=0.1)) == flat(theta_0)  # int(0.6) = 0 entries


@given(vectors, tasks)
def test_average_is_task_arithmetic_with_lam_one_over_t(theta_0: Theta, thetas: list[Theta]) -> None:
    arithmetic = task_arithmetic(theta_0, thetas, 1 / len(thetas))
    assert flat(arithmetic) == pytest.approx(flat(average(theta_0, thetas)), abs=1e-5)


@given(vectors, tasks)
def test_lam_zero_gives_theta_0(theta_0: Theta, thetas: list[Theta]) -> None:
    assert flat(task_arithmetic(theta_0, thetas, 0.0)) == flat(theta_0)
    assert flat(ties(theta_0, thetas, 0.0)) == flat(theta_0)


@given(vectors, tasks, st.sampled_from([0.2, 0.5, 1.0]))
def test_the_order_of_the_tasks_changes_nothing(theta_0: Theta, thetas: list[Theta], density: float) -> None:
    for order in itertools.permutations(thetas):
        assert flat(average(theta_0, list(order))) == flat(average(theta_0, thetas))
        assert flat(task_arithmetic(theta_0, order, 0.5)) == flat(task_arithmetic(theta_0, thetas, 0.5))
        assert flat(ties(theta_0, order, 0.5, density)) == flat(ties(theta_0, thetas, 0.5, density))


@given(vectors, vectors)
def test_task_vector_leads_from_theta_0_to_theta_t(theta_0: Theta, theta_t: Theta) -> None:
    tau = task_vector(theta_t, theta_0)
    assert flat(task_arithmetic(theta_0, [theta_t], 1.0)) == flat(theta_t)
    assert flat(tau) == [b - a for a, b in zip(flat(theta_0), flat(theta_t), strict=True)]


@given(vectors, tasks, st.sampled_from([0.2, 0.5, 1.0]))
def test_ties_stays_between_the_task_vectors(theta_0: Theta, thetas: list[Theta], density: float) -> None:
    """Each merged entry is a mean of entries of one sign: between the smallest and the largest, or 0."""
    taus = torch.tensor([flat(task_vector(t, theta_0)) for t in thetas])
    merged = torch.tensor(flat(task_vector(ties(theta_0, thetas, 1.0, density), theta_0)))
    assert (merged <= taus.max(0).values.clamp(min=0) + 1e-5).all()
    assert (merged >= taus.min(0).values.clamp(max=0) - 1e-5).all()


def test_merging_keeps_order_dtype_and_its_arguments() -> None:
    theta_0 = {"b": torch.zeros(3, dtype=torch.float64), "a": torch.zeros(2, 2, dtype=torch.float64)}
    theta_1 = {"a": torch.ones(2, 2, dtype=torch.float64), "b": torch.ones(3, dtype=torch.float64)}
    for merged in (task_arithmetic(theta_0, [theta_1], 1.0), ties(theta_0, [theta_1], density=1.0)):
        assert list(merged) == ["b", "a"]
        assert all(w.dtype == torch.float64 and (w == 1).all() for w in merged.values())
    assert all((w == 0).all() for w in theta_0.values())


FREE = [method.name for method in METHODS.values() if method.plan]
BACK = ("average", "task_arithmetic", "ties", "consensus", "dare")  # give a single task back, with these settings
SETTINGS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"lam": 1.0},
    "ties": {"density": 1.0},
    "consensus": {"lam": 1.0, "agree": 1, "mask_lam": 0.4},
    "dare": {"lam": 1.0, "drop": 0.0},
    "wudi": {"steps": 5},
}


def test_a_method_is_documented_by_all_its_arguments() -> None:
    """Also those that its decorator gives it, in the order in which they are taken."""
    for method in METHODS.values():
        function = getattr(samlib.merge, method.name)
        signature = inspect.signature(function)
        assert re.findall(r"^    (\w+): ", function.__doc__.split("Args:\n")[1].split("\n\n")[0], re.M) == [
            *signature.parameters
        ]
        assert {name: signature.parameters[name].default for name in method.rules} == method.defaults
        assert typing.get_type_hints(function).keys() == {*signature.parameters, "return"}
        assert f"Source: {method.source}.\nTaught in: 05_merging." in function.__doc__
    theta_0, theta_1 = theta(1, 1, 1, 1, 1, 1), theta(2, 0, 3, 1, 1, 1)
    assert flat(task_arithmetic(thetas=[theta_1], theta_0=theta_0, lam=0.5)) == [1.5, 0.5, 2, 1, 1, 1]  # type: ignore


def test_the_registry_is_complete() -> None:
    assert set(FREE) == {
        *("average", "task_arithmetic", "ties", "dare", "tsv_m", "iso_c", "iso_cts", "wudi"),
        *("consensus", "model_stock"),
    }
    assert {m.name for m in METHODS.values() if not m.plan} == {"fisher", "regmean", "adamerging"}
    for method in METHODS.values():
        assert callable(getattr(samlib.merge, method.name)) and method.source and method.needs
        for name, (allowed, holds) in method.rules.items():
            assert holds(method.defaults[name]) and allowed
            assert not holds(math.nan) and not holds("nonsense")


@given(vectors, st.lists(vectors, min_size=2, max_size=3), st.sampled_from(FREE))
def test_lam_zero_gives_theta_0_for_every_method_that_has_one(theta_0: Theta, thetas: list[Theta], name: str) -> None:
    if "lam" in METHODS[name].defaults:
        merged = getattr(samlib.merge, name)(theta_0, thetas, **SETTINGS.get(name, {}) | {"lam": 0.0})
        assert flat(merged) == flat(theta_0)


@given(vectors, st.lists(vectors, min_size=2, max_size=3), st.sampled_from(sorted(set(FREE) - {"dare"})))
def test_permuting_the_tasks_changes_nothing(theta_0: Theta, thetas: list[Theta], name: str) -> None:
    """Apart from rounding, and from singular vectors that share a singular value; DARE draws by place."""
    method, settings = getattr(samlib.merge, name), SETTINGS.get(name, {})
    taus = [task_vector(theta, theta_0)["weight"] for theta in thetas]
    if name in ("tsv_m", "iso_c", "iso_cts"):
        gaps = [s.diff().abs().min() for s in map(torch.linalg.svdvals, [*taus, sum(taus)])]
        smallest = [torch.linalg.svdvals(tau).min() for tau in [*taus, sum(taus)]]
        assume(min(gaps) > 0.1 and min(smallest) > 0.1)
    merged = flat(method(theta_0, thetas, **settings))
    for order in itertools.permutations(thetas):
        assert flat(method(theta_0, list(order), **settings)) == pytest.approx(merged, abs=1e-3)


@given(vectors, vectors, st.sampled_from(BACK))
def test_one_task_comes_back(theta_0: Theta, theta_t: Theta, name: str) -> None:
    merged = getattr(samlib.merge, name)(theta_0, [theta_t], **SETTINGS.get(name, {}))
    assert flat(merged) == pytest.approx(flat(theta_t), abs=1e-5)


def test_spectral_methods_keep_or_flatten_one_task() -> None:
    theta_0, theta_1 = theta(0, 0, 0, 0, 0, 0), theta(3, 0, 0, 1, 5, 6)
    assert flat(tsv_m(theta_0, [theta_1])) == pytest.approx([3, 0, 0, 1, 5, 6], abs=1e-6)
    assert flat(iso_c(theta_0, [theta_1])) == pytest.approx([2, 0, 0, 2, 5, 6], abs=1e-6)


def test_half_precision_is_combined_in_fp32_and_returned_in_its_dtype() -> None:
    theta_0 = {"w": torch.ones(5, dtype=torch.bfloat16)}
    thetas = [{"w": torch.full((5,), 1 + 2**-7, dtype=torch.bfloat16)} for _ in range(3)]
    merged = task_arithmetic(theta_0, thetas, 1.0)["w"]
    assert merged.dtype == torch.bfloat16 and (merged == 1 + 3 * 2**-7).all()


@given(st.lists(st.floats(0, 3, width=32), min_size=1, max_size=40), st.data())
def test_the_kth_largest_is_that_of_sorting(numbers: list[float], data: st.DataObject) -> None:
    """In one row and in parts of any size, also with equal numbers, fp32 and fp64."""
    k = data.draw(st.integers(0, len(numbers)))
    cut = data.draw(st.integers(0, len(numbers)))
    for dtype in (torch.float32, torch.float64):
        rows = torch.tensor([numbers, numbers[::-1]], dtype=dtype).round(decimals=1)
        found, surplus = kth_largest(lambda rows=rows: iter([rows[:, :cut], rows[:, cut:]]), k)
        expected = rows[0].sort(descending=True).values[k - 1] if k else torch.inf
        assert found.tolist() == [float(expected)] * 2
        assert surplus.tolist() == [int((rows[0] >= expected).sum()) - k] * 2


def test_ties_over_many_equal_magnitudes_keeps_exactly_its_share() -> None:
    """As in bf16 checkpoints, where a threshold is shared by many entries."""
    torch.manual_seed(0)
    theta_0 = {name: torch.zeros(7, 11) for name in "ab"}
    thetas = [{name: torch.randint(-3, 4, (7, 11)).float() for name in "ab"} for _ in range(3)]
    for trim in ("flat", "tensor"):
        for density in (0.1, 0.2, 0.55, 1.0):
            for theta in thetas:
                merged = ties(theta_0, [theta], density=density, trim=trim)
                kept = [int((w != 0).sum()) for w in merged.values()]
                could = [int((w != 0).sum()) for w in theta.values()]
                if trim == "flat":
                    assert sum(kept) == min(sum(could), int(density * 154))
                else:
                    assert kept == [min(c, int(density * 77)) for c in could]


def test_bad_weights_are_named() -> None:
    good, zero = theta(1, 2, 3, 4, 5, 6), theta(0, 0, 0, 0, 0, 0)
    cases: list[tuple[Theta, str]] = [
        ({"weight": good["weight"]}, r"tensor 'bias' is in theta_0 but not in thetas\[1\]"),
        ({**good, "extra": torch.ones(1)}, r"tensor 'extra' is in thetas\[1\] but not in theta_0"),
        ({**good, "bias": torch.ones(3)}, r"tensor 'bias' is \(3,\) torch.float32 in thetas\[1\] but \(2,\)"),
        ({**good, "bias": torch.ones(2, dtype=torch.float64)}, "tensor 'bias' is .*float64"),
        ({**good, "bias": torch.tensor([1.0, float("nan")])}, r"tensor 'bias' of thetas\[1\] holds NaN"),
    ]
    for bad, message in cases:
        for name in FREE:
            with pytest.raises(ValueError, match=message):
                getattr(samlib.merge, name)(zero, [good, bad])
    with pytest.raises(ValueError, match="tensor 'bias' .* holds NaN"):
        task_vector(cases[-1][0], zero)
    whole = {"n": torch.ones(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="tensor 'n' of theta_0 is torch.int64: only floating point"):
        average(whole, [whole])


def test_bad_arguments_are_named() -> None:
    zero = theta(0, 0, 0, 0, 0, 0)
    for name in FREE:
        with pytest.raises(ValueError, match="empty"):
            getattr(samlib.merge, name)(zero, [])
        with pytest.raises(ValueError, match="theta_0 holds no tensor"):
            getattr(samlib.merge, name)({}, [{}, {}])
    for density in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"ties: density must be a number in \(0, 1\]"):
            ties(zero, [zero], density=density)
    for lam in (float("nan"), float("inf"), "0.3", True):
        with pytest.raises(ValueError, match="task_arithmetic: lam must be a finite number"):
            task_arithmetic(zero, [zero], lam)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trim must be one of flat, tensor, not 'none'"):
        ties(zero, [zero], trim="none")
    with pytest.raises(ValueError, match="at least two"):
        model_stock(zero, [zero])
    with pytest.raises(ValueError, match="drop must be a number in \\[0, 1\\)"):
        dare(zero, [zero], drop=1.0)


def test_methods_with_images_want_as_many_images_and_heads_as_models(tiny: Any) -> None:
    theta_0 = weights_of(tiny.encoder)
    image, head = torch.rand(2, 3, 32, 32), torch.rand(3, 6)
    for name in ("fisher", "regmean", "adamerging"):
        method = getattr(samlib.merge, name)
        with pytest.raises(ValueError, match="2 models, 1 sets of images and 2 heads"):
            method(tiny.encoder, theta_0, [theta_0] * 2, [image], [head] * 2)
        with pytest.raises(ValueError, match="at least one image"):
            method(tiny.encoder, theta_0, [theta_0], [image[:0]], [head])
    with pytest.raises(ValueError, match="adamerging: objective must be one of entropy, kl, not 'loss'"):
        samlib.merge.adamerging(tiny.encoder, theta_0, [theta_0], [image], [head], objective="loss")


def test_choose_lambda_by_its_three_rules() -> None:
    grid = [0.0, 0.25, 0.5]
    scores = [[0.2, 0.9], [0.6, 0.6], [0.7, 0.5]]  # means 0.55, 0.6, 0.6: the first of the best
    assert choose_lambda(scores, grid) == (0.25, 0.25)
    assert choose_lambda(scores, grid, "per task") == (0.5, 0.0)
    assert choose_lambda(scores, grid, 0.3) == (0.3, 0.3)
    with pytest.raises(ValueError, match=r"scores must be \(G, T\) with a row for each of 0 lam"):
        choose_lambda([], [])
    with pytest.raises(ValueError, match="the score of task 1 at lam = 0.5 is nan"):
        choose_lambda([[0.1, 0.2], [0.1, float("nan")]], [0.0, 0.5])
    with pytest.raises(ValueError, match="rule must be 'shared', 'per task' or a finite number, not 'best'"):
        choose_lambda(scores, grid, "best")


def test_accuracy_curve_is_that_of_the_models_on_the_line(tiny: Any) -> None:
    loaded = [load_task(name) for name in ("warm", "cool")]
    heads = [zero_shot_head(tiny, task) for task in loaded]
    theta_0 = weights_of(tiny.encoder)
    torch.manual_seed(1)
    thetas = [{name: w + w.std() * torch.randn_like(w) for name, w in theta_0.items()} for _ in loaded]
    grid = [0.0, 0.3, 1.0, -2.0]
    splits = [task.test for task in loaded]
    curve = accuracy_curve(tiny.encoder, theta_0, task_arithmetic(theta_0, thetas, 1.0), grid, splits, heads)
    for lam, row in zip(grid, curve, strict=True):
        merged = task_arithmetic(theta_0, thetas, lam)
        for task, head, found in zip(loaded, heads, row, strict=True):
            assert found == pytest.approx(evaluate.accuracy(tiny.encoder, merged, task.test, head), abs=1e-12)
    assert len(curve.unique()) > 2  # the line is not flat, so that agreement means something
    with pytest.raises(ValueError, match="0 values of lam, 2 splits and 2 heads"):
        accuracy_curve(tiny.encoder, theta_0, theta_0, [], splits, heads)


def test_sam_over_the_coefficients_is_two_merges_a_step_written_out(tiny: Any) -> None:
    loaded = [load_task(name) for name in ("warm", "cool")]
    heads = [zero_shot_head(tiny, task) for task in loaded]
    images = [task.validation.images[:5] for task in loaded]  # one batch holds them all, whatever the order
    theta_0 = weights_of(tiny.encoder)
    torch.manual_seed(2)
    thetas = [{name: w + w.std() * torch.randn_like(w) for name, w in theta_0.items()} for _ in loaded]
    lams = torch.full((2, len(theta_0)), 0.3)
    names, rho, lr = list(theta_0), 0.2, 0.05

    def merged(lams: Tensor) -> Theta:
        return {
            name: w + sum(lams[t, i] * (theta[name] - w) for t, theta in enumerate(thetas))
            for i, (name, w) in enumerate(theta_0.items())
        }

    def gradient(lams: Tensor) -> Tensor:
        lams = lams.clone().requires_grad_()
        loss = torch.zeros(())
        for x, head, theta in zip(images, heads, thetas, strict=True):
            p = (torch.func.functional_call(tiny.encoder, theta, (x,)) @ head.T).softmax(1).detach()
            log_q = (torch.func.functional_call(tiny.encoder, merged(lams), (x,)) @ head.T).log_softmax(1)
            loss = loss + (p * (p.log() - log_q)).sum() / len(x)  # KL(expert || merged)
        return torch.autograd.grad(loss, lams)[0]

    m, v = torch.zeros_like(lams), torch.zeros_like(lams)
    for step in (1, 2, 3):  # Adam by hand, with the gradient at the climbed coefficients
        g = gradient(lams)
        g = gradient(lams + rho * g / g.norm())
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        lams = lams - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    settings: dict[str, Any] = {"objective": "kl", "rho": rho, "lr": lr, "steps": 3, "batch_size": 5}
    found = samlib.merge.adamerging(tiny.encoder, theta_0, thetas, images, heads, **settings)
    plain = samlib.merge.adamerging(tiny.encoder, theta_0, thetas, images, heads, **settings | {"rho": 0.0})
    for name, w in merged(lams).items():
        torch.testing.assert_close(found[name], w, rtol=1e-4, atol=1e-5)
    assert any((found[name] - plain[name]).abs().max() > 1e-3 for name in names)  # the climb makes a difference


def test_tsv_m_and_regmean_leave_what_one_task_wants_where_another_is_silent(tiny: Any) -> None:
    """A zero task matrix has arbitrary singular vectors; a dead input has no equation."""
    torch.manual_seed(3)
    a = torch.randn(8, 8)
    u, s, vh = torch.linalg.svd(a)
    zero = {"weight": torch.zeros(8, 8)}
    found = tsv_m(zero, [{"weight": a}, zero])["weight"]
    torch.testing.assert_close(found, u[:, :4] @ s[:4].diag() @ vh[:4], rtol=1e-4, atol=1e-5)

    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2, bias=False))
    images = torch.rand(30, 3, 2, 2)
    images[:, 0] = 0  # the first four inputs never occur
    thetas = [{"1.weight": torch.randn(2, 12)} for _ in range(2)]
    merged = samlib.merge.regmean(encoder, thetas[0], thetas, [images, images], [torch.eye(2)] * 2)["1.weight"]
    mean = (thetas[0]["1.weight"] + thetas[1]["1.weight"]) / 2
    torch.testing.assert_close(merged, mean, rtol=1e-4, atol=1e-5)  # equal inputs: averaging, everywhere
