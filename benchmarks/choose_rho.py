"""Choose the radii of SAM and ASAM on validation data: `python -m benchmarks.choose_rho`.

For each optimiser the radius with the best mean validation accuracy of the model merged by task arithmetic
wins. No test image plays a part, and the seed is none of the published ones. The grid is written to
book/published/rho.published.json; the chosen values belong into samlib/presets.py.
"""

from __future__ import annotations

import argparse
import dataclasses

import joblib

from samlib.model.clip import load_clip
from samlib.notebook.run import begin
from samlib.study.central import measure

GRIDS = {"SAM": (0.005, 0.01, 0.02, 0.05, 0.1), "ASAM": (0.05, 0.1, 0.2, 0.5, 1.0)}


def main() -> None:
    """Fine-tune, merge and score every radius, side by side; resumable."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--length", type=float, default=0.5, help="multiple of the published preset's steps")
    a = parser.parse_args()
    run = begin("rho", preset="published")
    clip = load_clip(run.device)
    points = [(arm, rho) for arm, radii in GRIDS.items() for rho in radii]
    presets = [
        dataclasses.replace(run.preset, rho_sam=rho) if arm == "SAM" else dataclasses.replace(run.preset, rho_asam=rho)
        for arm, rho in points
    ]
    runs = [dataclasses.replace(run, preset=preset) for preset in presets]
    jobs = joblib.cpu_count() if run.device == "cpu" else 1
    calls = (
        joblib.delayed(measure)(one, clip, arm, a.seed, a.length) for one, (arm, _) in zip(runs, points, strict=True)
    )
    grid: dict[str, dict[str, dict[str, float]]] = {arm: {} for arm in GRIDS}
    for (arm, rho), result in zip(points, joblib.Parallel(jobs, return_as="generator")(calls), strict=True):
        grid[arm][str(rho)] = result["validation"]
        print(arm, rho, result["validation"], flush=True)
    chosen = {arm: float(max(row, key=lambda rho: row[rho]["task arithmetic"])) for arm, row in grid.items()}
    without = measure(run, clip, "AdamW", a.seed, a.length)["validation"]  # where both end as rho goes to 0
    run.publish({"grid": grid, "AdamW": without, "chosen": chosen, "seed": a.seed, "length": a.length})
    print(chosen, without)


if __name__ == "__main__":
    main()
