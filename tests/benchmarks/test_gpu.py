from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def test_the_benchmark_of_a_gpu_runs_on_the_cpu_through_the_same_code(tmp_path: Path) -> None:
    book = ROOT / "book" / "published" / "gpu.json"
    before = book.read_bytes() if book.exists() else b""
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    values = found["values"]
    parts = "steps estimates launches micro_batches precisions resumed merges eigenvalue testbed".split()
    assert list(values) == parts and not any({"error", "skipped"} & set(values[part]) for part in parts[:4])
    assert values["resumed"]["largest difference"] == 0 < values["resumed"]["steps before the kill"]
    assert values["micro_batches"]["within"]
    assert all(one["largest difference"] == 0 for one in values["merges"].values())  # there is one device
    assert found["stamp"]["cuda"] is None and found["stamp"]["device"].startswith("cpu")
    assert (book.read_bytes() if book.exists() else b"") == before, "the book shows no number of a CPU as a GPU's"
