"""Which pre-trained models there are and where they come from, told without loading them, or PyTorch."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from samlib.data.catalogue import FOLDER, SIZE
from samlib.store.files import read_json

WEIGHTS = FOLDER / "model" / "model.safetensors"
CONFIG = WEIGHTS.with_name("config.json")  # of the architecture
TESTBED = "testbed"  # name of the embedded model
RANDOM = "random"  # in place of a tag: no pre-trained weights
TABLE = Path(__file__).with_name("open_clip_models.json")  # by tools/open_clip_table.py; to ask open_clip takes seconds
TOLD = ("hf_hub", "mean", "std", "interpolation", "resize_mode", "quick_gelu")  # of weights, in the table


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
    row = _row(model)
    if row is None or not (tag or file):
        close = difflib.get_close_matches(name, _names(), 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"model must be 'testbed' or such as 'ViT-B-32/openai', not {model!r}{hint}")
    if row["size"] is None:
        raise ValueError(f"{name} is no CLIP with CLIP's own tokenizer, such as ViT-B-32, ViT-B-16 or ViT-L-14")
    if file and not (file.suffix == ".safetensors" and file.is_file()):
        raise ValueError(f"the weights {file} of {name} are no safetensors file")
    tags = row["tags"]
    if tag not in (*tags, RANDOM, *([""] if file else [])):
        raise ValueError(f"open_clip has no weights {tag!r} for {name}, only {', '.join(tags) or 'none'}")
    told = released(model)
    if "interpolation" in told or "resize_mode" in told:
        raise ValueError(f"{model} reads images that are not resized as CLIP's are: choose other weights")
    if tag in tags and not file and told.get("hf_hub", "").rstrip("/").count("/") != 1:
        raise ValueError(f"the weights {tag!r} of {name} are not on the hub as safetensors: choose other ones")


def released(model: str) -> dict[str, Any]:
    """What open_clip says of the weights that a model's tag names: their place `hf_hub`, and where it is not CLIP's the
    activation or how pixels are scaled; {} without a tag."""
    tag = parts(model)[1]
    told: dict[str, Any] = (_row(model) or {"tags": {}})["tags"].get(tag.lower().replace("-", "_"), {})
    return {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}


def image_size(model: str) -> int:
    """Pixels a side that a model reads."""
    row = None if model == TESTBED else _row(model)
    return int(row["size"]) if row else SIZE


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


def table_row(open_clip: ModuleType, name: str) -> dict[str, Any]:
    """What samlib reads of a model of open_clip.

    Args:
        open_clip: the module.
        name: of the model.

    Returns:
        `size`, in pixels a side, None unless it is a CLIP with CLIP's own tokenizer; and `tags`, by the name of
        pre-trained weights: those of TOLD that are not CLIP's usual ones.
    """
    config, usual = open_clip.get_model_config(name), vars(open_clip.transform.PreprocessCfg())
    size = None if "hf_tokenizer_name" in config["text_cfg"] else config["vision_cfg"].get("image_size")
    tags = {}
    for tag in open_clip.list_pretrained_tags_by_model(name) if size else ():
        told = open_clip.get_pretrained_cfg(name, tag)
        tags[tag] = {key: told[key] for key in TOLD if key in told and told[key] != usual.get(key)}
    return {"size": size, "tags": tags}


def _row(model: str) -> dict[str, Any] | None:
    """A model's row: of the table, or of open_clip itself once it is loaded; None if there is no such model.

    What the table lacks and another version of open_clip may have is worth loading it.
    """
    name, tag, _ = parts(model)
    row: dict[str, Any] | None = _table()["models"].get(name)
    if "open_clip" not in sys.modules:
        found = row is not None and tag in (*row["tags"], RANDOM, "")
        if found or importlib.metadata.version("open_clip_torch") == _table()["version"]:
            return row
    open_clip = importlib.import_module("open_clip")
    return table_row(open_clip, name) if name in open_clip.list_models() else None


def _names() -> list[str]:
    """Of all models."""
    loaded = sys.modules.get("open_clip")
    return loaded.list_models() if loaded else list(_table()["models"])


@cache
def _table() -> Any:
    return read_json(TABLE)
