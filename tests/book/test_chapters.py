"""Every chapter with the preset `paper`, as people run it who take other models and tasks than the book's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import open_clip
import pytest
from conftest import SMALL_VIT

from samlib.study.grid import declared

pytestmark = pytest.mark.slow
CHAPTERS = sorted((Path(__file__).parents[2] / "notebooks").glob("0*.ipynb"))


@pytest.fixture(scope="module")
def another_open_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with an open_clip that knows one model more, a small one: chapters take seconds."""
    package = tmp_path_factory.mktemp("packages") / "open_clip"
    (package / "model_configs").mkdir(parents=True)
    original = Path(open_clip.__file__).parent
    for path in (*original.iterdir(), *(original / "model_configs").iterdir()):
        if path.name != "model_configs":
            (package / path.relative_to(original)).symlink_to(path)
    (package / "model_configs" / "tiny-ViT.json").write_text(json.dumps(SMALL_VIT))
    (package.parent / "open_clip_torch-99.dist-info").mkdir()
    (package.parent / "open_clip_torch-99.dist-info" / "METADATA").write_text("Name: open_clip_torch\nVersion: 99\n")
    return package.parent


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache, in which later chapters find what earlier ones trained."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_every_chapter_runs_with_the_preset_paper(
    chapter: Path, hub_tasks: Path, another_open_clip: Path, shared: Path, tmp_path: Path
) -> None:
    """By papermill's command, with another model, two of the hub's tasks and small sizes; the cache is shared."""
    wanted = {"model": "tiny-ViT/random", "tasks": "[mnist, dtd]"}
    wanted |= {"steps": "4", "batch_size": "8", "n_train": "80", "n_eval": "40"}
    known = declared(nbformat.read(chapter, as_version=4))
    given = {"preset": "paper"} | {name: value for name, value in wanted.items() if name in known}
    command = [sys.executable, "-m", "papermill", chapter.name, str(tmp_path / chapter.name), "-k", "python3"]
    command += [word for name, value in given.items() for word in ("-p", name, value)]
    environment = os.environ | {"PYTHONPATH": str(another_open_clip), "SAMLIB_DATA": str(hub_tasks)}
    environment["SAMLIB_CACHE"] = str(shared)
    done = subprocess.run(command, cwd=chapter.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "model" not in known or wanted["model"] in (tmp_path / chapter.name).read_text()
