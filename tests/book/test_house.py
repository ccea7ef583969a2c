"""The order of the packages, and the names that they show; `lint-imports` checks who imports whom."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import samlib

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
HOUSE = ROOT / "samlib"
LAYERS = ["store", "data", "model", "train", "merge", "measure", "notebook", "study"]
FACES = [init for init in sorted(HOUSE.rglob("__init__.py")) if init.with_suffix(".pyi").exists()]


def package_of(init: Path) -> str:
    return ".".join(init.parent.relative_to(ROOT).parts)


def shown(init: Path) -> Iterator[tuple[str, str]]:
    """Modules and the names that a package shows of them; a subpackage is shown by itself."""
    for node in ast.parse(init.with_suffix(".pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 1
            yield from ((node.module or alias.name, alias.name) for alias in node.names)


def test_the_order_is_the_same_in_the_contract_and_in_the_pages() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (order,) = [contract for contract in contracts if contract["type"] == "layers"]
    assert order["layers"] == [*reversed(LAYERS), "rules"] and order["exhaustive"]
    assert sorted(LAYERS) == sorted(init.parent.name for init in HOUSE.glob("*/__init__.py"))
    assert re.findall(r"`(\w+)`", samlib.__doc__ or "") == [*LAYERS, "rules"]
    assert re.findall(r"file: book/api/(\w+)", (ROOT / "_toc.yml").read_text()) == ["index", *LAYERS, "rules"]
    picture = re.search(r"```text\nrules +(.+)\n```", (ROOT / "book" / "api" / "index.md").read_text())
    assert picture and re.split(r"\s*<-\s*", picture[1]) == LAYERS
    table = re.findall(r"^\| `samlib/(\w+)/` \|", (ROOT / "README.md").read_text(), re.M)
    assert [name for name in table if name != "testbed"] == LAYERS


@pytest.mark.parametrize("init", FACES, ids=package_of)
def test_every_name_that_a_package_shows_is_that_of_its_module(init: Path) -> None:
    package = importlib.import_module(package_of(init))
    names = [name for _, name in shown(init)]
    assert sorted(names) == sorted(package.__all__) == sorted(set(names))
    for module, name in shown(init):
        home = importlib.import_module(f"{package.__name__}.{module}")
        thing = getattr(package, name)
        assert thing is (home if module == name else getattr(home, name)), name
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert thing.__module__ == home.__name__, f"{name} lives in {thing.__module__}"
        if inspect.isfunction(thing):
            assert _modules(package.__name__).isdisjoint({name}), f"a module {name} would hide the function"


@pytest.mark.parametrize("init", sorted(HOUSE.rglob("__init__.py")), ids=package_of)
def test_every_package_says_what_lives_where(init: Path) -> None:
    said = importlib.import_module(package_of(init)).__doc__ or ""
    own = {name for name in _modules(package_of(init)) if not name.startswith("_")}
    assert len(said.splitlines()) >= 2
    assert init.with_suffix(".pyi") not in FACES or {name for name in own if f"`{name}`" not in said} == set()


def test_the_names_at_the_top_load_nothing_before_they_are_asked_for() -> None:
    """A wrong parameter is told before torch is there."""
    program = """
import sys
import samlib, samlib.data, samlib.measure, samlib.study, samlib.train
from samlib import begin
from samlib.train import Recipe
from samlib.study import ARMS
slow = {"torch", "open_clip", "datasets", "pandas", "scipy", "matplotlib"}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_code_of_the_library_names_modules() -> None:
    """Keys follow imports from module to module; a name taken from a package's face would lead nowhere."""
    for path in HOUSE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "samlib":
                init = ROOT.joinpath(*(node.module or "").split("."), "__init__.py")
                if init in FACES:
                    found = {alias.name for alias in node.names} - _modules(node.module or "") - {"__version__"}
                    assert not found, f"{path.relative_to(ROOT)} takes {found} from {node.module}"


def _modules(package: str) -> set[str]:
    """Names of a package's modules and subpackages."""
    folder = ROOT.joinpath(*package.split("."))
    return {p.stem for p in folder.glob("*.py") if p.stem != "__init__"} | {
        p.parent.name for p in folder.glob("*/__init__.py")
    }
