"""Sphinx extension: in docstrings only `code` is marked, while |w|, w* and w_ mean themselves."""

import re

from sphinx.application import Sphinx


def escape(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Escape in place what reStructuredText would read as markup, outside of backticks."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`+[^`]+`+)", line)  # text, code, text, ...
        parts[::2] = [re.sub(r"([*|]|_\b)", r"\\\1", part) for part in parts[::2]]
        parts[1::2] = ["\\ ``" + part.strip("`") + "``\\ " for part in parts[1::2]]  # an escaped space shows none
        lines[number] = "".join(parts)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", escape, priority=100)  # before napoleon
    return {"parallel_read_safe": True}
