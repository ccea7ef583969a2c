from __future__ import annotations

import json
import math
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import nbformat
import papermill
import pytest
import torch

from samlib.data import catalogue
from samlib.data.paper_tasks import HUB
from samlib.measure.intervals import interval, paired_interval
from samlib.notebook import parameters, plot
from samlib.notebook.presets import PRESETS
from samlib.notebook.run import Run, begin
from samlib.store.files import write_json
from samlib.train import budget as estimate


@pytest.fixture()
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("SAMLIB_CACHE", str(tmp_path / "cache"))
    started = begin("demo", preset="smoke", seed=3, device="cpu")
    return Run("demo", started.preset, started.parameters, 3, "cpu", started.cache, tmp_path / "published")


# ---- parameters


def test_begin_gives_the_preset_with_its_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMLIB_CACHE", str(tmp_path))
    chosen = {"tasks": ["flags", "digits"], "steps": 7, "rho_sam": None}
    run = begin("demo", preset="published", seed=10, device="cpu", **chosen)
    assert run.preset.tasks == ("flags", "digits") and run.preset.steps == 7
    assert run.preset.seeds == (10, 11, 12, 13, 14)
    assert run.preset.rho_sam == PRESETS["published"].rho_sam and run.preset.name == "published"
    assert (run.seed, run.device, run.cache) == (10, "cpu", tmp_path)
    assert begin("demo", preset="laptop", tasks="all").preset.tasks == catalogue.TASKS


