"""Paths of this repository that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT

TOP = [p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")]
PATH = re.compile(rf"`((?:{'|'.join(map(re.escape, sorted(TOP)))})/[\w./-]*)`")
HISTORY = {ROOT / "CHANGELOG.md"}
"""Names what has been moved, too."""
MADE = ("site/", "dist/")


def paths(page: Path) -> list[str]:
    """In code spans; a pattern or a placeholder (``*``, ``<noun>``) is none."""
    return [path for path in PATH.findall(page.read_text()) if not path.startswith(MADE)]


@pytest.mark.parametrize("page", [p for p in PAGES if p not in HISTORY], ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_exist(page: Path) -> None:
    missing = [path for path in paths(page) if not (ROOT / path).exists()]
    assert missing == []


def test_the_walk_from_a_request_to_a_machine_is_short() -> None:
    """Issue: a reader opens at most seven files."""
    text = (ROOT / "docs/architecture.md").read_text()
    walk = text.split("## From `POST /v1/jobs` to a machine")[1].split("\n## ")[0]
    assert 0 < len(re.findall(r"^\d+\. ", walk, re.MULTILINE)) <= 7


def test_each_question_has_an_answer() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    table = text.split("## Where do I change …?")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) >= 10
    for question, answer in rows:
        links = re.findall(r"\]\(\.\./([\w./-]+)\)", answer)
        assert links, question
        assert all((ROOT / link).is_file() for link in links), question
