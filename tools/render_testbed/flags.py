"""The flags task: which country's flag is in the synthetic capture? Split by drawing set."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from tools.render_testbed.common import SIZE, encode_png, near_duplicates, photograph, thumbnails, write_split
from tools.render_testbed.iconsets import IconSet, fit, load_set, record_sources, render

COUNTRIES = {
    "Australia": "au",
    "Austria": "at",
    "Belgium": "be",
    "Brazil": "br",
    "Canada": "ca",
    "Chile": "cl",
    "China": "cn",
    "Colombia": "co",
    "Cuba": "cu",
    "Denmark": "dk",
    "Egypt": "eg",
    "Finland": "fi",
    "France": "fr",
    "Germany": "de",
    "Ghana": "gh",
    "Greece": "gr",
    "India": "in",
    "Israel": "il",
    "Italy": "it",
    "Jamaica": "jm",
    "Japan": "jp",
    "Kazakhstan": "kz",
    "Kenya": "ke",
    "Mexico": "mx",
    "Morocco": "ma",
    "Nepal": "np",
    "New Zealand": "nz",
    "Nigeria": "ng",
    "Norway": "no",
    "Pakistan": "pk",
    "Peru": "pe",
    "Portugal": "pt",
    "South Africa": "za",
    "South Korea": "kr",
    "Spain": "es",
    "Sweden": "se",
    "Switzerland": "ch",
    "Turkey": "tr",
    "Ukraine": "ua",
    "Vietnam": "vn",
}
SPLITS = {"train": ("circle-flags", "flag"), "validation": ("cif",), "test": ("flagpack", "twemoji")}
CAPTURES = {"train": 19, "validation": 8, "test": 8}


def drawing(icons: IconSet, country: str) -> str:
    """The name of a country's flag in a set."""
    if icons.prefix == "twemoji":
        return "flag-turkiye" if country == "Turkey" else "flag-" + country.lower().replace(" ", "-")
    code = COUNTRIES[country]
    return f"{code}-4x3" if icons.prefix == "flag" else code


def main(sources: Path, out: Path) -> None:
    """Render the task into `out`."""
    rng = np.random.default_rng(30)
    table: list[IconSet] = []
    rows: dict[str, list[dict[str, Any]]] = {}
    small, clean = {}, {}
    for split, prefixes in SPLITS.items():
        rows[split], captured, plain = [], [], []
        for prefix in prefixes:
            icons = load_set(sources, prefix)
            table.append(icons)
            for label, country in enumerate(COUNTRIES):
                image = render(icons.svg(drawing(icons, country)), 8 * SIZE)
                flat = fit(image, SIZE, SIZE, (128, 128, 128))
                if flat is None:
                    raise ValueError(f"The flag of {country} in {prefix} is empty, but every flag must have ink.")
                plain.append(np.asarray(flat))
                for _ in range(CAPTURES[split]):
                    pixels = photograph(image, rng)
                    captured.append(pixels)
                    rows[split].append({"image": encode_png(pixels, colours=64), "label": label, "group": prefix})
        small[split], clean[split] = thumbnails(captured), thumbnails(plain)
    held = np.concatenate([small["validation"], small["test"]])
    repeated = near_duplicates(small["train"], held)
    rows["train"] = [row for row, drop in zip(rows["train"], repeated, strict=True) if not drop]
    print(f"flags: dropped {int(repeated.sum())} training images that are near duplicates of held-out ones")
    for split in ("validation", "test"):
        same = near_duplicates(clean[split], clean["train"]).sum()
        print(f"flags: {same} of {len(clean[split])} clean {split} drawings nearly equal a training drawing")
    for split in SPLITS:
        path = write_split(out / "flags", split, rows[split], list(COUNTRIES))
        print(f"flags {split}: {len(rows[split])} images, {path.stat().st_size} bytes")
    record_sources("flags", [icons.source("flags") for icons in table])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
