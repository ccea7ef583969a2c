"""The book's published values: measured seed after seed, and rewritten after each part; a stopped one goes on."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import replace

from samlib.notebook.run import begin  # whatever loads torch is imported where it is needed: mistakes are told at once

EXPERIMENTS = ("experiment", "compare", "pairs", "flatness", "regimes")  # modules with a `plan` and a `measure`


def main() -> None:
    """Measure and publish one of the experiments; what is published with the same recipes is not measured again."""
    parser = argparse.ArgumentParser(prog="python -m samlib.study.publish", description=main.__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--preset", default="published")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the preset's")
    parser.add_argument(
        "--lengths", type=float, nargs="+", help="of `experiment`, instead of the preset's, such as 0.5 1"
    )
    a = parser.parse_args()
    if a.lengths and a.experiment != "experiment":
        parser.error(f"--lengths is for experiment, not for {a.experiment}")
    try:
        run = begin(a.experiment, preset=a.preset, model=None, tasks="all")
    except (ValueError, ConnectionError) as error:
        parser.error(str(error))
    from samlib.model.clip import load_clip
    from samlib.study.evidence import publish_runs

    if a.lengths:
        run = replace(run, preset=replace(run.preset, lengths=tuple(a.lengths)))
    module = importlib.import_module(f"samlib.{a.experiment}")
    loaded = load_clip(run.device, run.preset.model)
    for seed in a.seeds or run.preset.seeds:
        for within, wanted in module.plan(run, seed):
            publish_runs(within, loaded, module.measure, wanted)


if __name__ == "__main__":
    main()
