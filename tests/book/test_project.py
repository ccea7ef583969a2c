"""Things that are said in more than one file must agree."""

import re
import sys
from pathlib import Path

import pytest
import yaml

import samlib
from samlib.store.files import write_json
from tools.check_stamps import problems

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
TARGETS = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.M))


def test_environment_takes_its_packages_from_the_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    (requirement,) = pip
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", requirement).group(1).split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    assert f"'.[{','.join(extras)}]'" in (ROOT / "Makefile").read_text()
    assert {re.split("[=<>]", d)[0] for d in conda} == {"python", "pip", "make"}, "nothing is pinned twice"
    (python,) = [d.split("=")[1] for d in conda if d.startswith("python=")]
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert [int(n) for n in python.split(".")] >= [int(n) for n in least.split(".")]


def test_version_is_the_same_everywhere():
    version = PROJECT["project"]["version"]
    assert samlib.__version__ == version
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert set(re.findall(r"samlib@v([\d.]+)", path.read_text())) <= {version}


def test_repository_is_the_same_everywhere():
    url = CONFIG["repository"]["url"]
    assert PROJECT["project"]["urls"]["Repository"] == url
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == url
    patterns = ("*.md", "book/**/*.md", "notebooks/*.ipynb", "samlib/**/*.py")
    for path in [path for pattern in patterns for path in ROOT.glob(pattern)]:
        found = re.findall(r"github(?:\.com)?/([\w.-]+/samlib)\b", path.read_text())
        assert {f"https://github.com/{name}" for name in found} <= {url}, path


def test_title_is_the_same_everywhere():
    title = CONFIG["title"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["title"] == title
    for name in ("README.md", "book/intro.md"):
        assert (ROOT / name).read_text().startswith(f"# {title}\n")


def test_torch_is_not_pinned():
    (torch,) = [d for d in PROJECT["project"]["dependencies"] if re.match(r"torch\b", d)]
    assert re.fullmatch(r"torch>=[\d.]+", torch)


def test_presets_are_explained():
    from samlib.notebook.presets import PRESETS

    how_to_run = (ROOT / "book" / "how-to-run.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", how_to_run, re.M) == list(PRESETS)
    assert "PRESET ?= laptop" in (ROOT / "Makefile").read_text()


def test_pages_use_the_mathjax_that_is_in_the_repository():
    settings = CONFIG["sphinx"]["config"]
    script = ROOT / "book" / "vendor" / settings["mathjax_path"]
    assert "book/vendor" in settings["html_static_path"] and script.is_file()
    assert len(list((script.parent / "output" / "chtml" / "fonts" / "woff-v2").glob("*.woff"))) >= 20
    assert (script.parent / "LICENSE").is_file()


def test_workflows_call_the_same_commands_as_people():
    for name in ("test", "book"):
        jobs = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())["jobs"]
        runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        assert runs and all(re.match(r"make |\.venv/bin/python -m tools\.", run) for run in runs), name
        assert any(re.match(rf"make {name}\b", run) for run in runs)
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^ *make (.+?)(?: *\||$)", script, re.M) == ["test", "test-slow", "book PRESET=smoke"]


def test_published_values_belong_to_this_version(tmp_path):
    assert problems(ROOT / "book" / "published", None, lambda commit: True) == []
    assert problems(ROOT / "book" / "published", f"v{samlib.__version__}", lambda commit: True) == []
    write_json(tmp_path / "one.json", {"values": 1, "stamp": {"samlib": "0.0.1", "commit": "abc-dirty"}})
    found = problems(tmp_path, "v9", lambda commit: commit != "abc")
    assert len(found) == 3 and "the tag is v9" in found[0] and "samlib 0.0.1" in found[1] and "made at abc," in found[2]
    assert "nothing is published" in problems(tmp_path / "empty", None)[0]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "book/how-to-run.md", "book/results.md"])
def test_pages_name_commands_that_exist(name):
    text = (ROOT / name).read_text()
    for module in re.findall(r"-m ((?:samlib|tools|benchmarks)[\w.]*)", text):
        assert runs(module), module
    for target in re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", text, re.M):
        assert set(target) & TARGETS, target
    for path in re.findall(r"`((?:tests|tools|samlib|book)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path


def runs(module):
    """Whether a module or package is a command."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return file.exists() and '__name__ == "__main__"' in file.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.stem)
def test_workflows_call_what_exists(path):
    workflow = yaml.safe_load(path.read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = "\n".join(step.get("run", "") for step in steps)
    for target in re.findall(r"\bmake ([\w./-]+)", commands):
        assert target in TARGETS, target
    for module in re.findall(r"python -m ((?:samlib|tools)[\w.]*)", commands):
        assert runs(module), module
    for file in re.findall(r"(?:tests|tools)/[\w/]+\.py", commands):
        assert (ROOT / file).exists(), file
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
