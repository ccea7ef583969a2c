from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samlib.merge import average, choose_lambda, task_arithmetic, task_vector, ties

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
    methods = (lambda t: average([theta_0, *t]), lambda t: task_arithmetic(theta_0, t, 0.5), lambda t: ties(theta_0, t))
    for method in methods:
        merged, expected = method(other), method(thetas)
        assert list(merged) == list(theta_0) and all(torch.equal(merged[name], expected[name]) for name in theta_0)


def test_ties_keeps_exactly_k_the_first_of_equal_magnitudes() -> None:
    merged = ties(theta(0, 0, 0, 0, 0, 0), [theta(1, -1, 1, 2, -1, 1)], density=0.5)
    assert flat(merged) == [1, -1, 0, 2, 0, 0]


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
    assert flat(arithmetic) == pytest.approx(flat(average(thetas)), abs=1e-5)


@given(vectors, tasks)
def test_lam_zero_gives_theta_0(theta_0: Theta, thetas: list[Theta]) -> None:
    assert flat(task_arithmetic(theta_0, thetas, 0.0)) == flat(theta_0)
    assert flat(ties(theta_0, thetas, 0.0)) == flat(theta_0)


@given(vectors, tasks, st.sampled_from([0.2, 0.5, 1.0]))
def test_the_order_of_the_tasks_changes_nothing(theta_0: Theta, thetas: list[Theta], density: float) -> None:
    for order in itertools.permutations(thetas):
        assert flat(average(list(order))) == flat(average(thetas))
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


def test_bad_weights_are_named() -> None:
    good, zero = theta(1, 2, 3, 4, 5, 6), theta(0, 0, 0, 0, 0, 0)
    cases: list[tuple[Theta, str]] = [
        ({"weight": good["weight"]}, "'bias' is in one of them only"),
        ({**good, "extra": torch.ones(1)}, "'extra' is in one of them only"),
        ({**good, "bias": torch.ones(3)}, r"'bias' is \(3,\)"),
        ({**good, "bias": torch.ones(2, dtype=torch.float64)}, "'bias' is .*float64"),
        ({**good, "bias": torch.tensor([1.0, float("nan")])}, "'bias' of weights 1 holds NaN"),
    ]
    for bad, message in cases:
        for merge in (
            lambda bad=bad: task_vector(bad, zero),
            lambda bad=bad: average([good, bad]),
            lambda bad=bad: task_arithmetic(zero, [bad], 0.3),
            lambda bad=bad: ties(zero, [bad]),
        ):
            with pytest.raises(ValueError, match=message):
                merge()
    whole = {"n": torch.ones(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="'n' of weights 0 is torch.int64"):
        average([whole])


def test_bad_arguments_are_named() -> None:
    zero = theta(0, 0, 0, 0, 0, 0)
    for merge in (lambda: average([]), lambda: task_arithmetic(zero, [], 0.3), lambda: ties(zero, [])):
        with pytest.raises(ValueError, match="empty"):
            merge()
    for density in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
            ties(zero, [zero], density=density)
    for lam in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lam must be a finite number"):
            task_arithmetic(zero, [zero], lam)
        with pytest.raises(ValueError, match="lam must be a finite number"):
            ties(zero, [zero], lam)


def test_choose_lambda_takes_the_first_maximum() -> None:
    assert choose_lambda(lambda lam: -((lam - 0.5) ** 2), [0.0, 0.25, 0.75, 1.0]) == (
        0.25,
        [-0.25, -0.0625, -0.0625, -0.25],
    )
    with pytest.raises(ValueError, match="grid of lam is empty"):
        choose_lambda(lambda lam: lam, [])
    with pytest.raises(ValueError, match="score at lam = 0.5 is nan"):
        choose_lambda(lambda lam: float("nan"), [0.5])
