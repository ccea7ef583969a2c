"""The emoji task: which group does an emoji belong to? Split by emoji identity."""

import hashlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.render_testbed.common import (
    SIZE,
    Pixels,
    decode_png,
    encode_png,
    near_duplicates,
    thumbnails,
    write_split,
)
from tools.render_testbed.iconsets import (
    MODULES,
    IconSet,
    emojibase_source,
    fit,
    load_set,
    record_sources,
    render,
)

SETS = ("emojione", "fluent-emoji-flat", "fxemoji", "noto", "noto-v1", "twemoji")
SPLITS = {"test": 0.25, "validation": 0.125, "train": 0.625}
CLASSES: dict[str, tuple[str, ...]] = {
    "smiling face": ("face-smiling", "face-affection", "face-tongue", "face-hat"),
    "unhappy face": ("face-concerned", "face-unwell"),
    "hand gesture": (
        "hand-fingers-open",
        "hand-fingers-partial",
        "hand-single-finger",
        "hand-fingers-closed",
        "hands",
    ),
    "person": ("person-role", "person-gesture", "person-fantasy"),
    "mammal": ("animal-mammal",),
    "bird": ("animal-bird",),
    "bug": ("animal-bug",),
    "sea animal": ("animal-marine",),
    "plant": ("plant-flower", "plant-other"),
    "fruit": ("food-fruit",),
    "vegetable": ("food-vegetable",),
    "prepared food": ("food-prepared", "food-asian"),
    "sweet food": ("food-sweet",),
    "drink": ("drink",),
    "building": ("place-building", "place-religious"),
    "road or rail vehicle": ("transport-ground",),
    "boat or aircraft": ("transport-water", "transport-air"),
    "sky or weather": ("sky-weather",),
    "sport": ("sport",),
    "clothing": ("clothing",),
    "musical instrument": ("musical-instrument",),
    "electronic device": ("phone", "computer"),
    "stationery": ("book-paper", "writing", "office"),
    "tool": ("tool",),
}
LARGEST = 23  # identities of one class

GENDERS = {  # emoji that are one identity without sharing a code: woman's or man's version to the person's
    "1F468": "1F9D1",
    "1F469": "1F9D1",
    "1F466": "1F9D2",
    "1F467": "1F9D2",
    "1F474": "1F9D3",
    "1F475": "1F9D3",
    "1F934": "1FAC5",
    "1F478": "1FAC5",
    "1F385": "1F9D1-200D-1F384",
    "1F936": "1F9D1-200D-1F384",
    "1F57A": "1F483",
    "1F46B": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F46C": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F46D": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F930": "1FAC4",
    "1FAC3": "1FAC4",
}
MISLEADING = {"down", "up", "keycap"}  # names of drawings that older names would match to another emoji


@dataclass(frozen=True)
class Emoji:
    """One emoji of the default skin tone."""

    hexcode: str
    label: str
    subgroup: str
    identity: str  # the hexcode shared by all genders and directions


def identity(hexcode: str) -> str:
    """The hexcode without gender and direction."""
    code = re.sub("-FE0F", "", hexcode)
    code = re.sub("-200D-(2640|2642|27A1)", "", code)
    code = re.sub("^(1F468|1F469)-200D", "1F9D1-200D", code)
    return GENDERS.get(code, code)


def key(name: str) -> str:
    """Letters and digits of a name, to compare names that differ in punctuation."""
    letters = re.sub("[^a-z0-9]", "", name.lower())
    return re.sub("^flagfor", "flag", letters)


def catalogue(sources: Path) -> list[Emoji]:
    """All emoji of emojibase in order of their hexcodes."""
    folder = sources / MODULES / "emojibase-data"
    subgroups = json.loads((folder / "meta/groups.json").read_text())["subgroups"]
    return sorted(
        (
            Emoji(
                entry["hexcode"],
                entry["label"],
                subgroups[str(entry["subgroup"])],
                identity(entry["hexcode"]),
            )
            for entry in json.loads((folder / "en/data.json").read_text())
            if "subgroup" in entry
        ),
        key=lambda emoji: emoji.hexcode,
    )


