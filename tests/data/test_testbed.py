"""The embedded images keep their promises: sizes, and no image of a test split, or its twin, seen in training."""

from __future__ import annotations

import math
import re
from functools import lru_cache

import numpy as np
import pytest
from numpy.typing import NDArray

from samlib.data import catalogue, folders, tasks
from samlib.data.tasks import load_task
from samlib.model import registry
from tools import pretrain
from tools.render_testbed import common

TWIN = 3.0  # grey levels out of 255: mean difference of the thumbnails below which two images are twins


@lru_cache
def thumbnails(folder: str, split: str) -> NDArray[np.float32]:
    """Grey values (N, 256) of 16 x 16 thumbnails, without the nearly blank; of the corpus, those in colour."""
    table = folders.read(tasks._file(catalogue.FOLDER / folder, split))
    images = [np.asarray(image.convert("RGB")) for image in table["image"]]
    if folder in pretrain.CORPUS:  # its one-colour icons look like no held-out image
        images = [image for image in images if (image.max(2) != image.min(2)).any()]
    rows = common.thumbnails(images)
    return rows[rows.std(1) >= TWIN]  # blank images are all alike


def closest(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Smallest mean absolute difference of two rows, of those below TWIN; else infinity."""
    second = second[second.mean(1).argsort()]
    means = second.mean(1)
    nearest = math.inf
    for row in first:  # the difference of the means is at most the mean of the differences
        low, high = np.searchsorted(means, [row.mean() - TWIN, row.mean() + TWIN])
        if low < high:
            nearest = min(nearest, float(np.abs(second[low:high] - row).mean(1).min()))
    return nearest if nearest < TWIN else math.inf


@pytest.mark.parametrize("name", catalogue.TASKS)
def test_no_twin_of_a_test_image_was_trained_on(name: str) -> None:
    for held_out, seen in (("test", "train"), ("test", "validation"), ("validation", "train")):
        assert closest(thumbnails(name, held_out), thumbnails(name, seen)) == math.inf


@pytest.mark.parametrize("name", catalogue.TASKS)
def test_the_corpus_shows_no_held_out_image(name: str) -> None:
    held_out = np.concatenate([thumbnails(name, "validation"), thumbnails(name, "test")])
    for folder in pretrain.CORPUS:
        assert closest(held_out, thumbnails(folder, "train")) == math.inf


def test_a_twin_would_be_found() -> None:
    rows = np.random.default_rng(0).uniform(0, 255, (30, 256)).astype(np.float32)
    assert closest(rows[:10], rows[10:]) == math.inf
    assert closest(rows[:10] + 1, rows) == pytest.approx(1, abs=1e-3)


def test_no_caption_is_a_label_and_no_caption_names_a_letter() -> None:
    _, captions = pretrain.corpus()
    for name in ("climates", "textures", "sprites"):
        assert not set(captions) & set(load_task(name).classes)
    named = re.compile(r"\bletter [a-z]\b")
    assert not [caption for caption in set(captions) if named.search(caption)]


def test_everything_is_small_enough_to_ship() -> None:
    images = sum(path.stat().st_size for path in catalogue.FOLDER.rglob("*.parquet"))
    assert images < 25_000_000 and registry.WEIGHTS.stat().st_size < 8_000_000
