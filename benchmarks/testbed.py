"""What the testbed shows, as the model card reports it: `python -m benchmarks.testbed [--write]`.

Zero-shot accuracy against chance, fine-tuned accuracy and its cost, what merging loses, where the best lambda
lies, and the training loss at three training lengths, for AdamW and one seed.
"""

from __future__ import annotations

import argparse

from samlib import clip as clip_module
from samlib import tasks
from samlib.experiment import measure_many, recipes, zero_shot
from samlib.finetune import finetune_many
from samlib.run import begin

CARD = clip_module.FOLDER / "README.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def report(preset: str) -> str:
    """Measure and write the card's tables in Markdown."""
    run = begin("testbed", preset=preset)
    p = run.preset
    clip = clip_module.load(run.device)
    zero = zero_shot(run, clip)
    lengths = sorted({1.0, *p.lengths})
    by_length = dict(zip(lengths, measure_many(run, clip, [("AdamW", 0, x) for x in lengths]), strict=True))
    found = by_length[1.0]
    seconds = {d.recipe.task: d.seconds for d in finetune_many(recipes(run, "AdamW", 0), clip, run.device, run.cache)}
    arithmetic = found["task arithmetic"]
    lines = ["| task | classes | chance | zero-shot | fine-tuned | seconds | training loss | averaged | merged |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name in p.tasks:
        classes = len(tasks.load(name).classes)
        lines.append(
            f"| {name} | {classes} | {1 / classes:.3f} | {zero[name]:.3f} | {found['single']['accuracy'][name]:.3f} "
            f"| {seconds[name]:.0f} | {found['train_loss'][name]:.4f} "
            f"| {found['averaging']['accuracy'][name]:.3f} | {arithmetic['accuracy'][name]:.3f} |"
        )
    mean = {name: sum(values) / len(values) for name, values in (("zero", list(zero.values())),)}
    chance = sum(1 / len(tasks.load(name).classes) for name in p.tasks) / len(p.tasks)
    lines.append(
        f"| **mean** | | {chance:.3f} | {mean['zero']:.3f} | {found['single']['mean']:.3f} | | "
        f"| {found['averaging']['mean']:.3f} | {arithmetic['mean']:.3f} |"
    )
    lines += [
        "",
        f"Preset `{p.name}`, seed 0, {p.steps} steps of {p.batch_size}, {p.precision}. Normalised accuracy: averaging "
        f"{found['averaging']['normalised']:.3f}, task arithmetic {arithmetic['normalised']:.3f} at lambda "
        f"{arithmetic['lam']:g}, TIES {found['TIES']['normalised']:.3f} at lambda {found['TIES']['lam']:g} "
        "(lambda chosen on validation).",
        "",
        "| training length | mean training loss | single | averaged | task arithmetic | lambda |",
        "|---|---|---|---|---|---|",
    ]
    for x, row in by_length.items():
        loss = sum(row["train_loss"].values()) / len(row["train_loss"])
        lines.append(
            f"| {x:g} x {p.steps} steps | {loss:.4f} | {row['single']['mean']:.3f} | {row['averaging']['mean']:.3f} "
            f"| {row['task arithmetic']['mean']:.3f} | {row['task arithmetic']['lam']:g} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the tables, or put them into the model card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="published")
    parser.add_argument("--write", action="store_true", help="replace the measured part of the model card")
    a = parser.parse_args()
    text = report(a.preset)
    print(text)
    if a.write:
        card = CARD.read_text(encoding="utf-8")
        head, rest = card.split(BEGIN)
        CARD.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
