"""The package as people install it, from elsewhere than a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CHAPTER = "01_why_merging_interferes.ipynb"
LOOK = """
import samlib
from samlib.notebook.run import PUBLISHED
print(samlib.__file__)
print(*sorted(PUBLISHED.glob("*.json")), sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves a folder `build` behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "LICENSE-text"):
        shutil.copy(ROOT / name, source)
    for name in ("samlib", "book/published"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    _pip("wheel", "--no-build-isolation", "--wheel-dir", str(source / "dist"), str(source))
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but samlib."""
    folder = tmp_path_factory.mktemp("installed")
    _pip("install", "--target", str(folder), str(wheel))
    return folder


def test_the_wheel_holds_all_of_the_library(wheel: Path) -> None:
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "samlib").rglob("*") if p.is_file()}
    wanted = {name for name in files if "__pycache__" not in name}
    wanted |= {f"samlib/published/{p.name}" for p in (ROOT / "book" / "published").glob("*.json")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted


def test_a_chapter_runs_with_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / CHAPTER, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(LOOK))
    nbformat.write(notebook, tmp_path / CHAPTER)
    command = [sys.executable, "-m", "papermill", CHAPTER, "done.ipynb", "-k", "python3", "-p", "preset", "smoke"]
    environment = os.environ | {"PYTHONPATH": str(installed), "SAMLIB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (output,) = nbformat.read(tmp_path / "done.ipynb", as_version=4).cells[-1].outputs
    package, *published = map(Path, output.text.splitlines())
    assert package == installed / "samlib" / "__init__.py"
    assert published == sorted(installed / "samlib" / "published" / p.name for p in ROOT.glob("book/published/*.json"))


def _pip(command: str, *arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*pip, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
