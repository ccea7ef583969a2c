"""Do two runs of the notebooks say the same? `python -m tools.compare_runs OLD NEW [--rename PATTERN REPLACEMENT]`.

OLD and NEW are folders of executed notebooks, such as build/smoke/executed of two checkouts. Every glued value of the
one is compared with that of the other: its numbers exactly, whatever words stand around them, or else its words. A
rewrite of the library that changes no behaviour leaves no difference but wall-clock times.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

NUMBER = re.compile(r"[-+−]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


def glued(folder: Path) -> dict[str, str]:
    """Name -> text of every value that the folder's notebooks glued."""
    found = {}
    for path in sorted(folder.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                name = output.get("metadata", {}).get("scrapbook", {}).get("name")
                text = output.get("data", {}).get("application/papermill.record/text/plain")
                if name and text is not None:
                    found[name] = "".join(text).strip("'\"")
    return found


def numbers(text: str) -> list[float]:
    """The numbers in a text, but not the level of its intervals."""
    plain = text.replace("95 % interval", "")
    return [float(n.replace(",", "").replace("−", "-").rstrip(".")) for n in NUMBER.findall(plain)]


def said(text: str) -> list[float] | str:
    """What counts of a glued value: its numbers; where it has none, such as a verdict, its words."""
    return numbers(text) or text


def main() -> int:
    """Print what differs; 0 if nothing does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rename", nargs=2, default=("$^", ""), help="of names in OLD, a pattern and its replacement")
    a = parser.parse_args()
    pattern, replacement = a.rename
    old = {re.sub(pattern, replacement, name): text for name, text in glued(a.old).items()}
    new = glued(a.new)
    both = [name for name in old if name in new]
    differ = [name for name in both if said(old[name]) != said(new[name])]
    for name in differ:
        print(f"{name}: {old[name]!r} -> {new[name]!r}")
    for what, names in (("only in OLD", old.keys() - new.keys()), ("only in NEW", new.keys() - old.keys())):
        if names:
            print(f"{what}: {', '.join(sorted(names))}")
    print(f"{len(both)} glued values in both runs, {len(differ)} of them differ")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
