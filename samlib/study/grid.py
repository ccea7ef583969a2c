"""What a sweep's YAML file asks for: a notebook, the parameters that all runs share, and a grid of the others."""

from __future__ import annotations

import ast
import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from samlib.store import keys
from samlib.store.files import (
    read_json,  # whatever loads torch is imported where it is needed: mistakes are told at once
)

KEYS = ("notebook", "out", "parameters", "grid", "figure")  # of the YAML file
Point = dict[str, Any]  # parameter -> value


@dataclass(frozen=True)
class Sweep:
    """What a YAML file asks for, checked.

    Args:
        name: of the file, without its ending.
        notebook: what to run.
        out: folder of all results.
        defaults: the notebook's own parameters.
        fixed: parameters that all runs share.
        points: the swept parameters of each run.
        files: the executed notebook of each run; its name holds a hash of all that decides the run.
        figure: `x`, `y` and, if wanted, `hue`, columns of the table; or empty.
    """

    name: str
    notebook: Path
    out: Path
    defaults: Point
    fixed: Point
    points: list[Point]
    files: list[Path]
    figure: dict[str, str]


def expand(grid: Any) -> list[Point]:
    """The points of a grid; the last name varies fastest.

    Args:
        grid: name -> list of values, of which every combination is a point; or a list of such grids, whose points
            follow each other.

    Raises:
        ValueError: something is empty or has another form.

    Taught in: 08_sweep.
    """
    points: list[Point] = []
    for part in grid if isinstance(grid, list) else [grid]:
        if not isinstance(part, dict) or not part:
            raise ValueError(
                f"grid must be such as {{rho: [0.005, 0.02], seed: [0, 1]}}, or a list of it, not {part!r}"
            )
        for name, values in part.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"grid: {name} must be a list of values, such as [{values or 0}], not {values!r}")
        points += [dict(zip(part, values, strict=True)) for values in itertools.product(*part.values())]
    if not points:
        raise ValueError("grid is empty: it needs a name with a list of values, such as {seed: [0, 1]}")
    return points


def declared(notebook: Mapping[str, Any]) -> Point:
    """A notebook's parameters and their defaults: the literals that its cell tagged `parameters` assigns.

    Args:
        notebook: as JSON.

    Raises:
        ValueError: no such cell, or a default that is no literal.
    """
    cells = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if not cells:
        raise ValueError("the notebook has no cell tagged 'parameters'")
    found: Point = {}
    for node in ast.parse("".join(cells[0]["source"])).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            found[ast.unparse(target)] = ast.literal_eval(node.value)
    return found


def read(path: Path, out: Path | None = None) -> Sweep:
    """Read and check a YAML file; nothing runs, nothing is written.

    Args:
        path: the file.
        out: folder of the results, instead of the one in the file.

    Raises:
        ValueError: the first mistake in it, and what would be right.

    Taught in: 08_sweep.
    """
    try:
        asked = yaml.load(path.read_text("utf-8"), _Loader)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(asked, dict):
        raise ValueError(f"{path} must hold the keys {', '.join(KEYS)}")
    known(asked, KEYS, f"{path.name} has no key")
    for name in ("notebook", "grid", *([] if out else ["out"])):
        if not asked.get(name):
            raise ValueError(f"{path.name}: {name!r} is missing or empty")
    source, folder = path.parent / str(asked["notebook"]), (out or path.parent / str(asked["out"])).resolve()
    if not source.is_file():
        raise ValueError(f"there is no notebook {source}: 'notebook' is relative to the folder of {path.name}")
    notebook, fixed, points = read_json(source), asked.get("parameters") or {}, expand(asked["grid"])
    defaults, swept = declared(notebook), list(dict.fromkeys(name for point in points for name in point))
    figure = asked.get("figure") or {}
    for key, value in {"parameters": fixed, "figure": figure}.items():
        if not isinstance(value, dict):
            raise ValueError(f"{path.name}: {key} must be names with values, not {value!r}")
    known([*fixed, *swept], defaults, f"{source.name} has no parameter")
    for point in [fixed, *points]:
        for name, value in point.items():
            _check(name, value)
            if point is not fixed and name in fixed:
                raise ValueError(f"{name} is in 'parameters' and in 'grid': take it out of one of them")
    whole = [defaults | fixed | point for point in points]
    if twice := [point for i, point in enumerate(points) if whole[i] in whole[:i]]:
        raise ValueError(f"grid holds a run twice: {words(twice[0])}")
    known(figure, ("x", "y", "hue"), "figure has no key")
    known([figure[axis] for axis in ("x", "hue") if axis in figure], swept, "figure: the grid varies no")
    if figure and not {"x", "y"} <= set(figure):
        raise ValueError("figure must have x and y, such as {x: rho, y: merged, hue: optimizer}")
    code = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    decides = [code, keys.library()]
    names = [keys.key([*decides, fixed | point])[:16] for point in points]
    labels = [re.sub(r"[^\w.=-]+", "_", words(point))[:100] for point in points]
    files = [folder / f"{label}-{key}.ipynb" for label, key in zip(labels, names, strict=True)]
    return Sweep(path.stem, source.resolve(), folder, defaults, fixed, points, files, figure)


class _Loader(yaml.SafeLoader):
    """As YAML's safe one, but a name that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [name.value for name, _ in node.value]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def known(names: Iterable[Any], allowed: Iterable[str], what: str) -> None:
    """Refuse the first name that is not allowed, with what is; `what` begins the message."""
    for name in names:
        if name not in allowed:
            close = difflib.get_close_matches(str(name), allowed, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{what} {name!r}, only {', '.join(allowed)}{hint}")


def _check(name: str, value: Any) -> None:
    """Refuse what a notebook's `begin` would refuse."""
    from samlib.notebook.parameters import PARAMETERS

    allowed, fits = PARAMETERS.get(name, ("", lambda value: True))
    if not fits(value):
        number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value)
        hint = f"; YAML takes {value} for text: write {value.replace('e', '.0e')}" if number else ""
        raise ValueError(f"{name} must be {allowed}, not {value!r} ({type(value).__name__}){hint}")


def words(point: Point) -> str:
    """A point for people, such as `optimizer=sam, rho=0.02, seed=0`."""
    return ", ".join(f"{name}={value}" for name, value in point.items())
