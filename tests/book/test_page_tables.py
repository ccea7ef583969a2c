from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from samlib.study import claims
from tools import page_tables

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "book" / "published"


def test_every_mark_on_a_page_is_a_table_and_every_table_is_on_a_page() -> None:
    marks = [mark for page in (ROOT / "book").rglob("*.md") for mark in page_tables.MARK.findall(page.read_text())]
    assert sorted(marks) == sorted(page_tables.TABLES)


def test_a_line_becomes_its_table_and_nothing_else_changes() -> None:
    page = "# Title\n\n<!-- claims: C2 -->\n\nwords <!-- claims: C2 --> in a line\n"
    assert page_tables.filled(page, PUBLISHED) == page.replace("<!-- claims: C2 -->", claims.details("C2"), 1)
    with pytest.raises(KeyError, match="claims: C9"):
        page_tables.filled("<!-- claims: C9 -->", PUBLISHED)


def test_no_number_of_a_gpu_is_shown_that_was_not_measured(tmp_path: Path) -> None:
    assert not any(character.isdigit() for character in page_tables.gpu(tmp_path))
    shutil.copy(PUBLISHED / "gpu.json", tmp_path)
    text, found = page_tables.gpu(tmp_path), json.loads((tmp_path / "gpu.json").read_text())
    assert "NVIDIA H200" in text and found["stamp"]["commit"] in text
    low, middle, high = found["values"]["steps"]["fp32"]["SAM"]["time / floor"]
    assert f"{middle:.2f} ({low:.2f} to {high:.2f})" in text
