"""Files that are either whole or absent."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

ABANDONED = 3600  # seconds without a write, after which unfinished work is nobody's


def cache_folder() -> Path:
    """Where everything stored between runs lives: $SAMLIB_CACHE, by default ~/.cache/samlib.

    Raises:
        ValueError: it is no folder that can be written to, or there is no home folder.
    """
    try:
        return _writable("SAMLIB_CACHE", lambda: Path.home() / ".cache" / "samlib")
    except RuntimeError:
        raise ValueError("there is no home folder here: let SAMLIB_CACHE name a folder for what is stored") from None


def images_folder() -> Path:
    """Where decoded images live, which are large and can be made again: $SAMLIB_IMAGES, by default in `cache_folder`.

    Raises:
        ValueError: as `cache_folder`.
    """
    return _writable("SAMLIB_IMAGES", lambda: cache_folder() / "images")


def _writable(variable: str, usual: Callable[[], Path]) -> Path:
    """The folder that an environment variable names, or else the usual one; it need not be there yet."""
    named = os.environ.get(variable)
    if named == "":
        raise ValueError(f"{variable} is empty: let it name a folder, or unset it")
    folder = Path(named) if named else usual()
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        wrong = "cannot be written to" if os.path.isdir(there) else "is no folder"
        raise ValueError(f"{there} {wrong}: let {variable} name a folder for what is stored between runs")
    return folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch name beside `path` that becomes `path` when the block ends without an error.

    Args:
        path: file or folder to write; an existing folder is left as it is (its content has the same key).

    Returns:
        The path to write to inside the block.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield scratch / path.name
        if not path.is_dir():
            try:
                os.replace(scratch / path.name, path)
            except OSError:  # another process may have been faster
                if not path.is_dir():
                    raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, which is let go when the process ends, however that ends.

    Some network drives have no locks: there everybody gets in.

    Args:
        path: of the lock file; its folder is made.
        wait: until nobody else holds it.

    Raises:
        BlockingIOError: somebody else holds it, and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(f"{path} is held by another process") from None
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until nobody else is making `path`, and remove what killed ones left of it.

    Args:
        path: what the block makes by `replacing`, if it is not there by then; where there are no locks two may make
            the same, and one of them wins.
    """
    with locked(path.with_name(f".{path.name}.lock")):
        for left in path.parent.glob(f".{glob.escape(path.name)}-*"):
            newest = max(file.stat().st_mtime for file in (left, *left.rglob("*")))
            if time.time() - newest > ABANDONED:  # else another machine, whose lock is not seen here, may be at it
                shutil.rmtree(left, ignore_errors=True)
        yield


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically.

    Args:
        path: where to write.
        value: anything JSON can hold; NaN and infinity are refused.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, indent=1, allow_nan=False)
    with replacing(path) as scratch:
        scratch.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is truncated or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise unreadable(path) from error


def unreadable(path: Path) -> ValueError:
    """The one error for a stored file that cannot be read: it names the file and the remedy."""
    return ValueError(f"cannot read {path}: it is truncated or damaged; delete it and run again")
