"""What a notebook's parameters may be."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping
from typing import Any

import yaml

from samlib.data import catalogue
from samlib.data.paper_tasks import HUB
from samlib.model import registry
from samlib.notebook.presets import PRESETS, Preset
from samlib.rules import Rule, choice, none, number, whole
from samlib.train.device import DEVICES


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


_NAMES = (*catalogue.TASKS, *HUB, "the folders in SAMLIB_DATA")
_COUNT = whole(1) | none
_SIZE = number(0) | none

# of a notebook's parameters; None means the preset's value
PARAMETERS: dict[str, Rule] = {
    "preset": choice(*PRESETS),
    "seed": whole(0),
    "device": Rule(DEVICES, _device),
    "tasks": Rule(f"'all' (the preset's) or a list of different names out of {', '.join(_NAMES)}", _tasks),
    "model": Rule("None, 'testbed' or such as 'ViT-B-32/openai'", _model),
    "optimizer": choice("adamw", "sam", "asam"),
    "steps": _COUNT,
    "batch_size": _COUNT,
    "micro_batch": whole(1) | choice("auto") | none,
    "n_train": _COUNT,
    "n_eval": _COUNT,
    "jobs": _COUNT,
    "label_noise": number(0, 1, open_high=True) | none,
    "rho": _SIZE,
    "rho_sam": _SIZE,
    "rho_asam": _SIZE,
    "eta": _SIZE,
    "lr": number(0, open_low=True) | none,
    "lam": number() | none,
    "precision": choice("auto", "fp32", "bf16") | none,
    "density": number(0, 1, open_low=True) | none,
}


def declared(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """A notebook's parameters with their values.

    Args:
        namespace: globals() of a notebook, of which those that are annotated count, and of a script that annotates none
            those that have a parameter's name; or a plain dictionary, of which all do.
    """
    annotated = namespace.get("__annotations__")
    if annotated is None and "__annotate__" in namespace:  # from Python 3.14 on
        annotated = namespace["__annotate__"](1)
    names = (annotated or [name for name in PARAMETERS if name in namespace]) if "__name__" in namespace else namespace
    return {name: namespace[name] for name in names}


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
