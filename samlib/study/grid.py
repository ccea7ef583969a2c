"""What a sweep's YAML file asks for: a notebook, the parameters that all runs share, and a grid of the others."""

from __future__ import annotations

import ast
import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from samlib.notebook.parameters import PARAMETERS
from samlib.store import keys
from samlib.store.files import read_json

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

    @property
    def swept(self) -> list[str]:
        """Names of the parameters that vary."""
        return list(dict.fromkeys(name for point in self.points for name in point))


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
    asked = _asked(path, ("notebook", "grid") if out else ("notebook", "grid", "out"))
    source, folder = path.parent / str(asked["notebook"]), out or path.parent / str(asked["out"])
    if not source.is_file():
        raise ValueError(f"there is no notebook {source}: 'notebook' is relative to the folder of {path.name}")
    notebook = read_json(source)
    sweep = Sweep(
        name=path.stem,
        notebook=source.resolve(),
        out=folder.resolve(),
        defaults=declared(notebook),
        fixed=asked["parameters"],
        points=expand(asked["grid"]),
        files=[],
        figure=asked["figure"],
    )
    _check_parameters(sweep)
    _check_figure(sweep)
    return replace(sweep, files=_files(sweep, notebook))


def _asked(path: Path, needed: Iterable[str]) -> dict[str, Any]:
    """What a YAML file holds: none but KEYS, something under each of `needed`, and names with values where it must."""
    try:
        asked = yaml.load(path.read_text("utf-8"), _Loader)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(asked, dict):
        raise ValueError(f"{path} must hold the keys {', '.join(KEYS)}")
    known(asked, KEYS, f"{path.name} has no key")
    for name in needed:
        if not asked.get(name):
            raise ValueError(f"{path.name}: {name!r} is missing or empty")
    for name in ("parameters", "figure"):
        asked[name] = asked.get(name) or {}
        if not isinstance(asked[name], dict):
            raise ValueError(f"{path.name}: {name} must be names with values, not {asked[name]!r}")
    return asked


def _check_parameters(sweep: Sweep) -> None:
    """Refuse parameters that the notebook does not have or take, and a run that is there twice."""
    known([*sweep.fixed, *sweep.swept], sweep.defaults, f"{sweep.notebook.name} has no parameter")
    for point in [sweep.fixed, *sweep.points]:
        for name, value in point.items():
            _check(name, value)
    if twice := [name for name in sweep.swept if name in sweep.fixed]:
        raise ValueError(f"{twice[0]} is in 'parameters' and in 'grid': take it out of one of them")
    whole = [sweep.defaults | sweep.fixed | point for point in sweep.points]
    if again := [point for i, point in enumerate(sweep.points) if whole[i] in whole[:i]]:
        raise ValueError(f"grid holds a run twice: {words(again[0])}")


def _check(name: str, value: Any) -> None:
    """Refuse what a notebook's `begin` would refuse."""
    allowed, fits = PARAMETERS.get(name, ("", lambda value: True))
    if not fits(value):
        number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value)
        hint = f"; YAML takes {value} for text: write {value.replace('e', '.0e')}" if number else ""
        raise ValueError(f"{name} must be {allowed}, not {value!r} ({type(value).__name__}){hint}")


def _check_figure(sweep: Sweep) -> None:
    """Refuse a figure without both axes, or with x and hue that do not vary."""
    known(sweep.figure, ("x", "y", "hue"), "figure has no key")
    varied = [sweep.figure[axis] for axis in ("x", "hue") if axis in sweep.figure]
    known(varied, sweep.swept, "figure: the grid varies no")
    if sweep.figure and not {"x", "y"} <= set(sweep.figure):
        raise ValueError("figure must have x and y, such as {x: rho, y: merged, hue: optimizer}")


def _files(sweep: Sweep, notebook: Mapping[str, Any]) -> list[Path]:
    """A name for each run, for people and by all that decides it: the notebook's code, samlib's, and the parameters."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    decides = [code, keys.library()]
    files = []
    for point in sweep.points:
        label = re.sub(r"[^\w.=-]+", "_", words(point))[:100]
        files.append(sweep.out / f"{label}-{keys.key([*decides, sweep.fixed | point])[:16]}.ipynb")
    return files


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


def words(point: Point) -> str:
    """A point for people, such as `optimizer=sam, rho=0.02, seed=0`."""
    return ", ".join(f"{name}={value}" for name, value in point.items())
