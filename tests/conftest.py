"""Small stand-ins, so that the tests need neither the pre-trained weights nor minutes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

DATA = Path(os.environ.get("SAMLIB_DATA", "nowhere"))  # before the fixtures change it
HUB_TASKS = ("gtsrb", "mnist", "dtd")
SMALL_VIT = {  # configuration of an open_clip model, for 48 pixels
    "embed_dim": 24,
    "vision_cfg": {"image_size": 48, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}

torch.set_num_threads(1)
hypothesis.settings.register_profile("samlib", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.load_profile("samlib")


class TinyEncoder(nn.Module):
    """An image encoder of 666 parameters with the interface of `clip.Encoder`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(48, 12)
        self.out = nn.Linear(12, 6)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        pooled = F.avg_pool2d(pixels - 0.5, 8).flatten(1)  # (B, 48)
        return F.normalize(self.out(torch.tanh(self.hidden(pooled))), dim=-1)  # (B, 6)


class TinyText(nn.Module):
    """The part of open_clip's model that `zero_shot_head` uses."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.embedding = nn.Embedding(128, 6)

    def encode_text(self, tokens: Tensor, normalize: bool) -> Tensor:
        assert normalize
        return F.normalize(self.embedding(tokens).sum(1), dim=-1)


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[ord(c) % 128 for c in text.ljust(40)[:40]] for text in texts])  # (N, 40)


@dataclass(frozen=True, eq=False)
class TinyClip:
    encoder: Any
    model: Any
    tokenizer: Any
    fingerprint: str
    size: int = 32
    name: str = "testbed"  # as `clip.load_clip` knows a model


@pytest.fixture(scope="session")
def tiny() -> Any:
    """A CLIP double; tests must not change it."""
    torch.manual_seed(0)
    return TinyClip(TinyEncoder(), TinyText(), tokenize, "tiny")


def write_split(path: Path, labels: list[int], names: list[str], seed: int, signal: int = 80) -> None:
    """A parquet file in the hub's layout: noise whose channel `label` is brighter by `signal`."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (len(labels), 32, 32, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[..., label] += signal
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {"image": [Image.fromarray(image) for image in images], "label": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


@pytest.fixture(scope="session", autouse=True)
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SAMLIB_DATA with two tasks of three classes: "warm" without and "cool" with a validation file."""
    folder = tmp_path_factory.mktemp("data")
    labels = [i % 3 for i in range(60)]
    classes = {"warm": ["red", "green", "blue"], "cool": ["a_1", "b_2", "c"]}
    for seed, (task, names) in enumerate(classes.items()):
        write_split(folder / task / "train-00000-of-00001.parquet", labels, names, seed)
        write_split(folder / task / "test-00000-of-00001.parquet", labels[:21], names, 10 + seed)
    write_split(folder / "cool" / "validation-00000-of-00001.parquet", labels[:9], classes["cool"], 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMLIB_DATA", str(folder))
        patch.setenv("SAMLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("SAMLIB_IMAGES", raising=False)
        yield folder


@pytest.fixture
def run(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of the preset smoke over the two stand-in tasks and the CLIP double, with published values of its own."""
    from samlib.notebook.run import begin

    monkeypatch.setenv("SAMLIB_CACHE", str(tmp_path / "cache"))
    started = begin("demo", {"preset": "smoke", "tasks": ["warm", "cool"], "seed": 3, "device": "cpu"})
    return dataclasses.replace(started, published=tmp_path / "published", models={"testbed": tiny})


@pytest.fixture(scope="session")
def hub_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with HUB_TASKS: SAMLIB_DATA, or, where it lacks one, stand-ins of noise in the same layout."""
    if all((DATA / name / "train-00000-of-00001.parquet").exists() for name in HUB_TASKS):
        return DATA
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(HUB_TASKS):
        for split, n in (("train", 300), ("test", 60)):
            labels = [i % 3 for i in range(n)]
            write_split(folder / name / f"{split}-00000-of-00001.parquet", labels, ["a", "b", "c"], seed, signal=0)
    return folder
