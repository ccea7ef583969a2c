"""Nothing stale: what decides a number is in its key, and nothing else is."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from samlib import merge, rules
from samlib.measure import interference
from samlib.notebook import plot
from samlib.notebook.run import begin
from samlib.store import keys


def cells(source: str, name: str = "f") -> Any:
    """A value of the page after its cells have run."""
    page: dict[str, Any] = {"__name__": "__main__"}
    for cell in source.split("\n---\n"):
        exec(compile(cell, "<cell>", "exec"), page)
    return page[name]


def key_of(source: str) -> str:
    return keys.code_of(cells(source))


HELPER = "def helper(x):\n    return x + 1\n---\ndef f(x):\n    return helper(x)"
DECORATED = (
    "import functools\n---\ndef twice(fn):\n    @functools.wraps(fn)\n    def both(*a):\n"
    "        return 2 * fn(*a)\n    return both\n---\n@twice\ndef f(x):\n    return x"
)
CLASS = (
    "class A:\n    scale = 2\n    def of(self, x):\n        return self.scale * x\n---\ndef f(x):\n    return A().of(x)"
)
RECURSION = "def g(n):\n    return n and f(n - 1)\n---\ndef f(n):\n    return n and g(n - 1)"
SPECTRUM = (
    "from samlib.measure import hessian\n---\ndef spectrum(operator, steps):\n"
    "    return hessian.spectral_density(operator, steps=steps, probes=2)\n---\nf = lambda: spectrum(None, 3)"
)


@pytest.mark.parametrize(
    ("page", "before", "after"),
    [
        (HELPER, "x + 1", "x + 2"),
        (HELPER, "return helper(x)", "return helper(-x)"),
        (HELPER, "f(x)", "f(x, y=1)"),
        (HELPER.replace("f(x):", "f(x, y=[1]):"), "[1]", "[2]"),
        (HELPER.replace("f(x):", "f(x, *, y=1):"), "y=1", "y=2"),
        (SPECTRUM, "probes=2", "probes=3"),
        (SPECTRUM, "None, 3", "None, 4"),
        ("def f(x, y):\n    return x - y", "(x, y)", "(y, x)"),
        ("def f(x):\n    return x in {'a', 'b'}", "'b'", "'c'"),
        (
            "def f():\n    try:\n        a()\n    except OSError:\n        return 1\n    else:\n        b()",
            "    except OSError:\n        return 1\n    else:\n        b()",
            "        b()\n    except OSError:\n        return 1",
        ),
        ("def f():\n    def inner():\n        return 1\n    return inner()", "return 1", "return 2"),
        ("def f():\n    class A:\n        x = 1\n    return A.x", "x = 1", "x = 2"),
        ("f = lambda x: (x\n    + 1)", "+ 1", "+ 2"),
        ("a, f = lambda: 1, lambda: 2", "2", "3"),
        ("RATE = 0.1\n---\ndef f(x):\n    return RATE * x", "0.1", "0.2"),
        ("KINDS = {'a', 'b'}\n---\ndef f(x):\n    return x in KINDS", "'b'", "'c'"),
        ("import numpy as np\nN = np.int64(3)\n---\ndef f(x):\n    return N * x", "(3)", "(4)"),
        ("ways = {'a': lambda x: x, 'b': None}\n---\ndef f(x):\n    return ways['a'](x)", "x, 'b'", "2 * x, 'b'"),
        ("a, b = lambda x: x, lambda x: -x\n---\nways = {'a': a, 'b': b}\n---\ndef f(x):\n    return ways['a'](x)",
         "{'a': a, 'b': b}", "{'a': b, 'b': a}"),
        ("ways = [abs, round]\n---\ndef f(x):\n    return ways[0](x)", "[abs, round]", "[round, abs]"),
        (DECORATED, "2 * fn", "3 * fn"),
        (DECORATED, "return x", "return -x"),
        (DECORATED.replace("@twice", "@functools.lru_cache"), "return x", "return -x"),
        ("import functools\n---\ndef g(x, y):\n    return x + y\n---\nf = functools.partial(g, y=2)", "y=2", "y=3"),
        ("import functools\n---\ndef g(x, y):\n    return x + y\n---\nf = functools.partial(g, 2)", "x + y", "x - y"),
        (CLASS, "self.scale * x", "self.scale + x"),
        (CLASS, "scale = 2", "scale = 3"),
        (CLASS.replace("    def of", "    @staticmethod\n    def of").replace("self.scale", "2"), "2 * x", "3 * x"),
        (CLASS.replace("    def of", "    @property\n    def of"), "self.scale * x", "self.scale + x"),
        (CLASS.replace("    def of", "    @classmethod\n    def of"), "self.scale * x", "self.scale + x"),
        (CLASS + "\n---\nf = A().of", "self.scale * x", "self.scale + x"),
        (CLASS + "\n---\nclass B(A):\n    pass\n---\nf = B", "scale = 2", "scale = 3"),
        ("from dataclasses import dataclass as D\n---\n@D(frozen=True, slots=True)\nclass A:\n    x: int\n---\n"
         "a = A(1)\n---\ndef f():\n    return a.x", "A(1)", "A(2)"),
        (RECURSION, "f(n - 1)", "f(n - 2)"),
        (RECURSION, "g(n - 1)", "g(n - 2)"),
        ("def outer(k):\n    def inner(x):\n        return k * x\n    return inner\n---\nf = outer(2)", "(2)", "(3)"),
        ("from samlib import merge\n---\ndef f(t):\n    return merge.ties(t)", "ties", "average"),
        ("def f(t):\n    from samlib.merge import ties\n    return ties(t)", "from samlib.merge import ties",
         "from samlib.merge import dare as ties"),
    ],
)  # fmt: skip
def test_a_change_of_what_runs_is_a_change_of_the_key(page: str, before: str, after: str) -> None:
    assert page.count(before) == 1
    assert key_of(page) == key_of(page)
    assert key_of(page) != key_of(page.replace(before, after))


@pytest.mark.parametrize(
    ("page", "before", "after"),
    [
        (HELPER, "x + 1", "(x +\n            1)  # one more"),
        (HELPER, "def helper(x):\n", 'def helper(x):\n    """One more."""\n\n'),
        (HELPER, "def f", "unused = 3\n\n\ndef f"),
        (HELPER, "def helper", "# the helper\n\n\ndef helper"),
        (HELPER.replace("f(x):", 'f(x):\n    """Old."""'), "Old", "New"),
        (CLASS, "    scale", '    """A scale."""\n\n    scale'),
        ("def f():\n    class A:\n        'Old'\n        x = 1\n    return A.x", "'Old'", "# no\n        'New'"),
        ("count = [0]\n---\ndef f(x):\n    return x.count", "[0]", "[1]"),
        ("def f():\n    import json\n    return json", "import json", "import json  # of Python"),
    ],
)
def test_comments_layout_docstrings_and_what_is_not_named_change_nothing(page: str, before: str, after: str) -> None:
    assert page.count(before) == 1
    assert key_of(page) == key_of(page.replace(before, after))


def test_the_key_is_that_of_other_processes() -> None:
    """Also where the order of sets is another."""
    page = (
        "KINDS = {'a', 'b', 'c'}\n---\ndef f(x):\n    class A:\n        y = x\n    return x in KINDS or x in {'d', 'e'}"
    )
    code = "import sys, test_keys; print(test_keys.key_of(sys.argv[1]))"
    folder = Path(__file__).parent
    found = {
        subprocess.run(
            [sys.executable, "-c", code, page],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": f"{folder}:{keys.ROOT.parent}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in "12"
    }
    assert found == {key_of(page)}


# Modules


def modules_of(fn: Callable[..., Any]) -> set[str]:
    met: set[str] = set()
    list(keys._trace(fn, {}, met))
    return set(keys._with_imports(met))


def test_modules_are_followed_to_what_they_import() -> None:
    assert {"samlib.merge.ties", "samlib.merge.method", "samlib.model.theta"} <= modules_of(merge.ties)
    assert "samlib.measure.interference" not in modules_of(merge.ties)
    assert "samlib.measure.interference" in modules_of(interference.xi)
    assert modules_of(functools.partial(rules.whole, 3)) == {"samlib.rules"}
    assert "samlib.rules" in modules_of(cells("from samlib import rules\n---\nf = [rules.whole(2)]"))


def test_of_a_package_that_is_named_every_module_counts() -> None:
    by_name = cells("from samlib import merge\n---\ndef f(name):\n    return getattr(merge, name)")
    assert {"samlib.merge.spectral", "samlib.merge.with_images", "samlib.rules"} <= modules_of(by_name)
    everything = modules_of(cells("import samlib\n---\ndef f():\n    return samlib.merge"))
    assert everything == {name for name in keys._TEXTS if not f"{name}.".startswith("samlib.notebook.")}


def test_of_the_package_notebook_counts_only_the_model_that_it_hands_on() -> None:
    found = modules_of(plot.stamp)
    assert "samlib.model.clip" in found and not any("notebook" in name for name in found)


def test_an_object_of_the_library_that_fills_itself_keeps_its_key() -> None:
    run = begin("demo", {"preset": "smoke", "device": "cpu"})
    page = cells("def f():\n    return run.preset")
    page.__globals__["run"] = run
    before = keys.code_of(page)
    run.parameters["filled"] = object()
    assert keys.code_of(page) == before and "samlib.model.clip" in modules_of(page)


def test_a_function_that_an_object_of_the_library_holds_counts() -> None:
    method = "from samlib.merge import Method\n---\ndef plan(t):\n    return t\n---\n"
    method += "own = Method('own', 'nothing', 'me', {}, {}, plan)\n---\ndef f(t):\n    return own.plan(t)"
    assert key_of(method) != key_of(method.replace("return t\n", "return -t\n"))


def test_modules_that_a_function_imports_are_followed() -> None:
    imports = "import samlib.merge.ties\n    from samlib.measure.interference import xi\n    from samlib import rules"
    assert {"samlib.merge.ties", "samlib.measure.interference", "samlib.rules"} <= modules_of(
        cells(f"def f():\n    {imports}")
    )


def test_samlib_imports_by_full_names() -> None:
    """A relative import, or a name that is put together, would not be followed."""
    for _, text in keys._TEXTS.values():
        assert "from ." not in text and "importlib.reload" not in text


def test_a_file_beside_the_notebook_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "beside_the_notebook.py"

    def key(text: str, page: str) -> str:
        file.write_text(text)
        sys.modules.pop(file.stem, None)
        return key_of(page)

    text = "SCALE = 2\ndef g(x):\n    return SCALE * x\n"
    for page in (
        f"from {file.stem} import g\n---\ndef f(x):\n    return g(x)",
        f"import {file.stem} as beside\n---\ndef f(x):\n    return beside.g(x)",
        f"def f(x):\n    from {file.stem} import g\n    return g(x)",
    ):
        found = [key(t, page) for t in (text, text.replace("SCALE = 2", "SCALE = 3"), text + "# done")]
        assert found[0] == found[2] != found[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of samlib that may be changed."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(keys.ROOT, folder / "samlib", ignore=shutil.ignore_patterns("testbed", "__pycache__"))
    (folder / "samlib" / "testbed").symlink_to(keys.ROOT / "testbed")
    return folder


def python(copy: Path, code: str) -> Any:
    """What code prints as JSON in its last line, with the copied samlib."""
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(
        command, cwd=copy, env=ENVIRONMENT | {"PYTHONPATH": str(copy)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


ENVIRONMENT = {"SAMLIB_CACHE": "cache", "OMP_NUM_THREADS": "1"}
RESULTS = """
import collections, json
from samlib import merge
from samlib.measure import interference
from samlib.notebook.run import begin

