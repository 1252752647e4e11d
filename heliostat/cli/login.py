"""``heliostat login``, ``whoami`` and ``version``."""

from __future__ import annotations

import getpass
import sys
from typing import Annotated

import typer

from heliostat.cli import options
from heliostat.cli.output import Format, facts, note, show
from heliostat.errors import HeliostatError, InvalidRequest, UserError


def login(
    host: Annotated[
        str | None,
        typer.Option("--host", help="URL of the API. Default: your last login or the stack on this machine."),
    ] = None,
    token_stdin: Annotated[
        bool, typer.Option("--token-stdin", help="Read the token from stdin instead of a prompt.")
    ] = False,
    output: options.Output = Format.TEXT,
) -> None:
    """Log in: check an API token and save it in a file that only you can read."""
    from heliostat.client import config

    host = config.normal_host(host or options.flags.host or _known_host() or input("Host (http://…): "))
    token = (sys.stdin.readline() if token_stdin else _prompt(host)).strip()
    if not token:
        raise InvalidRequest("The token is empty.", remedy="An admin creates one with `heliostat token create`.")
    if not host.startswith(("https://", "http://127.", "http://localhost", "http://[::1]")):
        note(f"Warning: {host} does not use TLS. Others on the network can read the token.")
    with options.connect(host, token) as client:
        me = client.whoami()
    path = config.store(host, token)
    show(
        {"host": host, "user": me.user, "organization": me.organization, "credentials": str(path)},
        lambda: f"Logged in to {host} as {me.user} of {me.organization}. The token is in {path}.",
    )


def whoami(output: options.Output = Format.TEXT) -> None:
    """Show the authenticated user and the server."""
    with options.connect() as client:
        me = client.whoami()
        host = client.host
    show(
        me,
        lambda: facts(
            [
                ("Host", host),
                ("User", me.user),
                ("Role", me.role),
                ("Organization", me.organization),
                ("Projects", ", ".join(me.projects)),
                ("Server", me.server_version),
            ]
        ),
    )


def version(output: options.Output = Format.TEXT) -> None:
    """Show the versions of the client and the server."""
    from heliostat import __version__

    try:
        with options.connect() as client:
            server, host = client.whoami().server_version, client.host
    except HeliostatError as error:
        server, host = None, ""
        why = error.message
    show(
        {"client": __version__, "server": server, "host": host or None},
        lambda: f"client {__version__}\n" + (f"server {server} at {host}" if server else f"server unknown: {why}"),
    )


def _known_host() -> str | None:
    from heliostat.client import config

    try:
        return config.resolve().host
    except UserError:
        return None


def _prompt(host: str) -> str:
    if not sys.stdin.isatty():
        raise InvalidRequest(
            "There is no terminal to prompt for the token.", remedy="Pipe it in: heliostat login --token-stdin < FILE"
        )
    return getpass.getpass(f"Token for {host}: ")
