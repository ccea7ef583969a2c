"""Build the book: run the notebooks with papermill, stage the executed copies, render them with Jupyter Book.

    python -m tools.build_book --preset smoke
    python -m tools.build_book -p seed=1                      # a parameter of every notebook
    python -m tools.build_book -p 05_merging:seed=1    # a parameter of one notebook

Everything is written below build/<preset>/ (see `Paths`). A notebook runs again only when its code, samlib's
code, the testbed, the published values or its parameters changed; a change of text is only rendered.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat

from samlib.notebook.execute import UNFINISHED, NotebookError, execute, failed
from samlib.notebook.presets import PRESETS
from samlib.store import keys
from samlib.store.files import locked, read_json, replacing, write_json
from tools.check_offline import problems
from tools.page_tables import filled

ROOT = Path(__file__).resolve().parent.parent
COLAB_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
LOCAL_BADGE = "../book/images/open-in-colab.svg"
WIDGET_TYPES = ("application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json")
SETTINGS = ("_config.yml", "_toc.yml")
RENDERERS = ("jupyter-book", "sphinx", "myst-nb", "sphinx-book-theme", "sphinxcontrib-bibtex")
HEARTBEAT = 60.0  # s, between two lines about a running notebook when the output is no terminal

Notebook = nbformat.NotebookNode
Cell = nbformat.NotebookNode


class BuildError(Exception):
    """A message for the reader of the terminal: what is wrong and where; no traceback is shown."""


@dataclasses.dataclass(frozen=True)
class Paths:
    """Where one preset's build lives."""

    root: Path  # the repository
    build: Path  # build/<preset>

    @property
    def executed(self) -> Path:
        """The notebooks as papermill left them."""
        return self.build / "executed"

    @property
    def stage(self) -> Path:
        """What Jupyter Book reads: configuration, pages, executed notebooks with today's text."""
        return self.build / "stage"

    @property
    def html(self) -> Path:
        """The rendered book."""
        return self.build / "html"

    @property
    def state(self) -> Path:
        """For every notebook, the key of its last complete run and the seconds it took."""
        return self.build / "state.json"


# Notebooks and their parameters


def notebooks_in_toc(root: Path) -> list[str]:
    """The notebooks' names in the book's order, as `_toc.yml` lists them."""
    text = (root / "_toc.yml").read_text(encoding="utf-8")
    return re.findall(r"file:\s*notebooks/([\w-]+)", text)


def read_notebook(path: Path) -> Notebook:
    return nbformat.read(path, as_version=4)


def tags(cell: Cell) -> list[str]:
    return list(cell.metadata.get("tags", []))


def code_cells(notebook: Notebook) -> list[Cell]:
    """The code cells, without the one that papermill injects."""
    return [c for c in notebook.cells if c.cell_type == "code" and "injected-parameters" not in tags(c)]


def parameters(notebook: Notebook) -> dict[str, set[str]]:
    """The parameters of a notebook: for each name the names of the allowed types, empty if anything goes."""
    cell = next((c for c in code_cells(notebook) if "parameters" in tags(c)), None)
    found: dict[str, set[str]] = {}
    for node in ast.parse(cell.source).body if cell else []:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = type_names(node.annotation)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constant = isinstance(node.value, ast.Constant)
            found[node.targets[0].id] = {type(ast.literal_eval(node.value)).__name__} if constant else set()
    return found


def type_names(annotation: ast.expr) -> set[str]:
    """An annotation's outer types: {'float', 'NoneType'} for `float | None`, {'list'} for `list[int]`."""
    if isinstance(annotation, ast.BinOp):
        return type_names(annotation.left) | type_names(annotation.right)
    if isinstance(annotation, ast.Subscript):
        return type_names(annotation.value)
    return {ast.unparse(annotation).replace("None", "NoneType")}


def parse_parameter(text: str) -> tuple[str | None, str, Any]:
    """Split `[NOTEBOOK:]NAME=VALUE`; the value is a Python literal (0.05, True, [1, 2]) or else a string."""
    match = re.fullmatch(r"(?:([\w-]+):)?([A-Za-z_]\w*)=(.*)", text)
    if match is None:
        raise BuildError(f"parameter {text!r} must look like NAME=VALUE or NOTEBOOK:NAME=VALUE")
    notebook, name, value = match.groups()
    try:
        return notebook, name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return notebook, name, value


