"""Write what samlib reads of open_clip's models: `python -m tools.open_clip_table`, after open_clip was changed."""

from __future__ import annotations

import importlib.metadata
import json

import open_clip

from samlib.model import registry


def table() -> str:
    """A line a model, as JSON, for the version of open_clip that is installed."""
    rows = (
        f"{json.dumps(name)}: {json.dumps(registry.table_row(open_clip, name))}" for name in open_clip.list_models()
    )
    version = json.dumps(importlib.metadata.version("open_clip_torch"))
    return f'{{"version": {version}, "models": {{\n' + ",\n".join(rows) + "\n}}\n"


if __name__ == "__main__":
    registry.TABLE.write_text(table(), encoding="utf-8")
