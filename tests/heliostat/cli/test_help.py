"""The help of every command is as committed: a change of words is seen in a review."""

from __future__ import annotations

import pytest

from heliostat.cli import app as cli
from tests.heliostat.cli.snapshots import FOLDER, commands, render

HOW = "Look at the change, then run: python -m tests.heliostat.cli.snapshots"


def test_help_is_as_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        shown = render()
        assert sorted(p.name for p in FOLDER.glob("*.txt")) == sorted(shown), HOW
        for name, text in shown.items():
            assert (FOLDER / name).read_text() == text, f"{name}: {HOW}"


def test_every_command_and_option_is_explained() -> None:
    for words, text in commands():
        assert len(text.splitlines()) > 4, words
    for words, command in leaves():
        for parameter in command.params:
            named = parameter.name in ("ref", "name", "project", "user", "token_id") and not parameter.opts[
                0
            ].startswith("-")
            assert named or getattr(parameter, "help", None), (words, parameter.name)


def test_what_is_committed_is_what_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "102")  # click leaves two columns free
    assert cli.main(["job", "submit", "--help"]) == 0
    printed = capsys.readouterr().out
    shown = next(text for words, text in commands() if words == ["heliostat", "job", "submit"])
    assert " ".join(printed.split()) == " ".join(shown.split())


def leaves():  # type: ignore[no-untyped-def]
    import typer.main

    def walk(command, words):  # type: ignore[no-untyped-def]
        if hasattr(command, "commands"):
            for name, sub in command.commands.items():
                yield from walk(sub, [*words, name])
        else:
            yield words, command

    return walk(typer.main.get_command(cli.app), [])
