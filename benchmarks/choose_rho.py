"""Choose the radii of SAM and ASAM on validation data: `python -m benchmarks.choose_rho`.

For each optimiser the radius with the best mean validation accuracy of the model merged by task arithmetic
wins. No test image plays a part, and the seed is none of the published ones. The grid is written to
book/published/rho.published.json; the chosen values belong into samlib/notebook/presets.py.
"""

from __future__ import annotations

import argparse

import joblib

from samlib.notebook.run import begin
from samlib.study.arms import Arm
from samlib.study.central import measure

GRIDS = {"SAM": (0.005, 0.01, 0.02, 0.05, 0.1), "ASAM": (0.05, 0.1, 0.2, 0.5, 1.0)}


def main() -> None:
    """Fine-tune, merge and score every radius, side by side; resumable."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--length", type=float, default=0.5, help="multiple of the published preset's steps")
    a = parser.parse_args()
    run = begin("rho", {"preset": "published"})
    points = [(name, Arm(name.lower(), rho)) for name, radii in GRIDS.items() for rho in radii]
    jobs = joblib.cpu_count() if run.device == "cpu" else 1
    calls = (joblib.delayed(measure)(run, arm, a.seed, a.length) for _, arm in points)
    grid: dict[str, dict[str, dict[str, float]]] = {arm: {} for arm in GRIDS}
    for (name, arm), result in zip(points, joblib.Parallel(jobs, return_as="generator")(calls), strict=True):
        grid[name][str(arm.rho)] = result["validation"]
        print(arm, result["validation"], flush=True)
    chosen = {arm: float(max(row, key=lambda rho: row[rho]["task arithmetic"])) for arm, row in grid.items()}
    without = measure(run, Arm("adamw"), a.seed, a.length)["validation"]  # where both end as rho goes to 0
    run.publish({"grid": grid, "AdamW": without, "chosen": chosen, "seed": a.seed, "length": a.length})
    print(chosen, without)


if __name__ == "__main__":
    main()
