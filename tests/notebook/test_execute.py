"""A notebook in a process of its own: it is complete, or it tells what failed, or it ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from samlib.notebook.execute import NotebookError, execute, failed


def write(folder: Path, *cells: str, name: str = "a") -> Path:
    """A notebook with two parameters, text and some cells."""
    parameters = new_code_cell("preset: str = 'laptop'\nrates = None", metadata={"tags": ["parameters"]})
    parts = [new_markdown_cell("# Words"), parameters, *map(new_code_cell, cells)]
    nbformat.write(new_notebook(cells=parts), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def printed(target: Path) -> list[str]:
    notebook = nbformat.read(target, as_version=4)
    return [output.text for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_parameters_environment_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "kept")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    names = "SAMLIB_STATIC", "MINE", "GIVEN", "OMP_WAIT_POLICY"
    source = write(
        tmp_path,
        "import os\nprint(preset, rates, os.path.basename(os.getcwd()))",
        f"print([*map(os.environ.get, {names})])",
    )
    (tmp_path / "out").mkdir()
    target, told = tmp_path / "out" / "a.ipynb", []
    seconds = execute(
        source,
        target,
        {"preset": "smoke", "rates": [1e-5, None]},
        environment={"GIVEN": "1"},
        progress=lambda cell, s: told.append((cell, s)),
    )
    assert printed(target) == [f"smoke [1e-05, None] {tmp_path.name}\n", "['1', 'kept', '1', 'PASSIVE']\n"]
    assert seconds > 0 and list((tmp_path / "out").iterdir()) == [target]
    assert told and all(0 <= cell <= 5 and 0 < s <= seconds for cell, s in told)


def test_the_users_own_settings_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    source = write(tmp_path, "import os\nprint(os.environ['OMP_WAIT_POLICY'])")
    execute(source, tmp_path / "b.ipynb", {})
    assert printed(tmp_path / "b.ipynb") == ["ACTIVE\n"]


@pytest.mark.parametrize(
    ("code", "cell", "problem"),
    [
        ("# comes first\nx = 1 / 0", "code cell 2, '# comes first'", "ZeroDivisionError: division by zero"),
        ("raise ValueError('one\\ntwo')", "code cell 2, \"raise ValueError('one\\\\ntwo')\"", "ValueError: two"),
        ("import os\nos._exit(1)", "code cell 2, 'import os'", "DeadKernelError: Kernel died"),
        ("import time\ntime.sleep(60)", "code cell 2, 'import time'", "it took longer than a cell may"),
    ],
)
def test_what_failed_is_told_and_the_last_complete_run_stays(
    code: str, cell: str, problem: str, tmp_path: Path
) -> None:
    target = tmp_path / "out.ipynb"
    target.write_text("complete")
    with pytest.raises(NotebookError) as error:
        execute(write(tmp_path, code, "print('never')"), target, {"preset": "smoke"}, timeout=5)
    assert error.value.cell == cell and problem in error.value.problem and "\n" not in error.value.problem
    assert str(error.value) == f"{cell}: {error.value.problem}"
    assert target.read_text() == "complete"
    assert len(json.loads(failed(target).read_text())["cells"]) > 3
    assert {path.name for path in tmp_path.iterdir()} == {"a.ipynb", "out.ipynb", "out.failed.ipynb"}


def test_a_notebook_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.ipynb").write_text("{}")
    with pytest.raises(NotebookError) as error:
        execute(tmp_path / "a.ipynb", tmp_path / "out.ipynb", {})
    assert error.value.cell == "" and str(error.value) == error.value.problem and "\n" not in error.value.problem
    assert [path.name for path in tmp_path.iterdir()] == ["a.ipynb"]


def run(*arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    execute(*arguments)


@pytest.mark.parametrize("end", ["kill", "interrupt"])
def test_it_ends_with_the_process_that_began_it(end: str, tmp_path: Path) -> None:
    code = "import os, pathlib, time\npathlib.Path('pids').write_text(f'{os.getpid()} {os.getppid()} ')\ntime.sleep(60)"
    source = write(tmp_path, code)
    process = multiprocessing.get_context("fork").Process(target=run, args=(source, tmp_path / "out.ipynb", {}))
    process.start()
    wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith(" "))
    kernel, papermill = map(int, (tmp_path / "pids").read_text().split())
    assert process.pid and psutil.Process(papermill).ppid() == process.pid
    process.kill() if end == "kill" else os.kill(process.pid, signal.SIGINT)
    process.join()
    wait_for(
        lambda: not any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in (kernel, papermill))
    )
    assert not (tmp_path / "out.ipynb").exists()
    assert end == "kill" or not list(tmp_path.glob(".running-*"))
