from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import samlib.merge
from samlib.merge import METHODS, files, method
from samlib.merge.__main__ import main
from samlib.merge.files import Checkpoint, merge_files

FREE = [method.name for method in METHODS.values() if method.plan]
SHAPES = {"z.weight": (12, 8), "b": (8,), "a.weight": (8, 12), "stem": (4, 3, 2, 2), "scale": ()}


def draw(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, list[Path]]:
    return save(tmp_path, torch.float32)


def save(folder: Path, dtype: torch.dtype) -> tuple[Path, list[Path]]:
    paths = [folder / f"{name}.safetensors" for name in ("base", "one", "two", "three")]
    for seed, path in enumerate(paths):
        save_file(draw(seed, dtype), path)
    return paths[0], paths[1:]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("method", FREE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_from_files_as_in_memory_bit_for_bit(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, models = save(tmp_path, dtype)
    merge_files(method, base, models, tmp_path / "out.safetensors", show=False)
    merged = getattr(samlib.merge, method)(load_file(base), [load_file(model) for model in models])
    assert same(load_file(tmp_path / "out.safetensors"), merged)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        provenance = json.loads(file.metadata()["samlib"])
    assert provenance == {"method": method, "settings": METHODS[method].defaults}
    assert not list(tmp_path.glob(".*"))  # nothing else stays


def test_shards_hold_the_same_and_can_be_merged_again(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, ends = models
    whole = load_file(merge_files("ties", base, ends, tmp_path / "whole.safetensors", show=False))
    folder = merge_files("ties", base, ends, tmp_path / "sharded", shard_bytes=400, show=False)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1 and all(path.stat().st_size < 900 for path in shards)
    assert same(dict(sorted(Checkpoint(folder).items())), dict(sorted(whole.items())))
    again = merge_files("average", base, [folder, folder], tmp_path / "again.safetensors", show=False)
    for name, w in load_file(again).items():
        torch.testing.assert_close(w, whole[name])


def test_shards_of_several_dtypes_become_a_file_in_which_every_tensor_is_aligned(tmp_path: Path) -> None:
    """A tensor of three half-precision numbers may not come before one in fp32."""
    parts = (
        {"b": torch.ones(3).half(), "d": torch.ones(2)},
        {"a": torch.ones(5).bfloat16(), "c": torch.ones(2).double()},
    )
    for i, part in enumerate(parts):
        save_file(part, tmp_path / f"{i}.safetensors")
    places = {name: f"{i}.safetensors" for i, part in enumerate(parts) for name in part}
    (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": places}))
    out = merge_files("average", tmp_path, [tmp_path], tmp_path / "out", show=False)
    assert same(load_file(out), parts[0] | parts[1])
    data = out.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    for name, w in (parts[0] | parts[1]).items():
        assert header[name]["data_offsets"][0] % w.itemsize == 0


@pytest.mark.parametrize("shard_bytes", [None, 400])
@pytest.mark.parametrize("torn", [b"", b"half a tensor"])
def test_a_stopped_merge_goes_on_behind_its_last_tensor(
    models: tuple[Path, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shard_bytes: int | None,
    torn: bytes,
) -> None:
    base, ends = models
    out = tmp_path / "out"
    expected = dict(Checkpoint(merge_files("tsv_m", base, ends, tmp_path / "whole", shard_bytes, show=False)))
    seen: list[str] = []
    task_vectors = method.task_vectors

    def stopping(theta_0: Any, thetas: Any, name: str) -> Tensor:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(name)
        return task_vectors(theta_0, thetas, name)

    monkeypatch.setattr(files, "task_vectors", stopping)
    with pytest.raises(KeyboardInterrupt):
        merge_files("tsv_m", base, ends, out, shard_bytes, show=False)
    assert not out.exists()
    last = max(tmp_path.glob(".out.*.partial/*.safetensors"))
    with open(last, "ab") as stream:
        stream.write(torn)
    seen.append("")
    monkeypatch.setattr(files, "task_vectors", lambda *a: [seen.append(a[2]), task_vectors(*a)][1])
    merge_files("tsv_m", base, ends, out, shard_bytes, show=False)
    assert sorted(set(seen)) == sorted(["", *SHAPES]) and len(seen) == len(SHAPES) + 1  # no tensor twice
    assert same(dict(Checkpoint(out)), expected)


def test_another_request_does_not_go_on_with_what_is_there(
    models: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, ends = models
    with monkeypatch.context() as patch:
        patch.setattr(files, "check_values", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge_files("task_arithmetic", base, ends, tmp_path / "out", show=False, lam=0.1)
    merge_files("task_arithmetic", base, ends, tmp_path / "out", show=False, lam=0.9)
    thetas = [load_file(end) for end in ends]
    assert same(load_file(tmp_path / "out"), samlib.merge.task_arithmetic(load_file(base), thetas, 0.9))


def test_bad_input_is_named_before_or_instead_of_the_output(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, ends = models
    out = tmp_path / "out.safetensors"

    def variant(name: str, **change: Tensor) -> Path:
        save_file({**draw(1), **{key.replace("_", "."): w for key, w in change.items()}}, tmp_path / name)
        return tmp_path / name

    truncated = tmp_path / "cut.safetensors"
    truncated.write_bytes(ends[0].read_bytes()[:-7])
    cases: list[tuple[list[Path], str]] = [
        ([], "empty"),
        ([tmp_path / "nothing.safetensors"], "there is no checkpoint .*nothing.safetensors"),
        ([truncated], "cannot read .*cut.safetensors"),
        ([ends[0], variant("extra", more=torch.ones(2))], "tensor 'more' is in .*extra but not in .*base.safetensors"),
        ([variant("shape", b=torch.ones(9))], r"tensor 'b' is \(9,\) torch.float32 in .*shape but \(8,\)"),
        ([variant("half", b=torch.ones(8).half())], "tensor 'b' is .*float16 in .*half"),
        ([variant("count", b=torch.ones(8, dtype=torch.int64))], "tensor 'b' of .*count is I64: only floating point"),
        ([variant("nan", stem=torch.full((4, 3, 2, 2), torch.nan))], "tensor 'stem' of .*nan holds NaN"),
    ]
    for chosen, message in cases:
        for name in ("average", "ties"):
            with pytest.raises(ValueError, match=message):
                merge_files(name, base, chosen, out, show=False)
            assert not out.exists() and not list(tmp_path.glob(".*"))
    for arguments, message in (
        ({"method": "fisher"}, "method must be one of .*, which need nothing but weights, not 'fisher'"),
        ({"method": "average", "lam": 1.0}, "average has no setting 'lam', only none"),
        ({"method": "ties", "density": 2.0}, r"ties: density must be a number in \(0, 1\]"),
        ({"method": "average", "shard_bytes": 0}, "shard_bytes must be an integer >= 1 or None, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_files(base=base, models=ends, out=out, show=False, **arguments)  # type: ignore[arg-type]
    out.write_text("mine")
    with pytest.raises(ValueError, match="exists: give another name"):
        merge_files("average", base, ends, out, show=False)
    assert out.read_text() == "mine"


def test_a_full_disk_is_one_error_and_leaves_nothing(
    models: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, ends = models
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        with pytest.raises(ValueError, match="needs 0.00 GB, and only 0.00 GB are free"):
            merge_files("average", base, ends, tmp_path / "out", show=False)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_append", full)
    with pytest.raises(ValueError, match="the disk is full: .*out was not written"):
        merge_files("average", base, ends, tmp_path / "out", show=False)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_the_command_line_has_the_names_of_the_functions(
    models: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, ends = models
    out = tmp_path / "out.safetensors"
    arguments = ["--base", str(base), "--models", *map(str, ends), "--out", str(out)]
    main(["ties", *arguments, "--lambda", "0.3", "--density", "0.5", "--trim", "tensor"])
    assert capsys.readouterr().out.strip() == str(out)
    thetas = [load_file(end) for end in ends]
    assert same(load_file(out), samlib.merge.ties(load_file(base), thetas, 0.3, 0.5, "tensor"))
    with pytest.raises(SystemExit) as stopped:
        main(["ties", *arguments])
    assert stopped.value.code == 2 and "exists: give another name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ties", "--models", str(ends[0]), "--out", str(out)])
    assert "--base" in capsys.readouterr().err
    main(["list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in METHODS) and "density: a number in (0, 1]; 0.2 by default" in listed


def test_the_command_line_does_not_load_what_only_training_needs() -> None:
    script = (
        "import sys, samlib.merge.files; print(sorted({'open_clip', 'timm', 'datasets', 'pandas'} & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"  # they take seconds and 300 MB
