"""What all data-free merging methods share: checks, task vectors, one tensor after the other."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import torch
from torch import Tensor

from samlib.checkpoint import Theta

P = ParamSpec("P")
Weights = Mapping[str, Tensor]  # by name; may read a tensor from a file when it is asked for
Rule = tuple[str, Callable[[Any], bool]]  # what a value may be, and whether one is that
Combine = Callable[[str, Tensor], Tensor]  # name, task vectors (T, *shape) -> merged task vector (*shape)


@dataclass(frozen=True)
class Method:
    """One row of the registry.

    Args:
        name: of the function in `samlib.merge` and on the command line.
        needs: what the method reads beside theta_0 and the fine-tuned weights: "nothing" or "unlabelled images".
        source: paper.
        defaults: hyper-parameter -> value.
        rules: hyper-parameter -> what it may be, and whether a value is that.
        plan: of a data-free method: theta_0, thetas and hyper-parameters -> how to combine one tensor's task vectors.
    """

    name: str
    needs: str
    source: str
    defaults: dict[str, Any]
    rules: dict[str, Rule]
    plan: Callable[..., Combine] | None = None


METHODS: dict[str, Method] = {}


def number(low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False) -> Rule:
    """The rule for a finite number in an interval."""
    text = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    if (low, high) == (-math.inf, math.inf):
        text = "a finite number"
    elif high == math.inf:
        text = f"a finite number {'>' if open_low else '>='} {low:g}"

    def holds(value: Any) -> bool:
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return right and (low < value if open_low else low <= value) and (value < high if open_high else value <= high)

    return text, holds


def whole(low: int) -> Rule:
    """The rule for an integer of at least `low`."""
    return f"an integer >= {low}", lambda value: type(value) is int and value >= low


def choice(*values: Any) -> Rule:
    """The rule for one of several values."""
    text = " or ".join([", ".join(map(str, values[:-1])), str(values[-1])])
    return text, lambda value: any(value is v if isinstance(v, bool) else value == v for v in values)


def data_free(source: str, **rules: Rule) -> Callable[[Callable[P, Combine]], Callable[P, Theta]]:
    """Make a public merging function of one that says how to combine the task vectors of one tensor.

    Args:
        source: paper and place.
        rules: setting -> what it may be, from `number`, `whole` or `choice`.

    Returns:
        A decorator. What it makes checks the weights and settings first, and holds the merged model in memory;
        `samlib.merge.files` runs the same plan from file to file.
    """

    def decorate(plan: Callable[P, Combine]) -> Callable[P, Theta]:
        method = _register(plan, "nothing", source, rules)

        @functools.wraps(plan)
        def merge(*args: P.args, **kwargs: P.kwargs) -> Theta:
            given = _checked(plan, rules, args, kwargs)
            assert method.plan is not None
            return dict(merged_tensors(given["theta_0"], given["thetas"], method.plan(*args, **kwargs)))

        return merge

    return decorate


def with_images(source: str, **rules: Rule) -> Callable[[Callable[P, Theta]], Callable[P, Theta]]:
    """Enter a merging function that looks at images in the registry, and let it check what it is given.

    Args:
        source, rules: as for `data_free`.
    """

    def decorate(function: Callable[P, Theta]) -> Callable[P, Theta]:
        _register(function, "unlabelled images", source, rules)

        @functools.wraps(function)
        def merge(*args: P.args, **kwargs: P.kwargs) -> Theta:
            given = _checked(function, rules, args, kwargs)
            sizes = [len(given[name]) for name in ("thetas", "images", "heads")]
            if len(set(sizes)) > 1 or not all(map(len, given["images"])):
                raise ValueError(
                    f"{function.__name__} needs at least one image and one head for each fine-tuned model, "
                    f"and has {sizes[0]} models, {sizes[1]} sets of images and {sizes[2]} heads"
                )
            return function(*args, **kwargs)

        return merge

    return decorate


def _register(function: Callable[..., Any], needs: str, source: str, rules: dict[str, Rule]) -> Method:
    parameters = inspect.signature(function).parameters
    defaults = {name: parameters[name].default for name in rules}
    method = Method(function.__name__, needs, source, defaults, rules, function if needs == "nothing" else None)
    METHODS[method.name] = method
    return method


def _checked(
    function: Callable[..., Any], rules: dict[str, Rule], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments by name, once they are known to be right."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    check_settings(function.__name__, rules, given)
    weights = [given["theta_0"], *given["thetas"]]
    check_fit(weights)
    check_values(weights)
    return given


def merged_tensors(theta_0: Weights, thetas: Sequence[Weights], combine: Combine) -> Iterator[tuple[str, Tensor]]:
    """theta_0 plus the merged task vector, one tensor after the other, in the order and dtypes of theta_0.

    Half-precision weights are combined in fp32.
    """
    for name, w in theta_0.items():
        yield name, merged_tensor(name, w, taus(theta_0, thetas, name), combine)


def merged_tensor(name: str, w: Tensor, taus: Tensor, combine: Combine) -> Tensor:
    """One tensor of theta_0 plus its merged task vector."""
    return (wide(w) + combine(name, taus)).to(w.dtype)


def taus(theta_0: Weights, thetas: Sequence[Weights], name: str) -> Tensor:
    """The task vectors of one tensor, (T, *shape)."""
    w = wide(theta_0[name])
    return torch.stack([wide(theta[name]) for theta in thetas]).sub_(w)


def wide(w: Tensor) -> Tensor:
    """The tensor in at least fp32."""
    return w.float() if w.dtype in (torch.float16, torch.bfloat16) else w


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


def check_settings(method: str, rules: dict[str, Rule], given: Mapping[str, Any]) -> None:
    """Refuse a setting out of its range.

    Raises:
        ValueError: a value breaks its rule.
    """
    for name, (allowed, holds) in rules.items():
        if not holds(given[name]):
            raise ValueError(f"{method}: {name} must be {allowed}, not {given[name]!r}")


def check_fit(weights: Sequence[Weights], labels: Sequence[str] | None = None) -> None:
    """Refuse an empty list and weights that differ in names, shapes or dtypes.

    Args:
        weights: theta_0 first; anything with names, and tensors that have shape and dtype.
        labels: what to call them in the error, such as their files.

    Raises:
        ValueError: what differs, and where.
    """
    if len(weights) < 2:
        raise ValueError("the list of weights to merge is empty: give at least one fine-tuned model beside theta_0")
    labels = labels or ["theta_0", *(f"thetas[{i}]" for i in range(len(weights) - 1))]
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

    Raises:
        ValueError: the tensor and where it is.
    """
    labels = labels or ["theta_0", *(f"thetas[{i}]" for i in range(len(weights) - 1))]
    for label, theta in zip(labels, weights, strict=True):
        for name, w in theta.items():
            if not torch.isfinite(w).all():
                raise ValueError(f"tensor {name!r} of {label} holds NaN or infinity")
