"""Which tasks there are and where their images lie, told without loading them, or PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from PIL import Image

from samlib.data.paper_tasks import HUB
from samlib.data.testbed_tasks import TASK_TABLE
from samlib.store import keys
from samlib.store.files import images_folder

FOLDER = Path(__file__).parents[1] / "testbed"
TASKS: tuple[str, ...] = tuple(TASK_TABLE)  # the embedded ones
SIZE = 32  # pixels a side, of the testbed's images and model
SPLITS = ("train", "validation", "test")
FORMAT = 1  # of decoded images; to be raised when what `decode.write` stores changes


def known() -> tuple[str, ...]:
    """Names that `tasks.load_task` accepts: the embedded tasks, the folders in the folder SAMLIB_DATA, the hub's tasks.

    Raises:
        ValueError: SAMLIB_DATA is no folder, or a folder in it has the name of an embedded task, or a + in its name.
    """
    data = os.environ.get("SAMLIB_DATA")
    if data and not Path(data).is_dir():
        raise ValueError(f"SAMLIB_DATA must name a folder with one folder a task, and {data} is none")
    own = sorted(path.name for path in Path(data).iterdir() if _is_task(path)) if data else []
    for name in own:
        if name in TASKS:
            raise ValueError(f"{name!r} in SAMLIB_DATA has the name of an embedded task: rename it")
        if "+" in name:
            raise ValueError(f"{name!r} in SAMLIB_DATA has a + in its name, which joins tasks: rename it")
    return tuple(dict.fromkeys((*TASKS, *own, *HUB)))


def task_folder(task: str) -> Path | None:
    """The task's folder on this machine, None if it has to come from the hub.

    Raises:
        KeyError: no such task; the message lists the known ones.
        ValueError: as `known`.
    """
    if task not in known():
        raise KeyError(f"unknown task {task!r}: known are {', '.join(known())}")
    if task in TASKS:
        return FOLDER / task
    own = Path(os.environ["SAMLIB_DATA"]) / task if "SAMLIB_DATA" in os.environ else None
    return own if own and _is_task(own) else None


def split_files(folder: Path, split: str) -> list[Path]:
    """The parquet files of a split, or else its images in one folder a class."""
    return sorted(folder.glob(f"{split}-*.parquet")) or sorted(filter(_is_image, folder.glob(f"{split}/*/*")))


def decoded(task: str, size: int, kind: str | None = None) -> Path:
    """Where the cache keeps, or will keep, a task's decoded images; the name follows its files.

    Args:
        task: one of `known()`.
        size: what the model reads, pixels a side.
        kind: of damaged test images; None for the task's three splits.

    Raises:
        As `folder`.
    """
    here = task_folder(task)
    source: Any = repr(HUB[task]) if here is None else []
    if here:
        for path in (path for split in (("train", kind) if kind else SPLITS) for path in split_files(here, split)):
            source.append((str(path.relative_to(here)), path.stat().st_size, path.stat().st_mtime_ns))
    decides = {"size": size, "kind": kind, "format": FORMAT, "source": source}
    return images_folder() / f"{task}-{size}-{keys.key(decides)}"


def _is_task(folder: Path) -> bool:
    return any(folder.glob("train-*.parquet")) or any(map(_is_image, folder.glob("train/*/*")))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in Image.registered_extensions() and not path.name.startswith(".")