run, computed = begin("demo", {"preset": "smoke", "device": "cpu"}), collections.deque()

def merged():
    computed.append("merged")
    return merge.average.__name__

def measured():
    computed.append("measured")
    return interference.xi.__name__

for fn in (merged, measured):
    run.cached("result", {}, fn)
print(json.dumps([*computed]))
"""


def test_a_line_of_the_library_makes_its_results_again(copy: Path) -> None:
    linear, measure = copy / "samlib" / "merge" / "linear.py", copy / "samlib" / "measure" / "interference.py"
    assert python(copy, RESULTS) == ["merged", "measured"]
    for file in (linear, measure):
        file.write_text("# Words.\n" + file.read_text().replace('"""', '"""Words. ', 1).replace("(tau", "( tau"))
    assert python(copy, RESULTS) == []
    linear.write_text(linear.read_text() + "\nSOMETHING = 1\n")
    assert python(copy, RESULTS) == ["merged"]
    measure.write_text(measure.read_text() + "\nSOMETHING = 1\n")
    assert python(copy, RESULTS) == ["measured"]


CHANGED_WHILE_IT_RUNS = r"""
import json
from pathlib import Path
from samlib import rules
from samlib.store import keys

found, file = [keys.code_of(rules.whole), keys.library()], Path(rules.__file__)
file.write_text(file.read_text() + "# words")
found += [keys.code_of(rules.whole), keys.library()]
file.write_text(file.read_text() + "\nSOMETHING = 1")
found += [keys.code_of(keys.key), keys.library()]
try:
    keys.code_of(rules.whole)
