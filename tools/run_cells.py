"""The code of notebooks as plain Python, for a machine without Jupyter: `python -m tools.run_cells --device cuda`.

Each notebook's cells run in a process of their own, with parameters given here; what a cell shows is not shown. It is a
quick check on another device, no way to read the book.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run(path: Path, parameters: dict[str, Any]) -> None:
    """Run a notebook's code cells.

    Args:
        path: the notebook.
        parameters: override those of its cell tagged `parameters`, where it has them.
    """
    namespace: dict[str, Any] = {"__name__": "__main__", "display": lambda *_: None}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        code = "".join(cell["source"])
        if cell["cell_type"] != "code" or "%pip" in code:
            continue
        exec(compile(code, f"{path.name}, cell {number}", "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            namespace |= {name: value for name, value in parameters.items() if name in namespace}


def main() -> int:
    """Run all chapters, or those named; 0 if all came to their end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", type=Path, help="notebooks; none for all")
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--device", default="auto")
    a = parser.parse_args()
    os.environ |= {"SAMLIB_STATIC": "1", "MPLBACKEND": "agg"}
    wrong = 0
    for path in a.chapters or sorted((ROOT / "notebooks").glob("*.ipynb")):
        begun = time.monotonic()
        chapter = multiprocessing.get_context("spawn").Process(
            target=run, args=(path, {"preset": a.preset, "device": a.device})
        )
        chapter.start()
        chapter.join()  # the traceback is shown, and the other chapters go on
        wrong += chapter.exitcode != 0
        print(f"{path.stem}: {'failed' if chapter.exitcode else 'done'}, {time.monotonic() - begun:.0f} s", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
