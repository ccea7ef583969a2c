"""Sphinx extension: in docstrings only `code` is marked, while |w|, w* and w_ mean themselves."""

import re

from sphinx.application import Sphinx


def escape(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Escape in place what reStructuredText would read as markup, outside of backticks."""
    parts = re.split(r"(`+[^`]+`+)", "\n".join(lines))  # text, code, text, ...
    parts[::2] = [re.sub(r"([*|]|_\b)", r"\\\1", part) for part in parts[::2]]
    code = (" ".join(part.strip("`").split()) for part in parts[1::2])  # one that spans lines becomes one line
    parts[1::2] = [f"\\ ``{part}``\\ " for part in code]  # an escaped space shows none
    lines[:] = "".join(parts).split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", escape, priority=100)  # before napoleon
    return {"parallel_read_safe": True}
