"""Render the task "letters": lower-case letters of free fonts under synthetic capture, split by family."""

import io
import json
import sys
from functools import partial
from pathlib import Path
from string import ascii_lowercase

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from tools.render_testbed.common import encode_png, photograph
from tools.render_testbed.splits import Example, write_task

LICENCES = ("OFL-1.1", "Apache-2.0")
# Families that draw capitals in place of lower-case letters, and two whose forms are those of another family.
SKIPPED = (
    "amatic-sc",
    "bangers",
    "bebas-neue",
    "bungee",
    "cinzel",
    "creepster",
    "fira-mono",
    "ibm-plex-mono",
    "luckiest-guy",
    "monoton",
    "permanent-marker",
    "rock-salt",
)
FAMILIES = {"test": 20, "validation": 12, "train": 59}  # one capture of each letter and family
SIDE = 160  # pixels of a drawing before its capture


def _font(package: Path, weight: int) -> bytes:
    """Return a family's Latin font as TrueType or OpenType bytes."""
    font = TTFont(package / "files" / f"{package.name}-latin-{weight}-normal.woff2")
    font.flavor = None
    buffer = io.BytesIO()
    font.save(buffer)
    return buffer.getvalue()


def _draw(letter: str, font: bytes, rng: np.random.Generator) -> Image.Image:
    """Draw a letter in random ink on random, lighter paper, its longer side 70 % to 90 % of the sheet."""
    while True:
        ink, paper = rng.integers(0, 256, (2, 3))
        weights = np.array([0.299, 0.587, 0.114])
        if float((paper - ink) @ weights) > 90:
            break
    face = ImageFont.truetype(io.BytesIO(font), 100)
    left, top, right, bottom = face.getbbox(letter)
    size = 100 * SIDE * rng.uniform(0.7, 0.9) / max(right - left, bottom - top)
    face = ImageFont.truetype(io.BytesIO(font), round(size))
    left, top, right, bottom = face.getbbox(letter)
    sheet = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in paper))
    offset = ((SIDE - right - left) / 2, (SIDE - bottom - top) / 2)
    ImageDraw.Draw(sheet).text(offset, letter, tuple(int(value) for value in ink), face)
    return sheet


def main(sources: Path, out: Path) -> None:
    """Write the task from the @fontsource packages in `sources`/npm/node_modules to `out`/letters."""
    families: dict[str, list[Path]] = {}  # by the style that the package names
    for package in sorted((sources / "npm" / "node_modules" / "@fontsource").iterdir()):
        about = json.loads((package / "metadata.json").read_text())
        usable = about["license"]["type"] in LICENCES and 400 in about["weights"]
        if usable and package.name not in SKIPPED:
            families.setdefault(about["category"], []).append(package)

    # Within each style the families are shuffled; then every split takes its share of each style.
    rng = np.random.default_rng(0)
    ranked: list[tuple[float, Path]] = []
    for packages in families.values():
        order = rng.permutation(len(packages))
        ranked += [((rank + 0.5) / len(packages), packages[i]) for rank, i in enumerate(order)]
    queue = [package for _, package in sorted(ranked, key=lambda item: (item[0], item[1].name))]

    candidates: dict[str, list[Example]] = {}
    for split, count in FAMILIES.items():
        chosen, queue = queue[:count], queue[count:]
        examples = []
        for package in chosen:
            weights = json.loads((package / "metadata.json").read_text())["weights"]
            font = _font(package, 700 if 700 in weights and rng.random() < 0.4 else 400)
            for label, letter in enumerate(ascii_lowercase):
                pixels = photograph(_draw(letter, font, rng), rng, strength=0.4)
                examples.append(Example(pixels, label, package.name))
        candidates[split] = examples
    write_task(out / "letters", tuple(ascii_lowercase), candidates, FAMILIES, partial(encode_png, colours=40))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
