"""Run a notebook for every point of a grid, side by side, and collect: `python -m samlib.study.sweep FILE`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import queue
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
from tqdm.auto import tqdm

from samlib.model import weights
from samlib.notebook.execute import UNFINISHED, NotebookError, failed
from samlib.notebook.execute import execute as execute_notebook
from samlib.notebook.parameters import PARAMETERS, check, needs
from samlib.store.files import (
    locked,
    read_json,
    replacing,
    write_json,  # what is slow to load is imported where it is needed: mistakes are told at once
)
from samlib.study.grid import Point, Sweep, known, read, words

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


PROVENANCE = ("path", "commit", "seconds")  # columns of the table, beside parameters and numbers


def slots(jobs: int | None, cores: int, gpus: int = 0, shown: str | None = None) -> list[str | None]:
    """For each run that may go on at the same time its CUDA_VISIBLE_DEVICES, None for a run on the CPU.

    Args:
        jobs: number of runs at a time, >= 1; None for one a GPU, or one a core where there is no GPU.
        cores: of the machine, >= 1.
        gpus: how many CUDA finds; more runs than GPUs share them in turn.
        shown: CUDA_VISIBLE_DEVICES of the sweep itself, None if it is not set.

    Taught in: 08_sweep.
    """
    names = shown.split(",") if shown else [str(i) for i in range(gpus)]
    return [names[i % gpus].strip() if gpus else None for i in range(jobs or gpus or cores)]


def run_one(
    notebook: Path, target: Path, given: Point, threads: int | None, free: queue.Queue[str | None] | None
) -> tuple[Path, str]:
    """One run in a process of its own, which ends when this process does.

    Args:
        notebook: what to run.
        target: where the executed notebook goes once it is complete; where it failed, it goes to `failed(target)`.
        given: its parameters.
        threads: of numerical libraries, where OMP_NUM_THREADS is not set; None for as many as they like.
        free: GPUs at rest, of which the run borrows one; None leaves the choice to the machine.

    Returns:
        target, and "" or the error in one line.
    """
    environment = {} if threads is None or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    gpu = free.get() if free else None
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        execute_notebook(notebook, target, given, environment=environment)
    except NotebookError as error:
        return target, error.problem
    except OSError as error:
        return target, f"{type(error).__name__}: {error}"
    finally:
        if free:
            free.put(gpu)
    return target, ""


def execute(sweep: Sweep, places: Sequence[str | None] | None) -> dict[Path, str]:
    """Run what is missing, with joblib's backend of the moment.

    Args:
        sweep: what to run.
        places: as `slots` gives them; None where the workers are elsewhere.

    Returns:
        File -> last line of the exception, for each run that failed.
    """
    free: queue.Queue[str | None] | None = None
    if places:
        free = queue.Queue()
        for place in places:
            free.put(place)
    threads = max(1, joblib.cpu_count() // len(places)) if places else None
    todo = {file: point for file, point in zip(sweep.files, sweep.points, strict=True) if not file.exists()}
    calls = [
        joblib.delayed(run_one)(sweep.notebook, file, sweep.fixed | point, threads, free)
        for file, point in todo.items()
    ]
    problems = {}
    with tqdm(total=len(sweep.files), initial=len(sweep.files) - len(todo), unit="run", desc=sweep.name) as bar:
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="all")
        for file, problem in parallel(calls):
            bar.update()
            if problem:
                problems[file] = problem
                bar.set_postfix(failed=len(problems))
    return {file: problems[file] for file in todo if file in problems}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder for one sweep at a time, without what killed ones left."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / ".lock", wait=False))
        except BlockingIOError:
            raise ValueError(f"another sweep is writing to {folder}: wait for it, or choose another --out") from None
        for left in folder.glob(UNFINISHED):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _need(sweep: Sweep) -> None:
    """Refuse a sweep whose missing runs want something of the hub, while it does not answer."""
    wanted = set()
    for point, file in zip(sweep.points, sweep.files, strict=True):
        everything = sweep.defaults | sweep.fixed | point
        parameters = {name: value for name, value in everything.items() if name in PARAMETERS}
        with suppress(ValueError):  # a notebook that gives these names a meaning of its own
            check(sweep.notebook.stem, parameters)
            wanted |= set() if file.exists() else {needs(parameters)}
    for model, tasks in sorted(wanted):
        weights.need(model, tasks)


@contextmanager
def _workers(scheduler: str | None, places: Sequence[str | None] | None) -> Iterator[None]:
    """Threads here, each waiting for a process; or the workers of a dask cluster."""
    if scheduler is None:
        with joblib.parallel_config("threading", n_jobs=len(places or [None])):
            yield
        return
    try:
        distributed = importlib.import_module("distributed")
    except ImportError:
        raise ValueError("--scheduler needs dask: pip install 'samlib[dask]'") from None
    try:
        client = distributed.Client(scheduler)
    except (OSError, ValueError) as error:
        raise ValueError(f"no scheduler answers at {scheduler}: {error}") from error
    with client, joblib.parallel_config("dask", client=client):
        yield


def glued(notebook: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that a notebook glued, by name without its chapter's prefix such as nb08_; words are left out.

    Args:
        notebook: executed, as JSON.
    """
    numbers = {}
    for output in (o for cell in notebook["cells"] for o in cell.get("outputs", [])):
        name = output.get("metadata", {}).get("scrapbook", {}).get("name")
        if name is not None:
            text = "".join(output["data"].get("application/papermill.record/text/plain", ""))
            try:
                numbers[re.sub(r"^nb\d\d_", "", name)] = float(text)
            except ValueError:
                pass
    return numbers