def assign_parameters(
    notebooks: Mapping[str, Notebook], given: Iterable[tuple[str | None, str, Any]]
) -> dict[str, dict[str, Any]]:
    """Give every notebook its parameters, later ones first.

    Args:
        notebooks: The book's notebooks by name.
        given: Triples (notebook or None for all, parameter, value).

    Raises:
        BuildError: A notebook, a parameter or a type is unknown; the message lists all such mistakes.
    """
    chosen: dict[str, dict[str, Any]] = {name: {} for name in notebooks}
    wrong: list[str] = []
    for target, parameter, value in given:
        if target is not None and target not in notebooks:
            wrong.append(f"there is no notebook {target!r}, only {', '.join(notebooks)}")
            continue
        for name in notebooks if target is None else [target]:
            known = parameters(notebooks[name])
            if parameter not in known:
                wrong.append(f"{name} has no parameter {parameter!r}, only {', '.join(known) or 'none'}")
                continue
            types, given_type = known[parameter], type(value).__name__
            if types and given_type not in types and not (given_type == "int" and "float" in types):
                wrong.append(f"{name}: {parameter} must be {' or '.join(sorted(types))}, not {value!r}")
            chosen[name][parameter] = value
    if wrong:
        raise BuildError("; ".join(wrong))
    return chosen


# What a run depends on


def shared_digest(root: Path) -> str:
    """A hash of what every notebook depends on: samlib with its data, the published values, Python, torch."""
    code = keys.library(root / "samlib")
    digest = hashlib.sha256(f"{code} {sys.version_info[:2]} {importlib.metadata.version('torch')}".encode())
    for folder in (root / "samlib", root / "book" / "published"):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix not in (".py", ".pyc", ".md"):
                digest.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()


def run_key(notebook: Notebook, chosen: Mapping[str, Any], shared: str) -> str:
    """A hash of everything that a run of this notebook depends on; its text does not count."""
    parts = [[cell.source for cell in code_cells(notebook)], dict(chosen), shared]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_state(path: Path) -> dict[str, Any]:
    """What the last build left, or nothing."""
    return read_json(path) if path.is_file() else {}


# Running


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class Progress:
    """Says how far a notebook is: on a terminal in one line that stands still, else in a line a minute.

    Args:
        label: What the lines begin with.
        total: Cells that papermill will count.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.told, self.terminal = label, total, 0.0, sys.stdout.isatty()

    def __call__(self, cell: int, seconds: float) -> None:
        line = f"{self.label}: cell {cell} of {self.total}, {clock(seconds)}"
        if self.terminal:
            print(f"\r{line}   ", end="", flush=True)
        elif seconds - self.told >= HEARTBEAT:
            self.told = seconds
            print(line, flush=True)


def run_notebook(source: Path, target: Path, chosen: Mapping[str, Any], timeout: int, label: str) -> float:
    """Run one notebook in a process of its own and say how far it is.

    Args:
        source: The notebook.
        target: Where its executed copy goes; written only when the run is complete.
        chosen: Its parameters.
        timeout: Seconds that one cell may take.
        label: What the progress lines begin with.

    Returns:
        The seconds it took.

    Raises:
        BuildError: A cell failed; the message names it and the error.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(label, len(read_notebook(source).cells) + 1)  # papermill adds a cell
    try:
        return execute(source, target, chosen, timeout=timeout, progress=progress)
    except NotebookError as error:
        kept = f"\nThe run so far: {failed(target)}" if failed(target).exists() else ""
        where = f"{source.stem} failed in {error.cell}" if error.cell else f"{source.stem} could not be run"
        raise BuildError(f"{where}:\n{error.problem}{kept}") from None
    finally:
        if progress.terminal:
            print("\r\x1b[K", end="")


def without_widgets(notebook: Notebook) -> None:
    """Remove widgets: a page has no kernel to drive them."""
    notebook.metadata.pop("widgets", None)
    for cell in code_cells(notebook):
        cell.outputs = [o for o in cell.outputs if not any(t in o.get("data", {}) for t in WIDGET_TYPES)]


