"""Which code, libraries and device produced a number."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from samlib import __version__

_ROOT = Path(__file__).parents[2]


def software() -> dict[str, str]:
    """Commit, versions and the date."""
    return {
        "commit": _commit(),
        "samlib": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": importlib.metadata.version("open_clip_torch"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device(name: str) -> str:
    """A torch device with the name of the hardware behind it."""
    return f"{name} ({torch.cuda.get_device_name(name) if name.startswith('cuda') else platform.machine()})"


def _commit() -> str:
    """The commit of the checkout or of the pip installation from git, or "unknown"."""
    if (_ROOT / ".git").exists():
        try:
            commit = _git("rev-parse", "--short=12", "HEAD")
            code = _git(
                "status", "--porcelain", "--", "samlib", "notebooks", "benchmarks"
            )  # what runs may write is no code
        except (OSError, subprocess.SubprocessError):
            return "unknown"
        return f"{commit}-dirty" if code else commit
    try:
        origin = importlib.metadata.distribution("samlib").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
    return json.loads(origin or "{}").get("vcs_info", {}).get("commit_id", "unknown")


def _git(*arguments: str) -> str:
    """The answer of a git command that only reads."""
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=10, env=environment, check=True
    ).stdout.strip()