except RuntimeError as error:
    found.append(str(error))
print(json.dumps(found))
"""
KEY = (
    "import json; from samlib import rules; from samlib.store import keys; print(json.dumps(keys.code_of(rules.whole)))"
)


def test_code_that_changes_while_it_runs_is_not_what_runs(copy: Path) -> None:
    """Neither is an old result taken for one of the new code, nor is a result of the old code kept under its name."""
    old, library, same, still, _, new, told = python(copy, CHANGED_WHILE_IT_RUNS)
    assert (old, library) == (same, still) and new != library
    assert "rules.py has changed since it was loaded: restart Python" in told
    assert python(copy, KEY) != old


# A notebook


def test_cells_of_a_notebook(tmp_path: Path) -> None:
    """The helper's cell changes, the cell of the function that calls it does not."""
    show = "print(keys.code_of(f))"
    sources = [
        "from samlib.store import keys",
        "RATE = 0.1\ndef helper(x, probes=2):\n    return RATE * x",
        "class Model:\n    def of(self, x):\n        return x",
        "def f(x):\n    return helper(Model().of(x))",
        show,
        "def helper(x, probes=2):\n    'Words.'\n\n    return (RATE *  # words\n            x)",
        show,
        "def helper(x, probes=3):\n    return RATE * x",
        show,
        "RATE = 0.2",
        show,
        "class Model:\n    def of(self, x):\n        return -x",
        show,
    ]
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "page.ipynb")
    done = papermill.execute_notebook(str(tmp_path / "page.ipynb"), None, progress_bar=False)
    first, same, *others = (cell.outputs[0].text for cell in done.cells if cell.source == show)
    assert first == same and len({first, *others}) == 4