def check_executed(notebook: Notebook, name: str) -> None:
    """Check that a staged notebook was run to its end and that readers who cannot see its figures get a text.

    Raises:
        BuildError: A cell was not run, has an error, or shows an image without `mystnb.image.alt`.
    """
    for number, cell in enumerate(code_cells(notebook), start=1):
        where = f"{name}, code cell {number}"
        if cell.source.strip() and cell.execution_count is None:
            raise BuildError(f"{where} was not executed")
        if cell.metadata.get("papermill", {}).get("exception") or any(o.output_type == "error" for o in cell.outputs):
            raise BuildError(f"{where} ended with an error")
        images = any(t.startswith("image/") for o in cell.outputs for t in o.get("data", {}))
        if images and not cell.metadata.get("mystnb", {}).get("image", {}).get("alt"):
            raise BuildError(f"{where} shows an image but its metadata has no mystnb.image.alt")
    if notebook.metadata.get("papermill", {}).get("exception"):
        raise BuildError(f"{name} ended with an error")


# Staging and rendering


def combine(source: Notebook, executed: Notebook) -> Notebook:
    """Put the outputs of an earlier run into the notebook as it is now.

    The code cells must be the same, in the same order; text cells and the cells' metadata are the source's.
    """
    result = copy.deepcopy(source)
    result.metadata = executed.metadata
    injected = [c for c in executed.cells if "injected-parameters" in tags(c)]
    for cell in injected:
        cell.metadata["tags"] = [*tags(cell), "hide-input"]  # folded, as the parameters themselves are
    for cell, run in zip(code_cells(result), code_cells(executed), strict=True):
        cell.outputs, cell.execution_count = run.outputs, run.execution_count
        if "papermill" in run.metadata:
            cell.metadata["papermill"] = run.metadata["papermill"]
    place = next((i for i, c in enumerate(result.cells) if "parameters" in tags(c)), -1) + 1
    result.cells[place:place] = injected
    return result


def stage(paths: Paths, names: Sequence[str]) -> None:
    """Write what Jupyter Book reads; files that stay the same are left alone, so that it knows what to render."""
    book = [path for path in (paths.root / "book").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    book += [paths.root / name for name in SETTINGS]
    files = {path.relative_to(paths.root): path.read_bytes() for path in book}
    for place in [place for place in files if place.suffix == ".md"]:
        files[place] = filled(files[place].decode(), paths.root / "book" / "published").encode()
    for name in names:
        source = read_notebook(paths.root / "notebooks" / f"{name}.ipynb")
        notebook = combine(source, read_notebook(paths.executed / f"{name}.ipynb"))
        check_executed(notebook, name)
        without_widgets(notebook)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = cell.source.replace(COLAB_BADGE, LOCAL_BADGE)
        files[Path("notebooks", f"{name}.ipynb")] = nbformat.writes(notebook).encode()
    for path in [path for path in paths.stage.rglob("*") if path.is_file()]:
        if path.relative_to(paths.stage) not in files:
            path.unlink()
    for place, content in files.items():
        path = paths.stage / place
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def render_key(paths: Paths, names: Sequence[str]) -> str:
    """A hash of what all pages depend on: settings, extensions, programs, numbers that pages take from others."""
    files = [*(paths.root / name for name in SETTINGS), *sorted((paths.root / "book" / "extensions").glob("*.py"))]
    files += [paths.executed / f"{name}.ipynb" for name in names]
    programs = [f"{name} {importlib.metadata.version(name)}" for name in RENDERERS]
    return keys.key([*programs, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)])


