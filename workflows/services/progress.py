"""What a service and its versions wait for, in words. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from workflows.services.state import LIVING, ServiceData, VersionData

ENDPOINT = "the load balancer: "


class Line(NamedTuple):
    """One condition of a version's checklist."""

    kind: str
    status: bool
    reason: str
    message: str


def checklist(version: VersionData) -> list[Line]:
    slots = version.slots

    def line(kind: str, done: list[bool], good: str, waits: str) -> Line:
        count = "" if len(slots) == 1 else f" ({sum(done)} of {len(slots)})"
        if all(done):
            return Line(kind, True, "Ready", good + count)
        return Line(kind, False, "Waiting", waits.rstrip(": ") + count)

    def first(messages: list[str]) -> str:
        return next((message for message in messages if message), "")

    return [
        line(
            "Cluster",
            [s.ready for s in slots],
            "its cluster is ready",
            f"its cluster to be ready (10 to 30 s on a local cloud): {first([s.reason for s in slots if not s.ready])}",
        ),
        line(
            "Application",
            [s.taken and s.healthy for s in slots],
            "Serve reports it healthy",
            "Serve to report it healthy (usually 5 to 20 s after its cluster is ready): "
            f"{first([s.message for s in slots if not s.healthy])}",
        ),
        line(
            "Endpoint",
            [s.fit(version.spec.id) for s in slots],
            "it answers real requests through the load balancer",
            f"answers to real requests through the load balancer: {first([s.message for s in slots if s.healthy])}",
        ),
    ]


def waiting_on(s: ServiceData, endpoint_error: str) -> str:
    """What the service waits for, "" for nothing; ``endpoint_error``: of the newest call to its load balancer."""
    if endpoint_error or s.endpoint_trouble:
        return endpoint_error or f"{ENDPOINT}{s.endpoint_trouble}"
    r = s.rollout
    if r is None:
        return ""
    version = s.versions[r.version_id]
    if r.paused:
        return f"a user: the rollout of {version.spec.name} is paused at {r.percent} %"
    if r.doing == "holding":
        return f"the hold of {version.spec.name} at {r.percent} % to end"
    missing = next((c for c in version.checklist.values() if not c.status), None)
    if missing is not None and r.doing in ("starting", "shifting"):
        return f"{version.spec.name}: {missing.message}"
    return ""


def refresh(s: ServiceData, now: datetime) -> None:
    """Rewrites the texts of a state that comes from an older release.

    Danger: without it, a text that was reworded counts as a change, and a replay would write the records once more than
    the history did.
    """
    for version in s.versions.values():
        if version.state in LIVING:
            for line in checklist(version):
                version.condition(line.kind, line.status, now, line.reason, line.message)
    # An error of the endpoint's last call is not in the state: that its text goes away is a change.
    if s.terminate is None and not s.waits_for.startswith(ENDPOINT):
        s.waits_for = waiting_on(s, "")
