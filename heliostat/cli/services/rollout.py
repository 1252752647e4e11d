"""``heliostat service rollout``: control the current rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.cli import options
from heliostat.cli.output import Format, note, screen, show
from heliostat.cli.services import view as service_view
from heliostat.errors import HeliostatError, InvalidRequest

if TYPE_CHECKING:
    from heliostat.client.client import Client
    from heliostat.models.services import Service
from heliostat.cli.services.shared import CommandWait, Ref, check_limit

rollout = typer.Typer(name="rollout", help="Control the current rollout.", no_args_is_help=True, rich_markup_mode=None)


@rollout.command()
def pause(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Pause the rollout. It stays at its percentage until you resume, promote or abort it."""
    _control(ref, "pause", "is paused", project)


@rollout.command()
def resume(
    ref: Ref,
    wait: CommandWait = False,
    timeout_s: options.WaitLimit = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Resume a paused rollout, step by step."""
    _control(ref, "resume", "is resumed", project, wait=wait, timeout_s=timeout_s)


@rollout.command()
def promote(
    ref: Ref,
    percent: Annotated[
        int | None, typer.Option("--percent", help="Percent of traffic for the new version, then pause. Default: 100.")
    ] = None,
    wait: CommandWait = False,
    timeout_s: options.WaitLimit = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Send traffic to the new version now, without further steps."""
    _control(ref, "promote", f"is promoted to {percent or 100} %", project, percent, wait=wait, timeout_s=timeout_s)


@rollout.command()
def abort(
    ref: Ref,
    wait: CommandWait = False,
    timeout_s: options.WaitLimit = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Abort the rollout: all traffic returns to the previous version."""
    _control(
        ref, "abort", "is aborted; the traffic returns to the previous version", project, wait=wait, timeout_s=timeout_s
    )


def _control(
    ref: str,
    action: str,
    done: str,
    project: str | None,
    percent: int | None = None,
    *,
    wait: bool = False,
    timeout_s: float | None = None,
) -> None:
    if percent is not None and not 1 <= percent <= 100:
        raise InvalidRequest(
            f"--percent {percent} is not a percentage.", remedy="Give a number from 1 to 100.", field="percent"
        )
    check_limit(wait, timeout_s)
    with options.connect() as client:
        before = client.services.get(ref, project=project) if wait else None
        service = client.services.rollout(ref, action, percent=percent, project=project)
        text = f"The rollout of service {service.name} {done}."
        show_result(client, before, service, text, action, percent, timeout_s)


def show_result(
    client: Client,
    before: Service | None,
    service: Service,
    text: str,
    action: str | None,
    percent: int | None,
    timeout_s: float | None,
) -> None:
    """Shows what was accepted or, with ``--wait``, the result. ``before``: the service before the command; None: do
    not wait."""
    if before is None:
        show(service, lambda: text + "\n" + service_view.next_commands(service))
        return
    note(text)
    last = followed(service, lambda seen: service_view.follow_command(client, before, action, percent, timeout_s, seen))
    show(last, lambda: service_view.status(last))


def followed(service: Service, follow: Callable[[Callable[[Service], None]], Service]) -> Service:
    """Waits. In JSON and YAML a failure shows the service too, in its last known state."""
    last = service

    def seen(now: Service) -> None:
        nonlocal last
        last = now

    try:
        return follow(seen)
    except HeliostatError:
        if not screen.text:
            show(last, str)
        raise
