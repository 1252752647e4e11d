"""What the command line prints: results on stdout as text, JSON or YAML, everything else on stderr.

With ``-o json`` or ``-o yaml`` stdout holds one document or nothing, and stderr nothing but the error, as one document
``{"error": {code, detail, remedy, …}}``: the problem+json of the API plus ``exit_code``. Env values are never printed.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import typer

from heliostat.errors import HeliostatError

BROKEN_PIPE = 141
"""128 + SIGPIPE: whoever read us (``| head``) has had enough."""

MASKED = "********"

GAP = 2
"""Between the columns of a table."""
NARROWEST = 20
"""To which a terminal may squeeze the last column of a table."""


class Format(StrEnum):
    TEXT = "text"
    JSON = "json"
    YAML = "yaml"


class Screen:
    """The one output of this process. ``format`` is set as soon as ``-o`` has been read."""

    format: Format = Format.TEXT

    @property
    def text(self) -> bool:
        return self.format is Format.TEXT


screen = Screen()


def write(text: str) -> None:
    """To stdout, at once: a followed log must not sit in a buffer."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None


def note(text: str) -> None:
    """A remark for the person at the terminal; nothing in JSON and YAML."""
    if screen.text:
        print(text, file=sys.stderr, flush=True)


def show(result: Any, text: Callable[[], str]) -> None:
    """A resource or a list of them, in the format that was asked for."""
    if screen.text:
        write(text().rstrip("\n") + "\n")
        return
    items = [_plain(item) for item in result] if isinstance(result, list) else _plain(result)
    write(document(items))


def document(content: Any) -> str:
    if screen.format is Format.YAML:
        import yaml

        return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def show_error(error: HeliostatError) -> None:
    if screen.text:
        red = typer.style("error:", fg="red", bold=True) if coloured(sys.stderr) else "error:"
        lines = f"{red} {error.message}" + (f"\n  {error.remedy}" if error.remedy else "")
    else:
        lines = document({"error": {**error.to_problem(), "exit_code": error.exit_code}}).rstrip("\n")
    print(lines, file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str) -> str:
    """Columns without lines between them. On a terminal the last column is wrapped to its width; elsewhere each row is
    one line, however long, so that scripts can cut it."""
    cells = [["" if c is None else " ".join(str(c).split()) for c in row] for row in rows]
    if not cells:
        return empty
    # Here, not above: `--help` does without rich, which costs it half its time.
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    widths = [max(cell_len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    width = sum(widths) + GAP * (len(widths) - 1)
    if is_terminal(sys.stdout):
        fixed = width - widths[-1]  # never narrower: what is cut off is an id that somebody wants to copy
        width = min(width, max(shutil.get_terminal_size().columns, fixed + min(widths[-1], NARROWEST)))
    grid = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="")
    for name, least in zip(columns[:-1], widths[:-1], strict=True):
        grid.add_column(name, no_wrap=True, min_width=least)
    grid.add_column(columns[-1], overflow="fold")
    for line in cells:
        grid.add_row(*(Text(cell, style=colour_of(cell) or "") for cell in line))
    paint = coloured(sys.stdout)
    console = Console(file=io.StringIO(), width=width, force_terminal=paint, color_system="standard" if paint else None)
    with console.capture() as drawn:
        console.print(grid)
    return "\n".join(line.rstrip() for line in drawn.get().splitlines())


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """``label  value`` lines; what is empty is left out."""
    kept = [(label, str(value)) for label, value in pairs if value not in (None, "", [], {})]
    width = max((len(label) for label, _ in kept), default=0)
    return "\n".join(f"{label.ljust(width)}  {value}" for label, value in kept)


def next_steps(*steps: tuple[str, str]) -> str:
    """Commands that are likely to be wanted now."""
    width = max(len(command) for command, _ in steps)
    return "\n" + "\n".join(f"  {command.ljust(width)}   {what}" for command, what in steps)


def age(since: datetime | None, until: datetime | None = None) -> str:
    """``45s``, ``12m``, ``3h 20m``, ``5d``."""
    return "" if since is None else duration(((until or datetime.now(UTC)) - since).total_seconds())


def duration(seconds: float) -> str:
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{seconds:.1f}s" if 0 < seconds < 10 else f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60}s" if whole < 600 else f"{whole // 60}m"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60}m"
    return f"{whole // 86400}d"


def tags(pairs: dict[str, str]) -> str:
    return ", ".join(f"{k}={v}" for k, v in pairs.items())


def is_terminal(stream: Any) -> bool:
    """A dumb one (Emacs' shell, a CI's console) is written to as a file is."""
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def coloured(stream: Any) -> bool:
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def colour_of(word: str) -> str | None:
    """Of a state."""
    colours = {
        "RUNNING": "green",
        "SUCCEEDED": "green",
        "ENABLED": "green",
        "FAILED": "red",
        "LOST": "red",
        "ERROR": "red",
        "UNHEALTHY": "red",
    }
    passing = ["STARTING", "RECOVERING", "TERMINATING", "WARNING", "REQUESTED", "LAUNCHED"]
    passing += ["ROLLING_OUT", "ROLLING_BACK", "UPDATING"]
    return (colours | dict.fromkeys(passing, "yellow")).get(word)


def _plain(item: Any) -> Any:
    return _without_env(item.model_dump(mode="json") if hasattr(item, "model_dump") else item)


def _without_env(content: Any) -> Any:
    if isinstance(content, dict):
        return {
            k: dict.fromkeys(v, MASKED) if k == "env_vars" and isinstance(v, dict) else _without_env(v)
            for k, v in content.items()
        }
    if isinstance(content, list):
        return [_without_env(item) for item in content]
    return content
