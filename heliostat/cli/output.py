"""What the command line prints: results on stdout as text, JSON or YAML, everything else on stderr.

With ``-o json`` or ``-o yaml`` stdout holds one document or nothing, and stderr nothing but the error, as one document
``{"error": {code, detail, remedy, …}}``: the problem+json of the API plus ``exit_code``. Env values are never printed.
"""

from __future__ import annotations

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
    """One line a row. On a terminal the last column is cut at its width; in a pipe nothing is."""
    cells = [["" if c is None else " ".join(str(c).split()) for c in row] for row in rows]
    if not cells:
        return empty
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    lines = []
    for number, line in enumerate([list(columns), *cells]):
        room = limit - sum(w + 2 for w in widths[:-1])
        last = line[-1]
        if limit and 8 < room < len(last):
            last = last[: room - 1] + "…"
        plain = [*(cell.ljust(width) for cell, width in zip(line[:-1], widths[:-1], strict=True)), last]
        if number and coloured(sys.stdout):
            plain = [_painted(cell) for cell in plain]
        lines.append("  ".join(plain).rstrip())
    return "\n".join(lines)


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


def coloured(stream: Any) -> bool:
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR")


def _painted(cell: str) -> str:
    colour = colour_of(cell.strip())
    return typer.style(cell, fg=colour) if colour else cell


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
