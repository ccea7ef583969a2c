"""Draw the README's picture from the published values: `python -m tools.readme_picture`."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from samlib.notebook import plot
from samlib.notebook.run import begin
from samlib.study.central import table
from samlib.study.evidence import published, published_zero_shot

PICTURE = Path(__file__).parents[1] / "book" / "images" / "summary.png"


def main() -> None:
    """Mean test accuracy of single and merged models by arm, with intervals over seeds."""
    run = begin("readme", {"preset": "published", "device": "cpu"})
    results, zero_shot = published(run), published_zero_shot(run)
    if not results or zero_shot is None:
        raise SystemExit("nothing is published yet: run python -m samlib.study.publish central first")
    steps, seeds = results["AdamW"][0]["steps"], len(results["AdamW"])
    plot.style()
    figure, ax = plt.subplots(figsize=(8, 3.6))
    plot.bars(100 * table(results)[["mean", "low", "high"]], ax)
    ax.axhline(100 * sum(zero_shot.values()) / len(zero_shot), color="0.5", ls=":")
    ax.annotate("before fine-tuning", (3.4, 100 * sum(zero_shot.values()) / len(zero_shot)), va="bottom", ha="right")
    spread = f"{seeds} seeds, 95 % intervals" if seeds > 1 else "one seed"
    ax.set(ylabel="test accuracy, %", title=f"{len(zero_shot)} tasks, {steps:,} steps, {spread}")
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
