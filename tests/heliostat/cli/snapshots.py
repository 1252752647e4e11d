"""``python -m tests.heliostat.cli.snapshots`` writes the help of every command to ``snapshots/``, one file per noun."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from heliostat.cli.app import app

FOLDER = Path(__file__).with_name("snapshots")
WIDTH = 100


def commands() -> Iterator[tuple[list[str], str]]:
    """Words of each command and its help, as wide on every terminal."""

    def walk(command: Any, words: list[str], parent: Any) -> Iterator[tuple[list[str], str]]:
        context = command.context_class(
            command, info_name=words[-1], parent=parent, terminal_width=WIDTH, max_content_width=WIDTH
        )
        yield words, command.get_help(context)
        for name, sub in sorted(getattr(command, "commands", {}).items()):
            yield from walk(sub, [*words, name], context)

    return walk(typer.main.get_command(app), ["heliostat"], None)


def render() -> dict[str, str]:
    """The content of each file."""
    files: dict[str, str] = {}
    for words, text in commands():
        name = f"{words[1] if len(words) > 1 else words[0]}.txt"
        lines = "\n".join(line.rstrip() for line in text.splitlines())
        files[name] = files.get(name, "") + f"$ {' '.join(words)} --help\n{lines}\n\n"
    return files


def write() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for name, text in render().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    write()
