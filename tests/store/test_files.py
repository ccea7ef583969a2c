"""Files that are whole or absent, on machines of all kinds."""

from __future__ import annotations

import ast
import multiprocessing
import multiprocessing.synchronize
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from samlib.store import files

ROOT = Path(__file__).parents[2]
HOMELESS = """
import os, sys
import pwd
def nobody(*_): raise KeyError
pwd.getpwuid = pwd.getpwnam = nobody
os.environ.pop("HOME", None)
"""


def python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in environment}
    given = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | given | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


# Where things are stored

BEGIN = "from samlib.notebook.run import begin; print(begin('demo', {'preset': 'smoke', 'device': 'cpu'}).cache)"


@pytest.mark.parametrize(
    ("before", "cache", "images", "told"),
    [
        ("", "", None, "SAMLIB_CACHE is empty: let it name a folder, or unset it"),
        ("", "FOLDER", "", "SAMLIB_IMAGES is empty: let it name a folder, or unset it"),
        ("", "FILE", None, "FILE is no folder: let SAMLIB_CACHE name a folder"),
        ("", "FILE/below", None, "FILE is no folder: let SAMLIB_CACHE name a folder"),
        ("", "FOLDER", "FILE", "FILE is no folder: let SAMLIB_IMAGES name a folder"),
        ("", "/proc/samlib", None, "/proc cannot be written to: let SAMLIB_CACHE name a folder"),
        (HOMELESS, None, None, "there is no home folder here: let SAMLIB_CACHE name a folder"),
    ],
)
def test_a_folder_that_will_not_do_is_told_before_any_work(
    before: str, cache: str | None, images: str | None, told: str, tmp_path: Path
) -> None:
    (tmp_path / "FILE").touch()
    if cache == "/proc/samlib":  # for root every folder can be written to
        before += "os = __import__('os'); os.access = lambda path, mode: str(path) != '/proc'\n"
    environment = {
        name: value and value.replace("FILE", f"{tmp_path}/FILE").replace("FOLDER", f"{tmp_path}/new/folder")
        for name, value in {"SAMLIB_CACHE": cache, "SAMLIB_IMAGES": images}.items()
    }
    done = python(f"{before}try:\n    {BEGIN}\nfinally:\n    import sys; print('torch' in sys.modules)", **environment)
    assert done.returncode == 1 and done.stdout == "False\n"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: {told.replace('FILE', f'{tmp_path}/FILE')}")
    assert "During handling" not in done.stderr


def test_without_a_home_folder_a_named_one_will_do(tmp_path: Path) -> None:
    load = "from samlib.data.tasks import load_task; load_task('digits', 48)"
    done = python(f"{HOMELESS}if True:\n    {BEGIN}\n{load}", SAMLIB_CACHE=f"{tmp_path}/new", SAMLIB_IMAGES=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{tmp_path}/new" and (tmp_path / "new" / "images").is_dir()


def test_nothing_that_only_some_systems_have_is_imported_at_once() -> None:
    for file in [*ROOT.glob("samlib/**/*.py"), *ROOT.glob("tools/*.py")]:
        found = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import)]
        assert not {"fcntl", "resource", "pwd"} & {alias.name for node in found for alias in node.names}, file


# Locks


def hold(path: Path, held: multiprocessing.synchronize.Event) -> None:
    with files.locked(path):
        held.set()
        time.sleep(60)


def test_a_lock_refuses_or_waits_and_ends_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "new" / ".lock", held))
    process.start()
    assert held.wait(10)
    with (
        pytest.raises(BlockingIOError, match="is held by another process"),
        files.locked(tmp_path / "new" / ".lock", False),
    ):
        pass
    threading.Timer(0.3, process.kill).start()
    begun = time.monotonic()
    with files.locked(tmp_path / "new" / ".lock"):
        assert 0.2 < time.monotonic() - begun < 10
        with pytest.raises(BlockingIOError), files.locked(tmp_path / "new" / ".lock", False):
            pass
    with files.locked(tmp_path / "new" / ".lock", False):
        pass
    process.join()


@pytest.mark.parametrize("error", [OSError(95, "not supported"), NotImplementedError("no flock")])
def test_where_there_are_no_locks_everybody_gets_in(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(files.filelock.FileLock, "acquire", refuse)
    with files.alone(tmp_path / "result"), files.replacing(tmp_path / "result") as scratch:
        scratch.mkdir()
    assert (tmp_path / "result").is_dir()


def test_an_error_inside_is_handed_on(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mine"), files.locked(tmp_path / ".lock"):
        raise OSError("mine")
    with files.locked(tmp_path / ".lock", wait=False):
        pass


# Whole or absent


def test_a_failing_block_leaves_nothing_and_a_faster_one_stays(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "a.txt") as scratch:
        scratch.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with files.replacing(tmp_path / "folder") as scratch:
        scratch.mkdir()
        (scratch / "mine").touch()
        (tmp_path / "folder").mkdir()
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    old, new = tmp_path / ".x[1]-old", tmp_path / ".x[1]-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "part").touch()
    for path in (old / "part", old):
        os.utime(path, (0, 0))
    with files.alone(tmp_path / "x[1]"):
        assert new.is_dir() and not old.exists()
