from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import write_split
from PIL import Image

from samlib.data import catalogue, decode, folders, hub, tasks
from samlib.data.paper_tasks import HUB
from samlib.data.tasks import load_task, subset
from samlib.data.testbed_tasks import TASK_TABLE
from samlib.store.files import alone
from tools import pretrain


@pytest.mark.parametrize("name", catalogue.TASKS)
def test_embedded_task_is_sound(name: str) -> None:
    task = load_task(name)
    assert len(task.classes) == len(set(task.classes)) == len(task.phrases) >= 8
    assert len(task.train) >= 1400 and len(task.validation) >= 250 and len(task.test) >= 500
    for split in (task.train, task.validation, task.test):
        assert split.images.shape == (len(split), 3, 32, 32) and split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert set(split.labels.tolist()) == set(range(len(task.classes)))
    assert all(template.count("{}") == 1 for template in task.templates)


@pytest.mark.parametrize("name", catalogue.TASKS)
def test_splits_share_no_image_and_no_group(name: str) -> None:
    found = {split: folders.read(tasks._file(catalogue.FOLDER / name, split)) for split in catalogue.SPLITS}
    task = load_task(name)
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not set(found[first]["group"]) & set(found[second]["group"])
        pixels = [{image.numpy().tobytes() for image in getattr(task, s).images} for s in (first, second)]
        assert not pixels[0] & pixels[1]


def test_table_says_what_each_task_is() -> None:
    for name, info in TASK_TABLE.items():
        assert info.kind in ("captured", "artwork", "artwork under synthetic capture")
        assert info.licence and info.source
        assert set(info.prompts) <= set(load_task(name).classes)


def test_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="unknown task 'digit'.*digits.*warm"):
        load_task("digit")


def test_own_task_without_validation_sets_a_tenth_aside() -> None:
    task = load_task("warm")
    assert (len(task.train), len(task.validation), len(task.test)) == (54, 6, 21)
    together = torch.cat([task.train.images, task.validation.images])
    assert len(together.flatten(1).unique(dim=0)) == 60
    assert task.templates == ("a photo of a {}.",)


def test_own_task_with_validation_keeps_its_split_and_reads_underscores_as_spaces() -> None:
    task = load_task("cool")
    assert (len(task.train), len(task.validation), len(task.test)) == (60, 9, 21)
    assert task.classes == ("a_1", "b_2", "c") and task.phrases == ("a 1", "b 2", "c")


def test_own_task_must_not_take_an_embedded_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path / "digits" / "train-00000-of-00001.parquet", [0, 1], ["x", "y"], 0)
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="'digits' in SAMLIB_DATA.*rename"):
        load_task("digits")


def test_truncated_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "torn" / "train-00000-of-00001.parquet"
    write_split(path, [0, 1], ["x", "y"], 0)
    path.write_bytes(path.read_bytes()[:-20])
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="train-00000-of-00001.parquet: it is truncated"):
        load_task("torn")


def test_missing_test_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path / "half" / "train-00000-of-00001.parquet", [0, 1], ["x", "y"], 0)
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="'half' has no test split: no file test-"):
        load_task("half")


def test_small_images_get_a_black_border_and_large_ones_are_scaled() -> None:
    small = decode.square(Image.new("L", (28, 28), 200), 32, border=True)
    assert small.shape == (3, 32, 32)
    assert (small[:, 2:30, 2:30] == 200).all() and small.sum() == 200 * 3 * 28 * 28
    large = decode.square(Image.new("RGB", (90, 64), (1, 2, 3)), 32, border=True)
    assert (large == np.array([1, 2, 3], np.uint8)[:, None, None]).all()


def test_subset_is_fixed_and_nested() -> None:
    split = load_task("cool").train
    few, more = subset(split, 5), subset(split, 9)
    assert torch.equal(few.images, more.images[:5]) and torch.equal(few.labels, more.labels[:5])
    assert subset(split, None) is split and subset(split, 100) is split