def render(paths: Paths, key: str) -> None:
    """Turn the stage into HTML; a warning of Sphinx is an error, and so is a page that needs a network.

    Args:
        paths: Where the stage is.
        key: Of what all pages depend on; while it stays the same, only pages that changed are rendered again.
    """
    work = paths.build / "render"  # what Sphinx remembers, only of pages without a warning
    if not (work / key).is_file():
        shutil.rmtree(work, ignore_errors=True)
    (work / key).unlink(missing_ok=True)
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(paths.stage), "-W", "-n"]
    command += ["--keep-going", "-q", "--path-output", str(work)]
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = re.sub(r"\x1b\[[\d;]*m", "", result.stdout)  # without colours
    (paths.build / "render.log").write_text(log, encoding="utf-8")
    if result.returncode != 0:
        lines = [line for line in log.splitlines() if re.search("WARNING|ERROR|CRITICAL", line)]
        reported = "\n".join(lines) or log
        raise BuildError(f"Jupyter Book reports:\n{reported}\nAll it said: {paths.build / 'render.log'}")
    if found := problems(work / "_build" / "html"):
        raise BuildError("the pages are not complete without a network:\n" + "\n".join(found))
    shutil.rmtree(paths.html, ignore_errors=True)
    with replacing(paths.html) as scratch:
        shutil.copytree(work / "_build" / "html", scratch)
    (work / key).touch()


def build(root: Path, preset: str, given: Sequence[str], timeout: int) -> Path:
    """Build the book of one preset.

    Args:
        root: The repository.
        preset: The value of every notebook's `preset` parameter.
        given: Further parameters as `[NOTEBOOK:]NAME=VALUE`.
        timeout: Seconds that one cell may take.

    Returns:
        The first page.

    Raises:
        BuildError: With a message for the terminal.
    """
    paths = Paths(root, root / "build" / preset)
    names = notebooks_in_toc(root)
    missing = [name for name in names if not (root / "notebooks" / f"{name}.ipynb").is_file()]
    if missing:
        raise BuildError(f"_toc.yml lists notebooks that do not exist: {', '.join(missing)}")
    notebooks = {name: read_notebook(root / "notebooks" / f"{name}.ipynb") for name in names}
    chosen = assign_parameters(notebooks, [(None, "preset", preset), *map(parse_parameter, given)])

    for left in paths.executed.glob(UNFINISHED):
        shutil.rmtree(left, ignore_errors=True)
    state = read_state(paths.state)
    shared = shared_digest(root)
    decides = {name: run_key(notebooks[name], chosen[name], shared) for name in names}
    to_run = [
        name
        for name in names
        if state.get(name, {}).get("key") != decides[name] or not (paths.executed / f"{name}.ipynb").is_file()
    ]
    print(f"{len(names)} notebooks with preset {preset}: {len(to_run)} to run, the others are unchanged.")
    start = time.monotonic()
    for number, name in enumerate(to_run, start=1):
        label = f"[{number}/{len(to_run)}] {name}"
        past = [state.get(n, {}).get("seconds") for n in to_run[number - 1 :]]
        print(label + (f", about {clock(sum(past))} left" if all(past) else ""), flush=True)
        source = root / "notebooks" / f"{name}.ipynb"
        seconds = run_notebook(source, paths.executed / f"{name}.ipynb", chosen[name], timeout, label)
        state[name] = {"key": decides[name], "seconds": round(seconds, 1)}
        write_json(paths.state, state)
        so_far = clock(time.monotonic() - start)
        print(f"{label}: done in {clock(seconds)}, {so_far} since the start", flush=True)

    print("Rendering the pages.", flush=True)
    stage(paths, names)
    render(paths, render_key(paths, names))
    return paths.html / "index.html"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks and render the book.")
    parser.add_argument("--preset", default="laptop", help="size of the experiments (default: laptop)")
    parser.add_argument(
        "-p",
        dest="parameters",
        action="append",
        default=[],
        metavar="[NOTEBOOK:]NAME=VALUE",
        help="set a notebook's parameter; without NOTEBOOK, of every notebook; may be repeated",
    )
    limit = "seconds that one cell may take (default: %(default)s)"
    parser.add_argument("--execution-timeout", type=int, default=7200, metavar="S", help=limit)
    options = parser.parse_args(arguments)
    if options.preset not in PRESETS:
        parser.error(f"there is no preset {options.preset!r}, only {', '.join(PRESETS)}")
    try:
        with locked(ROOT / "build" / options.preset / ".lock", wait=False):
            page = build(ROOT, options.preset, options.parameters, options.execution_timeout)
    except BlockingIOError:
        print(f"build_book: another build with preset {options.preset} goes on: wait for it", file=sys.stderr)
        return 1
    except BuildError as error:
        print(f"build_book: {error}", file=sys.stderr)
        return 1
    print(f"The book is ready: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
