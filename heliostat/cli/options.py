"""Options that several commands share, and the client of a command."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from heliostat.cli.output import Format, note, screen
from heliostat.errors import HeliostatError, InvalidRequest

if TYPE_CHECKING:
    from heliostat.client.client import Client
    from heliostat.client.sources import Document

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)


def _remember(value: Format) -> Format:
    screen.format = value
    return value


Output = Annotated[
    Format,
    typer.Option("-o", "--output", callback=_remember, is_eager=True, help="Output format: text, json or yaml."),
]
Name = Annotated[str | None, typer.Option("-n", "--name", help="Name.")]
Project = Annotated[str | None, typer.Option("--project", help="Project. Default: yours, if you have only one.")]
Tags = Annotated[list[str] | None, typer.Option("--tag", metavar="K=V", help="Tag; can be repeated.")]
State = Annotated[list[str] | None, typer.Option("--state", help="Only those in this state; can be repeated.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Maximum number of results, newest first.")]
Reason = Annotated[str, typer.Option("--reason", help="Reason, recorded in the events.")]
Wait = Annotated[bool, typer.Option("-w", "--wait", help="Wait until it is done. No time limit.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and print the plan and its price; create nothing.")
]
WaitLimit = Annotated[
    float | None, typer.Option("-t", "--timeout-s", min=0, help="Stop waiting after this many seconds (exit 3).")
]
EventLimit = Annotated[int, typer.Option("--limit", min=1, help="Maximum number of events, the newest ones.")]

# Shared by jobs and services.
WorkingDir = Annotated[str | None, typer.Option("--working-dir", help="Directory to upload, or the URL of a zip.")]
Exclude = Annotated[
    list[str] | None,
    typer.Option("-e", "--exclude", help="Leave out of the upload: a pattern as in .gitignore; added to the file's."),
]
Requirements = Annotated[
    str | None, typer.Option("-r", "--requirements", help="requirements.txt to install on the nodes.")
]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="K=V", help="Environment variable; K alone reads the value from your environment."),
]
PyModule = Annotated[
    list[str] | None, typer.Option("--py-module", help="Package directory or .py file to make importable.")
]
ComputeConfigOf = Annotated[
    str | None, typer.Option("--compute-config", help="Compute config: NAME[:VERSION], id, or a YAML file.")
]


@dataclass
class Flags:
    """Options before the command: ``heliostat --host URL job list``."""

    host: str | None = None
    token_file: Path | None = None


flags = Flags()


@contextmanager
def connect(host: str | None = None, token: str | None = None) -> Iterator[Client]:
    """The client of this invocation. It reports repeated calls on stderr."""
    client = new_client(host or flags.host, token or _token_from_file())
    try:
        yield client
    finally:
        client.close()


def new_client(host: str | None, token: str | None) -> Client:
    # httpx imports its own command line with click, rich and pygments: a quarter of a second, for nothing. It copes
    # with that import failing, and a None here makes it fail.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    from heliostat.client.client import Client

    return Client(host, token, on_retry=RetryNotice())


class RetryNotice:
    """Reports repeated calls: the second failure in a row, then every twentieth."""

    def __init__(self) -> None:
        self.message = ""
        self.times = 0

    def __call__(self, error: HeliostatError, delay: float) -> None:
        self.times = self.times + 1 if error.message == self.message else 1
        self.message = error.message
        if self.times == 2 or self.times % 20 == 0:  # one failure is not worth a line
            note(f"{error.message} Retrying.")


def pairs(values: Iterable[str] | None, option: str) -> dict[str, str]:
    """``["a=1", "b=2"]`` → ``{"a": "1", "b": "2"}``."""
    found = {}
    for value in values or ():
        key, sign, rest = value.partition("=")
        if not sign or not key:
            raise InvalidRequest(
                f"{option} {value!r} is not of the form KEY=VALUE.", remedy=f"Write e.g. {option} team=search."
            )
        found[key] = rest
    return found


def env_vars(values: Iterable[str]) -> dict[str, str]:
    """``["A=1", "B"]`` → ``{"A": "1", "B": <the environment's>}``."""
    from heliostat.client.yaml_files import from_shell

    found = {}
    for value in values:
        key, sign, rest = value.partition("=")
        if not key:
            raise InvalidRequest(
                "--env needs a name.",
                remedy="Write --env KEY=VALUE, or --env KEY to read the value from your environment.",
                field="env_vars",
            )
        found[key] = rest if sign else from_shell(key, f"--env: {key}")
    return found


def compute_config(value: str | None) -> str | Document | None:
    """The value of ``--compute-config``; a file's content."""
    if value is not None and value.endswith((".yaml", ".yml", ".json")):
        from heliostat.client.sources import load

        return load(value)
    return value


def choices(values: list[str] | None, states: type[E], option: str) -> list[E]:
    return [found for value in values or () if (found := choice(value, states, option))]


def choice(value: str | None, states: type[E], option: str) -> E | None:
    if value is None:
        return None
    try:
        return states(value.upper())
    except ValueError:
        raise InvalidRequest(
            f"{option} {value!r} is not a valid state.", remedy=f"Choose one of {', '.join(states)}."
        ) from None


def first(items: Iterator[T], limit: int, what: str) -> list[T]:
    """The first ``limit`` items. Says on stderr when there are more."""
    found = list(itertools.islice(items, limit))
    if len(found) == limit and next(items, None) is not None:
        note(f"There are more {what}. Show them with --limit {limit * 10}, or filter with --state and --name.")
    return found


def show_events(events: Iterator[Any], limit: int) -> None:
    from collections import deque

    from heliostat.cli.output import age, show, table

    found = list(deque(events, maxlen=limit))
    show(
        found,
        lambda: table(
            ["AGE", "LEVEL", "EVENT", "ACTOR", "MESSAGE"],
            [(age(e.at), e.level, e.kind, e.actor, e.message) for e in found],
            empty="No events yet.",
        ),
    )


def _token_from_file() -> str | None:
    if flags.token_file is None:
        return None
    try:
        return flags.token_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"--token-file {flags.token_file} can't be read: {error}.", remedy="Name a file with an API token."
        ) from error
