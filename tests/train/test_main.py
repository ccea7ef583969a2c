from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from samlib.train.__main__ import main, parser

GOOD = "--tasks warm --optimizer sam --steps 2 --rho 0.01 --batch_size 4"


def run(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train", *arguments.split()])
    main()


def test_the_command_line_trains_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(f"{GOOD} --device cpu --cache {tmp_path}", monkeypatch)
    (recipe,) = tmp_path.glob("finetune/*/recipe.json")
    out = capsys.readouterr().out
    assert str(recipe.parent) in out and "GB of memory at most" in out
    asked = json.loads(recipe.read_text())["recipe"]
    assert (asked["optimizer"], asked["steps"], asked["rho"], asked["clip_norm"]) == ("sam", 2, 0.01, 1.0)
    run(f"{GOOD} --device cpu --cache {tmp_path / 'no'} --estimate", monkeypatch)
    assert "GB of memory, " in capsys.readouterr().out and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"{GOOD} --rho -1", "rho must be .*, not -1.0"),
        (f"{GOOD} --steps many", "steps must be of type int, not many"),
        (f"{GOOD} --micro_batch 2.5", r"micro_batch must be of type int \| None, not 2.5"),
        (f"{GOOD} --optimzer adamw", "optimzer"),
        ("--tasks warm", "required: optimizer, steps"),
        (f"{GOOD} --tasks cold", "unknown task 'cold'"),
        (f"{GOOD} --device gpu", "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not 'gpu'"),
        (f"{GOOD} --model vit", "model must be"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(arguments, monkeypatch)
    told = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(told) == 1
    assert re.search(message, told[0]), told


def test_a_mistake_is_told_before_torch_loads() -> None:
    program = (
        f"import sys; sys.argv = ['train', *{GOOD.split()}, '--rho', '-1']; from samlib.train.__main__ import main\n"
    )
    program += "try: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "False\n" and "rho must be" in done.stderr


def test_a_file_may_hold_the_recipe_and_help_explains_its_fields(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("tasks: [digits]\noptimizer: asam\nsteps: 7\nrho: 0.5\nclip_norm: null\n")
    found = parser().parse_args(["--config", str(file), "--steps", "9"])
    assert (found.optimizer, found.steps, found.rho, found.clip_norm, found.model) == ("asam", 9, 0.5, None, "testbed")
    assert "floor of ASAM's scale" in parser().format_help()
