"""Check that rendered pages need no network: every script, style, image and font is a local file that exists.

python -m tools.check_offline build/laptop/html
"""

from __future__ import annotations

import argparse
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {  # attributes that make a browser fetch something on its own
    "script": ("src",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "track": ("src",),
    "iframe": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "input": ("src",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}
LOADED_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "manifest", "apple-touch-icon"}
CSS_REFERENCE = re.compile(r"""(?:url\(\s*|@import\s+)["']?([^"')\s;]+)""")


class Page(HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        names = LOADED.get(tag, ())
        if tag == "link" and LOADED_LINKS & set(values.get("rel", "").split()):
            names = ("href",)
        for name in names:
            if name in values:
                candidates = values[name].split(",") if name == "srcset" else [values[name]]
                self.references += [c.split()[0] for c in candidates if c.strip()]
        self.references += CSS_REFERENCE.findall(values.get("style", ""))
        self.in_style = tag == "style"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.in_style = False

    def handle_data(self, data: str) -> None:
        if self.in_style:
            self.references += CSS_REFERENCE.findall(data)

    def handle_endtag(self, tag: str) -> None:
        self.in_style = False


def problems(folder: Path) -> list[str]:
    """What the pages below a folder load from elsewhere or do not find.

    Args:
        folder: Rendered HTML; must hold an index.html.

    Returns:
        One line per problem, sorted; empty when all is well.
    """
    if not (folder / "index.html").is_file():
        return [f"{folder} holds no index.html"]
    found: set[str] = set()
    for path in folder.rglob("*.html"):
        if path.is_relative_to(folder / "_static"):
            continue  # templates of the theme, no pages
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        for reference in page.references:
            parts = urlsplit(reference)
            if parts.scheme == "data" or reference.startswith("#"):
                continue
            if parts.scheme or parts.netloc:
                found.add(f"{path.relative_to(folder)} loads {reference}")
            elif not (path.parent / unquote(parts.path)).exists():
                found.add(f"{path.relative_to(folder)} does not find {reference}")
    for path in folder.rglob("*.css"):
        for reference in CSS_REFERENCE.findall(path.read_text(encoding="utf-8")):
            if urlsplit(reference).scheme != "data" and urlsplit(reference).netloc:
                found.add(f"{path.relative_to(folder)} loads {reference}")
    return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that rendered pages need no network.")
    parser.add_argument("folder", type=Path)
    found = problems(parser.parse_args().folder)
    print("\n".join(found) or "Every script, style, image and font is local.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
