"""The book's published values: measured seed after seed, and rewritten after each part; a stopped one goes on."""

from __future__ import annotations

import argparse
from dataclasses import replace

from samlib.notebook.run import begin  # whatever loads torch is imported where it is needed: mistakes are told at once

STUDIES = ("central", "all_methods", "pairs", "flatness_chain", "where_sam_helps")


def main() -> None:
    """Measure and publish one of the studies; what is published with the same recipes is not measured again."""
    parser = argparse.ArgumentParser(prog="python -m samlib.study.publish", description=main.__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--preset", default="published")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the preset's")
    parser.add_argument("--lengths", type=float, nargs="+", help="of `central`, instead of the preset's, such as 0.5 1")
    a = parser.parse_args()
    if a.lengths and a.study != "central":
        parser.error(f"--lengths is for central, not for {a.study}")
    try:
        run = begin(a.study, {"preset": a.preset, "model": None, "tasks": "all"})
    except (ValueError, ConnectionError) as error:
        parser.error(str(error))
    from samlib.study import evidence

    if a.lengths:
        run = replace(run, preset=replace(run.preset, lengths=tuple(a.lengths)))
    for seed in a.seeds or run.preset.seeds:
        for wanted in evidence.STUDIES[a.study].plan(run, seed):
            evidence.publish_runs(run, a.study, wanted)


if __name__ == "__main__":
    main()
