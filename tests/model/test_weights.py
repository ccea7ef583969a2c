"""What a run needs from the hub is asked for before anything slow is loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from samlib.data import catalogue, hub
from samlib.data.paper_tasks import HUB
from samlib.model import weights
from samlib.notebook.run import begin

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SLOW = {"torch", "torchvision", "timm", "open_clip", "transformers", "datasets", "pandas", "matplotlib", "scipy.stats"}
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}  # nobody listens on this port
LISTING = "\nfinally:\n    import sys; print('LOADED', *sys.modules, sep='\\n')"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A machine with nothing in the hub's caches and no network; what was wanted of the hub is listed."""
    wanted: list[str] = []

    def refuse(*_: object) -> None:
        wanted.append("")
        raise OSError("no route")

    session = type("Session", (), {"head": lambda *_, **__: refuse()})
    monkeypatch.setattr(hub.huggingface_hub, "get_session", session)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("SAMLIB_IMAGES", str(tmp_path / "images"))
    monkeypatch.delenv("SAMLIB_DATA", raising=False)
    return wanted


def keep(folder: Path, repository: str) -> None:
    """Weights as the hub's own cache keeps them."""
    here = folder / "hub" / f"models--{repository.replace('/', '--')}"
    (here / "snapshots" / "abc").mkdir(parents=True)
    (here / "snapshots" / "abc" / weights.WEIGHTS).touch()
    (here / "refs").mkdir()
    (here / "refs" / "main").write_text("abc")