def collect(sweep: Sweep) -> pd.DataFrame:
    """The results so far.

    Args:
        sweep: whose executed notebooks to read.

    Returns:
        One row a complete run, in the order of the grid: the swept parameters, the glued numbers, and PROVENANCE: name
        of the executed notebook, samlib's commit as the notebook's stamp shows it, wall time in s. A glued number with
        the name of another column is left out.

    Raises:
        ValueError: a notebook is damaged.

    Taught in: 08_sweep.
    """
    import pandas as pd

    names = sweep.swept
    plain = {n for n in names if all(isinstance(p.get(n), (int, float, type(None))) for p in sweep.points)}
    rows = []
    for point, path in zip(sweep.points, sweep.files, strict=True):
        if path.exists():
            notebook = read_json(path)
            texts = [o.get("data", {}).get("text/plain", "") for c in notebook["cells"] for o in c.get("outputs", [])]
            commit = re.search(r"^commit +(\S+)$", "\n".join("".join(text) for text in texts), re.M)
            seconds = notebook["metadata"]["papermill"]["duration"]
            given = {n: value if n in plain or value is None else str(value) for n, value in point.items()}
            numbers = {n: value for n, value in glued(notebook).items() if n not in (*names, *PROVENANCE)}
            rows.append({**given, **numbers, "path": path.name, "commit": commit and commit[1], "seconds": seconds})
    table = pd.DataFrame(rows)
    return table.reindex(columns=[*names, *(n for n in table if n not in (*names, *PROVENANCE)), *PROVENANCE])


def draw(table: pd.DataFrame, ax: Axes, x: str, y: str, hue: str | None = None) -> None:
    """Mean over the other parameters, such as seeds, with Student's 95 % interval.

    Args:
        table: as `collect` gives it.
        ax: where to draw.
        x, y, hue: names of columns. The axis of x is logarithmic where its positive values span a decade, with a place
            of its own for 0.
    """
    import pandas as pd
    import seaborn as sns

    from samlib.measure.intervals import estimate
    from samlib.notebook.plot import COLOURS

    colours = {name.lower(): colour for name, colour in COLOURS.items()}
    ours = hue is not None and set(table[hue]) <= set(colours)
    style = {"hue": hue, "palette": colours if ours else None, "marker": "o"}
    sns.lineplot(table, x=x, y=y, ax=ax, err_style="bars", errorbar=lambda v: estimate(v)[1:3], **style)
    if pd.api.types.is_numeric_dtype(table[x]):
        values = sorted(table[x].dropna().unique())
        positive = [value for value in values if value > 0]
        if positive and values[0] >= 0 and positive[-1] >= 10 * positive[0]:
            ax.set_xscale("symlog", linthresh=positive[0]) if values[0] == 0 else ax.set_xscale("log")
            ax.set_xlim(-0.3 * positive[0] if values[0] == 0 else positive[0] / 1.5, 1.5 * positive[-1])
        if len(values) <= 12:
            ax.set_xticks(values, [f"{value:g}" for value in values])
            ax.minorticks_off()


