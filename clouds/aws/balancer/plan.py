"""The target groups and listener rules that an ALB needs for a service's backends. No call is made here.

    rule            the header names a backend → that backend's own group; any other value of it → 503
    rule, default   all the rest → the versions' groups by weight; without traffic → 503
    group           one for each backend, of it alone; one for each version, of its clusters that have traffic

With gRPC the same again, for content type ``application/grpc*``, in groups that speak it. A version's clusters share
one group, since an ALB spares an unhealthy target within a group, but never a whole group: with one group for each
cluster a dead head would keep its share.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clouds.contract.balancer import Backend
from clouds.contract.errors import BadConfig
from clouds.contract.machines import OWNER_TAG
from heliostat.models.services import BACKEND_HEADER

if TYPE_CHECKING:
    from types_boto3_elbv2.type_defs import (
        ActionOutputTypeDef,
        ActionTypeDef,
        FixedResponseActionConfigTypeDef,
        ForwardActionConfigTypeDef,
        RuleConditionTypeDef,
        RuleTypeDef,
        TargetGroupTupleTypeDef,
    )

SERVICE_TAG, BACKEND_TAG = "heliostat-service", "heliostat-backend"
MAX_GROUPS = 5
"""That one forward action may name (quota of ALB, not adjustable)."""
MAX_WEIGHT = 999
HEALTH_PATH = "/-/healthz"
_ID = re.compile(r"[A-Za-z0-9_-]{1,60}")
_ADDRESS = re.compile(r"(\d{1,3}(?:\.\d{1,3}){3}):(\d{1,5})")

SPECIFIC = {"grpc": range(1, 10_000), "http": range(10_000, 20_000)}
"""Priorities of the rules that name a backend: those for gRPC first."""
OTHERS, GRPC = 30_000, 40_000
"""Of the rule for any other value of the header, and of that for gRPC's traffic."""

Target = tuple[str, int]
"""IPv4 address and port."""
Conditions = tuple[tuple[str, tuple[str, ...]], ...]
"""Headers (in lower case) and the patterns of which one must match; all of them must."""
Forward = tuple[tuple[str, int], ...]
"""Groups' names and weights; empty: 503."""


@dataclass(frozen=True)
class Group:
    name: str
    kind: str
    """``http`` or ``grpc``."""
    targets: frozenset[Target]
    tags: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Plan:
    groups: dict[str, Group]
    rules: dict[Conditions, tuple[range, Forward]]
    """By conditions: the priorities that it may have, and where it leads."""
    default: Forward


def prefix(service_id: str) -> str:
    """Of the names of all that is a service's: names are 32 characters at most, and unique in account and region."""
    return f"hs-{hashlib.sha256(service_id.encode()).hexdigest()[:12]}"


def group_name(service_id: str, kind: str, of: str) -> str:
    return f"{prefix(service_id)}-{hashlib.sha256(f'{kind} {of}'.encode()).hexdigest()[:15]}"


def plan(service_id: str, installation_id: str, backends: list[Backend]) -> Plan:
    """Raises BadConfig for what no ALB can have: see ``check``."""
    check(backends)
    groups: dict[str, Group] = {}
    rules: dict[Conditions, tuple[range, Forward]] = {}
    own = ((OWNER_TAG, installation_id), (SERVICE_TAG, service_id))
    forwards: dict[str, Forward] = {}
    for kind in ("http", "grpc"):
        mine = [b for b in backends if kind == "http" or b.grpc]
        more = (("content-type", ("application/grpc*",)),) if kind == "grpc" else ()
        for position, b in enumerate(backends):
            if b in mine:
                name = group_name(service_id, kind, f"backend {b.id}")
                tags = (*own, (BACKEND_TAG, _written(position, b)))
                groups[name] = Group(name, kind, frozenset([_target(b, kind)]), tags)
                rules[_conditions((BACKEND_HEADER, (b.id,)), *more)] = SPECIFIC[kind], ((name, 1),)
        versions: dict[str, int] = {}
        for b in mine:
            versions[b.version_id] = max(versions.get(b.version_id, 0), b.weight)
        # One without traffic is named too, as far as there is room: so its health is known when it gets some.
        chosen = sorted(versions, key=lambda v: versions[v] == 0)[:MAX_GROUPS]
        for version in chosen:
            name = group_name(service_id, kind, f"version {version}")
            of_it = [b for b in mine if b.version_id == version]
            busy = [b for b in of_it if b.weight] or of_it
            groups[name] = Group(name, kind, frozenset(_target(b, kind) for b in busy), own)
        traffic = any(versions.values())
        forwards[kind] = tuple((group_name(service_id, kind, f"version {v}"), versions[v]) for v in chosen if traffic)
        if kind == "grpc" and mine:
            rules[_conditions(*more)] = range(GRPC, GRPC + 1), forwards[kind]
    rules[_conditions((BACKEND_HEADER, ("*",)))] = range(OTHERS, OTHERS + 1), ()
    return Plan(groups, rules, forwards["http"])