def shortcodes(sources: Path) -> dict[str, str]:
    """Older names of emoji: the shortcode's key to the hexcode."""
    found: dict[str, str] = {}
    for path in sorted((sources / MODULES / "emojibase-data/en/shortcodes").glob("*.json")):
        table: dict[str, Any] = json.loads(path.read_text())
        for hexcode, codes in sorted(table.items()):
            for code in [codes] if isinstance(codes, str) else codes:
                found.setdefault(key(code), hexcode)
    return found


def drawings(icons: IconSet, emoji: Sequence[Emoji], older: dict[str, str]) -> dict[str, str]:
    """Which drawing of a set shows which emoji: hexcode to the drawing's name."""
    by_label = {key(entry.label): entry.hexcode for entry in emoji}
    known = {entry.hexcode for entry in emoji}
    names = {name: name for name in icons.names()} | icons.aliases()
    found: dict[str, str] = {}
    for table in (by_label, older):
        taken = set(found.values())
        for name, drawing in sorted(names.items()):
            hexcode = table.get(key(name))
            if hexcode in known and drawing not in taken and name not in MISLEADING:
                found.setdefault(hexcode, drawing)
    return found


def order(text: str) -> str:
    """A fixed pseudo-random sort key."""
    return hashlib.sha256(text.encode()).hexdigest()


def assign(emoji: Sequence[Emoji]) -> dict[str, tuple[str, str]]:
    """Identity to (class, split), in fixed shares of every class's identities."""
    assigned: dict[str, tuple[str, str]] = {}
    for name, subgroups in CLASSES.items():
        identities = sorted({entry.identity for entry in emoji if entry.subgroup in subgroups}, key=order)
        identities = identities[:LARGEST]
        end = 0.0
        for split, share in SPLITS.items():
            start, end = end, end + share * len(identities)
            for code in identities[round(start) : round(end)]:
                assigned.setdefault(code, (name, split))
    return assigned


def clean(icons: IconSet, name: str) -> Pixels | None:
    """A render on white; None for an empty drawing."""
    image = fit(render(icons.svg(name), 4 * SIZE), SIZE - 2, SIZE, (255, 255, 255))
    return None if image is None else np.asarray(image)


def picture(icons: IconSet, name: str, rng: np.random.Generator) -> Pixels | None:
    """A clean render on white or on a random pastel background; None for an empty drawing."""
    pastel = tuple(int(value) for value in rng.integers(200, 256, 3))
    background = (255, 255, 255) if rng.random() < 0.5 else (pastel[0], pastel[1], pastel[2])
    image = fit(render(icons.svg(name), 4 * SIZE), SIZE - 2, SIZE, background)
    return None if image is None else np.asarray(image)


def main(sources: Path, out: Path) -> None:
    """Render the task into `out`."""
    emoji = catalogue(sources)
    older = shortcodes(sources)
    assigned = assign(emoji)
    rng = np.random.default_rng(20)
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    shown: dict[str, list[Pixels]] = defaultdict(list)  # every row's image as stored, then on white
    rendered: set[tuple[str, str]] = set()
    table = [load_set(sources, prefix) for prefix in SETS]
    for icons in table:
        names = drawings(icons, emoji, older)
        for entry in emoji:
            drawing = names.get(entry.hexcode)
            if drawing is None or entry.identity not in assigned or (icons.prefix, entry.identity) in rendered:
                continue
            pixels, white = picture(icons, drawing, rng), clean(icons, drawing)
            if pixels is not None and white is not None:
                rendered.add((icons.prefix, entry.identity))
                name, split = assigned[entry.identity]
                image = encode_png(pixels, colours=64)
                shown[split] += [decode_png(image), white]
                rows[split].append({"image": image, "label": list(CLASSES).index(name), "group": entry.identity})
    small = {split: thumbnails(images) for split, images in shown.items()}
    for split, held in (
        ("train", np.concatenate([small["validation"], small["test"]])),
        ("validation", small["test"]),
    ):
        repeated = near_duplicates(small[split], held).reshape(-1, 2).max(axis=1)
        rows[split] = [row for row, drop in zip(rows[split], repeated, strict=True) if not drop]
        print(f"emoji: dropped {int(repeated.sum())} {split} images that are near duplicates of held-out ones")
    for split in ("train", "validation", "test"):
        path = write_split(out / "emoji", split, rows[split], list(CLASSES))
        print(f"emoji {split}: {len(rows[split])} images, {path.stat().st_size} bytes")
    record_sources("emoji", [*(icons.source("emoji") for icons in table), emojibase_source(sources, "emoji")])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