def test_what_is_here_needs_no_hub(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.need("testbed", ["digits", "flags"])
    weights.need("ViT-B-32/random")
    file = tmp_path / "weights.safetensors"
    file.touch()
    weights.need(f"ViT-B-32/openai@{file}")
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-0.parquet").touch()
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    weights.need("ViT-B-32/random", ["mnist"])
    assert asked == []


def test_weights_in_the_cache_of_the_hub_spare_the_question(asked: list[str], tmp_path: Path) -> None:
    keep(tmp_path, "timm/vit_large_patch14_clip_224.openai")  # of another model
    with pytest.raises(
        ConnectionError, match="open_clip_model.safetensors in timm/vit_base_patch32_clip_224.openai. That"
    ):
        weights.need("ViT-B-32/openai")
    keep(tmp_path, "timm/vit_base_patch32_clip_224.openai")
    weights.need("ViT-B-32/openai")
    assert len(asked) == 1


def test_decoded_images_spare_the_question(asked: list[str]) -> None:
    with pytest.raises(ConnectionError, match="'svhn', the dataset ufldl-stanford/svhn"):
        weights.need("testbed", ["digits", "svhn", "dtd"])
    catalogue.decoded("svhn", 32).mkdir(parents=True)
    weights.need("testbed", ["digits", "svhn"])
    with pytest.raises(ConnectionError, match="'svhn'"):
        weights.need("ViT-B-32/random", ["svhn"])  # of another size
    assert len(asked) == 2


def test_offline_the_own_caches_of_the_hub_decide(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="'dtd', the dataset tanganke/dtd. That"):
        weights.need("ViT-B-32/random", ["dtd"])
    (tmp_path / "hub" / "datasets--tanganke--dtd").mkdir(parents=True)
    (tmp_path / "datasets" / "ufldl-stanford___svhn").mkdir(parents=True)
    weights.need("ViT-B-32/random", ["dtd", "svhn"])
    assert len(asked) == 1


def test_all_that_is_missing_is_told_at_once_with_the_command_that_fetches_it(asked: list[str]) -> None:
    with pytest.raises(ConnectionError) as told:
        begin("demo", dict(preset="paper", model=None, tasks="all"))
    assert all(f"'{name}', the dataset {row.id}" in str(told.value) for name, row in HUB.items())
    assert "no route" in str(told.value) and "the weights 'openai' of ViT-B-32" in str(told.value)
    assert f"python -m samlib.model.fetch {' '.join(HUB)} --model ViT-B-32/openai (it fills" in str(told.value)


def test_begin_asks_for_what_the_notebook_loads(asked: list[str]) -> None:
    with pytest.raises(ConnectionError, match="samlib.model.fetch --model ViT-B-32/openai;"):
        begin("demo", dict(preset="paper", model=None, tasks=["digits"]))
    catalogue.decoded("mnist", 224).mkdir(parents=True)
    with pytest.raises(ConnectionError, match="samlib.model.fetch --model ViT-B-32/openai;"):
        begin("demo", dict(preset="paper", tasks=["mnist"]))  # the preset's model is what will read it
    with pytest.raises(ConnectionError, match="'sun397'"):
        begin("demo", dict(preset="paper", model="ViT-B-32/random", tasks="all"))
    begin("demo", dict(preset="paper", micro_batch=1))  # a notebook without these parameters loads neither
    assert len(asked) == 3


def test_a_silent_network_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    session = type("Session", (), {"head": lambda *_, **__: time.sleep(60)})
    monkeypatch.setattr(hub.huggingface_hub, "get_session", session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.SECONDS + 0.5 < 5
    monkeypatch.setattr(hub, "SECONDS", 0.1)
    with pytest.raises(ConnectionError, match="no answer in 0 s"):
        weights.need("ViT-B-32/random", ["sun397"])


BEGIN = "from samlib.notebook.run import begin; begin('demo', {'preset': 'paper', "
RECIPE = "--tasks mnist --optimizer adamw --steps 1"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (f"{BEGIN}'tasks': 'mnist'}})", "tasks must be 'all'"),
        (f"{BEGIN}'device': 'gpu'}})", "device must be 'auto'"),
        (f"{BEGIN}'model': 'ViT-B-32/opnai'}})", "no weights 'opnai' for ViT-B-32, only openai"),
        (f"{BEGIN}'model': None}})", "python -m samlib.model.fetch"),
        ("from samlib.model.fetch import main; main()  # mnist", "'mnist', the dataset ylecun/mnist"),
        (
            "from samlib.model.fetch import main; main()  # --model ViT-B-32/openai",
            "'openai' of ViT-B-32, open_clip_model",
        ),
        ("from samlib.model.fetch import main; main()  # --model ViT-B-23/openai", "did you mean ViT-B-32"),
        (f"from samlib.train.__main__ import main; main()  # {RECIPE}", "'mnist', the dataset ylecun/mnist"),
        (
            "from samlib.study.publish import main; main()  # pairs --preset paper",
            "samlib.model.fetch sun397 .* ViT-B-32/openai",
        ),
        ("from samlib.study.sweep import main; main()  # SWEEP", "samlib.model.fetch dtd --model ViT-B-32/openai"),
        ("from samlib.data.tasks import load_task; load_task('dtd', 224)", "'dtd', the dataset tanganke/dtd"),
        (
            "from samlib.model.clip import load_clip; load_clip(model='ViT-B-32/openai')",
            "samlib.model.fetch --model ViT-B-32/openai",
        ),
    ],
)
def test_mistakes_and_a_missing_network_are_told_before_anything_slow_is_loaded(
    code: str, message: str, tmp_path: Path
) -> None:
    sweep = {"notebook": str(NOTEBOOKS / "08_sweep.ipynb"), "out": str(tmp_path / "out"), "grid": {"seed": [0, 1]}}
    sweep["parameters"] = {"preset": "paper", "tasks": ["dtd"]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    program, _, arguments = code.partition("  # ")
    environment = os.environ | NOWHERE | {"HF_HOME": str(tmp_path), "SAMLIB_CACHE": str(tmp_path)}
    environment.pop("SAMLIB_DATA", None)
    arguments = arguments.replace("SWEEP", str(tmp_path / "sweep.yaml"))
    command = [sys.executable, "-c", f"try:\n    {program}{LISTING}", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode and re.search(message, done.stderr), done.stderr
    loaded = SLOW & set(done.stdout.split("LOADED")[1].split())
    assert loaded <= ({"torch"} if "; load_" in code else set())  # modules about tensors begin with torch
