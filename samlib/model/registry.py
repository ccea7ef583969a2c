"""Which pre-trained models there are and where they come from, told without loading them, or PyTorch."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from samlib.data.catalogue import FOLDER, SIZE
from samlib.store.files import read_json

WEIGHTS = FOLDER / "model" / "model.safetensors"
CONFIG = WEIGHTS.with_name("config.json")  # of the architecture
TESTBED = "testbed"  # name of the embedded model
RANDOM = "random"  # in place of a tag: no pre-trained weights


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
    return {path.stem: read_json(path) for path in sorted((_open_clip() / "model_configs").glob("*.json"))}


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
