"""Sweeps of a notebook that is small: it needs neither torch nor a model, and writes down that it ran."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from samlib.measure.intervals import estimate
from samlib.notebook import page
from samlib.store.files import read_json
from samlib.study import grid, sweep

PARAMETERS = """
preset: str = "smoke"  # size
optimizer: str = "sam"  # which
rho: float | None = None  # radius
seed: int = 0  # base seed
"""
CODE = """
import os, time
from IPython.display import display

def glue(name, value):  # what myst_nb's does
    mark = "application/papermill.record/"
    scrapbook = {"name": name, "mime_prefix": mark}
    display({mark + "text/plain": repr(value)}, metadata={"scrapbook": scrapbook}, raw=True)

facts = os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()
with open("ran.txt", "a") as file:
    print(optimizer, rho, seed, *facts, file=file)
while os.path.exists("wait") and seed:
    time.sleep(0.05)
if rho == 0.5 and not os.path.exists("mended"):
    raise ValueError("first line\\nrho is too large")
glue("nb08_merged", 100 * rho + seed)
glue("nb08_verdict", "higher than")
glue("nb08_rho", 7.0)
display({"text/plain": "            this run\\npreset         smoke\\ncommit  abc123-dirty"}, raw=True)
"""
GRID = [{"optimizer": ["sam"], "rho": [0.02, 0.5], "seed": [0]}, {"optimizer": ["asam"], "rho": [0.02], "seed": [0]}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the notebook; two runs at a time, one thread each."""
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(CODE)]
    nbformat.write(new_notebook(cells=cells), tmp_path / "08_sweep.ipynb")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def write(folder: Path, **changes: Any) -> str:
    asked = {"notebook": "08_sweep.ipynb", "out": "out", "parameters": {"preset": "smoke"}, "grid": GRID} | changes
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in asked.items() if value is not None}))
    return str(path)


def ran(folder: Path) -> list[list[str]]:
    """The runs that began, sorted: optimizer, rho, seed, threads, GPU, process."""
    path = folder / "ran.txt"
    return sorted(line.split() for line in path.read_text().splitlines()) if path.exists() else []


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# What a file asks for