def check(backends: list[Backend]) -> None:
    """Raises BadConfig for an id or an address that cannot be one, one cluster twice, two weights (but for 0) of one
    version, and more versions with traffic than an ALB takes."""
    weights: dict[str, int] = {}
    seen = set()
    for b in backends:
        wrong = ""
        if not _ID.fullmatch(b.id) or not _ID.fullmatch(b.version_id):
            wrong = "has an invalid id"
        elif not _ADDRESS.fullmatch(b.http) or (b.grpc and not _ADDRESS.fullmatch(b.grpc)):
            wrong = f"has no address of the form IPv4:port: {b.http!r}, {b.grpc!r}"
        elif b.id in seen:
            wrong = "is there twice"
        elif b.weight > MAX_WEIGHT:
            wrong = f"has weight {b.weight}; an ALB takes {MAX_WEIGHT}"
        elif b.weight and weights.setdefault(b.version_id, b.weight) != b.weight:
            wrong = f"has weight {b.weight}; another one of its version has {weights[b.version_id]}"
        if wrong:
            raise BadConfig(f"Backend {b.id!r} of version {b.version_id!r} {wrong}.", resource=b.id)
        seen.add(b.id)
    if len(weights) > MAX_GROUPS:
        raise BadConfig(f"{len(weights)} versions have traffic; an ALB supports {MAX_GROUPS} at most.")


def read(tags: dict[str, str]) -> tuple[int, Backend] | None:
    """The backend whose own group has these tags, and its position."""
    parts = tags.get(BACKEND_TAG, "").split("/")
    if len(parts) != 6 or not parts[0].isdigit() or not parts[5].isdigit():
        return None
    position, backend_id, version_id, http, grpc, weight = parts
    found = Backend(id=backend_id, version_id=version_id, http=http, grpc=grpc, weight=int(weight))
    return int(position), found


def conditions_of(rule: RuleTypeDef) -> Conditions:
    """Of one rule as DescribeRules returns it."""
    configs = [c["HttpHeaderConfig"] for c in rule["Conditions"] if c["Field"] == "http-header"]
    return _conditions(*((c["HttpHeaderName"], tuple(c["Values"])) for c in configs))


def conditions_for(conditions: Conditions) -> list[RuleConditionTypeDef]:
    return [
        {"Field": "http-header", "HttpHeaderConfig": {"HttpHeaderName": name, "Values": list(values)}}
        for name, values in conditions
    ]


def forward_of(actions: list[ActionOutputTypeDef]) -> Forward:
    """Of actions as ELB returns them; names of groups come from their ARNs."""
    forward = next((a for a in actions if a["Type"] == "forward"), None)
    if forward is None:
        return ()
    named = forward.get("ForwardConfig", {}).get("TargetGroups") or [{"TargetGroupArn": forward["TargetGroupArn"]}]
    return tuple(sorted((g["TargetGroupArn"].split("/")[1], int(g.get("Weight", 1))) for g in named))


def actions_for(forward: Forward, arns: dict[str, str]) -> list[ActionTypeDef]:
    if not forward:
        said: FixedResponseActionConfigTypeDef = {
            "StatusCode": "503",
            "ContentType": "text/plain",
            "MessageBody": "There is no backend for this request.",
        }
        return [{"Type": "fixed-response", "FixedResponseConfig": said}]
    groups: list[TargetGroupTupleTypeDef] = [
        {"TargetGroupArn": arns[name], "Weight": weight} for name, weight in sorted(forward)
    ]
    config: ForwardActionConfigTypeDef = {
        "TargetGroups": groups,
        "TargetGroupStickinessConfig": {"Enabled": False},
    }
    return [{"Type": "forward", "ForwardConfig": config}]


def _conditions(*headers: tuple[str, tuple[str, ...]]) -> Conditions:
    return tuple(sorted((name.lower(), values) for name, values in headers))


def _written(position: int, b: Backend) -> str:
    """At most 256 characters, of those that a tag may have."""
    return f"{position}/{b.id}/{b.version_id}/{b.http}/{b.grpc}/{b.weight}"


def _target(b: Backend, kind: str) -> Target:
    found = _ADDRESS.fullmatch(b.http if kind == "http" else b.grpc)
    assert found is not None  # check
    return found[1], int(found[2])
