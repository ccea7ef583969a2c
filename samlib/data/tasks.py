"""Image classification tasks as uint8 tensors: the embedded ones, those of the hub, and the reader's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from samlib.data import catalogue, decode, hub
from samlib.data.catalogue import SIZE, SPLITS, task_folder
from samlib.data.paper_tasks import HUB
from samlib.data.testbed_tasks import TASK_TABLE
from samlib.store.files import alone, images_folder, read_json

if TYPE_CHECKING:  # seconds to import, and only who decodes images needs it
    import datasets


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Args:
        images: uint8 (N, 3, side, side), on the CPU; those of larger tasks lie on the disk, mapped into memory.
        labels: int64 (N,), indices into the task's classes.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Task:
    """A classification task with zero-shot prompts.

    Args:
        name: as `load` knows it.
        classes: class names in label order, (K,).
        phrases: what the prompts call each class, (K,).
        templates: prompts with one {}.
        train, validation, test: disjoint splits.
        revision: commit of the hub's dataset, None for tasks from elsewhere.

    Taught in: 03_models_and_tasks.
    """

    name: str
    classes: tuple[str, ...]
    phrases: tuple[str, ...]
    templates: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    revision: str | None = None


def load_task(name: str, size: int = SIZE) -> Task:
    """Read a task.

    A task of the reader's own is a folder <SAMLIB_DATA>/<name>/ with train/<class>/*.jpg and test/<class>/*.jpg (any
    format that Pillow reads), or with train-*.parquet and test-*.parquet (columns `image` and `label`). It may have a
    validation split, too; without one, a tenth of train, at most 5000, is set aside. A file task.json may hold
    "templates", a list of prompts with one {} each, and "phrases", from a class to what the prompts call it. With the
    name of a task of the hub, it takes its place.

    Args:
        name: one of `catalogue.known()`.
        size: what the model reads, pixels a side. For the testbed's 32, smaller images get a black border; else images
            are stored at most `size` large, and the model enlarges smaller ones.

    Returns:
        The task, images decoded and resized once and kept in the cache; embedded tasks are read into memory.

    Raises:
        KeyError: no such task; the message lists the known ones.
        ValueError: a file is not in this layout.
        ConnectionError: the task is the hub's, and the hub cannot be reached.

    Taught in: 03_models_and_tasks.
    """
    folder = task_folder(name)
    if name in catalogue.TASKS and size == SIZE:
        return _embedded(folder)
    stored = _stored(name, folder, size, images_folder())
    facts = read_json(stored / "facts.json")
    splits = [Split(*decode.read(stored, split)) for split in SPLITS]
    return _task(name, folder, tuple(facts["classes"]), splits, facts["revision"])


def corrupted(name: str, kind: str, size: int = SIZE) -> Split:
    """Test images of a task with one kind of damage, for measures of robustness.

    Args:
        name: a task with such splits: on the hub Cars, RESISC45 and GTSRB; or the reader's own, in <kind>-*.parquet.
        kind: such as "motion_blur"; see `paper_tasks.CORRUPTIONS`.
        size: as for `load`.

    Raises:
        KeyError: no such task.
        ValueError: the task has no such split.
        ConnectionError: as `load`.

    Taught in: 03_models_and_tasks.
    """
    folder = task_folder(name)
    has = sorted({path.name.split("-")[0] for path in folder.glob("*-*.parquet")}) if folder else HUB[name].corruptions
    kinds = [one for one in has if one not in SPLITS]
    if kind not in kinds:
        raise ValueError(f"{name} has no test images with {kind!r}, only {', '.join(kinds) or 'clean ones'}")
    return Split(*decode.read(_stored(name, folder, size, images_folder(), kind), kind))


def subset(split: Split, n: int | None) -> Split:
    """At most n examples, drawn once and for all by a fixed seed.

    Args:
        split: (N, ...) examples.
        n: how many to keep, or None for all.

    Returns:
        The first n of a fixed permutation, so that a larger subset contains a smaller one.
    """
    if n is None or n >= len(split):
        return split
    index = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:n]
    return Split(split.images[index], split.labels[index])


def fingerprint(name: str, size: int = SIZE) -> str:
    """SHA-256 over the task's images, labels and prompts, part of every cache key.

    Raises:
        As `load`.
    """
    folder = task_folder(name)
    if folder and name in catalogue.TASKS and size == SIZE:
        return _fingerprint(folder)
    facts = read_json(_stored(name, folder, size, images_folder()) / "facts.json")
    decides = [facts["sha256"], facts["classes"], *_prompts(name, folder)]
    return hashlib.sha256(repr(decides).encode()).hexdigest()


def _file(folder: Path, split: str) -> Path:
    return folder / f"{split}-00000-of-00001.parquet"


def _task(
    name: str, folder: Path | None, classes: tuple[str, ...], splits: Sequence[Split], revision: str | None = None
) -> Task:
    templates, phrases = _prompts(name, folder)
    for phrase in set(phrases) - set(classes):
        raise ValueError(f"{name} has no class {phrase!r}, which its phrases name, only {', '.join(classes)}")
    return Task(
        name=name,
        classes=classes,
        phrases=tuple(phrases.get(c, c.replace("_", " ")) for c in classes),
        templates=templates,
        train=splits[0],
        validation=splits[1],
        test=splits[2],
        revision=revision,
    )


@lru_cache(maxsize=16)
def _embedded(folder: Path) -> Task:
    from samlib.data import folders

    classes, found = folders.checked(folder.name, folders.local(folder, SPLITS))
    found = folders.with_validation(found)
    splits = [Split(_pixels(found[split]), torch.tensor(found[split]["label"])) for split in SPLITS]
    return _task(folder.name, folder, classes, splits)


@lru_cache(maxsize=64)
def _stored(name: str, folder: Path | None, size: int, cache: Path, kind: str | None = None) -> Path:
    """The folder of the task's decoded images, of a kind of damaged ones alone; filled if it is not there.

    `folder` and `cache` are what the environment says now, so that what is remembered follows it.
    """
    stored = catalogue.decoded(name, size, kind)
    if not stored.is_dir():
        revision = None if folder else hub.commit(name)  # a missing network is told before anything slow is loaded
        from samlib.data import folders

        with alone(stored):
            if not stored.is_dir():
                splits = ("train", kind) if kind else SPLITS
                found = folders.local(folder, splits) if folder else hub.dataset(name, revision)
                classes, found = folders.checked(name, found, splits)
                wanted = {kind: found[kind]} if kind else folders.with_validation(found)
                decode.write(stored, wanted, size, size == SIZE, {"classes": classes, "revision": revision})
    return stored


def _prompts(name: str, folder: Path | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """Templates, and phrases of classes that are not called by their name."""
    if name in catalogue.TASKS:
        return TASK_TABLE[name].templates, TASK_TABLE[name].prompts
    usual = HUB[name].templates if name in HUB else ("a photo of a {}.",)
    file = folder / "task.json" if folder else None
    if file is None or not file.exists():
        return usual, {}
    info = read_json(file)
    templates = info.get("templates", usual)
    if not set(info) <= {"templates", "phrases"} or not templates or any(t.count("{}") != 1 for t in templates):
        raise ValueError(f'{file} may hold "templates", a list of prompts with one {{}} each, and "phrases", by class')
    return tuple(templates), info.get("phrases", {})


@lru_cache(maxsize=16)
def _fingerprint(folder: Path) -> str:
    info = TASK_TABLE.get(folder.name)
    digest = hashlib.sha256(repr(info and (info.templates, info.prompts)).encode())
    for split in SPLITS:
        if _file(folder, split).exists():
            digest.update(split.encode())
            digest.update(_file(folder, split).read_bytes())
    return digest.hexdigest()


def _pixels(table: datasets.Dataset) -> Tensor:
    """uint8 (N, 3, 32, 32)."""
    return torch.from_numpy(np.stack([decode.square(image, SIZE, border=True) for image in table["image"]]))