def test_a_grid_is_every_combination_the_last_name_fastest() -> None:
    assert grid.expand({"rho": [1, 2], "seed": [0, 1, 2]}) == [
        {"rho": rho, "seed": seed} for rho in (1, 2) for seed in (0, 1, 2)
    ]
    assert grid.expand([{"optimizer": ["adamw"]}, {"optimizer": ["sam"], "rho": [0.1, 0.2]}]) == [
        {"optimizer": "adamw"},
        {"optimizer": "sam", "rho": 0.1},
        {"optimizer": "sam", "rho": 0.2},
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"girds": GRID}, "has no key 'girds', only notebook, out, parameters, grid, figure; did you mean 'grid'?"),
        ({"out": None}, "'out' is missing or empty"),
        ({"notebook": "09.ipynb"}, "there is no notebook .*09.ipynb: 'notebook' is relative to the folder of small"),
        ({"grid": {}}, "'grid' is missing or empty"),
        ({"grid": [{}]}, "grid must be such as {rho: "),
        ({"grid": {"rho": []}}, "rho must be a list of values, such as .*, not \\[\\]"),
        ({"grid": {"rho": 0.02}}, "rho must be a list of values, such as \\[0.02\\], not 0.02"),
        ({"grid": {"roh": [0.1]}}, "has no parameter 'roh', only preset, optimizer, rho, seed; did you mean 'rho'"),
        ({"parameters": {"step": 3}}, "has no parameter 'step'"),
        ({"parameters": [1]}, "parameters must be names with values"),
        ({"parameters": {"preset": "small"}}, "preset must be one of smoke, .*, not 'small'"),
        ({"grid": {"rho": [0.1, -1]}}, "rho must be a finite number >= 0 or None, not -1"),
        ({"grid": {"rho": ["1e-3"]}}, "YAML takes 1e-3 for text: write 1.0e-3"),
        ({"grid": {"optimizer": ["adam"]}}, "optimizer must be"),
        ({"grid": {"preset": ["smoke"]}}, "preset is in 'parameters' and in 'grid'"),
        ({"grid": {"seed": [1, 2, 1]}}, "grid holds a run twice: seed=1"),
        ({"grid": [{"seed": [0]}, {"rho": [None]}]}, "grid holds a run twice: rho=None"),
        ({"figure": {"x": "rho"}}, "figure must have x and y"),
        ({"figure": {"x": "rho", "z": "merged"}}, "figure has no key 'z'"),
        ({"figure": {"x": "preset", "y": "merged"}}, "the grid varies no 'preset', only optimizer, rho, seed"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    folder: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        grid.read(Path(path))
    with pytest.raises(SystemExit) as stopped:
        sweep.main([path])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and str(error.value) in told and "Traceback" not in told
    assert ran(folder) == [] and not (folder / "out").exists()


def test_files_that_are_no_sweep_are_refused(folder: Path) -> None:
    path = Path(write(folder))
    for text, message in (
        ("a: [", "cannot read .*small.yaml"),
        ("- 1", "must hold the keys"),
        ("grid: {rho: [1], rho: [2]}", "'rho' is there twice"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            grid.read(path)
    with pytest.raises(ValueError, match="cannot read .*absent.yaml"):
        grid.read(folder / "absent.yaml")
    with pytest.raises(ValueError, match="no cell tagged 'parameters'"):
        grid.declared(new_notebook(cells=[new_code_cell("x = 1")]))


def test_a_files_name_follows_from_all_that_decides_its_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(**changes: Any) -> list[str]:
        return [file.name for file in grid.read(Path(write(folder, **changes))).files]

    first = names()
    assert first[0].startswith("optimizer=sam_rho=0.02_seed=0-") and len(set(first)) == 3
    assert names() == names(figure={"x": "rho", "y": "merged"}, out="elsewhere") == first
    assert not set(names(parameters={"preset": "laptop"})) & set(first)
    notebook = json.loads((folder / "08_sweep.ipynb").read_text())
    notebook["cells"].insert(0, {"cell_type": "markdown", "metadata": {}, "source": ["# Words"]})
    (folder / "08_sweep.ipynb").write_text(json.dumps(notebook))
    assert names() == first, "words decide nothing"
    with monkeypatch.context() as patch:
        patch.setattr(grid.keys, "library", lambda: "x = 1")
        assert not set(names()) & set(first)
    notebook["cells"][-1]["source"].append("\n1 + 1")
    (folder / "08_sweep.ipynb").write_text(json.dumps(notebook))
    assert not set(names()) & set(first)


def test_the_code_of_every_module_decides(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "samlib"
    shutil.copytree(grid.keys.ROOT, library, ignore=lambda _, names: [n for n in names if n == "testbed"])
    monkeypatch.setattr(grid.keys, "library", partial(grid.keys.library, library))

    def names() -> list[str]:
        return [file.name for file in grid.read(Path(write(folder))).files]

    seen = [names()]
    for module in ("train/sam", "merge/ties", "study/central", "data/tasks", "study/sweep", "notebook/page"):
        file = library / f"{module}.py"
        file.write_text(file.read_text() + "\n# words decide nothing\n")
        assert names() == seen[-1], module
        file.write_text(file.read_text() + "\nx = 1\n")
        seen.append(names())
    assert len(set(map(tuple, seen))) == len(seen)


# Runs


def test_places_are_cores_or_gpus_in_turn() -> None:
    assert sweep.slots(None, 4) == [None] * 4
    assert sweep.slots(1, 4) == [None]
    assert sweep.slots(None, 4, 2) == ["0", "1"]
    assert sweep.slots(3, 4, 2) == ["0", "1", "0"]
    assert sweep.slots(None, 4, 2, "5, 7") == ["5", "7"]
    assert sweep.slots(None, 4, 0, "") == [None] * 4  # hidden from CUDA
    assert sweep.slots(1, 4, 2, "GPU-a,GPU-b") == ["GPU-a"]


def test_runs_share_gpus_and_a_failing_one_stops_no_other(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, figure={"x": "rho", "y": "merged", "hue": "optimizer"})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert sweep.main([path]) == 1
    told = capsys.readouterr()
    began = ran(folder)
    assert [one[:3] for one in began] == [["asam", "0.02", "0"], ["sam", "0.02", "0"], ["sam", "0.5", "0"]]
    assert {one[4] for one in began} == {"5", "7"} and {one[3] for one in began} == {"1"}
    assert "1 of 3 runs failed" in told.err and "2 runs:" in told.out
    asked = grid.read(Path(path))
    for file, point in zip(asked.files, asked.points, strict=True):
        wrong = point["rho"] == 0.5
        assert file.exists() != wrong == sweep.failed(file).exists()
        report = f"failed: {grid.words(point)}\n  ValueError: rho is too large\n  {sweep.failed(file)}\n"
        assert (report in told.err) == wrong
    assert len(pd.read_parquet(asked.out / "sweep.parquet")) == 2 and (asked.out / "sweep.png").exists()
    assert not list(asked.out.glob(".running-*"))

    (folder / "mended").touch()
    assert sweep.main([path]) == 0
    assert len(ran(folder)) == 4, "only the failed one again"
    assert sweep.main([path, "--jobs", "1"]) == 0
    assert len(ran(folder)) == 4 and not list(asked.out.glob("*.failed.ipynb"))
    table = pd.read_parquet(asked.out / "sweep.parquet")
    assert list(table) == ["optimizer", "rho", "seed", "merged", "path", "commit", "seconds"]
    assert table[["optimizer", "rho", "seed", "merged"]].values.tolist() == [
        ["sam", 0.02, 0, 2.0],
        ["sam", 0.5, 0, 50.0],
        ["asam", 0.02, 0, 2.0],
    ]
    assert table["path"].tolist() == [file.name for file in asked.files]
    assert set(table["commit"]) == {"abc123-dirty"} and (table["seconds"] > 0).all()


def test_a_killed_sweep_goes_on_where_it_was(folder: Path) -> None:
    path = write(folder, grid={"rho": [0.02], "seed": [0, 1, 2]})
    (folder / "wait").touch()  # holds all seeds but 0
    asked = grid.read(Path(path))
    process = multiprocessing.get_context("fork").Process(target=sweep.main, args=([path, "--jobs", "2"],))
    process.start()
    wait_for(lambda: asked.files[0].exists() and len(ran(folder)) > 1)
    with pytest.raises(SystemExit) as stopped:
        sweep.main([path])
    assert stopped.value.code == 2, "one sweep at a time"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    pids = [int(one[-1]) for one in ran(folder)]
    wait_for(lambda: not any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in pids))
    assert [file.exists() for file in asked.files] == [True, False, False], "nothing runs on by itself"

    (folder / "wait").unlink()
    before = len(ran(folder))
    assert sweep.main([path]) == 0
    assert len(ran(folder)) == before + 2 and [one[2] for one in ran(folder)].count("0") == 1
    assert pd.read_parquet(asked.out / "sweep.parquet")["merged"].tolist() == [2.0, 3.0, 4.0]
    assert not list(asked.out.glob(".running-*"))


def test_a_run_that_leaves_no_exception_is_told_by_its_log(folder: Path) -> None:
    asked = grid.read(Path(write(folder)))
    asked.out.mkdir()
    (folder / "08_sweep.ipynb").write_text("{}")
    file, problem = sweep.run_one(asked.notebook, asked.files[0], {}, None, None)
    assert file == asked.files[0] and problem and "\n" not in problem
    assert list(asked.out.iterdir()) == []
    assert sweep.run_one(asked.notebook, folder / "absent" / "x.ipynb", {}, 1, None)[1].startswith("FileNotFoundError")


def test_jobs_must_be_positive_and_not_for_a_cluster(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (
        (["--jobs", "0"], "--jobs must be >= 1"),
        (["--jobs", "1", "--scheduler", "x"], "not allowed"),
    ):
        with pytest.raises(SystemExit):
            sweep.main([write(folder), *given])
        assert message in capsys.readouterr().err


def test_without_dask_a_cluster_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SystemExit) as stopped:
        sweep.main([write(folder), "--scheduler", "tcp://127.0.0.1:1"])
    assert stopped.value.code == 2 and "pip install 'samlib[dask]'" in capsys.readouterr().err
    assert ran(folder) == []


def test_a_cluster_runs_what_is_missing(folder: Path) -> None:
    distributed = pytest.importorskip("distributed")
    path = write(folder, grid={"rho": [0.02, 0.5], "seed": [0]})
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "protocol": "tcp"}
    with distributed.LocalCluster(dashboard_address=None, **options) as cluster:
        assert sweep.main([path, "--scheduler", cluster.scheduler_address]) == 1
    assert len(ran(folder)) == 2
    assert pd.read_parquet(folder / "out" / "sweep.parquet")["merged"].tolist() == [2.0]


# Results


def test_numbers_are_read_as_the_book_glues_them(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[dict[str, Any]] = []

    def display(data: Any, metadata: dict[str, Any], **_: Any) -> None:
        outputs.append({"output_type": "display_data", "data": data, "metadata": metadata})

    monkeypatch.setattr("IPython.display.display", display)
    pytest.importorskip("myst_nb")
    for name, value in {"nb08_merged": 62.5, "nb08_lam": 1, "nb08_word": "3.5", "gap": float("nan")}.items():
        page.glue(name, value)
    numbers = sweep.glued({"cells": [{"outputs": outputs}, {"source": "no outputs"}]})
    assert list(numbers) == ["merged", "lam", "gap"]
    assert (numbers["merged"], numbers["lam"]) == (62.5, 1.0) and math.isnan(numbers["gap"])


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [("adamw", 0.0, seed, 50.0 + seed) for seed in (0, 1)]
    rows += [("sam", rho, seed, 52 + 100 * rho + 3 * seed) for rho in (0.01, 0.1) for seed in (0, 1)]
    frame = pd.DataFrame(rows, columns=["optimizer", "rho", "seed", "merged"])
    return frame.assign(path="x.ipynb", commit="abc", seconds=2.0)


def test_the_figure_shows_means_with_students_interval(table: pd.DataFrame) -> None:
    figure, ax = plt.subplots()
    sweep.draw(table, ax, "rho", "merged", "optimizer")
    assert ax.get_xscale() == "symlog" and ax.get_xticks().tolist() == [0, 0.01, 0.1]
    drawn = [line.get_xydata().tolist() for line in ax.lines if len(line.get_xydata())]
    assert [[0, 50.5]] in drawn and [[0.01, 54.5], [0.1, 63.5]] in drawn
    bars = [segment.tolist() for c in ax.collections for segment in c.get_segments()]
    _, low, high, _ = estimate([53, 56])
    assert any(bar == [[0.01, pytest.approx(low)], [0.01, pytest.approx(high)]] for bar in bars)
    ax.clear()
    sweep.draw(table[table["rho"] > 0], ax, "rho", "merged")
    assert ax.get_xscale() == "log"
    ax.clear()
    sweep.draw(table, ax, "seed", "merged", "optimizer")
    assert ax.get_xscale() == "linear"
    plt.close(figure)


def test_published_tables_come_back(folder: Path, table: pd.DataFrame) -> None:
    asked = grid.read(Path(write(folder, grid={"seed": [0, 1]})))
    table.loc[0, "merged"] = math.nan
    path = sweep.publish(asked, table, folder)
    found = read_json(path)
    assert path == folder / "small.published.json"
    assert found["values"]["parameters"] == {"preset": "smoke"}
    first = {"optimizer": "adamw", "rho": 0.0, "seed": 0, "merged": None, "commit": "abc", "seconds": 2.0}
    assert found["values"]["runs"][0] == first and len(found["values"]["runs"]) == 6
    stamp = found["stamp"]
    assert (stamp["seeds"], stamp["seconds"], stamp["commit"], stamp["preset"]) == ([0, 1], 12.0, "abc", "smoke")


def test_a_figure_of_a_number_that_nobody_glued(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, grid={"rho": [0.02]}, figure={"x": "rho", "y": "mergd"})
    assert sweep.main([path]) == 1
    assert "figure: y is no column 'mergd'" in (told := capsys.readouterr().err) and "mean 'merged'?" in told
    assert (folder / "out" / "sweep.parquet").exists()


def test_columns_of_mixed_values_are_words(folder: Path) -> None:
    asked = grid.read(Path(write(folder, grid=[{"optimizer": ["adamw"]}, {"optimizer": ["sam"], "rho": [0.02]}])))
    asked.out.mkdir()
    for file in asked.files:
        notebook = new_notebook(cells=[new_code_cell("x")], metadata={"papermill": {"duration": 1.0}})
        nbformat.write(notebook, file)
    table = sweep.collect(asked)
    assert list(table) == ["optimizer", "rho", "path", "commit", "seconds"]
    assert math.isnan(table["rho"][0]) and table["rho"][1] == 0.02
    sweep.save(asked, table)
    assert pd.read_parquet(asked.out / "sweep.parquet")["optimizer"].tolist() == ["adamw", "sam"]


def test_the_books_sweep_is_one() -> None:
    asked = grid.read(Path(__file__).parents[2] / "notebooks" / "sweep.yaml")
    assert asked.notebook.name == "08_sweep.ipynb" and asked.name == "sweep"
    assert {point["optimizer"] for point in asked.points} == {"adamw", "sam", "asam"}


def test_only_missing_runs_ask_for_what_is_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(sweep.weights, "need", lambda model, tasks: asked.append((model, tasks)))
    points = [{"model": "ViT-B-32/random"}, {"model": "ViT-B-16/random"}]
    files = [tmp_path / "a.ipynb", tmp_path / "b.ipynb"]
    wanted = grid.Sweep("s", Path("own.ipynb"), tmp_path, {"preset": "paper", "tasks": "all"}, {}, points, files, {})
    files[0].touch()
    sweep._need(dataclasses.replace(wanted, fixed={"tasks": ["mnist"]}))
    assert asked == [("ViT-B-16/random", ("mnist",))]
    sweep._need(dataclasses.replace(wanted, defaults={"preset": "mine", "seeds": 3, "tasks": "mnist", "width": 1}))
    assert len(asked) == 1  # a notebook whose parameters are not samlib's
