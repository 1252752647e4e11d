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
from heliostat.cli.services.shared import OrderWait, Ref, check_limit

rollout = typer.Typer(
    name="rollout", help="Steer the rollout that is under way.", no_args_is_help=True, rich_markup_mode=None
)


@rollout.command()
def pause(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Stay at the present share until it is resumed, promoted or aborted."""
    _steer(ref, "pause", "stays where it is", project)


@rollout.command()
def resume(
    ref: Ref,
    wait: OrderWait = False,
    timeout_s: options.WaitLimit = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Go on step by step after a pause."""
    _steer(ref, "resume", "goes on", project, wait=wait, timeout_s=timeout_s)


@rollout.command()
def promote(
    ref: Ref,
    percent: Annotated[
        int | None, typer.Option("--percent", help="Give the new version this share and stop there; default: all.")
    ] = None,
    wait: OrderWait = False,
    timeout_s: options.WaitLimit = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Give the new version its traffic now, without further steps."""
    _steer(ref, "promote", f"goes to {percent or 100} %", project, percent, wait=wait, timeout_s=timeout_s)


@rollout.command()
def abort(
    ref: Ref,
    wait: OrderWait = False,
    timeout_s: options.WaitLimit = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Give all the traffic back to the version that ran."""
    _steer(ref, "abort", "is given up, the traffic goes back", project, wait=wait, timeout_s=timeout_s)


def _steer(
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
        raise InvalidRequest(f"--percent {percent} is no share.", remedy="Give 1 to 100.", field="percent")
    check_limit(wait, timeout_s)
    with options.connect() as client:
        before = client.services.get(ref, project=project) if wait else None
        service = client.services.rollout(ref, action, percent=percent, project=project)
        text = f"The rollout of service {service.name} {done}."
        ordered(client, before, service, text, action, percent, timeout_s)


def ordered(
    client: Client,
    before: Service | None,
    service: Service,
    text: str,
    action: str | None,
    percent: int | None,
    timeout_s: float | None,
) -> None:
    """Shows what was accepted or, where it is waited for, what came of it. ``before``: the service before the order, to
    wait; None: don't."""
    if before is None:
        show(service, lambda: text + "\n" + service_view.next_commands(service))
        return
    note(text)
    last = followed(service, lambda seen: service_view.follow_order(client, before, action, percent, timeout_s, seen))
    show(last, lambda: service_view.status(last))


def followed(service: Service, follow: Callable[[Callable[[Service], None]], Service]) -> Service:
    """A failure is shown as a document too: the service as it was seen last."""
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
