"""Choose the radii of SAM and ASAM on validation data: `python -m benchmarks.choose_rho`.

For each optimiser the radius with the best mean validation accuracy of the model merged by task arithmetic
wins. No test image plays a part. The grid is written to book/published/rho.published.json, and the chosen
values belong into samlib/presets.py.
"""

from __future__ import annotations

import argparse
import dataclasses

from samlib import clip as clip_module
from samlib.experiment import measure_many
from samlib.run import begin

GRIDS = {"SAM": (0.02, 0.05, 0.1, 0.2), "ASAM": (0.2, 0.5, 1.0, 2.0)}


def main() -> None:
    """Fine-tune, merge and score every radius; resumable."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="published")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100])
    a = parser.parse_args()
    run = begin("rho", preset=a.preset)
    clip = clip_module.load(run.device)
    grid: dict[str, dict[str, list[float]]] = {"SAM": {}, "ASAM": {}}
    for arm, radii in GRIDS.items():
        name = f"rho_{arm.lower()}"
        for rho in radii:
            one = dataclasses.replace(run, preset=dataclasses.replace(run.preset, **{name: rho}))
            found = measure_many(one, clip, [(arm, seed, 1.0) for seed in a.seeds])
            grid[arm][str(rho)] = [result["validation"]["task arithmetic"] for result in found]
            print(arm, rho, grid[arm][str(rho)], [result["validation"]["single"] for result in found], flush=True)
    chosen = {arm: float(max(row, key=lambda rho: sum(row[rho]))) for arm, row in grid.items()}
    run.publish({"grid": grid, "chosen": chosen, "seeds": a.seeds})
    print(chosen)


if __name__ == "__main__":
    main()
