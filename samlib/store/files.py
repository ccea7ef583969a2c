"""Files that are either whole or absent."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ABANDONED = 3600  # seconds without a write, after which unfinished work is nobody's


def cache_folder() -> Path:
    """Where everything stored between runs lives: $SAMLIB_CACHE, by default ~/.cache/samlib."""
    return Path(os.environ.get("SAMLIB_CACHE", Path.home() / ".cache" / "samlib"))


def images_folder() -> Path:
    """Where decoded images live, which are large and can be made again: $SAMLIB_IMAGES, by default in `folder`."""
    return Path(os.environ.get("SAMLIB_IMAGES", cache_folder() / "images"))


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
def alone(path: Path) -> Iterator[None]:
    """Wait until nobody else is making `path`, and remove what killed ones left of it.

    Args:
        path: what the block makes by `replacing`, if it is not there by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        with suppress(OSError):  # some network drives have no locks: then two may make the same, and one of them wins
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
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
