"""What all merging methods share: the registry, the checks, and the way of a data-free one from tensor to tensor."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor

from samlib import rules
from samlib.model.theta import Theta, Weights, check_fit, check_values, wide
from samlib.rules import Rule

P = ParamSpec("P")
Combine = Callable[[str, Tensor], Tensor]  # name, task vectors (T, *shape) -> merged task vector (*shape)
LAM = rules.number()
DATA_FREE = [
    inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
    for name, annotation in (("theta_0", "Weights"), ("thetas", "Sequence[Weights]"))
]

WEIGHTS = """
    theta_0: pre-trained weights.
    thetas: T >= 1 fine-tuned weights, with the names, shapes and dtypes of theta_0."""
IMAGES = f"""
    encoder: gives the architecture.{WEIGHTS}
    images: of each task, (N, 3, H, W), N >= 1.
    heads: of each task, (K, d)."""
DOC = """{text}

Args:{arguments}

Returns:
    The merged weights, in the order and dtypes of theta_0.

Raises:
    ValueError: one of these is out of range, missing or not finite, or they do not fit together.

Source: {source}.
Taught in: 05_merging."""


@dataclass(frozen=True)
class Method:
    """One row of the registry.

    Args:
        name: of the function in `samlib.merge` and on the command line.
        needs: what the method reads beside theta_0 and the fine-tuned weights: "nothing" or "unlabelled images".
        source: paper.
        defaults: hyper-parameter -> value.
        rules: hyper-parameter -> what it may be.
        plan: of a data-free method: theta_0, thetas and hyper-parameters -> how to combine one tensor's task vectors.
    """

    name: str
    needs: str
    source: str
    defaults: dict[str, Any]
    rules: dict[str, Rule]
    plan: Callable[..., Combine] | None


METHODS: dict[str, Method] = {}


def per_tensor(
    source: str, **settings: Rule
) -> Callable[[Callable[Concatenate[Tensor, P], Tensor]], Callable[Concatenate[Weights, Sequence[Weights], P], Theta]]:
    """Make a merging method of a function that merges the task vectors of one tensor, (T, *shape) -> (*shape).

    Args:
        source: paper and place.
        settings: what each of the function's other arguments may be.

    Returns:
        A decorator. The method takes theta_0 and thetas in place of the task vectors, checks all it is given, and adds
        theta_0; half precision is merged in fp32. `samlib.merge.files` runs the same function from file to file.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Theta]:
        def plan(theta_0: Weights, thetas: Sequence[Weights], **given: Any) -> Combine:
            return lambda name, taus: function(taus, **given)

        return _method(function, source, settings, plan)

    return decorate


def planned(source: str, **settings: Rule) -> Callable[[Callable[P, Combine]], Callable[P, Theta]]:
    """As `per_tensor`, of a function that looks at all weights before it says how to merge those of one tensor."""
    return lambda plan: _method(plan, source, settings, plan)


def with_images(source: str, **settings: Rule) -> Callable[[Callable[P, Theta]], Callable[P, Theta]]:
    """Make a merging method of a function that merges by looking at images; what is checked are its arguments."""
    return lambda function: _method(function, source, settings, None)


def task_vectors(theta_0: Weights, thetas: Sequence[Weights], name: str) -> Tensor:
    """Those of one tensor in at least fp32, (T, *shape)."""
    w = wide(theta_0[name])
    return torch.stack([wide(theta[name]) for theta in thetas]).sub_(w)


def added(w: Tensor, tau: Tensor) -> Tensor:
    """A tensor of theta_0 plus its merged task vector, in its dtype."""
    return (wide(w) + tau).to(w.dtype)


def _method(
    function: Callable[..., Any], source: str, settings: dict[str, Rule], plan: Callable[..., Combine] | None
) -> Callable[..., Theta]:
    """What is called: the function with its signature and docstring made whole, its arguments checked."""
    name, signature = function.__name__, inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.name in settings]
    if plan:
        signature = signature.replace(parameters=[*DATA_FREE, *own], return_annotation="Theta")
    defaults = {parameter.name: parameter.default for parameter in own}
    METHODS[name] = Method(name, "nothing" if plan else "unlabelled images", source, defaults, settings, plan)

    @functools.wraps(function)
    def merge(*args: Any, **kwargs: Any) -> Theta:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        rules.check(name, settings, given)
        check_fit([given["theta_0"], *given["thetas"]])
        check_values([given["theta_0"], *given["thetas"]])
        if plan:
            return _in_memory(plan, **given)
        models, images, heads = (len(given[one]) for one in ("thetas", "images", "heads"))
        if not models == images == heads or not all(map(len, given["images"])):
            raise ValueError(
                f"{name} needs at least one image and one head for each fine-tuned model, "
                f"and has {models} models, {images} sets of images and {heads} heads"
            )
        return function(**given)

    text, _, documented = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")
    arguments = f"{WEIGHTS if plan else IMAGES}\n{documented}".rstrip()
    merge.__doc__ = DOC.format(text=text, arguments=arguments, source=source)
    types = {"theta_0": Weights, "thetas": Sequence[Weights], "return": Theta}  # not every module knows these names
    merge.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()} | types
    merge.__signature__ = signature  # type: ignore[attr-defined]
    return merge


def _in_memory(plan: Callable[..., Combine], theta_0: Weights, thetas: Sequence[Weights], **settings: Any) -> Theta:
    combine = plan(theta_0, thetas, **settings)
    return {name: added(w, combine(name, task_vectors(theta_0, thetas, name))) for name, w in theta_0.items()}
