"""What a run needs from the hub is asked for before anything slow is loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from samlib import hub
from samlib.run import begin

SLOW = {"torch", "torchvision", "timm", "open_clip", "transformers", "datasets", "pandas", "scipy.stats"}
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}  # nobody listens on this port
LISTING = "\nfinally:\n    import sys; print('LOADED', *sys.modules, sep='\\n')"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A machine with nothing in the hub's cache and no network; what was wanted of the hub is listed."""
    wanted: list[str] = []

    def refuse(_: object, what: str, remedy: str) -> None:
        wanted.append(what)
        raise ConnectionError(f"{what}. {remedy}")

    monkeypatch.setattr(hub, "_ask", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("SAMLIB_DATA", raising=False)
    return wanted


def test_what_is_here_needs_no_hub(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.need("testbed", ["digits", "flags"])
    hub.need("ViT-B-32/random")
    hub.need(f"ViT-B-32/openai@{tmp_path}/weights.safetensors")
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-0.parquet").touch()
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    hub.need("ViT-B-32/random", ["mnist"])
    assert asked == []


def test_weights_in_the_cache_of_the_hub_spare_the_question(asked: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="samlib.fetch --model ViT-B-32/openai; or name a file"):
        hub.need("ViT-B-32/openai")
    snapshot = tmp_path / "hub" / "models--someone--something" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / hub.WEIGHTS).touch()
    hub.need("ViT-B-32/openai")
    assert len(asked) == 1


def test_decoded_images_spare_the_question(asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAMLIB_IMAGES", str(tmp_path / "images"))
    with pytest.raises(ConnectionError, match="'svhn' is the dataset ufldl-stanford/svhn"):
        hub.need("testbed", ["digits", "svhn", "dtd"])
    hub.catalogue.decoded("svhn", 32).mkdir(parents=True)
    hub.need("testbed", ["digits", "svhn"])
    with pytest.raises(ConnectionError, match="'svhn'"):
        hub.need("ViT-B-32/random", ["svhn"])  # of another size
    assert len(asked) == 2


def test_begin_asks_for_what_the_notebook_loads(asked: list[str]) -> None:
    with pytest.raises(ConnectionError, match="'openai' of ViT-B-32"):
        begin("demo", preset="paper", model=None, tasks="all")
    with pytest.raises(ConnectionError, match="'sun397'"):
        begin("demo", preset="paper", model="ViT-B-32/random", tasks="all")
    begin("demo", preset="paper", micro_batch=1)  # loads neither the preset's model nor its tasks
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("code", "message", "slow"),
    [
        ("from samlib.run import begin; begin('demo', preset='papper')", "preset must be one of smoke", set()),
        ("from samlib.run import begin; begin('demo', preset='paper', model=None)", "python -m samlib.fetch", set()),
        ("from samlib.fetch import main; main()  # mnist", "'mnist' is the dataset ylecun/mnist", set()),
        ("from samlib.fetch import main; main()  # --model ViT-B-32/openai", "'openai' of ViT-B-32 are on", set()),
        ("from samlib.fetch import main; main()  # --model ViT-B-23/openai", "did you mean ViT-B-32", set()),
        (
            'from samlib.train import main; main()  # {"task":"mnist","optimizer":"adamw","steps":1}',
            "'mnist' is the dataset ylecun/mnist",
            set(),
        ),
    ],
)
def test_mistakes_and_a_missing_network_are_told_before_anything_slow_is_loaded(
    code: str, message: str, slow: set[str], tmp_path: Path
) -> None:
    program, _, arguments = code.partition("  # ")
    environment = os.environ | NOWHERE | {"HF_HOME": str(tmp_path), "SAMLIB_CACHE": str(tmp_path)}
    environment.pop("SAMLIB_DATA", None)
    command = [sys.executable, "-c", f"try:\n    {program}{LISTING}", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode and re.search(message, done.stderr) and done.stderr.count("Traceback") <= 1
    assert SLOW & set(done.stdout.split("LOADED")[1].split()) == slow
