"""Pick balanced splits without near duplicates between them, and write them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.render_testbed.common import Pixels, decode_png, near_duplicates, thumbnails, write_split

SPLITS = ("test", "validation", "train")  # in the order in which they are filled


@dataclass(frozen=True)
class Example:
    """One image of a task; `group` is what the splits are disjoint by."""

    pixels: Pixels  # (H, W) or (H, W, 3)
    label: int
    group: str


def choose(
    candidates: Iterable[Example],
    per_class: int,
    encode: Callable[[Pixels], bytes],
    avoid: NDArray[np.float32],
) -> tuple[list[dict[str, bytes | int | str]], NDArray[np.float32], int]:
    """Take the first `per_class` candidates of each class that resemble no image to avoid.

    Args:
        candidates: in order of preference.
        per_class: largest number of images of one class.
        encode: turns pixels into PNG bytes; images are compared as they are after this.
        avoid: thumbnails of the other splits' images: (M, 256).

    Returns:
        Rows with `image`, `label` and `group`; their thumbnails (N, 256); how many candidates were passed
        over as near duplicates.
    """
    counts: dict[int, int] = {}
    rows: list[dict[str, bytes | int | str]] = []
    chosen = []
    passed = 0
    for example in candidates:
        if counts.get(example.label, 0) == per_class:
            continue
        png = encode(example.pixels)
        thumbnail = thumbnails([decode_png(png)])  # (1, 256)
        if len(avoid) and near_duplicates(thumbnail, avoid)[0]:
            passed += 1
            continue
        counts[example.label] = counts.get(example.label, 0) + 1
        rows.append({"image": png, "label": example.label, "group": example.group})
        chosen.append(thumbnail)
    return rows, np.concatenate(chosen), passed


def write_task(
    folder: Path,
    classes: Sequence[str],
    candidates: Mapping[str, Iterable[Example]],
    per_class: Mapping[str, int],
    encode: Callable[[Pixels], bytes],
) -> None:
    """Choose test, validation and training images in this order, check the groups, write and report.

    Args:
        folder: the task's folder.
        classes: names of the labels.
        candidates: for each split, its candidates in order of preference.
        per_class: for each split, the number of images of one class.
        encode: turns pixels into PNG bytes.

    Raises:
        ValueError: a group is in two splits.
    """
    avoid = np.empty((0, 256), np.float32)
    used: set[str] = set()
    for split in SPLITS:
        rows, chosen, passed = choose(candidates[split], per_class[split], encode, avoid)
        groups = {str(row["group"]) for row in rows}
        if groups & used:
            raise ValueError(f"groups {sorted(groups & used)[:5]} are in two splits; every group belongs to one")
        avoid = np.concatenate([avoid, chosen])
        used |= groups
        order = np.random.default_rng(0).permutation(len(rows))
        path = write_split(folder, split, [rows[i] for i in order], classes)
        counts = np.bincount([int(row["label"]) for row in rows], minlength=len(classes))
        print(
            f"{folder.name} {split}: {len(rows)} images, {counts.min()}-{counts.max()} a class, "
            f"{len(groups)} groups, {passed} near duplicates passed over, {path.stat().st_size / 1e6:.2f} MB"
        )