def test_fingerprint_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    prints = []
    for seed in (0, 0, 1):
        tasks._stored.cache_clear()
        for split in ("train", "test"):
            write_split(tmp_path / "mine" / f"{split}-00000-of-00001.parquet", [0, 1] * 5, ["x", "y"], seed)
        prints.append(tasks.fingerprint("mine"))
    assert prints[0] == prints[1] != prints[2]


def test_corpus_gives_images_with_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"image": [Image.new("L", (32, 32), 9), Image.new("L", (32, 32), 7)], "caption": ["cat", "hat"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    (tmp_path / "corpus").mkdir()
    path = tmp_path / "corpus" / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    monkeypatch.setattr(pretrain, "FOLDER", tmp_path)
    monkeypatch.setattr(pretrain, "CORPUS", ("corpus",))
    images, captions = pretrain.corpus()
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8
    assert images.flatten(1).unique(dim=1).squeeze().tolist() == [9, 7] and captions == ["cat", "hat"]


def test_corpus_shares_no_group_with_a_test_split() -> None:
    """Neither drawings nor emoji of a test split were seen in pre-training."""
    found = [folders.read(tasks._file(catalogue.FOLDER / folder, "train")) for folder in pretrain.CORPUS]
    seen = {group for table in found for group in table["group"]}
    for name in catalogue.TASKS:
        assert not seen & set(folders.read(tasks._file(catalogue.FOLDER / name, "test"))["group"])


def photographs(folder: Path, sizes: list[int], split: str = "train") -> None:
    """One folder a class, images of several sizes, filled with 10 times the class and the number of the image."""
    for k, name in enumerate(("cat", "hot dog")):
        (folder / split / name).mkdir(parents=True)
        for i, side in enumerate(sizes):
            Image.new("RGB", (side + 6, side), (10 * k, i, 0)).save(folder / split / name / f"{i}.png")


def test_a_folder_of_images_is_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs(tmp_path / "mine", [40, 50, 30] * 7)
    photographs(tmp_path / "mine", [20, 60], "test")
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    task = load_task("mine", 224)
    assert task.classes == ("cat", "hot dog") and task.templates == ("a photo of a {}.",)
    assert task.train.images.shape == (38, 3, 50, 50)  # the largest shorter side, below the model's 224
    assert (len(task.validation), len(task.test), task.revision) == (4, 4, None)
    assert torch.equal(task.train.images[:, 0].flatten(1).amax(1).long(), 10 * task.train.labels)
    seen = torch.cat([task.train.images, task.validation.images])[:, :2].flatten(2).amax(2)
    assert len(seen.unique(dim=0)) == 42  # every image once
    assert load_task("mine", 32).train.images.shape[-1] == 32
    assert load_task("mine", 45).train.images.shape[-1] == 45


def test_prompts_of_an_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        photographs(tmp_path / "mine", [30] * 5, split)
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    before = tasks.fingerprint("mine")
    (tmp_path / "mine" / "task.json").write_text('{"templates": ["a sketch of {}."], "phrases": {"cat": "a kitten"}}')
    task = load_task("mine")
    assert task.templates == ("a sketch of {}.",) and task.phrases == ("a kitten", "hot dog")
    assert tasks.fingerprint("mine") != before
    (tmp_path / "mine" / "task.json").write_text('{"templates": ["a sketch"]}')
    with pytest.raises(ValueError, match="task.json may hold .*one {} each"):
        load_task("mine")
    (tmp_path / "mine" / "task.json").write_text('{"phrases": {"cats": "a kitten"}}')
    with pytest.raises(ValueError, match="mine has no class 'cats', which its phrases name, only cat, hot dog"):
        load_task("mine")


def test_odd_names_and_files_in_a_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets are no patterns, hidden files and notes are no images, a damaged image is named."""
    data = tmp_path / "data [1]"
    for split in ("train", "test"):
        photographs(data / "mine", [30] * 6, split)
    Image.new("L", (30, 30), 1).save(data / "mine" / "train" / "cat" / "1[0].png")
    (data / "mine" / "train" / "cat" / "._1.png").write_bytes(b"x")
    (data / "mine" / "train" / "cat" / "notes.csv").write_text("a,b")
    monkeypatch.setenv("SAMLIB_DATA", str(data))
    task = load_task("mine", 64)
    assert len(task.train) + len(task.validation) == 13
    (data / "mine" / "test" / "cat" / "torn.png").write_bytes(b"no image")
    tasks._stored.cache_clear()
    with pytest.raises(ValueError, match="torn.png cannot be read"):
        load_task("mine", 64)
    (data / "mine" / "test" / "cow").mkdir()
    (data / "mine" / "test" / "cat" / "torn.png").rename(data / "mine" / "test" / "cow" / "torn.png")
    with pytest.raises(ValueError, match="cow is no class of .*train: cat, hot dog"):
        load_task("mine", 64)


def test_too_few_images_for_a_validation_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        photographs(tmp_path / "few", [30] * 4, split)
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="8 training images are too few"):
        load_task("few")


def test_own_tasks_never_ask_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked the network")

    for split in ("train", "test"):
        write_split(tmp_path / "mine" / f"{split}-00000-of-00001.parquet", [0, 1] * 10, ["x", "y"], 0)
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(load_task("mine", 40).train) == 18


def test_text_labels_and_damaged_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    (tmp_path / "text").mkdir()
    for split in ("train", "test", "spatter"):
        rows = {"image": [Image.new("L", (32, 32), i) for i in range(12)], "label": ["dog", "cat", "eel"] * 4}
        file = tmp_path / "text" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    task = load_task("text")
    assert task.classes == ("cat", "dog", "eel") and task.test.labels.tolist() == [1, 0, 2] * 4
    damaged = tasks.corrupted("text", "spatter")
    assert torch.equal(damaged.images, task.test.images) and torch.equal(damaged.labels, task.test.labels)
    with pytest.raises(ValueError, match="text has no test images with 'fog', only spatter"):
        tasks.corrupted("text", "fog")


def test_classes_must_agree_between_the_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, names in (("train", ["x", "y"]), ("test", ["y", "x"])):
        write_split(tmp_path / "odd" / f"{split}-00000-of-00001.parquet", [0, 1], names, 0)
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="test split of 'odd' has other classes"):
        load_task("odd")


def test_own_folder_takes_the_place_of_a_task_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        write_split(tmp_path / "mnist" / f"{split}-00000-of-00001.parquet", [0, 1] * 6, ["0", "1"], 0)
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    task = load_task("mnist", 224)
    assert task.templates == ('a photo of the number: "{}".',) and task.test.images.shape == (12, 3, 32, 32)
    assert catalogue.known().count("mnist") == 1


def test_without_a_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the resolver hangs: the call returns long before it."""

    def hang(*_: object, **__: object) -> None:
        time.sleep(60)

    monkeypatch.setattr(hub.huggingface_hub, "HfApi", lambda: type("Api", (), {"dataset_info": staticmethod(hang)}))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    begun = time.monotonic()
    with pytest.raises(
        ConnectionError, match="'dtd', the dataset tanganke/dtd. .*samlib.model.fetch dtd --model.*SAMLIB"
    ):
        load_task("dtd", 224)
    assert time.monotonic() - begun < 5


def test_a_task_of_the_hub_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["banded", "lacelike"])}
    )
    rows = {"image": [Image.new("L", (300, 260), 3 * i) for i in range(20)], "label": [0, 1] * 10}
    table = datasets.Dataset.from_dict(rows, features=features)
    asked = []

    def fetch(id: str, config: str | None, revision: str) -> datasets.DatasetDict:
        asked.append((id, config, revision))
        return datasets.DatasetDict(train=table, test=table.select(range(5)), contrast=table)

    info = type("Info", (), {"sha": "abc123"})
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.huggingface_hub, "HfApi", lambda: type("Api", (), {"dataset_info": lambda *_, **__: info}))
    monkeypatch.setattr(datasets, "load_dataset", fetch)
    task = load_task("dtd", 224)
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 2, 5)
    assert task.train.images.shape[-1] == 224 and task.revision == "abc123" and len(task.templates) == 8
    tasks._stored.cache_clear()
    assert load_task("dtd", 224).classes == ("banded", "lacelike")
    assert asked == [("tanganke/dtd", None, "abc123")]


