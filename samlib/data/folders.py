"""A task's images and labels as tables of the `datasets` library, before they are decoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import datasets
import pyarrow.parquet
import torch
from datasets.table import InMemoryTable

from samlib.data.catalogue import SPLITS, split_files


def read(path: Path) -> datasets.Dataset:
    """A parquet file in the layout of the Hugging Face hub, read into memory."""
    try:
        return datasets.Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"cannot read {path}: it is truncated or no parquet file") from error


def local(folder: Path, splits: Iterable[str]) -> dict[str, datasets.Dataset]:
    """The splits of a task of the reader's own, from parquet files or folders of images; nothing asks the network."""
    classes = sorted({path.parent.name for path in split_files(folder, "train")})
    tables = {}
    for split in splits:
        paths = split_files(folder, split)
        if paths and paths[0].suffix == ".parquet":
            tables[split] = datasets.concatenate_datasets([read(path) for path in paths])
        elif paths:
            for path in paths:
                if path.parent.name not in classes:
                    raise ValueError(f"{path.parent} is no class of {folder / 'train'}: {', '.join(classes)}")
            features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
            columns = {"image": [str(path) for path in paths], "label": [path.parent.name for path in paths]}
            tables[split] = datasets.Dataset.from_dict(columns, features)
    return tables


def checked(
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


def with_validation(tables: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
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
