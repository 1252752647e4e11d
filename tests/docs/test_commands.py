"""What the documents say to type can be typed: commands of ours, recipes of make, modules of Python."""

from __future__ import annotations

import ast
import itertools
import os
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

import heliostat
from heliostat.cli.app import app
from tests.docs.pages import PAGES, ROOT, Block, blocks, commands

RECIPES = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def parse(words: list[str]) -> None:
    """As the command line does, without running anything. Raises a usage error: no such command or option, an argument
    that is missing."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("heliostat", list(words))
    while (resolve := getattr(command, "resolve_command", None)) is not None:
        name, command, rest = resolve(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_each_command_is_one(block: Block) -> None:
    for words in commands(block):
        if words[0] == "heliostat":
            parse(words[1:])
        elif words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            assert set(targets) <= RECIPES, words
        elif words[0].startswith("python") and words[1:2] == ["-m"]:
            assert is_module(words[2]), words


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_named_in_the_text_is_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"`make ([a-z][a-z-]*)", text):
        assert target in RECIPES, target
    text = re.sub(
        r"\| before \| now \|.*?\n\n", "", text, flags=re.DOTALL
    )  # of CHANGELOG.md: names of earlier checkouts
    for module in re.findall(r"`(?:\.venv/bin/)?python -m ([\w.]+)", text):
        assert is_module(module), module
    for words in re.findall(r"`heliostat ((?:[a-z-]+ ?)+)", text):
        assert is_command(words.split()), words


@pytest.mark.parametrize("words", [["job", "no-such-verb"], ["job", "submit", "--no-such-option"], ["job", "status"]])
def test_what_can_not_be_typed_is_found(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"No such|[Mm]issing"):
        parse(words)


def is_command(words: list[str]) -> bool:
    """Whether the leading words are nouns and verbs; what follows the verb is its own affair."""
    command: Any = typer.main.get_command(app)
    for word in words:
        found = getattr(command, "commands", None)
        if found is None:
            return True
        if word not in found:
            return False
        command = found[word]
    return True


def is_module(name: str) -> bool:
    """Of this tree, or of a package that is installed beside it."""
    file = ROOT / name.replace(".", "/")
    if (ROOT / name.split(".")[0]).is_dir():
        return file.with_suffix(".py").exists() or (file / "__main__.py").exists()
    return name in ("pip", "venv", "pytest")


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_can_be_read_and_names_what_is_public(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module == "heliostat":
            assert {alias.name for alias in node.names} <= set(heliostat.__all__), str(block)


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_directories_and_files_of_examples_are_there(block: Block) -> None:
    """From the top of the checkout, or where a ``cd`` of the same block leads. What is made in the reader's own
    directory is not there yet."""
    here = ROOT
    for words in commands(block):
        if words[0] == "cd" and not words[1].startswith("~"):
            here = Path(os.path.normpath(here / words[1]))
            assert here.is_dir(), words
        if words[0] == "heliostat" and here != ROOT:
            for flag, value in itertools.pairwise(words):
                if flag == "-f" and "." in value:
                    assert (here / value).is_file(), words
