"""What the testbed shows, as the model card reports it: `python -m benchmarks.testbed [--write]`.

Zero-shot accuracy against chance, fine-tuned accuracy and its cost, what merging loses, where the best lambda
lies, and the training loss at three training lengths, for AdamW and one seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from samlib.data.tasks import load_task
from samlib.model import registry
from samlib.notebook.run import begin
from samlib.study import central
from samlib.study.arms import Arm, recipes
from samlib.study.campaign import measure_many
from samlib.study.scoring import zero_shot
from samlib.train.finetune import finetune_many

CARD = registry.WEIGHTS.with_name("README.md")
ADAMW = Arm("adamw")
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def report(preset: str, lengths: list[float] | None) -> str:
    """Measure and write the card's tables in Markdown."""
    run = begin("testbed", {"preset": preset})
    p = run.preset
    zero = zero_shot(run)
    lengths = sorted(lengths or p.lengths)
    by_length = dict(zip(lengths, measure_many(central.measure, [(run, ADAMW, 0, x) for x in lengths]), strict=True))
    main_length = max((x for x in lengths if x <= 1), default=lengths[0])
    found, todo = by_length[main_length], recipes(run, ADAMW, 0, main_length)
    seconds = {d.recipe.task: d.seconds for d in finetune_many(todo, run.clip, run.device, run.cache)}
    arithmetic = found["task arithmetic"]

    rows = []
    for name in p.tasks:
        classes = len(load_task(name).classes)
        accuracies = [zero[name], *(found[row]["accuracy"][name] for row in ("single", "averaging", "task arithmetic"))]
        rows.append([classes, 1 / classes, *accuracies, found["train_loss"][name], seconds[name]])
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    head = ("task", "classes", "chance", "zero-shot", "fine-tuned", "averaged", "task arithmetic", "training loss", "s")
    lines = [_row(head), _row(["---"] * len(head))]
    for name, row in zip((*p.tasks, "**mean**"), (*rows, ["", *means[1:]]), strict=True):
        lines.append(_row([name, row[0], *(f"{value:.3f}" for value in row[1:-1]), f"{row[-1]:.0f}"]))
    curve = (f"{lam:g}: {value:.3f}" for lam, value in zip(p.lambdas, arithmetic["curve"], strict=True))
    lines += [
        "",
        f"Test accuracy; preset `{p.name}`, AdamW, seed 0, {todo[0].steps} steps of {p.batch_size} images, "
        f"{p.precision}; s: seconds of one thread with another run beside it. Normalised accuracy: averaging "
        f"{found['averaging']['normalised']:.3f}, task arithmetic {arithmetic['normalised']:.3f} at lambda "
        f"{arithmetic['lam']:g}, TIES {found['TIES']['normalised']:.3f} at lambda {found['TIES']['lam']:g} (lambda "
        f"chosen on validation data). Normalised validation accuracy of task arithmetic by lambda: {', '.join(curve)}.",
        "",
        _row(("steps", "mean training loss", "fine-tuned", "averaged", "task arithmetic", "lambda")),
        _row(["---"] * 6),
    ]
    for length, result in by_length.items():
        loss = sum(result["train_loss"].values()) / len(result["train_loss"])
        accuracies = [result[row]["mean"] for row in ("single", "averaging", "task arithmetic")]
        numbers = [f"{loss:.4f}", *(f"{value:.3f}" for value in accuracies), f"{result['task arithmetic']['lam']:g}"]
        lines.append(_row([recipes(run, ADAMW, 0, length)[0].steps, *numbers]))
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Print the tables, or put them into the model card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="published")
    parser.add_argument("--lengths", type=float, nargs="+", help="multiples of the preset's steps")
    parser.add_argument("--write", action="store_true", help="replace the measured part of the model card")
    a = parser.parse_args()
    text = report(a.preset, a.lengths)
    print(text)
    if a.write:
        card = CARD.read_text(encoding="utf-8")
        head, rest = card.split(BEGIN)
        CARD.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
