"""Image classification tasks as uint8 tensors: the embedded ones, those of the hub, and the reader's own."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import torch
from datasets.table import InMemoryTable
from PIL import Image
from torch import Tensor

from samlib import cache as store
from samlib import hub, images
from samlib.hub_table import HUB
from samlib.task_table import TASK_TABLE

FOLDER = Path(__file__).parent / "testbed"
CORPUS = ("corpus", "corpus_patches")  # folders of captioned images
SIZE = 32  # pixels a side, of the testbed's model
TESTBED: tuple[str, ...] = tuple(TASK_TABLE)
SPLITS = ("train", "validation", "test")


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


def known() -> tuple[str, ...]:
    """Names that `load` accepts: the embedded tasks, the folders in the folder SAMLIB_DATA, the tasks of the hub.

    Raises:
        ValueError: SAMLIB_DATA is no folder, or a folder in it has the name of an embedded task, or a + in its name.
    """
    data = os.environ.get("SAMLIB_DATA")
    if data and not Path(data).is_dir():
        raise ValueError(f"SAMLIB_DATA must name a folder with one folder a task, and {data} is none")
    own = sorted(path.name for path in Path(data).iterdir() if _is_task(path)) if data else []
    for name in own:
        if name in TESTBED:
            raise ValueError(f"{name!r} in SAMLIB_DATA has the name of an embedded task: rename it")
        if "+" in name:
            raise ValueError(f"{name!r} in SAMLIB_DATA has a + in its name, which joins tasks: rename it")
    return tuple(dict.fromkeys((*TESTBED, *own, *HUB)))


def load(name: str, size: int = SIZE) -> Task:
    """Read a task.

    A task of the reader's own is a folder <SAMLIB_DATA>/<name>/ with train/<class>/*.jpg and test/<class>/*.jpg (any
    format that Pillow reads), or with train-*.parquet and test-*.parquet (columns `image` and `label`). It may have a
    validation split, too; without one, a tenth of train, at most 5000, is set aside. A file task.json may hold
    "templates", a list of prompts with one {} each, and "phrases", from a class to what the prompts call it. With the
    name of a task of the hub, it takes its place.

    Args:
        name: one of `known()`.
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
    folder = _folder(name)
    if name in TESTBED and size == SIZE:
        return _embedded(folder)
    stored = _stored(name, folder, size, store.images_folder())
    facts = store.read_json(stored / "facts.json")
    splits = [Split(*images.read(stored, split)) for split in SPLITS]
    return _task(name, folder, tuple(facts["classes"]), splits, facts["revision"])


def corrupted(name: str, kind: str, size: int = SIZE) -> Split:
    """Test images of a task with one kind of damage, for measures of robustness.

    Args:
        name: a task with such splits: on the hub Cars, RESISC45 and GTSRB; or the reader's own, in <kind>-*.parquet.
        kind: such as "motion_blur"; see `hub_table.CORRUPTIONS`.
        size: as for `load`.

    Raises:
        KeyError: no such task.
        ValueError: the task has no such split.
        ConnectionError: as `load`.

    Taught in: 03_models_and_tasks.
    """
    folder = _folder(name)
    has = sorted({path.name.split("-")[0] for path in folder.glob("*-*.parquet")}) if folder else HUB[name].corruptions
    kinds = [one for one in has if one not in SPLITS]
    if kind not in kinds:
        raise ValueError(f"{name} has no test images with {kind!r}, only {', '.join(kinds) or 'clean ones'}")
    return Split(*images.read(_stored(name, folder, size, store.images_folder(), kind), kind))


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
    folder = _folder(name)
    if folder and name in TESTBED and size == SIZE:
        return _fingerprint(folder)
    facts = store.read_json(_stored(name, folder, size, store.images_folder()) / "facts.json")
    decides = [facts["sha256"], facts["classes"], *_prompts(name, folder)]
    return hashlib.sha256(repr(decides).encode()).hexdigest()


def corpus() -> tuple[Tensor, list[str]]:
    """The captioned images on which the testbed's model was pre-trained.

    Returns:
        Images, uint8 (N, 3, 32, 32), and their N captions.

    Taught in: 03_models_and_tasks.
    """
    tables = [_table(_file(FOLDER / folder, "train")) for folder in CORPUS]
    return torch.cat([_pixels(table) for table in tables]), [c for table in tables for c in table["caption"]]


def corpus_fingerprint() -> str:
    """SHA-256 over the corpus's files."""
    files = [_file(FOLDER / folder, "train") for folder in CORPUS]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _folder(name: str) -> Path | None:
    """The task's folder here, None if it has to come from the hub."""
    if name not in known():
        raise KeyError(f"unknown task {name!r}: known are {', '.join(known())}")
    if name in TESTBED:
        return FOLDER / name
    own = Path(os.environ["SAMLIB_DATA"]) / name if "SAMLIB_DATA" in os.environ else None
    return own if own and _is_task(own) else None


def _file(folder: Path, split: str) -> Path:
    return folder / f"{split}-00000-of-00001.parquet"


def _is_task(folder: Path) -> bool:
    return any(folder.glob("train-*.parquet")) or any(map(_is_image, folder.glob("train/*/*")))


def _files(folder: Path, split: str) -> list[Path]:
    """The parquet files of a split, or else its images in one folder a class."""
    return sorted(folder.glob(f"{split}-*.parquet")) or sorted(filter(_is_image, folder.glob(f"{split}/*/*")))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in Image.registered_extensions() and not path.name.startswith(".")


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
    classes, tables = _checked(folder.name, _local(folder, SPLITS))
    tables = _with_validation(tables)
    splits = [Split(_pixels(tables[split]), torch.tensor(tables[split]["label"])) for split in SPLITS]
    return _task(folder.name, folder, classes, splits)


