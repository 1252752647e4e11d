"""The views of a service: its status, the status line of a wait, the live table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from heliostat.cli import live
from heliostat.cli.output import (
    age,
    colour_of,
    coloured,
    duration,
    facts,
    is_terminal,
    next_steps,
    note,
    table,
    tags,
    write,
)

if TYPE_CHECKING:
    from heliostat.client.client import Client
    from heliostat.models.common import Condition
    from heliostat.models.services import Service, ServiceDeploy, ServiceVersion

COLUMNS = ["VERSION", "STATE", "WEIGHT", "CLUSTERS", "REQUESTS", "REQ/S", "ERRORS", "P50", "P95", "FOR", "REASON"]


def follow_deploy(
    client: Client, service: Service, deploy: ServiceDeploy, timeout: float | None, on_change: Any
) -> Service:
    """``Services.wait_deployed`` with the status line; each shift of the traffic gets a line of its own.
    ``on_change`` gets each new state of the service."""
    with _following(service, on_change) as changed:
        return client.services.wait_deployed(service, deploy, timeout=timeout, on_change=changed)


def follow_command(
    client: Client, before: Service, action: str | None, percent: int | None, timeout: float | None, on_change: Any
) -> Service:
    """``Services.wait_steered`` with the status line."""
    with _following(before, on_change) as changed:
        return client.services.wait_steered(before, action, percent=percent, timeout=timeout, on_change=changed)


@contextmanager
def _following(service: Service, on_change: Any) -> Iterator[Callable[[Service], None]]:
    with live.status_line() as line, _detachable(service):
        steps = Steps(line)

        def changed(now: Service) -> None:
            on_change(now)
            steps.show(now)
            line.update(*waiting(now))

        yield changed


def wait_for(client: Client, service: Service, state: Any, timeout: float | None) -> Service:
    """``Services.wait`` with the status line."""
    with live.status_line() as line, _detachable(service):
        return client.services.wait(
            service.id, state=state, timeout=timeout, on_change=lambda now: line.update(*waiting(now))
        )


@contextmanager
def _detachable(service: Service) -> Iterator[None]:
    with live.detachable(
        f"service {service.name}",
        f"heliostat service status --watch {service.name}  watch it",
        f"heliostat service rollout abort {service.name}   return to the previous version",
    ):
        yield


class Steps:
    """Prints on stderr how the traffic shifts, step by step."""

    def __init__(self, line: live.StatusLine) -> None:
        self.line = line
        self.shown = ""

    def show(self, service: Service) -> None:
        text = weights(service)
        if service.rollout is not None and service.rollout.state == "paused":
            text += ", paused"
        if not text or text == self.shown:
            return
        self.shown = text
        self.line.clear()
        seen = service.rollout.observed if service.rollout is not None else ""
        note(f"  {text}" + (f"  ({seen.rstrip('.')})" if seen else ""))


def weights(service: Service) -> str:
    """``v2 25 % · v1 75 %``: who has traffic, newest first."""
    having = sorted((v for v in service.versions if v.weight), key=lambda v: -v.number)
    return " · ".join(f"{v.name} {v.weight} %" for v in having)


def waiting(service: Service) -> tuple[str, datetime | None]:
    """What the service waits for, and since when."""
    text = f"Service {service.name}: {service.state}"
    rollout = service.rollout
    version = next((v for v in service.versions if rollout is not None and v.id == rollout.version_id), None)
    version = version or next((v for v in service.versions if v.state in ("STARTING", "UPDATING")), None)
    unmet = next((c for c in version.checklist if not c.status), None) if version is not None else None
    if rollout is not None and rollout.state == "paused":
        return f"{text}, paused at {rollout.percent} %", rollout.since
    if rollout is not None and version is not None and rollout.state == "holding":
        held = f" ({version.config.rollout.hold_s:g} s a step)"
        return f"{text}, {version.name} is observed at {rollout.percent} %{held}", rollout.since
    if version is not None and unmet is not None:
        what = unmet.message or unmet.reason or f"its {unmet.type.lower()}"
        return f"{text}, {version.name} waits for {what}{_usually(service, version, unmet)}", unmet.since
    return text + (f", waits for {service.waits_for}" if service.waits_for else ""), service.state_since


def _usually(service: Service, version: ServiceVersion, unmet: Condition) -> str:
    """How long the same took the newest version that has been through it, counted from its deploy."""
    for other in sorted(service.versions, key=lambda v: -v.number):
        for condition in other.checklist:
            if other.id != version.id and condition.type == unmet.type and condition.status:
                took = (condition.since - other.created_at).total_seconds()
                return f" ({other.name}: {duration(took)} after its deploy)"
    return ""


def status(service: Service) -> str:
    text = facts(_facts(service))
    text += "\n\n" + table(COLUMNS, [_row(v) for v in _shown(service)], empty="No version yet.")
    unmet = [
        (v.name, c.type, age(c.since), c.message or c.reason)
        for v in _shown(service)
        if v.state not in ("TERMINATING", "TERMINATED")
        for c in v.checklist
        if not c.status
    ]
    if unmet:
        text += "\n\n" + table(["VERSION", "CONDITION", "FOR", "WAITS FOR"], unmet, empty="")
    return text + "\n" + next_commands(service)


def _facts(service: Service) -> list[tuple[str, Any]]:
    lasting = f"{service.state} for {age(service.state_since)}"
    if service.state.settled:
        lasting = f"{service.state} {age(service.ended_at or service.state_since)} ago"
    return [
        ("Service", f"{service.name} ({service.id})"),
        ("State", lasting),
        ("Reason", service.reason),
        ("Waits for", service.waits_for),
        ("URL", service.query_url),
        ("Tokens", _tokens(service)),
        ("Rollout", rollout_line(service)),
        ("Cloud", service.cloud),
        ("Created", f"{age(service.created_at)} ago by {service.created_by} in project {service.project}"),
        ("Tags", tags(service.tags)),
    ]


def _tokens(service: Service) -> str:
    """The ids of the tokens while there are two; the request below carries the primary one."""
    if len(service.query_auth_tokens) < 2:
        return ""
    return ", ".join(
        f"{t.id} ({'primary' if t.primary else 'second'}{'' if t.active else ', not accepted by every proxy yet'})"
        for t in service.query_auth_tokens
    )


def rollout_line(service: Service) -> str:
    """``to v2: holding at 25 % (5 → 25 → 50 → 100), next step in 7s; 120 requests, no error``."""
    rollout = service.rollout
    if rollout is None:
        return ""
    from heliostat.models.common import utcnow

    names = {v.id: v.name for v in service.versions}
    text = f"to {names.get(rollout.version_id, rollout.version_id)}: {rollout.state} at {rollout.percent} %"
    if rollout.steps:
        text += f" ({' → '.join(str(step) for step in rollout.steps)})"
    if rollout.state == "holding" and rollout.holds_until is not None:
        text += f", for another {age(utcnow(), rollout.holds_until)}"
    else:
        text += f" for {age(rollout.since)}"
    return text + (f"; {rollout.observed.rstrip('.')}" if rollout.observed else "")


def _shown(service: Service) -> list[ServiceVersion]:
    return sorted(service.versions, key=lambda v: -v.number)


def _row(version: ServiceVersion) -> list[str]:
    ended = version.state == "TERMINATED"
    weight = f"{version.weight} %"
    if version.target_weight != version.weight and not ended:
        weight += f" → {version.target_weight} %"
    ready = sum(c.ready for c in version.clusters)
    seen = version.traffic
    return [
        version.name,
        version.state,
        "" if ended else weight,
        "" if ended else f"{ready}/{len(version.clusters)}",
        f"{seen.requests:,}" if seen else "",
        f"{seen.requests_per_s:.1f}" if seen and not ended else "",
        f"{seen.errors:,}" if seen else "",
        _ms(seen.p50_ms) if seen and not ended else "",
        _ms(seen.p95_ms) if seen and not ended else "",
        age(version.state_since),
        version.reason,
    ]


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms"


def curl(service: Service) -> str:
    """A curl command for the service; "" while there is no URL."""
    if service.query_url is None or service.state.settled:
        return ""
    primary = next((v for v in service.versions if v.id == service.primary_version), None)
    version = primary or max(service.versions, key=lambda v: v.number, default=None)
    routes = [a.route_prefix for a in version.config.applications if a.route_prefix] if version else ["/"]
    if not routes:
        return ""  # gRPC alone
    token = service.query_auth_token
    header = f'-H "Authorization: Bearer {token}" ' if token else ""
    return f"curl {header}{shlex.quote(service.query_url.rstrip('/') + routes[0])}"


def next_commands(service: Service) -> str:
    name = service.name
    if service.state.settled:
        return next_steps(
            (f"heliostat service events {name}", "show its events"),
            (f"heliostat service delete {name}", "delete it with its tokens and versions"),
        )
    steps = [(f"heliostat service status --watch {name}", "watch its traffic")]
    if service.rollout is not None:
        steps += [
            (f"heliostat service rollout promote {name}", "send all traffic to the new version"),
            (f"heliostat service rollout abort {name}", "return to the previous version"),
        ]
    elif sum(v.state != "UNHEALTHY" for v in service.versions) > 1:
        steps.append((f"heliostat service rollback {name}", "return to the previous version"))
    steps += [
        (f"heliostat service logs -f {name}", "follow its log"),
        (f"heliostat service terminate {name}", "terminate it"),
    ]
    request = curl(service)
    return (f"\n  {request}\n" if request else "") + next_steps(*steps)


def watch(client: Client, service: Service) -> None:
    """A live table on a terminal; elsewhere a line per change. Until the service is terminated, or Ctrl-C."""
    back = f"heliostat service status --watch {service.name}  watch it again"
    with live.detachable(f"service {service.name}", back):
        states = client.services.watch(service.id)
        if is_terminal(sys.stdout):
            _draw(states)
            return
        shown = ""
        for now in states:
            text = change_line(now)
            if text != shown:
                shown = text
                write(text + "\n")


def change_line(service: Service) -> str:
    """A line of a log, without counters: it changes only with the service's state."""
    states = ", ".join(f"{v.name} {v.state} {v.weight} %" for v in _shown(service) if v.state != "TERMINATED")
    text = f"{service.state}" + (f"  {states}" if states else "")
    if service.rollout is not None:
        text += f"  rollout {service.rollout.state} at {service.rollout.percent} %"
    why = why_so(service)
    return text + (f"  ({why.rstrip('.')})" if why else "")