def test_the_table_of_the_hub_has_the_published_numbers_of_templates() -> None:
    counts = {
        "sun397": 2,
        "stanford_cars": 8,
        "resisc45": 18,
        "eurosat": 3,
        "svhn": 1,
        "gtsrb": 3,
        "mnist": 1,
        "dtd": 8,
    }
    assert {name: len(set(row.templates)) for name, row in HUB.items()} == counts
    assert all(template.count("{}") == 1 for row in HUB.values() for template in row.templates)
    assert HUB["resisc45"].templates[:2] == ("satellite imagery of {}.", "aerial imagery of {}.")


def test_overlap_counts_twins_and_near_twins() -> None:
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (30, 3, 8, 8), generator=draw, dtype=torch.uint8)
    seen = torch.nn.functional.interpolate(coarse.float(), (48, 48), mode="bilinear").to(torch.uint8)
    noise = torch.randint(-2, 3, seen[:3].shape, generator=draw)
    near = (seen[:3].int() + noise).clamp(0, 255).to(torch.uint8)
    assert decode.overlap([seen[:10], seen[10:20]], torch.cat([seen[5:9], seen[20:], near])) == (4, 7)
    assert decode.overlap([seen[:20]], seen[20:]) == (0, 0)


def test_a_disk_that_is_too_small_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        write_split(tmp_path / "big" / f"{split}-00000-of-00001.parquet", [0, 1] * 5, ["x", "y"], 0)
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    monkeypatch.setattr(decode.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(ValueError, match="0.0 GB left"):
        load_task("big", 33)


def test_images_are_decoded_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        write_split(tmp_path / "busy" / f"{split}-00000-of-00001.parquet", [0, 1] * 10, ["x", "y"], 0)
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    stored = catalogue.decoded("busy", 33)
    left = stored.with_name(f".{stored.name}-killed")
    left.mkdir(parents=True)
    young = left.with_name(f".{stored.name}-other-machine")
    young.mkdir()
    os.utime(left, (0, 0))
    written = []
    monkeypatch.setattr(decode, "write", lambda *a, write=decode.write: written.append(a) or write(*a))
    with ThreadPoolExecutor() as pool:
        with alone(stored):
            assert not left.exists() and young.exists()  # what a killed process left long ago
            loads = [pool.submit(load_task, "busy", 33) for _ in range(2)]
            time.sleep(0.5)
            assert not any(load.done() for load in loads) and list(stored.parent.glob("busy-*")) == []
        assert [len(load.result().test) for load in loads] == [20, 20] and len(written) == 1


def test_a_damaged_store_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        write_split(tmp_path / "torn" / f"{split}-00000-of-00001.parquet", [0, 1] * 10, ["x", "y"], 0)
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    stored = tasks._stored("torn", tmp_path / "torn", 32, tmp_path / "images")
    (stored / "train.npy").write_bytes((stored / "train.npy").read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot read .*torn-32.*delete it"):
        decode.read(stored, "train")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_a_folder_is_named_once_none_of_its_files_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows would refuse it."""
    mapped: list[bool] = []

    def replace(source: Path, target: Path, replace=os.replace) -> None:
        mapped.append(str(source) in Path("/proc/self/maps").read_text())
        replace(source, target)

    monkeypatch.setenv("SAMLIB_IMAGES", str(tmp_path))
    monkeypatch.setattr("os.replace", replace)
    assert len(load_task("warm", 48).test) == 21 and len(mapped) > 1 and not any(mapped)