@lru_cache(maxsize=64)
def _stored(name: str, folder: Path | None, size: int, cache: Path, kind: str | None = None) -> Path:
    """The folder of the task's decoded images, of a kind of damaged ones alone; filled if it is not there."""
    splits = ("train", kind) if kind else SPLITS
    files = [path for split in splits for path in _files(folder, split)] if folder else []
    source = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files if folder]
    decides = {"size": size, "kind": kind, "format": images.FORMAT, "source": source or repr(HUB[name])}
    stored = cache / f"{name}-{size}-{store.key(decides)}"
    if not stored.is_dir():
        tables, revision = (_local(folder, splits), None) if folder else hub.dataset(name)
        classes, tables = _checked(name, tables, splits)
        wanted = {kind: tables[kind]} if kind else _with_validation(tables)
        images.write(stored, wanted, size, size == SIZE, {"classes": classes, "revision": revision})
    return stored


def _local(folder: Path, splits: Iterable[str]) -> dict[str, datasets.Dataset]:
    """The splits of a task of the reader's own, from parquet files or folders of images; nothing asks the network."""
    classes = sorted({path.parent.name for path in _files(folder, "train")})
    tables = {}
    for split in splits:
        paths = _files(folder, split)
        if paths and paths[0].suffix == ".parquet":
            tables[split] = datasets.concatenate_datasets([_table(path) for path in paths])
        elif paths:
            for path in paths:
                if path.parent.name not in classes:
                    raise ValueError(f"{path.parent} is no class of {folder / 'train'}: {', '.join(classes)}")
            features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
            columns = {"image": [str(path) for path in paths], "label": [path.parent.name for path in paths]}
            tables[split] = datasets.Dataset.from_dict(columns, features)
    return tables


def _checked(
    name: str, tables: Mapping[str, datasets.Dataset], splits: Iterable[str] = SPLITS
) -> tuple[tuple[str, ...], dict[str, datasets.Dataset]]:
    """The class names, and those of the splits that are there; only validation may be missing."""
    for split in splits:
        if split not in tables and split != "validation":
            raise ValueError(f"task {name!r} has no {split} split: no file {split}-*.parquet and no folder {split}/")
    found = {split: tables[split] for split in splits if split in tables}
    for split, table in found.items():
        for column in {"image", "label"} - set(table.features):
            raise ValueError(f"the {split} split of {name!r} has no column {column!r}")
    label = found["train"].features["label"]
    if not isinstance(label, datasets.ClassLabel) and label.dtype == "string":
        label = datasets.ClassLabel(names=sorted(set(found["train"]["label"])))
        found = {split: table.cast_column("label", label) for split, table in found.items()}
    if not isinstance(label, datasets.ClassLabel):
        raise ValueError(f"the column 'label' of {name!r} must be a ClassLabel or text, not {label}")
    for split, table in found.items():
        if table.features["label"] != label:
            raise ValueError(f"the {split} split of {name!r} has other classes than the train split")
    return tuple(label.names), found


def _with_validation(tables: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """The three splits; without a validation split a tenth of train, at most 5000, becomes one, by a fixed seed."""
    if "validation" in tables:
        return tables
    n = len(tables["train"])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    held = min(n // 10, 5000)
    if not held:
        raise ValueError(f"{n} training images are too few to set a tenth aside: add some, or a validation split")
    kept = order[held:].sort().values.tolist()
    return tables | {"train": tables["train"].select(kept), "validation": tables["train"].select(order[:held].tolist())}


def _prompts(name: str, folder: Path | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """Templates, and phrases of classes that are not called by their name."""
    if name in TESTBED:
        return TASK_TABLE[name].templates, TASK_TABLE[name].prompts
    usual = HUB[name].templates if name in HUB else ("a photo of a {}.",)
    file = folder / "task.json" if folder else None
    if file is None or not file.exists():
        return usual, {}
    info = store.read_json(file)
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


def _table(path: Path) -> datasets.Dataset:
    """A parquet file in the layout of the Hugging Face hub, read into memory."""
    try:
        return datasets.Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"cannot read {path}: it is truncated or no parquet file") from error


def _pixels(table: datasets.Dataset) -> Tensor:
    """uint8 (N, 3, 32, 32)."""
    return torch.from_numpy(np.stack([images.square(image, SIZE, border=True) for image in table["image"]]))


def main() -> None:
    """Read tasks into the cache and report what they hold: `python -m samlib.tasks mnist dtd --size 224`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="+", help=f"such as {', '.join(known())}")
    parser.add_argument("--size", type=int, default=224, help="pixels a side that the model reads")
    a = parser.parse_args()
    for name in a.names:
        try:
            task = load(name, a.size)
        except (KeyError, ValueError, ConnectionError) as error:
            parser.error(str(error))
        exact, near = images.overlap([task.train.images, task.validation.images], task.test.images)
        side, revision = task.train.images.shape[-1], f", revision {task.revision}" if task.revision else ""
        print(
            f"{name}: {len(task.classes)} classes, {len(task.train)} + {len(task.validation)} training and validation, "
            f"{len(task.test)} test images of {side} x {side} pixels{revision}; "
            f"of the test images {exact} are among the others, {near} nearly"
        )


if __name__ == "__main__":
    main()
