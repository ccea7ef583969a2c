"""What a notebook's parameters may be."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import yaml

from samlib.data import catalogue
from samlib.data.paper_tasks import HUB
from samlib.model import registry
from samlib.notebook.presets import PRESETS, Preset
from samlib.rules import is_whole


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: is_whole(value, least)


def _number(low: float, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def listed(value: Any) -> Any:
    """A list that papermill's -p handed on as text, such as "[mnist, dtd]"; anything else as it is."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value
    return value


def _device(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", value))


def _tasks(value: Any) -> bool:
    value = listed(value)
    if isinstance(value, (list, tuple)):
        known = catalogue.known()
        return len(value) == len(set(map(str, value))) > 0 and all(name in known for name in value)
    return value == "all"


def _model(value: Any) -> bool:
    if isinstance(value, str):
        registry.check(value)
    return value is None or isinstance(value, str)


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


_NAMES = (*catalogue.TASKS, *HUB, "the folders in SAMLIB_DATA")


# name of a notebook's parameter -> (what is allowed, test); None means the preset's value
PARAMETERS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "preset": (f"one of {', '.join(PRESETS)}", lambda value: isinstance(value, str) and value in PRESETS),
    "seed": ("an integer >= 0", _whole(0)),
    "device": ("'auto', 'cpu', 'cuda' or 'cuda:N'", _device),
    "tasks": (f"'all' (the preset's) or a list of different names out of {', '.join(_NAMES)}", _tasks),
    "model": ("None, 'testbed' or such as 'ViT-B-32/openai'", _model),
    "optimizer": ("adamw, sam or asam", lambda value: value in ("adamw", "sam", "asam")),
    "steps": ("an integer >= 1 or None", _optional(_whole(1))),
    "batch_size": ("an integer >= 1 or None", _optional(_whole(1))),
    "micro_batch": (
        "an integer >= 1, 'auto' or None",
        lambda value: value in (None, "auto") or is_whole(value, 1),
    ),
    "n_train": ("an integer >= 1 or None", _optional(_whole(1))),
    "n_eval": ("an integer >= 1 or None", _optional(_whole(1))),
    "jobs": ("an integer >= 1 or None", _optional(_whole(1))),
    "label_noise": ("a number in [0, 1) or None", _optional(_number(0, math.nextafter(1, 0)))),
    "rho": ("a finite number >= 0 or None", _optional(_number(0))),
    "rho_sam": ("a finite number >= 0 or None", _optional(_number(0))),
    "rho_asam": ("a finite number >= 0 or None", _optional(_number(0))),
    "eta": ("a finite number >= 0 or None", _optional(_number(0))),
    "lr": ("a finite number > 0 or None", _optional(_number(sys.float_info.min))),
    "lam": ("a finite number or None", _optional(_number(-math.inf))),
    "precision": ("auto, fp32, bf16 or None", lambda value: value in (None, "auto", "fp32", "bf16")),
    "density": ("a number in (0, 1] or None", _optional(_number(sys.float_info.min, 1))),
}


def check(notebook: str, parameters: dict[str, Any]) -> None:
    """Refuse names and values that the notebook does not take.

    Args:
        notebook: its name, for the message.
        parameters: the notebook's declared parameters with their values.

    Raises:
        ValueError: a name that papermill injected and the notebook does not declare, a name that is not in
            PARAMETERS, or a value that its rule refuses.
    """
    for name in sorted(_injected()):
        if name not in parameters:
            close = difflib.get_close_matches(name, parameters, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{notebook} has no parameter {name!r}, only {', '.join(parameters)}{hint}")
    for name, value in parameters.items():
        if name not in PARAMETERS:
            raise ValueError(f"begin() knows no parameter {name!r}, only {', '.join(PARAMETERS)}")
        allowed, check = PARAMETERS[name]
        if not check(value):
            raise ValueError(f"{name} must be {allowed}, not {value!r} ({type(value).__name__})")


def chosen(parameters: dict[str, Any]) -> Preset:
    """The preset that a notebook's parameters name, with those of its fields that they override, and seeds from `seed`.

    Args:
        parameters: checked; None and "all" leave the preset's value.
    """
    preset = PRESETS[parameters.get("preset", "smoke")]
    fields = {f.name for f in dataclasses.fields(Preset)} - {"name"}
    overrides = {k: v for k, v in parameters.items() if k in fields and v is not None and v != "all"}
    if "tasks" in overrides:
        overrides["tasks"] = tuple(listed(overrides["tasks"]))
    return dataclasses.replace(preset, **overrides, seeds=tuple(parameters.get("seed", 0) + s for s in preset.seeds))


def needs(parameters: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Model and tasks that a notebook loads; one that has no such parameters loads the testbed's model and no task.

    Args:
        parameters: checked.
    """
    preset = chosen(parameters)
    model = preset.model if {"model", "tasks"} & parameters.keys() else registry.TESTBED
    return model, preset.tasks if "tasks" in parameters else ()


def _injected() -> set[str]:
    """Names assigned in the cells that papermill injected into the running notebook."""
    ipython = sys.modules.get("IPython")  # loaded already wherever a notebook runs
    shell = ipython.get_ipython() if ipython else None
    cells = shell.user_ns.get("In", []) if shell else []
    names: set[str] = set()
    for cell in cells:
        if cell.split("\n")[0].strip() == "# Parameters":  # papermill's mark
            for node in ast.walk(ast.parse(cell)):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    names.add(node.id)
    return names
