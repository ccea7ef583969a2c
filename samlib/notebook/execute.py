"""A notebook executed by papermill in a process of its own, for sweeps and for the book."""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

CHILD = """
import json, logging, os, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()  # ends when its parent does
logging.basicConfig(level="INFO", format="%(message)s")
import papermill
papermill.execute_notebook(**json.loads(sys.argv[1]))
"""
UNFINISHED = ".running-*"  # folders beside a target, of runs that go on, or whose process was killed
DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin while they wait stand still where another process works
ALWAYS = {"JUPYTER_PREFER_ENV_PATH": "1", "SAMLIB_STATIC": "1", "PYTHONUNBUFFERED": "1"}  # this Python; no sliders


class NotebookError(Exception):
    """A notebook that did not run to its end.

    Args:
        problem: the error in one line.
        cell: the code cell that failed, with its first line; "" if none did.
    """

    def __init__(self, problem: str, cell: str = "") -> None:
        super().__init__(f"{cell}: {problem}" if cell else problem)
        self.problem, self.cell = problem, cell


def failed(target: Path) -> Path:
    """Where a run that failed is kept, to be read."""
    return target.with_suffix(".failed.ipynb")


def execute(
    source: Path,
    target: Path,
    parameters: Mapping[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
    timeout: int | None = None,
    progress: Callable[[int, float], None] = lambda cell, seconds: None,
) -> float:
    """Run a notebook in a process that ends when this one does, however that ends.

    Args:
        source: the notebook; it runs in its folder.
        target: where the executed copy goes once it is complete; where it failed, it goes to `failed(target)`.
        parameters: by name, JSON-able.
        environment: variables of the run beside this process's own.
        timeout: seconds that one cell may take, None for no limit.
        progress: told every second which cell is running, counted from 1, and the seconds so far.

    Returns:
        The seconds it took.

    Raises:
        NotebookError: a cell failed, or papermill itself.
        OSError: a file cannot be written.
    """
    begun, source, target = time.monotonic(), source.resolve(), target.resolve()
    failed(target).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED[:-1], dir=target.parent) as folder:
        scratch = Path(folder) / target.name
        asked: dict[str, Any] = {"input_path": str(source), "output_path": str(scratch), "parameters": dict(parameters)}
        asked |= {"cwd": str(source.parent), "kernel_name": "python3", "language": "python"}
        asked |= {"progress_bar": False, "log_output": True, "execution_timeout": timeout}
        cell, log = [0], collections.deque[str](maxlen=200)
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(asked)],
            env={**DEFAULTS, **os.environ, **ALWAYS, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # an interrupt is for this process, and then the end of the other
        )
        assert process.stdin and process.stdout

        def follow(lines: Iterable[str]) -> None:
            for line in lines:
                log.append(line.rstrip())
                if match := re.match(r"Executing Cell (\d+)", line):
                    cell[0] = int(match[1])

        reader = threading.Thread(target=follow, args=[process.stdout], daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                try:
                    process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    progress(cell[0], time.monotonic() - begun)
        finally:
            process.stdin.close()
            process.wait()
            reader.join(timeout=5)  # what a cell left running may hold the pipe open
        if process.returncode == 0:
            os.replace(scratch, target)
            return time.monotonic() - begun
        error = _error(scratch, cell[0], list(log))
        if scratch.exists():
            os.replace(scratch, failed(target))
        raise error


def _error(executed: Path, position: int, log: Sequence[str]) -> NotebookError:
    """What failed, by the notebook as far as it came, the cell that was running and the last lines of the log."""
    errors = [line for line in log if re.match(r"[\w.]+(Error|Exception|Interrupt|NoSuchKernel|Exit)\b", line)]
    problem = (errors or [line for line in log if line.strip()] or ["papermill was killed"])[-1]
    try:
        cells = json.loads(executed.read_text("utf-8"))["cells"]
    except (OSError, ValueError, KeyError):  # papermill itself failed
        return NotebookError(problem)
    tags = [set(cell["metadata"].get("tags", [])) for cell in cells]
    ran = [c for c, tag in zip(cells, tags, strict=True) if "papermill-error-cell-tag" not in tag][:position]
    code = [c for c in ran if c["cell_type"] == "code" and "injected-parameters" not in c["metadata"].get("tags", [])]
    if not code:
        return NotebookError(problem)
    for output in code[-1]["outputs"]:
        if output["output_type"] == "error":
            problem = ": ".join([output["ename"], *output["evalue"].strip().splitlines()[-1:]])
    if any("CellTimeoutError" in line for line in log):
        problem = "it took longer than a cell may"
    first = next(iter("".join(code[-1]["source"]).strip().splitlines()), "")
    return NotebookError(problem, f"code cell {len(code)}, {first!r}")
