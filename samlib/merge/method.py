"""What all data-free merging methods share: checks, task vectors, one tensor after the other."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import torch
from torch import Tensor

from samlib.model.theta import Theta, Weights, check_fit, check_values, wide
from samlib.rules import Rule, check_settings

P = ParamSpec("P")
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
