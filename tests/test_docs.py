"""What the documents say to type can be typed, and what they name is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from heliostat.cli.app import app
from heliostat.client.yaml_files import load

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])
COMMAND = re.compile(r"^(?:    )?((?:heliostat|cd) .*)$", re.MULTILINE)


def words_of(line: str) -> list[list[str]]:
    """The commands of one line, without comment."""
    words, commands = shlex.split(line, comments=True), [[]]  # type: list[str], list[list[str]]
    for word in words:
        if word == "&&":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def parse(words: list[str]) -> None:
    """As the command line would, without running anything. Raises a usage error."""
    command, name = typer.main.get_command(app), "heliostat"
    context = command.make_context(name, list(words))
    while (found := getattr(command, "resolve_command", None)) is not None:
        name, command, rest = found(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_can_be_typed(page: Path) -> None:
    here = ROOT
    for line in COMMAND.findall(page.read_text()):
        for words in words_of(line):
            if words[0] == "cd":
                here = (here / words[1]).resolve()
                assert here.is_dir(), line
                continue
            parse(words[1:])
            if "submit" in words and "-f" in words:
                file = here / words[words.index("-f") + 1]
                directory = here / load(file)["working_dir"]  # of a file too, paths are taken from where one stands
                program = load(file)["entrypoint"].split()[1]
                assert (directory / program).is_file(), line
            if "--working-dir" in words:
                assert (here / words[words.index("--working-dir") + 1] / words[-1]).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_named_is_there(page: Path) -> None:
    text = page.read_text()
    recipes = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= recipes
    for path in re.findall(
        r"`((?:api|workflows|activities|clouds|agent|store|runtime|heliostat|tests|docs)/[\w/.]+)`", text
    ):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ([\w.]+)", text):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module
