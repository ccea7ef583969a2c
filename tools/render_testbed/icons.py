"""The pre-training corpus: icons that many sets draw, emoji and flags, captioned by their authors' names."""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from tools.render_testbed import emoji
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
    IconSet,
    collections,
    emojibase_source,
    fit,
    load_set,
    record_sources,
    render,
)

FEWEST_SETS = 8  # a concept that fewer sets draw is left out
FEWEST_DRAWINGS = 5  # and so is one that keeps fewer distinct drawings
MOST_DRAWINGS = 25
MOST_BYTES = 12_000_000
BYTES_PER_ROW = 40  # caption, group and the column's overhead
LEVELS = 16
FLAG_SET = "emojione"  # its flags are in no split of the flags task

CATEGORIES = {"Emoji", "Flags / Maps", "Logos", "Programming"}  # left out of the icons
STYLES = set(
    "outline outlined filled fill solid duotone duo twotone regular rounded sharp broken linear stroke alt "
    "alternate variant remix flat thin loop glyph ltr baseline 24px 16px 32px".split()
)
SHARED_STYLES = {"line", "light", "bold", "round", "fine", "small", "negative", "print", "pop", "tone", "two"}
MARKS = {
    "fa": "o",
    "uiw": "o",
    "vaadin": "o",
    "iwwa": "o",
    "vs": "o",
    "gg": "or",
    "jam": "f",
}  # one-letter styles
SIZES = {"10", "12", "14", "15", "16", "18", "20", "24", "26", "28", "32", "36", "40", "48", "96"}
DIGITS = {word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine".split())}
CUES = {"number", "numbers", "numeric", "digit", "counter", "looks"}
WRAPPERS = {"circle", "square", "hexagon", "box", "pentagon", "octagon", "rhombus", "diamond", "triangle"}
NUMBERED = {"dice", "heading", "medal", "step"}  # words whose final digit is drawn
JOINED = {"t shirt": "tshirt", "e mail": "email", "x ray": "xray", "u turn": "uturn", "wi fi": "wifi"}
LETTERS = {"letter", "letters", "alpha", "alphabet", "alphabetical", "abc", "az", "za"}


def words(name: str, icons: IconSet, endings: Counter[str]) -> tuple[str, ...]:
    """The words of an icon's name without style, size and variant; empty where letters are drawn."""
    for suffix in sorted(filter(None, icons.data.get("suffixes", {})), key=len, reverse=True):
        if name.endswith(f"-{suffix}"):
            name = name[: -len(suffix) - 1]
            break
    for prefix in sorted(filter(None, icons.data.get("prefixes", {}))):
        if name.startswith(f"{prefix}-"):
            name = name[len(prefix) + 1 :]
            break
    tokens = [token for token in name.split("-") if token]
    total = sum(endings.values())
    mark = MARKS.get(icons.prefix, "")

    def style(token: str) -> bool:
        frequent = endings[token] >= 0.05 * total
        return (
            token in STYLES
            or (token in SHARED_STYLES and frequent)
            or (token in SIZES and frequent)
            or token in set(mark)
        )

    while len(tokens) > 1 and style(tokens[-1]):
        tokens.pop()
    text = " ".join(tokens)
    for apart, joined in JOINED.items():
        text = re.sub(rf"\b{apart}\b", joined, text)
    tokens = text.split()

    rest = [DIGITS.get(token, token) for token in tokens if token not in CUES | WRAPPERS]
    wrappers = [token for token in tokens if token in WRAPPERS]
    if len(rest) == 1 and re.fullmatch("[0-9]", rest[0]):
        spelled_alone = not CUES & set(tokens) and rest[0] not in tokens
        return () if spelled_alone and "square" not in wrappers else ("number", rest[0], *wrappers)
    if len(tokens) > 1 and icons.prefix.startswith("icon-park") and tokens[-1] in DIGITS:
        tokens.pop()
    if len(tokens) > 1 and re.fullmatch("0?[0-9]", tokens[-1]) and tokens[0] not in NUMBERED:
        tokens.pop()
    if any(re.fullmatch("[a-z]", token) for token in tokens) or LETTERS & set(tokens):
        return ()
    return tuple(tokens)


def concepts(sets: list[IconSet]) -> dict[str, dict[str, str]]:
    """Caption to the drawings (set's prefix to name) of every concept that enough sets draw."""
    drawn: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    orders: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for icons in sets:
        names = [name for name in icons.names() if not icons.animated(name)]
        endings = Counter(name.split("-")[-1] for name in names)
        for name in sorted(names, key=lambda name: (len(name), name)):
            tokens = words(name, icons, endings)
            if tokens and tokens[0] not in {"logo", "logos", "brand"}:
                concept = tuple(sorted(tokens))
                orders[concept][" ".join(tokens)] += icons.prefix not in drawn[concept]
                drawn[concept].setdefault(icons.prefix, name)
    chosen = {}
    for concept, drawings in drawn.items():
        if len(drawings) >= FEWEST_SETS:
            caption = min(orders[concept].items(), key=lambda item: (-item[1], item[0]))[0]
            chosen[caption] = drawings
    return dict(sorted(chosen.items(), key=lambda item: (-len(item[1]), item[0])))


def icon(icons: IconSet, name: str) -> Pixels | None:
    """A drawing in black on white, (32, 32); None where it is empty, or full."""
    image = fit(render(icons.svg(name), 3 * SIZE), SIZE - 4, SIZE, (255, 255, 255))
    if image is None:
        return None
    grey = np.asarray(image.convert("L"))
    return grey if 8 < 255 - grey.mean() < 225 else None


def distinct(images: list[Pixels]) -> list[int]:
    """Positions of the images that are no near duplicate of an earlier one."""
    small = thumbnails(images)
    kept: list[int] = []
    for position in range(len(images)):
        if not kept or not near_duplicates(small[position : position + 1], small[kept])[0]:
            kept.append(position)
    return kept


def icon_rows(sets: dict[str, IconSet], room: int) -> Iterator[dict[str, Any]]:
    """Rows of the icons, concepts of most sets first, until `room` bytes are used."""
    for caption, drawings in concepts(list(sets.values())).items():
        found: list[tuple[str, Pixels]] = []
        for prefix, name in sorted(drawings.items(), key=lambda item: emoji.order(f"{item[0]}:{caption}")):
            pixels = icon(sets[prefix], name) if len(found) < MOST_DRAWINGS + 8 else None
            if pixels is not None:
                found.append((f"{prefix}:{name}", pixels))
        kept = distinct([pixels for _, pixels in found])[:MOST_DRAWINGS] if found else []
        if len(kept) < FEWEST_DRAWINGS:
            continue
        rows = [
            {"image": encode_png(found[i][1], levels=LEVELS), "caption": caption, "group": found[i][0]} for i in kept
        ]
        room -= sum(len(row["image"]) + BYTES_PER_ROW for row in rows)
        if room < 0:
            return
        yield from rows


def emoji_rows(sources: Path, out: Path) -> Iterator[dict[str, Any]]:
    """Rows of emoji of no identity that the emoji task in `out` holds out, and of one set's flags."""
    listed = emoji.catalogue(sources)
    older = emoji.shortcodes(sources)
    held = {code for code, (_, split) in emoji.assign(listed).items() if split != "train"}
    rng = np.random.default_rng(40)
    table = [load_set(sources, prefix) for prefix in emoji.SETS]
    named = {icons.prefix: emoji.drawings(icons, listed, older) for icons in table}
    kept_out = [  # on white, and below as stored on their backgrounds
        pixels
        for icons in table
        for entry in listed
        if entry.identity in held and entry.hexcode in named[icons.prefix]
        if (pixels := emoji.clean(icons, named[icons.prefix][entry.hexcode])) is not None
    ]
    for split in ("validation", "test"):
        stored = Dataset.from_parquet(str(out / "emoji" / f"{split}-00000-of-00001.parquet"))
        kept_out += [np.asarray(image.convert("RGB")) for image in stored["image"]]
    small = thumbnails(kept_out)
    for icons in table:
        seen = np.zeros((0, small.shape[1]), np.float32)
        for entry in listed:
            flag = entry.subgroup in {"country-flag", "subdivision-flag"}
            drawing = named[icons.prefix].get(entry.hexcode)
            if drawing is None or entry.identity in held or entry.subgroup in {"alphanum", "skin-tone"}:
                continue
            if flag and icons.prefix != FLAG_SET:
                continue
            caption = " ".join(re.sub(r"[^\w ]", " ", entry.label.lower().replace("’", "")).split())
            if caption == "keycap":  # of a sign that is no word
                continue
            plain = emoji.clean(icons, drawing)
            pixels = emoji.picture(icons, drawing, rng)
            if plain is None or pixels is None:
                continue
            image = encode_png(pixels, colours=48)
            shown = thumbnails([plain, decode_png(image)])
            if near_duplicates(shown, np.concatenate([small, seen])).any() and not flag:
                continue
            seen = np.concatenate([seen, shown[:1]])
            yield {
                "image": image,
                "caption": caption,
                "group": f"{icons.prefix}:{drawing}",
            }


def main(sources: Path, out: Path) -> None:
    """Render the corpus into `out`, which holds the emoji task."""
    coloured = list(emoji_rows(sources, out))
    used = sum(len(row["image"]) + BYTES_PER_ROW for row in coloured)
    print(f"corpus: {len(coloured)} emoji and flags, {used} bytes")
    sets = {
        prefix: load_set(sources, prefix)
        for prefix, info in collections(sources).items()
        if info.get("category") not in CATEGORIES and not info.get("palette") and "brands" not in prefix
    }
    rows = list(icon_rows(sets, MOST_BYTES - used))
    print(f"corpus: {len(rows)} icons of {len({row['caption'] for row in rows})} concepts")
    path = write_split(
        out / "corpus", "train", sorted(rows + coloured, key=lambda row: emoji.order(row["group"])), None
    )
    print(f"corpus train: {len(rows) + len(coloured)} images, {path.stat().st_size} bytes")
    drawn = sorted({row["group"].split(":")[0] for row in rows + coloured})
    table = [load_set(sources, prefix).source("corpus") for prefix in drawn]
    record_sources("corpus", [*table, emojibase_source(sources, "corpus")])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
