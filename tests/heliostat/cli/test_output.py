"""Tables: for people at a terminal, and for scripts."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from heliostat.cli.output import table

COLUMNS = ["ID", "STATE", "NAME", "REASON"]
REASON = "the head was lost and no other machine of its type is to be had in any of the zones"
ROWS = [
    ("job-1", "RUNNING", "日本語", REASON),
    ("job-22", "FAILED", "b", None),
    ("job-3", "x", "[bold]c", "two\nlines"),
]
PLAIN = [
    "ID      STATE    NAME     REASON",
    f"job-1   RUNNING  日本語   {REASON}",
    "job-22  FAILED   b",
    "job-3   x        [bold]c  two lines",
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, **env: str) -> list[str]:
    for name, value in {"COLUMNS": str(columns), **env}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", Terminal())
    return table(COLUMNS, ROWS, empty="").split("\n")


@pytest.mark.parametrize("columns", ["20", "500"])
def test_in_a_pipe_each_row_is_a_line_of_plain_text(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's own: what scripts read stays as it is
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert table(COLUMNS, ROWS, empty="").split("\n") == PLAIN


def test_a_dumb_terminal_is_written_to_as_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_a_terminal(monkeypatch, 40, TERM="dumb") == PLAIN


def test_a_terminal_wraps_the_last_column_and_paints_states(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = on_a_terminal(monkeypatch, 60)
    assert "\033[32mRUNNING" in lines[1]
    assert "\033[31mFAILED" in lines[4]
    bare = [re.sub(r"\033\[[0-9;]*m", "", line) for line in lines]
    assert on_a_terminal(monkeypatch, 60, NO_COLOR="1") == bare
    assert bare[:2] == [PLAIN[0], "job-1   RUNNING  日本語   the head was lost and no other"]
    assert all(line.startswith(" " * 26) for line in bare[2:4])
    assert " ".join(line[26:] for line in bare[2:4]).strip() in REASON


def test_nothing_is_ever_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(" ".join(on_a_terminal(monkeypatch, 10, NO_COLOR="1")).split())
    for word in [*COLUMNS, "job-22", "RUNNING", "日本語", "[bold]c", *REASON.split()]:
        assert word in text


def test_a_wide_terminal_wraps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_a_terminal(monkeypatch, 300, NO_COLOR="1") == PLAIN


def test_no_rows_are_said_in_words() -> None:
    assert table(COLUMNS, [], empty="No jobs.") == "No jobs."


def test_rich_is_imported_with_the_first_row() -> None:
    code = (
        "import sys; from heliostat.cli.output import table\n"
        "table(['A'], [], empty='x'); print('rich' in sys.modules)\n"
        "table(['A'], [['1']], empty='x'); print('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "True"]


ROOT = Path(__file__).parents[3]
