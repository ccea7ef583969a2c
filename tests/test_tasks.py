from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import write_split
from PIL import Image

from samlib import tasks
from samlib.task_table import TASK_TABLE


@pytest.mark.parametrize("name", tasks.TESTBED)
def test_embedded_task_is_sound(name: str) -> None:
    task = tasks.load(name)
    assert len(task.classes) == len(set(task.classes)) == len(task.phrases) >= 8
    assert len(task.train) >= 1400 and len(task.validation) >= 250 and len(task.test) >= 500
    for split in (task.train, task.validation, task.test):
        assert split.images.shape == (len(split), 3, 32, 32) and split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert set(split.labels.tolist()) == set(range(len(task.classes)))
    assert all(template.count("{}") == 1 for template in task.templates)


@pytest.mark.parametrize("name", tasks.TESTBED)
def test_splits_share_no_image_and_no_group(name: str) -> None:
    tables = {split: tasks._table(tasks._file(tasks.FOLDER / name, split)) for split in tasks.SPLITS}
    task = tasks.load(name)
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not set(tables[first]["group"]) & set(tables[second]["group"])
        pixels = [{image.numpy().tobytes() for image in getattr(task, s).images} for s in (first, second)]
        assert not pixels[0] & pixels[1]


def test_table_says_what_each_task_is() -> None:
    for name, info in TASK_TABLE.items():
        assert info.kind in ("captured", "artwork", "artwork under synthetic capture")
        assert info.licence and info.source
        assert set(info.prompts) <= set(tasks.load(name).classes)


def test_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="unknown task 'digit'.*digits.*warm"):
        tasks.load("digit")


def test_own_task_without_validation_sets_a_tenth_aside() -> None:
    task = tasks.load("warm")
    assert (len(task.train), len(task.validation), len(task.test)) == (54, 6, 21)
    together = torch.cat([task.train.images, task.validation.images])
    assert len(together.flatten(1).unique(dim=0)) == 60
    assert task.templates == ("a photo of a {}.",)


def test_own_task_with_validation_keeps_its_split_and_reads_underscores_as_spaces() -> None:
    task = tasks.load("cool")
    assert (len(task.train), len(task.validation), len(task.test)) == (60, 9, 21)
    assert task.classes == ("a_1", "b_2", "c") and task.phrases == ("a 1", "b 2", "c")


def test_own_task_must_not_take_an_embedded_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path / "digits" / "train-00000-of-00001.parquet", [0, 1], ["x", "y"], 0)
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="'digits' in SAMLIB_DATA.*rename"):
        tasks.load("digits")


def test_truncated_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "torn" / "train-00000-of-00001.parquet"
    write_split(path, [0, 1], ["x", "y"], 0)
    path.write_bytes(path.read_bytes()[:-20])
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="train-00000-of-00001.parquet: it is truncated"):
        tasks.load("torn")


def test_missing_test_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path / "half" / "train-00000-of-00001.parquet", [0, 1], ["x", "y"], 0)
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="has no file.*test-00000"):
        tasks.load("half")


def test_small_images_get_a_black_border_and_large_ones_are_scaled() -> None:
    small = tasks._pixels(Image.new("L", (28, 28), 200))
    assert small.shape == (3, 32, 32)
    assert (small[:, 2:30, 2:30] == 200).all() and small.sum() == 200 * 3 * 28 * 28
    large = tasks._pixels(Image.new("RGB", (90, 64), (1, 2, 3)))
    assert (large == np.array([1, 2, 3], np.uint8)[:, None, None]).all()


def test_subset_is_fixed_and_nested() -> None:
    split = tasks.load("cool").train
    few, more = tasks.subset(split, 5), tasks.subset(split, 9)
    assert torch.equal(few.images, more.images[:5]) and torch.equal(few.labels, more.labels[:5])
    assert tasks.subset(split, None) is split and tasks.subset(split, 100) is split


def test_fingerprint_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    prints = []
    for seed in (0, 0, 1):
        tasks._fingerprint.cache_clear()
        write_split(tmp_path / "mine" / "train-00000-of-00001.parquet", [0, 1], ["x", "y"], seed)
        prints.append(tasks.fingerprint("mine"))
    assert prints[0] == prints[1] != prints[2]


def test_corpus_gives_images_with_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"image": [Image.new("L", (32, 32), 9), Image.new("L", (32, 32), 7)], "caption": ["cat", "hat"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    (tmp_path / "corpus").mkdir()
    path = tmp_path / "corpus" / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    monkeypatch.setattr(tasks, "FOLDER", tmp_path)
    monkeypatch.setattr(tasks, "CORPUS", ("corpus",))
    images, captions = tasks.corpus()
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8
    assert images.flatten(1).unique(dim=1).squeeze().tolist() == [9, 7] and captions == ["cat", "hat"]


def test_corpus_shares_no_group_with_a_test_split() -> None:
    """Neither drawings nor emoji of a test split were seen in pre-training."""
    tables = [tasks._table(tasks._file(tasks.FOLDER / folder, "train")) for folder in tasks.CORPUS]
    seen = {group for table in tables for group in table["group"]}
    for name in tasks.TESTBED:
        assert not seen & set(tasks._table(tasks._file(tasks.FOLDER / name, "test"))["group"])
