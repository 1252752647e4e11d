"""The documents and what stands in them, for the tests of this folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")])
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
NOTES = re.compile(r"(?:<!--(?:(?!-->).)*-->\s*)+\Z", re.DOTALL)
INDENTED = re.compile(r"(?:^    [^\n]*\n)+", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    text: str
    line: int
    notes: tuple[tuple[str, str], ...] = ()
    """Comments of the page right before the block, as (kind, text): see ``test_run.py``."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language: str) -> list[Block]:
    """The fenced blocks of one language; examples' READMEs indent their commands instead."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match["language"] == language:
                line = text[: match.start()].count("\n") + 2
                found.append(Block(page, language, match["text"], line, _notes(text[: match.start()])))
        if language == "sh" and page.parent.parent.name == "examples":
            for match in INDENTED.finditer(text):
                line = text[: match.start()].count("\n") + 1
                found.append(Block(page, language, re.sub(r"^    ", "", match[0], flags=re.MULTILINE), line))
    return found


def _notes(before: str) -> tuple[tuple[str, str], ...]:
    comments = re.findall(r"<!--\s*(.*?)\s*-->", match[0], re.DOTALL) if (match := NOTES.search(before)) else []
    pairs = [comment.partition(":") for comment in comments]
    return tuple((kind.strip(), text.strip()) for kind, _, text in pairs)


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block of shell lines: without comments, one by one where ``&&``, ``|`` or ``;``
    join them, without the variables in front."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split, lexer.commenters = True, "#"
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)
