"""The command ``heliostat``.

Exit codes: 0 success · 1 the request must change · 2 the infrastructure failed · 3 a requested time limit ran out ·
4 not logged in or not allowed · 10 the workload failed · 130 Ctrl-C: the job, cluster or service keeps running.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli import clouds, clusters, compute_configs, jobs, login, options, schedules, users
from heliostat.cli.output import Format, screen, show_error
from heliostat.cli.services import commands as services
from heliostat.errors import HeliostatError, InvalidRequest

EXIT_CODES = (
    "Exit codes: 0 success, 1 user error, 2 infrastructure failure, 3 time limit, 4 not logged in or not allowed, "
    "10 the workload failed, 130 Ctrl-C (the job, cluster or service keeps running)."
)

# No rich help: it triples the time that `--help` takes. No rich tracebacks: they can show values.
app = typer.Typer(
    name="heliostat",
    help="Run Ray clusters, jobs and services on your own machines and cloud accounts.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for noun in (
    jobs.app, services.app, clusters.app, compute_configs.app, schedules.app, clouds.app,
    users.projects, users.users, users.tokens,
):  # fmt: skip
    app.add_typer(noun)
for command in (login.login, login.whoami, login.version):
    app.command()(command)

# What an invalid command line raises: click's, or typer's own copy of click, depending on typer's version.
_USAGE_ERRORS = tuple(c for c in typer.BadParameter.__mro__ if issubclass(c, Exception) and c is not Exception)


@app.callback()
def _before(
    host: Annotated[
        str | None,
        typer.Option("--host", help="URL of the API. Default: HELIOSTAT_HOST, your login, the stack on this machine."),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="File with the API token. Default: HELIOSTAT_TOKEN, your login.")
    ] = None,
) -> None:
    options.flags.host = host
    options.flags.token_file = token_file
    screen.format = Format.TEXT


def main(args: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    screen.format = Format.TEXT
    try:
        code = app(args=args, prog_name="heliostat", standalone_mode=False)
    except HeliostatError as error:
        show_error(error)
        return error.exit_code
    except _USAGE_ERRORS as error:
        screen.format = _requested_format(sys.argv[1:] if args is None else args)
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "heliostat"
        message = error.format_message()  # type: ignore[attr-defined]
        hint = " Put the job's command after --." if command.endswith("job submit") else ""
        show_error(InvalidRequest(message, remedy=f"`{command} --help` shows its options.{hint}"))
        return InvalidRequest.exit_code
    except typer.Abort:
        print(file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0


def _requested_format(args: list[str]) -> Format:
    """The -o of a command line that could not be parsed."""
    words = args[: args.index("--")] if "--" in args else args
    for word, following in zip(words, [*words[1:], ""], strict=True):
        value = following if word in ("-o", "--output") else word.removeprefix("--output=").removeprefix("-o")
        if word.startswith(("-o", "--output")) and value in tuple(Format):
            return Format(value)
    return Format.TEXT


if __name__ == "__main__":
    sys.exit(main())
