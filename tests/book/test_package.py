"""What the installed package needs, and where it can be imported."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def distributions(requirements: list[str]) -> set[str]:
    return {_plain(re.split(r"[\[=<>~! ]", requirement)[0]) for requirement in requirements}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def third_party(path: Path) -> Iterator[tuple[str, bool]]:
    """Packages of others that a file imports, and whether it does so as soon as it is imported itself."""
    tree = ast.parse(path.read_text())
    at_once = set(tree.body)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in {name.split(".")[0] for name in names}:
            if name not in {"samlib", *sys.stdlib_module_names}:
                yield name, node in at_once


def test_what_the_library_imports_is_among_its_dependencies() -> None:
    """Within a function it may also use what only a book needs: in Colab that is there already."""
    plain = distributions(PROJECT["dependencies"])
    book = plain | distributions(PROJECT["optional-dependencies"]["book"]) | {"myst-nb"}  # of jupyter-book
    provided = importlib.metadata.packages_distributions()
    for path in (ROOT / "samlib").rglob("*.py"):
        for name, at_once in third_party(path):
            by = {_plain(one) for one in provided[name]}
            assert by & (plain if at_once else book), f"{path.name} imports {name}"


def test_a_book_needs_no_tools_of_developers() -> None:
    extras = {name: distributions(requirements) for name, requirements in PROJECT["optional-dependencies"].items()}
    everything = distributions(PROJECT["dependencies"]) | extras["book"]
    assert not everything & {"pytest", "ruff", "mypy", "mergekit", "fusion-bench", "import-linter"}
    assert not everything & extras["test"], "the tests add to a book's installation"
    assert extras["bench"] <= extras["test"]


def test_every_module_is_imported_where_there_is_neither_fcntl_nor_resource() -> None:
    """As on Windows."""
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "samlib").rglob("*.py")
    )
    program = f"""
import importlib, sys
import filelock, psutil  # on Windows they do without
sys.modules["fcntl"] = sys.modules["resource"] = None
missing = {{}}
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing[name] = str(error)
assert not missing, missing
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
