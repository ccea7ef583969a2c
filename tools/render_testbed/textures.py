"""Render the task "textures": crops of Freedoom's wall textures, split by parts of each texture."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tools.render_testbed.common import SIZE, Pixels, encode_png
from tools.render_testbed.freedoom import read_wad, textures, wad_of
from tools.render_testbed.splits import Example, write_task

CLASSES = {  # what each texture shows, and its name in the WAD
    "brown bricks with moss": "A-BRBK28",
    "pale brown rough bricks": "A-BROCK2",
    "grey bricks with white mortar": "A-DBRI1",
    "dark bricks with rusty mortar": "A-DBRI2",
    "bright green leaves": "A-CAMO5",
    "brown roots on green leaves": "A-CAMO2",
    "white rough plaster": "A-CONCTE",
    "dark rock with rust stains": "A-DROCK1",
    "mossy boulders": "A-MOSRK2",
    "grey boulders": "A-MOSROK",
    "white stones with green moss": "AROCK2",
    "brown mud": "A-MUD",
    "wooden shingles": "A-MYWOOD",
    "green and grey paving bricks": "A-TILE",
    "rusty square tiles": "AQCONC03",
    "ribbed grey metal panels": "AQPANL05",
    "grey gravel": "ASPHALT",
    "green vines on a brown wall": "BROVINE",
    "pale sandstone": "CARLLF1",
    "green scales": "DOGRMSC",
    "bare branches on a grey wall": "GRAYVINE",
    "mossy green stone blocks": "GSTONE1",
    "line drawings on orange stone": "MURAL1",
    "green mottled marble": "MARBLE1",
    "cracked dark brown stone": "ROCK4",
    "jagged red rock": "ROCKRED1",
    "blue stone blocks": "ZZWOLF9",
    "ivy over brown ground": "SMSTONE6",
    "grey cliff with moss": "SP_ROCK1",
    "light stone masonry": "STONEW5",
    "brown stone masonry": "STONEW1",
    "dark circuits and cables": "TEKWALL1",
    "brown pipes": "TEKWALL4",
    "brown wooden planks": "A-WOOD1",
    "white cobblestones": "ZZWOLF1",
    "pink wrinkled hide": "SKIN2",
}
PER_CLASS = {"train": 42, "validation": 8, "test": 16}
CROP = (22, 40)  # smallest and largest side of a crop, in pixels of the texture
BAND = 40  # height of the strip of the left half that is kept for validation


def _crop(strip: Pixels, rng: np.random.Generator) -> Pixels:
    """Return a random square of the strip at 32 x 32, perhaps mirrored, under a random light."""
    side = int(rng.integers(CROP[0], min(CROP[1], *strip.shape[:2]) + 1))
    y = int(rng.integers(0, strip.shape[0] - side + 1))
    x = int(rng.integers(0, strip.shape[1] - side + 1))
    image = Image.fromarray(strip[y : y + side, x : x + side]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.float32)[:, :: int(rng.choice([-1, 1]))]
    light = rng.uniform(0.45, 1.25) * (1 + rng.uniform(-0.25, 0.25, 3))
    return np.clip(np.round(pixels * light), 0, 255).astype(np.uint8)


def main(sources: Path, out: Path) -> None:
    """Write the task from the Debian package of Freedoom in `sources`/apt to `out`/textures."""
    walls = textures(read_wad(wad_of(sources / "apt" / "freedoom_0.12.1-2_all.deb")))
    rng = np.random.default_rng(0)
    candidates: dict[str, list[Example]] = {split: [] for split in PER_CLASS}
    for label, name in enumerate(CLASSES.values()):
        wall = walls[name]
        half = wall.shape[1] // 2
        strips = {
            "train": wall[:-BAND, :half],
            "validation": wall[-BAND:, :half],
            "test": wall[:, half:],
        }
        for split, strip in strips.items():
            candidates[split] += [
                Example(_crop(strip, rng), label, f"{name}:{split}") for _ in range(2 * PER_CLASS[split])
            ]
    write_task(out / "textures", tuple(CLASSES), candidates, PER_CLASS, partial(encode_png, colours=32))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
