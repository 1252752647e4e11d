"""The documents use the field's words: none of those that only insiders understand. See docs/glossary.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT
from tools import reference

PRIVATE = {
    r"is honou?red|not honou?red": "supported",
    r"asked for": "requested",
    r"well again": "recovered",
    r"mended": "repaired",
    r"(?:un)?told\b": "notified, reported, acknowledged",
    r"\bheard?\b": "receive, read",
    r"\brelie(?:f|ve[ds]?)\b": "replacement",
    r"leftovers?": "orphaned resources",
    r"hand(?:s|ed)? over": "attach",
    r"\bsealed\b": "encrypted",
    r"withdrawn": "cancelled",
    r"\banew\b": "again",
    r"\bword(?:s)? (?:on|of) (?:it|why)": "status, reason",
    r"by retention": "by the retention policy",
    r"goes on\b|go on\b": "continues, keeps running",
    r"timetable": "schedule",
    r"under way": "in progress",
    r"looked after": "checked",
    r"to be had": "available",
    r"is no name of|is no share|is no mapping": "is not a valid …",
}
"""A pattern, and what to write instead."""

CODE = re.compile(r"```.*?```|`[^`]*`|<!--.*?-->|\]\([^)]*\)|^    .*$", re.DOTALL | re.MULTILINE)
CHECKED = [page for page in PAGES if page.name != "glossary.md"]


def found(text: str) -> list[str]:
    prose = CODE.sub(" ", text)
    return [
        f"{line.strip()!r}: {better}"
        for pattern, better in PRIVATE.items()
        for line in re.findall(rf".*(?:{pattern}).*", prose, re.IGNORECASE)
    ]


@pytest.mark.parametrize("page", CHECKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_is_in_plain_words(page: Path) -> None:
    assert found(page.read_text()) == []


@pytest.mark.parametrize("texts", [reference.MEANINGS, reference.ERRORS, reference.CLOUD_ERRORS])
def test_the_texts_of_the_reference_are_in_plain_words(texts: dict[str, str]) -> None:
    assert found("\n".join(texts.values())) == []


def test_a_private_word_is_found() -> None:
    assert found("The balancer is well again.") == ["'The balancer is well again.': recovered"]
    assert found("Set `goes on` there.") == []