def why_so(service: Service) -> str:
    """What it waits for, or the reason of its state."""
    if service.waits_for and not service.state.settled:
        return f"waits for {service.waits_for}"
    return service.reason


def _draw(states: Iterator[Service]) -> None:
    from rich.console import Console
    from rich.live import Live

    live_table = _LiveTable(next(states))
    console = Console(no_color=not coloured(sys.stdout))
    with Live(live_table, console=console, refresh_per_second=4):
        for now in states:
            live_table.service = now


class _LiveTable:
    """rich redraws it several times a second, so times run on between two polls."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def __rich__(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        service = self.service
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in COLUMNS:
            right = column in ("WEIGHT", "CLUSTERS", "REQUESTS", "REQ/S", "ERRORS", "P50", "P95")
            wraps = column == "REASON"
            grid.add_column(column, justify="right" if right else "left", no_wrap=not wraps, overflow="ellipsis")
        for version in _shown(service):
            cells = [Text(cell, style=colour_of(cell) or "") for cell in _row(version)]
            grid.add_row(*cells)
        head = Text.assemble(
            f"{service.name}  ",
            (str(service.state), colour_of(str(service.state)) or ""),
            f" for {age(service.state_since)}  {service.query_url or ''}",
        )
        below = [("Rollout ", rollout_line(service)), ("", why_so(service))]
        return Group(head, grid, *(Text(label + text) for label, text in below if text))
