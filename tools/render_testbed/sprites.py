"""Render the task "sprites": Freedoom's characters before its floors, split by the side that is seen."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tools.render_testbed.common import SIZE, Pixels, encode_png
from tools.render_testbed.freedoom import floors, read_wad, sprites, wad_of
from tools.render_testbed.splits import Example, write_task

CLASSES = {  # what each character looks like, and its prefix in the WAD
    "gaunt giant with an open back": "VILE",
    "tank on insect legs": "SPID",
    "black horned creature": "SKEL",
    "silver armoured beast with orange arms": "BOS2",
    "silver armoured beast with green arms": "BOSS",
    "walking machine on three legs": "CYBR",
    "yellow slug with two boxes": "FATT",
    "pink worm": "SARG",
    "sailor in a blue jacket": "SSWV",
    "brown serpent with a red crest": "TROO",
    "soldier in green armour": "PLAY",
    "gunman without a shirt": "POSS",
    "soldier in black": "SPOS",
    "soldier in grey armour": "CPOS",
    "small spider with a cannon": "BSPI",
    "cage of burning heads": "PAIN",
    "striped head with tentacles": "HEAD",
    "flaming skull": "SKUL",
}
VIEWS = {"train": "1357", "validation": "28", "test": "46"}  # 1 is the front, 3 and 7 the sides, 5 the back
PER_CLASS = {"train": 84, "validation": 17, "test": 30}


def _view(name: str) -> str:
    """Return the view of a sprite, with the mirrored views 8, 7, 6 named as 2, 3, 4."""
    return min(name[5], str(10 - int(name[5]))) if name[5] in "2345678" else name[5]


def _of_one_view(drawings: dict[str, Pixels]) -> dict[str, Pixels]:
    """Leave out drawings that serve several views, such as an attack that looks alike from everywhere."""
    views: dict[bytes, set[str]] = {}
    for name, pixels in drawings.items():
        views.setdefault(pixels.tobytes(), set()).add(_view(name))
    return {name: pixels for name, pixels in drawings.items() if len(views[pixels.tobytes()]) == 1}


def _compose(sprite: Pixels, floor: Pixels, rng: np.random.Generator) -> Pixels:
    """Put a character, perhaps mirrored, before a piece of floor under a random light: (32, 32, 3)."""
    y, x = rng.integers(0, floor.shape[0] - SIZE + 1, 2)
    canvas = Image.fromarray(floor[y : y + SIZE, x : x + SIZE]).convert("RGBA")
    figure = Image.fromarray(sprite[:, :: int(rng.choice([-1, 1]))])
    scale = rng.uniform(20, 32) / max(figure.size)
    size = (max(1, round(figure.width * scale)), max(1, round(figure.height * scale)))
    figure = figure.resize(size, Image.Resampling.BOX)
    left, top = (int(rng.integers(-2, max(SIZE - side, 0) + 3)) for side in size)
    layer = Image.new("RGBA", canvas.size)
    layer.paste(figure, (left, top))
    canvas.alpha_composite(layer)
    light = rng.uniform(0.6, 1.3) * (1 + rng.uniform(-0.25, 0.25, 3))
    pixels = np.asarray(canvas.convert("RGB"), np.float32)
    return np.clip(np.round(pixels * light), 0, 255).astype(np.uint8)


def main(sources: Path, out: Path) -> None:
    """Write the task from the Debian package of Freedoom in `sources`/apt to `out`/sprites."""
    wad = read_wad(wad_of(sources / "apt" / "freedoom_0.12.1-2_all.deb"))
    drawings = _of_one_view(sprites(wad))
    rng = np.random.default_rng(0)
    grounds = [floor for _, floor in sorted(floors(wad).items()) if floor.std() > 4]
    order = rng.permutation(len(grounds))
    thirds = dict(zip(PER_CLASS, np.array_split(order, 3), strict=True))  # no floor is in two splits

    candidates: dict[str, list[Example]] = {split: [] for split in PER_CLASS}
    for label, prefix in enumerate(CLASSES.values()):
        for split, views in VIEWS.items():
            names = sorted(name for name in drawings if name.startswith(prefix) and name[5] in views)
            for _ in range(2 * PER_CLASS[split] // len(names) + 1):
                for i in rng.permutation(len(names)):
                    floor = grounds[int(rng.choice(thirds[split]))]
                    pixels = _compose(drawings[names[i]], floor, rng)
                    candidates[split].append(Example(pixels, label, f"{prefix}:{_view(names[i])}"))
    write_task(out / "sprites", tuple(CLASSES), candidates, PER_CLASS, partial(encode_png, colours=40))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
