"""Lines of code that a reader of the rendered book sees, by chapter: `python -m tools.visible_code [FOLDER]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}  # tags of cells whose code is not in sight


def visible(notebook: dict[str, Any]) -> list[str]:
    """The lines of code in sight, without empty ones."""
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    shown = [c for c in cells if not FOLDED & set(c["metadata"].get("tags", []))]
    return [line for c in shown for line in "".join(c["source"]).splitlines() if line.strip()]


def main() -> None:
    """Print lines and the longest of them, chapter by chapter, and the sum."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "notebooks"
    total = 0
    for path in sorted(folder.glob("*.ipynb")):
        lines = visible(json.loads(path.read_text(encoding="utf-8")))
        total += len(lines)
        print(f"{path.stem:30} {len(lines):5} lines, the longest {max(map(len, lines), default=0)} characters")
    print(f"{'in all':30} {total:5}")


if __name__ == "__main__":
    main()