def save(sweep: Sweep, table: pd.DataFrame) -> list[Path]:
    """Write sweep.parquet and, where a figure is asked for, sweep.png.

    Raises:
        ValueError: the figure's y is no column.
    """
    from matplotlib.figure import Figure

    files = [sweep.out / "sweep.parquet"]
    with replacing(files[0]) as scratch:
        table.to_parquet(scratch)
    if sweep.figure:
        known([sweep.figure["y"]], list(table), "the table is written; figure: y is no column")
        files.append(sweep.out / "sweep.png")
        figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
        draw(table, figure.subplots(), **sweep.figure)
        commits = ", ".join(sorted(set(table["commit"].dropna())))
        figure.supxlabel(
            f"{sweep.notebook.stem}, {len(table)} runs, {words(sweep.fixed)}, commit {commits}", fontsize=6
        )
        with replacing(files[1]) as scratch:
            figure.savefig(scratch)
    return files


def publish(sweep: Sweep, table: pd.DataFrame, folder: Path | None = None) -> Path:
    """Write a sweep's table as published values, which `Run.published_values("<name>.published")` reads.

    Args:
        sweep: what was run.
        table: as `collect` gives it.
        folder: of the published values; None for the book's.

    Taught in: 08_sweep.
    """
    from samlib.notebook.run import start

    run = start(sweep.notebook.stem, {name: value for name, value in sweep.fixed.items() if name in PARAMETERS})
    commits = ", ".join(sorted(set(table["commit"].dropna())))
    stamp = run.stamp() | {"commit": commits, "seconds": round(float(table["seconds"].sum()), 1)}
    if "seed" in table:
        stamp["seeds"] = sorted({int(seed) for seed in table["seed"]})
    rows = table.drop(columns="path").astype(object).where(table.drop(columns="path").notna(), None)
    path = (folder or run.published) / f"{sweep.name}.published.json"
    write_json(path, {"values": {"parameters": sweep.fixed, "runs": rows.to_dict("records")}, "stamp": stamp})
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and collect: 0 if all is complete, 1 if not, 2 for a mistake before anything ran."""
    parser = argparse.ArgumentParser(prog="python -m samlib.study.sweep", description=__doc__)
    parser.add_argument("file", type=Path, help="the sweep, as YAML")
    parser.add_argument("--out", type=Path, help="folder of the results, instead of the one in the file")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, help="runs at a time; default: one a GPU, without GPUs one a core")
    where.add_argument("--scheduler", metavar="ADDRESS", help="of a dask cluster, such as tcp://10.0.0.1:8786")
    parser.add_argument("--publish", action="store_true", help="write the complete table to book/published, too")
    a = parser.parse_args(arguments)
    with ExitStack() as stack:
        try:
            if a.jobs is not None and a.jobs < 1:
                raise ValueError(f"--jobs must be >= 1, not {a.jobs}")
            if absent := [name for name in ("papermill", "myst_nb") if importlib.util.find_spec(name) is None]:
                raise ValueError(f"{absent[0]} is missing: pip install 'samlib[book]'")
            sweep = read(a.file, a.out)
            if not a.scheduler:  # whose machines may have what this one lacks
                _need(sweep)
            gpus = 0 if sweep.fixed.get("device") == "cpu" else importlib.import_module("torch").cuda.device_count()
            shown = os.environ.get("CUDA_VISIBLE_DEVICES")
            places = None if a.scheduler else slots(a.jobs, joblib.cpu_count(), gpus, shown)
            stack.enter_context(_locked(sweep.out))
            stack.enter_context(_workers(a.scheduler, places))
        except (ValueError, ConnectionError) as error:
            parser.error(str(error))
        try:
            problems = execute(sweep, places)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 130
        for file, problem in problems.items():
            point = sweep.points[sweep.files.index(file)]
            kept = failed(file) if failed(file).exists() else "it left no notebook"
            print(f"failed: {words(point)}\n  {problem}\n  {kept}", file=sys.stderr)
        if problems:
            print(
                f"{len(problems)} of {len(sweep.files)} runs failed; the same command tries them again", file=sys.stderr
            )
        try:
            table = collect(sweep)
            written = save(sweep, table) if len(table) else []
            written += [publish(sweep, table)] if a.publish and not problems else []
        except ValueError as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 1
        print(f"{len(table)} runs:", *written, sep="\n  ")
    return 1 if problems else 0


if __name__ == "__main__":
    from samlib.study import sweep

    sys.exit(sweep.main())  # by its own name, under which dask's workers can import what they run
