"""Image classification tasks as uint8 tensors: the embedded ones and the reader's own."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import torch
from datasets.table import InMemoryTable
from PIL import Image, ImageOps
from torch import Tensor

from samlib.task_table import TASK_TABLE

FOLDER = Path(__file__).parent / "testbed"
CORPUS = ("corpus", "corpus_patches")  # folders of captioned images
SIZE = 32  # pixels a side
TESTBED: tuple[str, ...] = tuple(TASK_TABLE)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Args:
        images: uint8 (N, 3, 32, 32).
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
        name: its folder's name.
        classes: class names in label order, (K,).
        phrases: what the prompts call each class, (K,).
        templates: prompts with one {}.
        train, validation, test: disjoint splits.

    Taught in: 03_models_and_tasks.
    """

    name: str
    classes: tuple[str, ...]
    phrases: tuple[str, ...]
    templates: tuple[str, ...]
    train: Split
    validation: Split
    test: Split


def known() -> tuple[str, ...]:
    """Names that `load` accepts: the embedded tasks, then the folders in the folder SAMLIB_DATA.

    Raises:
        ValueError: a folder of the reader's has the name of an embedded task, or a + in its name.
    """
    data = os.environ.get("SAMLIB_DATA")
    own = sorted(path.name for path in Path(data).iterdir() if _file(path, "train").exists()) if data else []
    for name in own:
        if name in TESTBED:
            raise ValueError(f"{name!r} in SAMLIB_DATA has the name of an embedded task: rename it")
        if "+" in name:
            raise ValueError(f"{name!r} in SAMLIB_DATA has a + in its name, which joins tasks: rename it")
    return (*TESTBED, *own)


def load(name: str) -> Task:
    """Read a task.

    Args:
        name: one of `known()`. A task of the reader's own is a folder <SAMLIB_DATA>/<name>/ with
            train-00000-of-00001.parquet and test-00000-of-00001.parquet (columns `image` and `label`,
            a ClassLabel). Without a validation file, a tenth of train, at most 5000, is set aside.

    Returns:
        The task; images smaller than 32 pixels have a black border, larger ones are scaled and cropped.

    Raises:
        KeyError: no such task; the message lists the known ones.
        ValueError: a file is not in this layout.

    Taught in: 03_models_and_tasks.
    """
    return _load(_folder(name))


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


def fingerprint(name: str) -> str:
    """SHA-256 over the task's files and prompts, part of every cache key.

    Raises:
        KeyError: no such task.
    """
    return _fingerprint(_folder(name))


def corpus() -> tuple[Tensor, list[str]]:
    """The captioned images on which the testbed's model was pre-trained.

    Returns:
        Images, uint8 (N, 3, 32, 32), and their N captions.

    Taught in: 03_models_and_tasks.
    """
    tables = [_table(_file(FOLDER / folder, "train")) for folder in CORPUS]
    return torch.cat([_images(table) for table in tables]), [c for table in tables for c in table["caption"]]


def corpus_fingerprint() -> str:
    """SHA-256 over the corpus's files."""
    files = [_file(FOLDER / folder, "train") for folder in CORPUS]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _folder(name: str) -> Path:
    if name not in known():
        raise KeyError(f"unknown task {name!r}: known are {', '.join(known())}")
    return (FOLDER if name in TESTBED else Path(os.environ["SAMLIB_DATA"])) / name


def _file(folder: Path, split: str) -> Path:
    return folder / f"{split}-00000-of-00001.parquet"


@lru_cache(maxsize=16)
def _load(folder: Path) -> Task:
    tables = {split: _table(_file(folder, split)) for split in SPLITS if _file(folder, split).exists()}
    for split in ("train", "test"):
        if split not in tables:
            raise ValueError(f"task {folder.name!r} has no file {_file(folder, split)}")
    label = tables["train"].features.get("label")
    if not isinstance(label, datasets.ClassLabel):
        raise ValueError(f"the column 'label' of {_file(folder, 'train')} must be a ClassLabel")
    splits = {split: Split(_images(table), torch.tensor(table["label"])) for split, table in tables.items()}
    if "validation" not in splits:
        splits["train"], splits["validation"] = _set_aside(splits["train"])
    info = TASK_TABLE.get(folder.name)
    classes = tuple(label.names)
    return Task(
        name=folder.name,
        classes=classes,
        phrases=tuple(info.prompts.get(c, c) if info else c.replace("_", " ") for c in classes),
        templates=info.templates if info else ("a photo of a {}.",),
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
    )


@lru_cache(maxsize=16)
def _fingerprint(folder: Path) -> str:
    info = TASK_TABLE.get(folder.name)
    digest = hashlib.sha256(repr(info and (info.templates, info.prompts)).encode())
    for split in SPLITS:
        if _file(folder, split).exists():
            digest.update(split.encode())
            digest.update(_file(folder, split).read_bytes())
    return digest.hexdigest()


def _set_aside(train: Split) -> tuple[Split, Split]:
    """A tenth of train, at most 5000, by a fixed seed: (train without it, validation)."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    n = min(len(train) // 10, 5000)
    held, kept = order[:n], order[n:].sort().values
    return Split(train.images[kept], train.labels[kept]), Split(train.images[held], train.labels[held])


def _table(path: Path) -> datasets.Dataset:
    """A parquet file in the layout of the Hugging Face hub, read into memory."""
    try:
        return datasets.Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"cannot read {path}: it is truncated or no parquet file") from error


def _images(table: datasets.Dataset) -> Tensor:
    return torch.from_numpy(np.stack([_pixels(image) for image in table["image"]]))  # (N, 3, 32, 32)


def _pixels(image: Image.Image) -> np.ndarray:
    """RGB pixels, uint8 (3, 32, 32)."""
    image = image.convert("RGB")
    if max(image.size) > SIZE:
        image = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (SIZE, SIZE))
    canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return np.asarray(canvas).transpose(2, 0, 1)