def test_begin_seeds_the_generators() -> None:
    draws = []
    for seed in (0, 0, 1):
        begin("demo", seed=seed)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("preset", "laptp", "one of smoke, laptop, published, paper"),
        ("preset", 3, "one of smoke"),
        ("seed", -1, "an integer >= 0"),
        ("seed", 1.0, "an integer >= 0"),
        ("seed", True, "an integer >= 0"),
        ("seed", "1", "an integer >= 0"),
        ("device", 0, "'auto', 'cpu', 'cuda'"),
        ("device", "gpu", "'auto', 'cpu', 'cuda'"),
        ("tasks", "digits", "'all'"),
        ("tasks", "[digits, dig]", "'all'"),
        ("tasks", "[digits", "'all'"),
        ("model", 3, "None, 'testbed' or such as 'ViT-B-32/openai'"),
        ("model", "ViT-B-32", "testbed' or such as 'ViT-B-32/openai', not 'ViT-B-32'"),
        ("model", "ViT-B-23/openai", "did you mean ViT-"),
        ("micro_batch", 0, "an integer >= 1, 'auto' or None"),
        ("optimizer", "sgd", "adamw, sam or asam"),
        ("tasks", [], "a list of different names"),
        ("tasks", ["digits", "digits"], "a list of different names"),
        ("tasks", ["digit"], "out of digits"),
        ("tasks", [["digits"]], "a list"),
        ("steps", 0, "an integer >= 1 or None"),
        ("n_train", "all", "an integer >= 1 or None"),
        ("rho", -0.05, "a finite number >= 0 or None"),
        ("rho", math.nan, "a finite number >= 0 or None"),
        ("rho", "0.05", "a finite number >= 0 or None"),
        ("lr", 0.0, "a finite number > 0"),
        ("lam", math.inf, "a finite number"),
        ("density", 0.0, r"a number in \(0, 1\]"),
        ("density", 1.5, r"a number in \(0, 1\]"),
        ("jobs", 0, "an integer >= 1"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*{expected}") as caught:
        begin("demo", **{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", sorted(parameters.PARAMETERS))
def test_none_means_the_presets_value_only_where_there_is_one(name: str) -> None:
    if "None" in parameters.PARAMETERS[name][0]:
        assert begin("demo", **{name: None}).preset == begin("demo").preset
    else:
        with pytest.raises(ValueError, match=f"{name} must be"):
            begin("demo", **{name: None})


def test_own_tasks_are_allowed() -> None:
    assert begin("demo", tasks=["warm", "digits"]).preset.tasks == ("warm", "digits")


def test_an_undeclared_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"begin\(\) knows no parameter 'colour', only preset"):
        begin("demo", colour=1)


def test_a_gpu_that_is_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' is not available here"):
        begin("demo", device="cuda")
    assert begin("demo", device="auto").device == "cpu"


def test_the_paper_preset_chooses_a_micro_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "need", lambda *_: None)
    monkeypatch.setattr(estimate, "free_memory", lambda device: 12 * 10**9)
    p = begin("demo", preset="paper", device="cpu").preset
    assert (p.model, p.micro_batch, p.batch_size, p.tasks) == ("ViT-B-32/openai", 128, 128, tuple(HUB))
    monkeypatch.setattr(estimate, "free_memory", lambda device: 20 * 10**9)
    assert begin("demo", preset="paper", device="cpu", model="ViT-L-14/openai").preset.micro_batch == 8
    monkeypatch.setattr(estimate, "free_memory", lambda device: 10**9)
    with pytest.raises(MemoryError, match="ViT-B-32/openai needs .* GB to be trained, 0.8 GB are free"):
        begin("demo", preset="paper", device="cpu")


def test_a_list_that_papermill_hands_on_as_text() -> None:
    assert begin("demo", tasks="[flags, digits]").preset.tasks == ("flags", "digits")


def fake_notebook(monkeypatch: pytest.MonkeyPatch, *cells: str) -> None:
    shell = SimpleNamespace(user_ns={"In": ["", *cells]})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def test_a_name_that_papermill_injected_must_be_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_notebook(monkeypatch, "preset = 'smoke'\nrho = 0.05", "# Parameters\nrhoo = 0.1\npreset = 'smoke'\n")
    with pytest.raises(ValueError, match="demo has no parameter 'rhoo', only preset, rho; did you mean"):
        begin("demo", preset="smoke", rho=0.05)


def test_other_cells_and_declared_names_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_notebook(monkeypatch, "width = 1\n# Parameters\n", "# Parameters\nrho: float = 0.1\nseed = 2")
    assert begin("demo", rho=0.1, seed=2).seed == 2


def test_papermill_run_of_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Papermill only warns of a name that the notebook does not declare, here eta; `begin` fails."""
    monkeypatch.setenv("SAMLIB_CACHE", str(tmp_path / "cache"))
    declared = nbformat.v4.new_code_cell('preset: str = "smoke"\nrho: float = 0.05')
    declared.metadata["tags"] = ["parameters"]
    cells = [
        "from samlib.notebook.run import begin",
        "try:\n    begin('demo', preset=preset, rho=rho)\nexcept ValueError as error:\n    print(error)",
        "print(begin('demo', preset=preset, rho=rho, eta=eta).parameters)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[declared, *map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "demo.ipynb")
    done = papermill.execute_notebook(
        tmp_path / "demo.ipynb", tmp_path / "out.ipynb", {"rho": 0.2, "eta": 0.1}, progress_bar=False
    )
    refused, accepted = (cell["outputs"][0]["text"] for cell in done.cells[-2:])
    assert refused == "demo has no parameter 'eta', only preset, rho\n"
    assert accepted == "{'preset': 'smoke', 'rho': 0.2, 'eta': 0.1}\n"


def test_presets_are_consistent() -> None:
    assert list(PRESETS) == ["smoke", "laptop", "published", "paper"]
    for name, preset in PRESETS.items():
        assert preset.name == name and preset.note and len(set(preset.seeds)) == len(preset.seeds) >= 1
        assert 1.0 in preset.lengths and min(preset.lengths) * preset.steps >= 1
        assert preset.lambdas[0] == preset.lambdas_wide[0] == 0 and preset.lambdas[-1] == 1
        assert preset.xi_grid == tuple(sorted(preset.xi_grid)) == tuple(-a for a in reversed(preset.xi_grid))
    assert PRESETS["smoke"].lambdas == (0.0, 0.25, 0.5, 0.75, 1.0)


# ---- cached results


def test_a_result_is_computed_once_a_content(run: Run) -> None:
    calls: deque[int] = deque()  # a list would be a plain value that the function names

    def compute() -> dict[str, Any]:
        calls.append(1)
        return {"accuracy": [0.25, 0.5], "grid": (1, 2)}

    first = run.cached("demo", {"lam": 0.1}, compute)
    assert first == {"accuracy": [0.25, 0.5], "grid": [1, 2]}  # as JSON gives it back, also the first time
    assert run.cached("demo", {"lam": 0.1}, compute) == first and len(calls) == 1
    run.cached("demo", {"lam": 0.2}, compute)
    assert len(calls) == 2
    assert len(list((run.cache / "results").iterdir())) == 2


def test_another_function_is_another_result(run: Run) -> None:
    assert run.cached("demo", {}, lambda: 1) == 1
    assert run.cached("demo", {}, lambda: 2) == 2


def test_a_failing_computation_leaves_nothing(run: Run) -> None:
    with pytest.raises(ZeroDivisionError):
        run.cached("demo", {}, lambda: 1 / 0)
    with pytest.raises(ValueError, match="JSON compliant"):
        run.cached("demo", {}, lambda: math.nan)
    assert not list(run.cache.rglob("*.json"))


def test_a_truncated_result_is_named_with_the_remedy(run: Run) -> None:
    def compute() -> list[int]:
        return [1, 2, 3]

    run.cached("demo", {}, compute)
    (path,) = (run.cache / "results").iterdir()
    path.write_text(path.read_text()[:-4])
    with pytest.raises(ValueError, match=r"cannot read .*demo-.*\.json: .*delete it"):
        run.cached("demo", {}, compute)


# ---- published values, provenance


def test_published_values_come_back_with_their_stamp(run: Run) -> None:
    assert run.published_values("demo.smoke") is None
    run.publish({"merged": [0.4, 0.5, 0.6]})
    assert run.published_file == run.published / "demo.smoke.json"
    assert run.published_values("demo.smoke") == {"merged": [0.4, 0.5, 0.6]}
    assert json.loads(run.published_file.read_text())["stamp"]["preset"] == "smoke"
    run.published_file.write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*demo\.smoke\.json"):
        run.published_values("demo.smoke")


def test_publishing_a_number_that_is_not_finite_keeps_the_old_file(run: Run) -> None:
    run.publish({"merged": 0.5})
    with pytest.raises(ValueError, match="JSON compliant"):
        run.publish({"merged": math.nan})
    assert run.published_values("demo.smoke") == {"merged": 0.5}


def test_the_stamp_says_where_numbers_come_from(run: Run) -> None:
    stamp = run.stamp()
    assert stamp["notebook"] == "demo" and stamp["preset"] == "smoke" and stamp["seeds"] == [3]
    assert stamp["parameters"] == {"preset": "smoke", "seed": 3, "device": "cpu"}
    assert stamp["device"].startswith("cpu (") and stamp["torch"] == torch.__version__
    assert stamp["seconds"] >= 0 and all(stamp[k] for k in ("commit", "samlib", "python", "open_clip", "date"))
    json.dumps(stamp)


def test_student_interval_by_hand() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0])  # s = 1, t = 4.302653 for 2 degrees of freedom
    assert mean == 2.0
    assert (high - low) / 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6) and (low + high) / 2 == mean
    assert interval([0.5])[0] == 0.5 and all(math.isnan(bound) for bound in interval([0.5])[1:])
    for bad in ([], [math.nan]):
        with pytest.raises(ValueError, match="at least one number"):
            interval(bad)


def test_paired_interval_is_that_of_the_differences() -> None:
    assert paired_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == interval([1.0, 2.0, 3.0])
    same = paired_interval([0.1, 0.9], [0.1, 0.9])
    assert same == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="same length"):
        paired_interval([1.0], [1.0, 2.0])


def test_a_figure_says_whether_it_shows_the_run_or_what_is_published(run: Run) -> None:
    def line(*arguments: object, **keywords: object) -> str:
        figure = plt.figure()
        plot.stamp(figure, run, *arguments, **keywords)
        plt.close(figure)
        return figure.get_supxlabel()

    own = line()
    assert own.startswith(f"{run.notebook}, preset {run.preset.name}") and own == line("a.published")  # none yet
    write_json(run.published / "a.published.json", {"values": 1, "stamp": {"commit": "0123-dirty"}})
    assert line("a.published") == "published values a.published, commit 0123-dirty"
    assert line("a.published", beside=True) == f"this run: {own}; published values a.published, commit 0123-dirty"


def test_a_slider_shows_the_figure_of_its_value() -> None:
    drawn = []

    def draw(value: float) -> plt.Figure:
        drawn.append(value)
        figure, ax = plt.subplots()
        ax.bar([0], [value])
        return figure

    slider = ipywidgets.FloatSlider(0.5, min=0, max=1)
    box = plot.slide(draw, slider)
    first = bytes(box.children[1].value)
    slider.value = 0.75
    assert drawn == [0.5, 0.75] and not plt.get_fignums() and box.children[0] is slider
    assert first.startswith(b"\x89PNG") and bytes(box.children[1].value) != first
    assert not any("Output" in type(widget).__name__ for widget in box.children)
