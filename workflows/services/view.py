"""A service as others see it: the resource for the records, the page in the Temporal UI. Pure."""

from __future__ import annotations

from heliostat.models.services import (
    ApplicationConfig,
    Rollout,
    Service,
    ServiceCluster,
    ServiceConfig,
    ServiceVersion,
)
from runtime.messages.services import ServiceInput
from workflows.services.rollout_state import RolloutKind
from workflows.services.state import ServiceData, Slot, VersionData

NO_CONFIG = ServiceConfig(applications=[ApplicationConfig(import_path="see:records")])
"""Only the records hold a version's applications; whoever reads a version from them fills its config in."""


def service_resource(arg: ServiceInput, s: ServiceData) -> Service:
    return Service(
        id=arg.service_id,
        name=arg.name,
        project=arg.project,
        cloud=arg.cloud,
        state=s.state,
        reason=s.reason,
        waits_for=s.waits_for,
        endpoint_trouble=s.endpoint_trouble,
        query_url=s.url or None,
        gate_hashes=s.gate_hashes,
        primary_version=s.primary,
        previous_version=s.previous if s.previous in s.versions else None,
        canary_version=s.rollout.version_id if s.rollout and s.rollout.kind == RolloutKind.STEPS else None,
        rollout=rollout_resource(s),
        created_by=arg.created_by,
        created_at=arg.created_at,
        state_since=s.state_since,
        ended_at=s.state_since if s.state.settled else None,
        tags=arg.tags,
        revision=s.revision,
    )


def rollout_resource(s: ServiceData) -> Rollout | None:
    r = s.rollout
    if r is None:
        return None
    return Rollout(
        version_id=r.version_id,
        from_version_id=max(r.base, key=lambda v: r.base[v]) if r.base else None,
        percent=r.percent,
        steps=r.steps,
        state="paused" if r.paused else r.doing,
        since=r.since,
        holds_until=r.holds_until,
        observed=r.observed,
    )


def version_resource(arg: ServiceInput, s: ServiceData, v: VersionData) -> ServiceVersion:
    now = {b.version_id: b.weight for b in s.backends if b.weight}
    target = s.weights.get(v.spec.id, 0)
    if s.rollout is not None and v.spec.id == s.rollout.version_id:
        target = s.rollout.target.get(v.spec.id, 100)
    return ServiceVersion(
        id=v.spec.id,
        service_id=arg.service_id,
        name=v.spec.name,
        number=v.spec.number,
        state=v.state,
        reason=v.reason,
        weight=now.get(v.spec.id, 0),
        target_weight=target,
        config=NO_CONFIG,
        clusters=[_cluster(s, slot) for slot in v.all_slots if slot.cluster_id],
        checklist=list(v.checklist.values()),
        created_by=v.spec.created_by,
        created_at=v.spec.created_at,
        state_since=v.state_since,
        kept_until=v.kept_until,
        ended_at=v.ended_at,
    )


def _cluster(s: ServiceData, slot: Slot) -> ServiceCluster:
    return ServiceCluster(
        cluster_id=slot.cluster_id,
        state=str(slot.state),
        ready=any(b.id == slot.cluster_id and b.weight for b in s.backends),
        message=slot.notice or slot.message or slot.reason,
    )


def service_details(arg: ServiceInput, s: ServiceData) -> str:
    lines = [f"### {s.state} since {s.state_since:%Y-%m-%d %H:%M:%S} UTC", "", s.reason or ""]
    if s.waits_for:
        lines += ["", f"**Waits for** {s.waits_for}"]
    lines += ["", f"- endpoint {s.url or 'not created yet'}; created by {arg.created_by}; project {arg.project}"]
    if (r := s.rollout) is not None:
        until = f", held until {r.holds_until:%H:%M:%S}" if r.holds_until else ""
        version = s.versions[r.version_id].spec.name
        state = "paused" if r.paused else r.doing
        lines.append(f"- rollout of **{version}** ({r.kind}) at {r.percent} %, {state}{until}")
        if r.observed:
            lines.append(f"- observed in the last step: {r.observed}")
    versions = sorted(s.versions.values(), key=lambda v: v.spec.number)
    for v in versions:  # a list each, as the UI has no lists in lists and its tables no space between the columns
        if v.ended_at is not None:
            continue
        clusters = ", ".join(f"`{slot.cluster_id}` {slot.state}" for slot in v.all_slots if slot.cluster_id)
        share = f"{s.weights.get(v.spec.id, 0)} % of the traffic"
        lines += ["", f"#### {v.spec.name} {v.state}, {share}", "", _flat(v.reason), ""]
        lines += [f"- cluster {clusters}"] if clusters else []
        lines += [f"- interruption of cluster {s.number}'s head: {_flat(s.notice)}" for s in v.slots if s.notice]
        lines += [f"- cluster {s.number} starts, to replace cluster {s.relieves}" for s in v.relief]
        lines += [f"- cluster {s.number} was replaced: it is drained, then released" for s in v.leaving]
        lines += [
            f"- {'✓' if c.status else '…'} {c.type} since {c.since:%H:%M:%S}: {_flat(c.message or c.reason)}"
            for c in v.checklist.values()
        ]
    if ended := [(v, v.ended_at) for v in versions if v.ended_at is not None]:
        lines += ["", "#### Ended", ""]
        lines += [f"- {v.spec.name} **{v.state}** at {at:%H:%M:%S}: {_flat(v.reason)}" for v, at in ended]
    return "\n".join(lines)


def _flat(text: str) -> str:
    """On one line: Serve's reasons are tracebacks, and a second line would end the list."""
    return " ".join(text.split())
