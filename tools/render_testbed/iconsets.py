"""Reading iconify's icon sets and emojibase's emoji list, and rendering their drawings."""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image as pillow

MODULES = Path("npm/node_modules")
LICENCES = {
    "MIT",
    "Apache-2.0",
    "ISC",
    "CC0-1.0",
    "BSD-3-Clause",
    "Unlicense",
    "OFL-1.1",
    "CC-BY-4.0",
    "CC-BY-3.0",
}


@dataclass(frozen=True)
class IconSet:
    """One icon set: the raw JSON of its icons and its entry in iconify's table of collections."""

    prefix: str
    data: Mapping[str, Any]
    info: Mapping[str, Any]

    def names(self) -> list[str]:
        """Names of the drawings that are not hidden, sorted, without aliases."""
        return sorted(name for name, icon in self.data["icons"].items() if not icon.get("hidden"))

    def aliases(self) -> dict[str, str]:
        """Further names of unchanged drawings: alias to the drawing's own name."""
        table = self.data.get("aliases", {})
        return {
            name: alias["parent"]
            for name, alias in sorted(table.items())
            if alias["parent"] in self.data["icons"] and not {"rotate", "hFlip", "vFlip"} & alias.keys()
        }

    def svg(self, name: str) -> str:
        """The drawing as an SVG document; shapes without a colour of their own are black."""
        icon = self.data["icons"][name]
        left, top, width, height = (
            icon.get(key, self.data.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )

    def animated(self, name: str) -> bool:
        """Whether the drawing is an animation, whose first frame may be empty."""
        return "<animate" in self.data["icons"][name]["body"] or "<set " in self.data["icons"][name]["body"]

    def source(self, used_for: str) -> dict[str, str]:
        """The set's row in the table of sources."""
        author, licence = self.info["author"], self.info["license"]
        return {
            "what": self.info["name"],
            "package": "@iconify/json (npm)",
            "version": self.data["package_version"],
            "set": self.prefix,
            "set version": str(self.info.get("version", "")),
            "licence": licence["spdx"],
            "author": author["name"],
            "address": str(author.get("url", "")),
            "used for": used_for,
        }


def collections(sources: Path) -> dict[str, dict[str, Any]]:
    """Iconify's table of collections, restricted to licences that allow redistribution."""
    table = json.loads((sources / MODULES / "@iconify/json/collections.json").read_text())
    return {prefix: info for prefix, info in sorted(table.items()) if info["license"].get("spdx") in LICENCES}


def load_set(sources: Path, prefix: str) -> IconSet:
    """Load one icon set of an allowed licence."""
    folder = sources / MODULES / "@iconify/json"
    version = json.loads((folder / "package.json").read_text())["version"]
    data = json.loads((folder / "json" / f"{prefix}.json").read_text())
    return IconSet(prefix, {**data, "package_version": version}, collections(sources)[prefix])


def emojibase_source(sources: Path, used_for: str) -> dict[str, str]:
    """The row of emojibase, which names and groups the emoji, in the table of sources."""
    package = json.loads((sources / MODULES / "emojibase-data/package.json").read_text())
    return {
        "what": "names and subgroups of emoji",
        "package": "emojibase-data (npm)",
        "version": package["version"],
        "set": "emojibase-data",
        "set version": package["version"],
        "licence": package["license"],
        "author": "Miles Johnson",
        "address": "https://emojibase.dev",
        "used for": used_for,
    }


def record_sources(used_for: str, rows: list[dict[str, str]]) -> None:
    """Replace the rows of one output in the table of sources, `sources_icons.json` beside this module."""
    path = Path(__file__).with_name("sources_icons.json")
    known = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in known if row["used for"] != used_for]
    table = sorted(kept + rows, key=lambda row: (row["used for"], row["set"]))
    path.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def render(svg: str, side: int) -> pillow.Image:
    """Render an SVG with its longer side at `side` pixels, as RGBA with a transparent background."""
    size = re.search(r'width="([\d.]+)" height="([\d.]+)"', svg)
    if size is None:
        raise ValueError("An SVG document needs a width and a height.")
    wide = float(size[1]) >= float(size[2])
    png = resvg_py.svg_to_bytes(
        svg_string=svg, skip_system_fonts=True, width=side if wide else None, height=None if wide else side
    )
    return pillow.open(io.BytesIO(bytes(png))).convert("RGBA")


def fit(image: pillow.Image, side: int, canvas: int, background: tuple[int, int, int]) -> pillow.Image | None:
    """Crop an RGBA drawing to its ink, scale its longer side to `side` and centre it on a square RGB canvas.

    Returns:
        The canvas; None for a drawing without ink.
    """
    alpha = np.asarray(image)[..., 3]
    box = pillow.fromarray(np.where(alpha > 16, 255, 0).astype(np.uint8)).getbbox()
    if box is None:
        return None
    ink = image.crop(box)
    scale = side / max(ink.size)
    size = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    layer = pillow.new("RGBA", (canvas, canvas), (*background, 255))
    small = ink.resize(size, pillow.Resampling.BOX if scale < 1 else pillow.Resampling.BICUBIC)
    layer.alpha_composite(small, ((canvas - size[0]) // 2, (canvas - size[1]) // 2))
    return layer.convert("RGB")
