"""Which models and tasks there are and where they come from, told without loading them, or PyTorch."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from samlib import cache as store
from samlib.hub_table import HUB
from samlib.task_table import TASK_TABLE

FOLDER = Path(__file__).parent / "testbed"
WEIGHTS = FOLDER / "model" / "model.safetensors"
CONFIG = WEIGHTS.with_name("config.json")  # of the architecture
TESTBED = "testbed"  # name of the embedded model
RANDOM = "random"  # in place of a tag: no pre-trained weights
TASKS: tuple[str, ...] = tuple(TASK_TABLE)  # the embedded ones
SIZE = 32  # pixels a side, of the testbed's images and model
SPLITS = ("train", "validation", "test")
FORMAT = 1  # of decoded images; to be raised when what `images.write` stores changes


def known() -> tuple[str, ...]:
    """Names that `tasks.load` accepts: the embedded tasks, the folders in the folder SAMLIB_DATA, the hub's tasks.

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


def folder(task: str) -> Path | None:
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


def files(folder: Path, split: str) -> list[Path]:
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
    here = folder(task)
    source: Any = repr(HUB[task]) if here is None else []
    if here:
        for path in (path for split in (("train", kind) if kind else SPLITS) for path in files(here, split)):
            source.append((str(path.relative_to(here)), path.stat().st_size, path.stat().st_mtime_ns))
    decides = {"size": size, "kind": kind, "format": FORMAT, "source": source}
    return store.images_folder() / f"{task}-{size}-{store.key(decides)}"


def parts(model: str) -> tuple[str, str, Path | None]:
    """Architecture, tag ("" for none) and file that the name of an open_clip model gives."""
    name, _, weights = model.partition("/")
    tag, _, file = ("", "", weights) if weights.startswith("/") else weights.partition("@")
    return name, tag, Path(file) if file else None


def check(model: str) -> None:
    """Refuse the name of a model that open_clip does not know, that is not for samlib, or whose file is missing.

    Raises:
        ValueError: what is wrong, and what would be right.
    """
    if model == TESTBED:
        return
    name, tag, file = parts(model)
    if name not in _architectures() or not (tag or file):
        close = difflib.get_close_matches(name, _architectures(), 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"model must be 'testbed' or such as 'ViT-B-32/openai', not {model!r}{hint}")
    config = _architectures()[name]
    if "hf_tokenizer_name" in config["text_cfg"] or "image_size" not in config["vision_cfg"]:
        raise ValueError(f"{name} is no CLIP with CLIP's own tokenizer, such as ViT-B-32, ViT-B-16 or ViT-L-14")
    if file and not (file.suffix == ".safetensors" and file.is_file()):
        raise ValueError(f"the weights {file} of {name} are no safetensors file")
    tags = _pretrained().list_pretrained_tags_by_model(name)
    if tag not in (*tags, RANDOM, *([""] if file else [])):
        raise ValueError(f"open_clip has no weights {tag!r} for {name}, only {', '.join(tags) or 'none'}")
    told = released(model)
    if told.get("interpolation", "bicubic") != "bicubic" or told.get("resize_mode", "shortest") != "shortest":
        raise ValueError(f"{model} reads images that are not resized as CLIP's are: choose other weights")
    if tag in tags and not file and told.get("hf_hub", "").rstrip("/").count("/") != 1:
        raise ValueError(f"the weights {tag!r} of {name} are not on the hub as safetensors: choose other ones")


def released(model: str) -> dict[str, Any]:
    """What open_clip says of the weights that a model's tag names, such as their place `hf_hub`; {} without a tag."""
    name, tag, _ = parts(model)
    return dict(_pretrained().get_pretrained_cfg(name, tag)) if tag not in ("", RANDOM) else {}


def image_size(model: str) -> int:
    """Pixels a side that a model reads."""
    if model == TESTBED:
        return SIZE
    return int(_architectures()[parts(model)[0]]["vision_cfg"]["image_size"])


def identity(model: str) -> str:
    """What stands for a model's weights without reading large ones: SHA-256 of the embedded file; else the name, with
    size and age of a file that it names, or with the version of torch, whose generator makes random weights. Weights
    of a tag are taken to stay the same."""
    if model == TESTBED:
        return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() if WEIGHTS.exists() else "missing"
    _, tag, file = parts(model)
    if file:
        return f"{model} {file.stat().st_size} {file.stat().st_mtime_ns}"
    return f"{model} {importlib.metadata.version('torch')}" if tag == RANDOM else model


def _architectures() -> dict[str, Any]:
    """open_clip's configurations, by name; once it is loaded also those added with `open_clip.add_model_config`."""
    loaded = sys.modules.get("open_clip")
    added = set(loaded.list_models()) - set(_configurations()) if loaded else ()
    return _configurations() | {name: loaded.get_model_config(name) for name in added if loaded}


def _pretrained() -> ModuleType:
    """open_clip's table of pre-trained weights."""
    return sys.modules.get("open_clip.pretrained") or _table()


# To import open_clip takes many seconds, so both are read from its files.


@lru_cache(maxsize=1)
def _configurations() -> dict[str, Any]:
    return {path.stem: store.read_json(path) for path in sorted((_open_clip() / "model_configs").glob("*.json"))}


@lru_cache(maxsize=1)
def _table() -> ModuleType:
    package = ModuleType("samlib._open_clip")  # open_clip's folder without what its __init__ loads
    package.__path__ = [str(_open_clip())]
    sys.modules[package.__name__] = package
    loaded = sys.modules.get("safetensors.torch")
    sys.modules["safetensors.torch"] = None  # type: ignore[assignment]  # would load torch; the table works without
    try:
        return importlib.import_module(".pretrained", package.__name__)
    finally:
        del sys.modules["safetensors.torch"]
        if loaded:
            sys.modules["safetensors.torch"] = loaded


def _open_clip() -> Path:
    package = importlib.util.find_spec("open_clip")
    assert package and package.submodule_search_locations, "open_clip is a dependency of samlib"
    return Path(package.submodule_search_locations[0])


def _is_task(folder: Path) -> bool:
    return any(folder.glob("train-*.parquet")) or any(map(_is_image, folder.glob("train/*/*")))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in Image.registered_extensions() and not path.name.startswith(".")
