"""Merging eight checkpoints from file to file: `python -m benchmarks.merging`, on Linux.

Random checkpoints of the image encoders of ViT-B/32 and ViT-L/14, in fp32, are merged by samlib, mergekit and
fusion-bench, each in a process of its own, one after the other. Printed are seconds, peak resident memory (program and
libraries included, files in the page cache not), and the time in units of samlib's. fusion-bench has no command for
files: its rows load them, call its functions and save. mergekit has no TSV-M, and trims TIES tensor by tensor, whereas
samlib and fusion-bench trim over all tensors.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pandas as pd

T = 8
LAM, DENSITY = 0.3, 0.2
METHODS = ("task_arithmetic", "ties", "tsv_m")


def make(name: str, folder: Path) -> None:
    """theta_0 and T fine-tuned checkpoints of random numbers, shaped as an image encoder of open_clip."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    visual = open_clip.create_model(name, pretrained=None).visual
    torch.manual_seed(0)
    base = {key: torch.randn(w.shape) * 0.02 for key, w in visual.named_parameters()}
    save_file(base, folder / "base.safetensors")
    for t in range(T):
        theta = {key: w + 1e-3 * torch.randn(w.shape) for key, w in base.items()}
        save_file(theta, folder / f"model-{t}.safetensors")


def samlib(method: str, folder: Path, out: Path) -> list[str]:
    """Command line that merges with samlib."""
    models = [str(folder / f"model-{t}.safetensors") for t in range(T)]
    command = [sys.executable, "-m", "samlib.merge", method, "--base", str(folder / "base.safetensors")]
    return [*command, "--models", *models, "--lambda", str(LAM), "--out", str(out / "merged.safetensors")]


def mergekit(method: str, folder: Path, out: Path) -> list[str] | None:
    """Command line that merges with mergekit, None if it cannot."""
    if method == "tsv_m":
        return None
    own = {"weight": 1.0} | ({"density": DENSITY} if method == "ties" else {})
    config = {
        "merge_method": method,
        "base_model": str(folder / "base.safetensors"),
        "models": [{"model": str(folder / f"model-{t}.safetensors"), "parameters": own} for t in range(T)],
        "parameters": {"lambda": LAM, "normalize": method == "ties"},
        "dtype": "float32",
    }
    (out / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return [str(Path(sys.executable).with_name("mergekit-pytorch")), str(out / "config.yaml"), str(out / "merged")]


def fusion_bench(method: str, folder: Path, out: Path) -> list[str]:
    """Command line that merges with the functions of fusion-bench."""
    return [sys.executable, "-m", "benchmarks.merging", "--fusion-bench", method, str(folder), str(out)]


def run_fusion_bench(method: str, folder: Path, out: Path) -> None:
    """What the command line of `fusion_bench` does."""
    import torch
    from fusion_bench.utils.state_dict_arithmetic import state_dict_add, state_dict_mul, state_dict_sub, state_dict_sum
    from safetensors.torch import load_file, save_file

    base = load_file(folder / "base.safetensors")
    taus = [state_dict_sub(load_file(folder / f"model-{t}.safetensors"), base) for t in range(T)]
    with torch.no_grad():
        if method == "task_arithmetic":
            tau = state_dict_sum(taus)
        elif method == "ties":
            from fusion_bench.method.ties_merging import ties_merging_utils as ties

            flat = torch.stack([ties.state_dict_to_vector(tau) for tau in taus])
            tau = ties.vector_to_state_dict(ties.ties_merging(flat, DENSITY, "mean"), taus[0])
        else:
            from fusion_bench.method.task_singular_vector.utils import TSVM_utils

            tau = TSVM_utils.compute_and_sum_svd_mem_reduction(taus, accelerator="cpu")
        merged = state_dict_add(base, state_dict_mul(tau, LAM))
    save_file({name: w.contiguous() for name, w in merged.items()}, out / "merged.safetensors")


def watch(command: list[str], limit: float) -> tuple[float | None, float, str]:
    """Seconds (None where it failed or took longer than the limit), peak resident GB, and what went wrong."""
    with tempfile.TemporaryFile("w+") as log:
        begun = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        peak = 0
        while process.poll() is None:
            try:
                found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
                peak = max(peak, int(found[1]) if found else 0)
            except OSError:
                pass
            if time.monotonic() - begun > limit:
                process.kill()
            time.sleep(0.02)
        seconds = time.monotonic() - begun
        log.seek(0)
        lines = log.read().strip().splitlines()
    failed = process.returncode != 0
    reason = f"killed after {seconds:.0f} s" if process.returncode < 0 else (lines or ["failed"])[-1]
    return (None if failed else seconds), peak * 1024 / 1e9, reason if failed else ""


TOOLS: dict[str, Callable[[str, Path, Path], list[str] | None]]
TOOLS = {"samlib": samlib, "mergekit": mergekit, "fusion-bench": fusion_bench}


def compare(method: str, folder: Path, rounds: int, limit: float) -> list[dict[str, object]]:
    """A row for each tool: medians of the seconds and of the ratios to samlib's in the same round, and the peak."""
    times: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    peaks: dict[str, float] = dict.fromkeys(TOOLS, 0.0)
    notes: dict[str, str] = dict.fromkeys(TOOLS, "")
    for _ in range(rounds):
        for tool, command_of in TOOLS.items():
            with tempfile.TemporaryDirectory(dir=folder) as out:
                command = command_of(method, folder, Path(out))
                if command is None or notes[tool]:
                    notes[tool] = notes[tool] or "does not have it"
                    continue
                seconds, peak, notes[tool] = watch(command, limit)
                peaks[tool] = max(peaks[tool], peak)
                times[tool] += [] if seconds is None else [seconds]
    rows: list[dict[str, object]] = []
    for tool, found in times.items():
        row: dict[str, object] = {"method": method, "tool": tool, "peak GB": peaks[tool] or None, "note": notes[tool]}
        if found:
            row["seconds"] = median(found)
            row["time / samlib"] = median(x / y for x, y in zip(found, times["samlib"], strict=False))
        rows.append(row)
    return rows


def main() -> None:
    """Print one table a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["ViT-B-32", "ViT-L-14"])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one merge")
    parser.add_argument(
        "--folder", type=Path, help="where to put some 12 GB of checkpoints, by default a temporary one"
    )
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--fusion-bench", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.make:
        make(a.make[0], Path(a.make[1]))
        return
    if a.fusion_bench:
        method, folder, out = a.fusion_bench
        run_fusion_bench(method, Path(folder), Path(out))
        return
    for name in a.networks:
        with tempfile.TemporaryDirectory(dir=a.folder) as place:
            command = [sys.executable, "-m", "benchmarks.merging", "--make", name, place]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            folder = Path(place)
            size = (folder / "base.safetensors").stat().st_size / 1e9
            print(f"\n{name}: theta_0 and {T} models of {size:.2f} GB each", flush=True)
            rows = [row for method in a.methods for row in compare(method, folder, a.rounds, a.limit)]
            columns = ["method", "tool", "seconds", "time / samlib", "peak GB", "note"]
            table = pd.DataFrame(rows, columns=columns).set_index(columns[:2])
            print(table.round(2).to_string(na_rep=""), flush=True)


if __name__ == "__main__":
    main()
