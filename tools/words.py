"""``python -m tools.words``: finds the words of ``tools/words.toml`` in the texts of the repository.

Prints ``file:line``, the word and what to write instead; exits with 1 if there is any. Code in backticks is not
checked. ``--all FOLDER…``, ``--errors FOLDER…`` and ``--prose GLOB…`` check these instead of the scope in the file.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from heliostat import errors

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("words.toml")
KEEP = "words: ok"
# Users also read these: the errors of workflows and of models.
OTHER_ERRORS = {"ApplicationError", "ValueError"}
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"(`+)[^`\n]+\1")


@dataclass(frozen=True)
class Text:
    """A part of a file; ``line`` is its first line."""

    line: int
    text: str


@dataclass(frozen=True, order=True)
class Finding:
    file: str
    line: int
    word: str
    instead: str

    def __str__(self) -> str:
        return f'{self.file}:{self.line}: "{self.word}": write {self.instead}'


class Words:
    def __init__(self, words: dict[str, str]) -> None:
        self.patterns = [
            (re.compile(rf"\b{pattern.replace(' ', ' +')}(?!\w)", re.IGNORECASE), instead)
            for pattern, instead in words.items()
        ]

    def find(self, file: Path, texts: Iterable[Text]) -> Iterator[Finding]:
        source = file.read_text().splitlines()
        name = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)
        for piece in texts:
            # The same length, for the line numbers; code is not prose; a phrase can span lines.
            flat = re.sub(r"\s", " ", INLINE_CODE.sub(lambda found: "`" * len(found[0]), piece.text))
            for pattern, instead in self.patterns:
                for found in pattern.finditer(flat):
                    line = piece.line + piece.text.count("\n", 0, found.start())
                    if KEEP not in source[line - 1]:
                        yield Finding(name, line, " ".join(found[0].split()), instead)


def strings(tree: ast.AST) -> Iterator[Text]:
    """Every string; in f-strings ``{}`` replaces each expression."""
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
            yield Text(node.lineno, "".join(str(p) for p in parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield Text(node.lineno, node.value)


def error_classes(trees: Iterable[ast.AST]) -> set[str]:
    """Names of heliostat's errors and of the classes derived from them in these files."""
    names = {cls.__name__ for cls in errors.BY_CODE.values()} | OTHER_ERRORS
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while more := {c.name for c in classes if any(_name(base) in names for base in c.bases)} - names:
        names |= more
    return names


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def error_texts(tree: ast.AST, classes: set[str]) -> Iterator[Text]:
    """Strings in the arguments of these classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) in classes:
            for argument in [*node.args, *(k.value for k in node.keywords)]:
                yield from strings(argument)


def comments(source: str) -> Iterator[Text]:
    """Comments on successive lines are one text."""
    block: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if block and (token.start[0] != block[-1].start[0] + 1 or token.start[1] != block[-1].start[1]):
            yield Text(block[0].start[0], "\n".join(t.string.lstrip("#") for t in block))
            block = []
        block.append(token)
    if block:
        yield Text(block[0].start[0], "\n".join(t.string.lstrip("#") for t in block))


def prose(source: str) -> Iterator[Text]:
    """A page without its blocks of code."""
    without = FENCE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), source)
    yield Text(1, without)


def check(
    words: Words,
    *,
    everything: Iterable[str],
    only_errors: Iterable[str],
    pages: Iterable[str],
    frozen: Iterable[str] = (),
) -> list[Finding]:
    found: set[Finding] = set()
    skipped = {ROOT / file for file in frozen}
    for folder in everything:
        for file in _python(folder):
            if file in skipped:
                continue
            source = file.read_text()
            found.update(words.find(file, [*strings(ast.parse(source)), *comments(source)]))
    trees = {file: ast.parse(file.read_text()) for folder in only_errors for file in _python(folder)}
    classes = error_classes(trees.values())
    for file, tree in trees.items():
        found.update(words.find(file, error_texts(tree, classes)))
    for pattern in pages:
        for file in sorted(ROOT.glob(pattern)):
            found.update(words.find(file, prose(file.read_text())))
    return sorted(found)


def _python(folder: str) -> list[Path]:
    path = ROOT / folder
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.words", description=__doc__)
    parser.add_argument("--all", nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--errors", nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--prose", nargs="*", default=[], metavar="GLOB")
    given = parser.parse_args(args)
    content = tomllib.loads(LIST.read_text())
    scope = content["scope"]
    frozen = scope["frozen"]
    if given.all or given.errors or given.prose:
        scope = {"all": given.all, "errors": given.errors, "prose": given.prose}
    found = check(
        Words(content["words"]),
        everything=scope["all"],
        only_errors=scope["errors"],
        pages=scope["prose"],
        frozen=frozen,
    )
    for finding in found:
        print(finding)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
