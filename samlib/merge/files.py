"""Merge from file to file, one tensor at a time, so that models need not fit in memory."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from samlib.merge.method import METHODS, added, task_vectors
from samlib.model.theta import Lazy, check_fit, check_values
from samlib.rules import check, none, whole
from samlib.store.files import read_json, unreadable, write_json
from samlib.store.keys import key

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"  # of a sharded checkpoint: {"weight_map": {tensor: file}}


class Checkpoint(Lazy):
    """A safetensors checkpoint whose tensors are read from the disk when they are asked for, and not kept.

    A file is opened anew for every tensor: while it stays open, all that was read from it stays mapped into memory.

    Args:
        path: a file; or a folder that holds model.safetensors, or shards with model.safetensors.index.json.

    Attributes:
        like: name -> tensor without data, of the right shape and dtype; ordered as safetensors does, wide dtypes first.

    Raises:
        ValueError: nothing there, a truncated file, or a tensor that is not floating point.
    """

    def __init__(self, path: Path) -> None:
        like: dict[str, Tensor] = {}
        places: dict[str, Path] = {}
        for file in _files(path):
            with _open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  (no dictionary)
                    form = tensors.get_slice(name)
                    code = form.get_dtype()
                    if code not in DTYPES:
                        raise ValueError(f"tensor {name!r} of {file} is {code}: only floating point can be merged")
                    like[name] = torch.empty(form.get_shape(), dtype=DTYPES[code], device="meta")
                    places[name] = file
        self.like = dict(sorted(like.items(), key=lambda item: (-item[1].itemsize, item[0])))

        def read(name: str) -> Tensor:
            with _open(places[name]) as tensors:
                return tensors.get_tensor(name)

        super().__init__(self.like, read)


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
    check("merge_files", {"shard_bytes": whole(1) | none}, {"shard_bytes": shard_bytes})
    if out.exists():
        raise ValueError(f"{out} exists: give another name, or delete it")
    theta_0, thetas = Checkpoint(base), [Checkpoint(model) for model in models]
    labels = [str(base), *map(str, models)]
    check_fit([theta_0.like, *(theta.like for theta in thetas)], labels)
    plan = METHODS[method].plan
    assert plan is not None
    shards = _shards(theta_0.like, shard_bytes)
    metadata = {"format": "pt", "samlib": json.dumps({"method": method, "settings": settings})}
    scratch = _scratch(out, [metadata, shard_bytes, *map(_facts, (base, *models))])
    try:
        needed = sum(map(_size, theta_0.like.values())) - sum(file.stat().st_size for file in scratch.iterdir())
        free = shutil.disk_usage(scratch).free
        if needed > free:
            raise ValueError(f"{out} needs {needed / 1e9:.2f} GB, and only {free / 1e9:.2f} GB are free there")
        combine = plan(theta_0, thetas, **settings)
        with tqdm(total=len(theta_0), desc=f"merging by {method}", unit="tensor", disable=not show) as bar:
            for file, names in shards.items():
                stream, done = _begin(scratch / file, {name: theta_0.like[name] for name in names}, metadata)
                with stream:
                    bar.update(done)
                    for name in names[done:]:
                        w = theta_0[name]  # read once
                        taus = task_vectors({name: w}, thetas, name)
                        check_values([{name: one} for one in (w, *taus)], labels)
                        _append(stream, added(w, combine(name, taus)))
                        bar.update()
        if shard_bytes is None:
            os.replace(scratch / next(iter(shards)), out)
            scratch.rmdir()
        else:
            weight_map = {name: file for file, names in shards.items() for name in names}
            write_json(scratch / INDEX, {"metadata": {}, "weight_map": weight_map})
            os.replace(scratch, out)
    except Exception as error:  # who stops it by hand keeps what is there
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ValueError(f"the disk is full: {out} was not written") from error
        raise
    return out


def _begin(path: Path, like: dict[str, Tensor], metadata: dict[str, str]) -> tuple[BinaryIO, int]:
    """Open a safetensors file for tensor after tensor, behind those that it holds already; and their number.

    `save_file` wants all tensors at once, in memory, and cannot go on with a file that was begun.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    ends = [0]
    for name, w in like.items():
        ends.append(ends[-1] + _size(w))
        entries[name] = {"dtype": CODES[w.dtype], "shape": list(w.shape), "data_offsets": ends[-2:]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    size = path.stat().st_size - len(header) if path.exists() else -1
    done = sum(end <= size for end in ends[1:])
    stream = open(path, "r+b" if size >= 0 else "wb")  # noqa: SIM115  (closed by who writes)
    stream.write(header)
    stream.seek(len(header) + ends[done])
    stream.truncate()
    return stream, done


def _append(stream: BinaryIO, w: Tensor) -> None:
    stream.write(w.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    stream.flush()


def _complete(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the defaults of those that are not given."""
    free = [name for name, m in METHODS.items() if m.plan]
    if method not in free:
        raise ValueError(f"method must be one of {', '.join(free)}, which need nothing but weights, not {method!r}")
    known = METHODS[method].defaults
    for name in settings:
        if name not in known:
            raise ValueError(f"{method} has no setting {name!r}, only {', '.join(known) or 'none'}")
    check(method, METHODS[method].rules, known | settings)
    return known | settings


def _scratch(out: Path, request: list[Any]) -> Path:
    """The folder beside `out` for what this very request has written so far; those of other requests are removed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.{key(request)}.partial")
    for left in out.parent.glob(f".{glob.escape(out.name)}.{'[0-9a-f]' * 32}.partial"):
        if left != scratch:
            shutil.rmtree(left)
    scratch.mkdir(exist_ok=True)
    return scratch


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as tensors:  # refuses what is truncated or no safetensors
            yield tensors
    except (SafetensorError, OSError) as error:
        raise unreadable(file) from error


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
    return w.numel() * w.itemsize
