"""Tables of the book's pages, made from published values where a page has a line such as `<!-- claims: C1 -->`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from samlib.store.files import read_json
from samlib.study import claims

MARK = re.compile(r"^<!-- ([\w: ]+) -->$", re.MULTILINE)


def gpu(folder: Path) -> str:
    """What `benchmarks.gpu` measured, in Markdown; without such a file, that nothing was."""
    file = folder / "gpu.json"
    if not file.exists():
        return "On a GPU it has not been measured yet: `python -m benchmarks.gpu` does that."
    found = read_json(file)
    values, stamp = found["values"], found["stamp"]
    rows = [["precision", "AdamW, s a step", "SAM, s a step", "SAM / two gradients and a step", "SAM, kernels more"]]
    rows += [["---"] * 5]
    for precision, way in values["steps"].items():
        ratio = [f"{x:.2f}" for x in way["SAM"]["time / floor"]]
        more = values["launches"].get(precision, {}).get("SAM - floor", "")
        seconds = (f"{way[arm]['seconds'][1]:.3f}" for arm in ("AdamW", "SAM"))
        rows.append([precision, *seconds, f"{ratio[1]} ({ratio[0]} to {ratio[2]})", str(more)])
    memory = values["estimates"]["SAM, fp32"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"Measured on {_device(stamp)}, PyTorch {stamp['torch']}, with ViT-B/32 at random weights and batches of 128 "
        f"images (median and quartiles of paired steps; commit {stamp['commit']}):\n\n{table}\n\n"
        f"A step of SAM in fp32 took {memory['bytes, measured'] / 1e9:.2f} GB where the estimate says "
        f"{memory['bytes, predicted'] / 1e9:.2f}. A run that was killed and went on ended in weights that differ from "
        f"those of an undisturbed run by {values['resumed']['largest difference']:g}."
    )


def _device(stamp: dict[str, Any]) -> str:
    return re.sub(r"^cuda \((.*)\)$", r"one \1", stamp["device"])


TABLES: dict[str, Callable[[Path], str]] = {
    "claims: overview": claims.overview,
    **{f"claims: {number}": partial(claims.details, number) for number in claims.DETAILS},
    "measured on a GPU": gpu,
}


def filled(text: str, published: Path) -> str:
    """A page with its tables.

    Args:
        text: of the page, in Markdown.
        published: folder of the published values.

    Raises:
        KeyError: a line asks for a table that there is not.
    """
    return MARK.sub(lambda mark: TABLES[mark[1]](published), text)
