"""Merge from file to file, one tensor at a time, so that models need not fit in memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from samlib.merge.method import METHODS, merged_tensor, taus
from samlib.model.theta import check_fit, check_values
from samlib.rules import check_settings
from samlib.store.files import read_json, unreadable, write_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"  # of a sharded checkpoint: {"weight_map": {tensor: file}}


class Checkpoint(Mapping[str, Tensor]):
    """A safetensors checkpoint whose tensors are read from the disk when they are asked for, and not kept.

    Args:
        path: a file; or a folder that holds model.safetensors, or shards with model.safetensors.index.json.

    Attributes:
        like: name -> tensor without data, of the right shape and dtype.

    Raises:
        ValueError: nothing there, a truncated file, or a tensor that is not floating point.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.like: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Path, int]] = {}  # file, first byte
        for file in _files(path):
            try:
                with safe_open(file, "pt"):  # refuses what is truncated or no safetensors
                    pass
                with open(file, "rb") as stream:
                    length = int.from_bytes(stream.read(8), "little")
                    header = json.loads(stream.read(length))
            except (SafetensorError, OSError, ValueError) as error:
                raise unreadable(file) from error
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if entry["dtype"] not in DTYPES:
                    raise ValueError(
                        f"tensor {name!r} of {file} is {entry['dtype']}: only floating point can be merged"
                    )
                self.like[name] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
                self._places[name] = file, 8 + length + entry["data_offsets"][0]

    def __getitem__(self, name: str) -> Tensor:
        like, (file, offset) = self.like[name], self._places[name]
        count = like.numel() * like.element_size()
        data = np.fromfile(file, np.uint8, count, offset=offset)
        if len(data) < count:
            raise unreadable(file)
        return torch.from_numpy(data).view(like.dtype).view(like.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


def merge_files(
    method: str,
    base: Path,
    models: Sequence[Path],
    out: Path,
    shard_bytes: int | None = None,
    show: bool = True,
    **settings: Any,
) -> Path:
    """Merge checkpoints by a data-free method, with a few tensors in memory at a time.

    The result is that of the function of the same name, bit for bit. A run that was stopped goes on behind the last
    tensor that it wrote; after an error nothing stays.

    Args:
        method: a name in METHODS that needs nothing but weights.
        base: checkpoint of theta_0, as in `Checkpoint`.
        models: T >= 1 checkpoints with the same tensors.
        out: file to write, which must not exist; with `shard_bytes` a folder.
        shard_bytes: start a new file before one grows beyond this, >= 1.
        show: print progress.
        settings: the method's hyper-parameters.

    Returns:
        `out`.

    Raises:
        ValueError: an unknown method or setting, a value out of range, `out` exists, checkpoints that do not fit
            together, a value that is not finite, or a disk without room.
    """
    settings = _complete(method, settings)
    if out.exists():
        raise ValueError(f"{out} exists: give another name, or delete it")
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError(f"shard_bytes must be an integer >= 1 or None, not {shard_bytes}")
    theta_0, thetas = Checkpoint(base), [Checkpoint(model) for model in models]
    labels = [str(base), *map(str, models)]
    check_fit([theta_0.like, *(theta.like for theta in thetas)], labels)
    out.parent.mkdir(parents=True, exist_ok=True)
    request = {"method": method, "settings": settings, "base": _facts(base), "models": [_facts(m) for m in models]}
    scratch = out.with_name(f".{out.name}.partial")
    if not _same_request(scratch / "request.json", request | {"shard_bytes": shard_bytes}):
        shutil.rmtree(scratch, ignore_errors=True)
        write_json(scratch / "request.json", request | {"shard_bytes": shard_bytes})
    shards = _shards(theta_0.like, shard_bytes)
    needed = sum(_size(w) for w in theta_0.like.values()) - sum(f.stat().st_size for f in scratch.glob("*.safetensors"))
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        shutil.rmtree(scratch)
        raise ValueError(f"{out} needs {needed / 1e9:.2f} GB, and only {free / 1e9:.2f} GB are free there")
    plan = METHODS[method].plan
    assert plan is not None
    try:
        combine = plan(theta_0, thetas, **settings)
        with tqdm(total=len(theta_0), desc=f"merging by {method}", unit="tensor", disable=not show) as bar:
            for file, names in shards.items():
                metadata = {"format": "pt", "samlib": json.dumps({"method": method, "settings": settings})}
                with _Writer(scratch / file, {name: theta_0.like[name] for name in names}, metadata) as writer:
                    bar.update(writer.done)
                    for name in names[writer.done :]:
                        w, vectors = theta_0[name], taus(theta_0, thetas, name)
                        check_values([{name: one} for one in (w, *vectors)], labels)
                        writer.write(merged_tensor(name, w, vectors, combine))
                        bar.update()
        (scratch / "request.json").unlink()
        if shard_bytes is None:
            os.replace(scratch / next(iter(shards)), out)
            scratch.rmdir()
        else:
            weight_map = {name: file for file, names in shards.items() for name in names}
            write_json(scratch / INDEX, {"metadata": {}, "weight_map": weight_map})
            os.replace(scratch, out)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            raise ValueError(f"the disk is full: {out} was not written") from error
        raise
    except Exception:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return out


class _Writer:
    """A safetensors file that grows tensor by tensor; `done` tensors are there already."""

    def __init__(self, path: Path, like: dict[str, Tensor], metadata: dict[str, str]) -> None:
        entries: dict[str, Any] = {"__metadata__": metadata}
        end, ends = 0, []
        for name, w in like.items():
            entries[name] = {"dtype": CODES[w.dtype], "shape": list(w.shape), "data_offsets": [end, end + _size(w)]}
            end += _size(w)
            ends.append(end)
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        size = path.stat().st_size - len(header) if path.exists() else -1
        self.done = sum(end <= size for end in ends)
        self.stream = open(path, "r+b" if size >= 0 else "wb")  # noqa: SIM115  (closed by __exit__)
        self.stream.write(header)
        self.stream.seek(len(header) + ([0, *ends][self.done]))
        self.stream.truncate()

    def write(self, w: Tensor) -> None:
        self.stream.write(w.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.stream.flush()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


def _complete(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the defaults of those that are not given."""
    free = [name for name, m in METHODS.items() if m.plan]
    if method not in free:
        raise ValueError(f"method must be one of {', '.join(free)}, which need nothing but weights, not {method!r}")
    known = METHODS[method].defaults
    for name in settings:
        if name not in known:
            raise ValueError(f"{method} has no setting {name!r}, only {', '.join(known) or 'none'}")
    settings = known | settings
    check_settings(method, METHODS[method].rules, settings)
    return settings


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint."""
    if path.is_dir() and (path / INDEX).exists():
        names = read_json(path / INDEX).get("weight_map", {}).values()
        return [path / name for name in sorted(set(names))]
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"there is no checkpoint {file}: give a safetensors file, or a folder with model.safetensors")
    return [file]


def _facts(path: Path) -> list[Any]:
    """What tells whether a checkpoint is still the same."""
    return [str(path.resolve()), [[f.stat().st_size, f.stat().st_mtime_ns] for f in _files(path)]]


def _same_request(file: Path, request: dict[str, Any]) -> bool:
    try:
        return bool(read_json(file) == json.loads(json.dumps(request)))
    except (OSError, ValueError):
        return False


def _shards(like: dict[str, Tensor], shard_bytes: int | None) -> dict[str, list[str]]:
    """File -> names of its tensors."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, w in like.items():
        if shard_bytes is not None and groups[-1] and size + _size(w) > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _size(w)
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def _size(w: Tensor) -> int:
    return w.numel() * w.element_size()
