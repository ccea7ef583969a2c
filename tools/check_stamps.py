"""Whether the published values belong to this version: `python -m tools.check_stamps [TAG]`.

Every file in book/published carries the stamp of the run that made it. The book may be published if each of them was
made by this version of samlib, at a commit from which this one descends, and if the tag, where one is given, is the
version's.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from samlib import __version__
from samlib.store.files import read_json

ROOT = Path(__file__).resolve().parent.parent


def is_ancestor(commit: str) -> bool:
    """Whether HEAD descends from a commit of this repository."""
    command = ["git", "-C", str(ROOT), "merge-base", "--is-ancestor", commit, "HEAD"]
    return subprocess.run(command, capture_output=True).returncode == 0


def problems(folder: Path, tag: str | None, known: Callable[[str], bool] = is_ancestor) -> list[str]:
    """What speaks against publishing, a line each.

    Args:
        folder: of the published values.
        tag: name of the git tag, or None.
        known: whether a commit belongs to the history.
    """
    found = [f"the tag is {tag} and the version {__version__}"] if tag not in (None, f"v{__version__}") else []
    files = sorted(folder.glob("*.json"))
    for file in files:
        stamp = read_json(file).get("stamp", {})
        commit = str(stamp.get("commit", "unknown")).removesuffix("-dirty")
        if stamp.get("samlib") != __version__:
            found.append(f"{file.name} was made by samlib {stamp.get('samlib')}, this is {__version__}")
        if not known(commit):
            found.append(f"{file.name} was made at {commit}, which is not in the history of this commit")
    return found if files else [*found, f"nothing is published in {folder}"]


if __name__ == "__main__":
    wrong = problems(ROOT / "book" / "published", sys.argv[1] if len(sys.argv) > 1 else None)
    sys.exit("\n".join(wrong) or None)
