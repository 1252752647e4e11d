"""Names and contents of the parts of a service's load balancer: pure functions, no call.

A part says whose it is in its description, as JSON, since most kinds have no labels. The URL map's also has the
revision and a digest of the backends that it was made from, and is changed under its fingerprint alone: it is what
holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from clouds.contract.balancer import Backend, EndpointSpec
from clouds.contract.machines import OWNER_TAG
from clouds.gcp.account.session import name_of
from heliostat.models.clouds import GcpConfig
from heliostat.models.services import BACKEND_HEADER

OURS = "hs-[0-9a-f]{20}"
MAX_WEIGHT = 1000
"""Of one backend service among several (https://cloud.google.com/compute/docs/reference/rest/v1/regionUrlMaps)."""
STREAM_S = 24 * 3600
"""A request may take so long: websockets and streams."""
IDEMPOTENT = ("GET", "HEAD", "OPTIONS", "PUT", "DELETE")
_GRPC = {"header_name": "content-type", "prefix_match": "application/grpc"}
MATCHER = "all"


@dataclass(frozen=True)
class Target:
    """Where a backend's machine is."""

    instance: str
    zone: str


@dataclass(frozen=True)
class Group:
    """One endpoint of one machine, as a network endpoint group."""

    name: str
    target: Target
    address: str
    """``ip:port``."""
    grpc: bool

    @property
    def endpoint(self) -> dict[str, Any]:
        ip, _, port = self.address.rpartition(":")
        return {"instance": self.target.instance, "ip_address": ip, "port": int(port)}


def base(service_id: str) -> str:
    """In front of the names of all parts of one service."""
    return f"hs-{_hash(service_id)}"


def described(spec: EndpointSpec, **more: Any) -> str:
    owner = {"heliostat": spec.installation_id, "service": spec.service_id, "name": spec.service_name}
    return json.dumps(owner | more, sort_keys=True)


def read(text: str) -> dict[str, Any]:
    """A part's description; {} for one that is not ours or corrupt."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and {"heliostat", "service", "name"} <= set(found) else {}


def digest(backends: list[Backend]) -> str:
    return hashlib.sha256(json.dumps([b.model_dump() for b in backends], sort_keys=True).encode()).hexdigest()


def groups(prefix: str, backend: Backend, target: Target | None) -> list[Group]:
    """Those of one backend: HTTP, and gRPC where it has such an address; none for one whose machine is gone. Another
    address or machine is another group, so that none is ever changed."""
    if target is None:
        return []
    addresses = [(backend.http, False)] + ([(backend.grpc, True)] if backend.grpc else [])
    return [
        Group(f"{prefix}-n-{_hash(backend.id, address, target.instance, grpc)[:16]}", target, address, grpc)
        for address, grpc in addresses
    ]


def service_name(prefix: str, members: Iterable[Group]) -> str:
    """The backend service of these groups: named by them, so that none is ever changed either."""
    names = sorted(g.name for g in members)
    return f"{prefix}-s-{_hash(*names)[:16]}" if names else f"{prefix}-none"


def service(config: GcpConfig, health: str, members: list[str], grpc: bool) -> dict[str, Any]:
    """Args:
    health: link of the health check.
    members: links of the groups.
    """
    return {
        "load_balancing_scheme": scheme(config),
        "protocol": "H2C" if grpc else "HTTP",
        "health_checks": [health],
        "timeout_sec": STREAM_S,
        "connection_draining": {"draining_timeout_sec": 3600},
        "locality_lb_policy": "ROUND_ROBIN",
        # A rate is a must; this one is never reached, so all groups share alike.
        "backends": [
            {"group": link, "balancing_mode": "RATE", "max_rate_per_endpoint": 100_000.0} for link in sorted(members)
        ],
    }


def health_check(grpc: bool) -> dict[str, Any]:
    """HTTP proxies answer for themselves; Ray Serve's gRPC proxy has no ``grpc.health.v1``, so its port must open."""
    times = {"check_interval_sec": 5, "timeout_sec": 5, "healthy_threshold": 1, "unhealthy_threshold": 2}
    if grpc:
        return {"type_": "TCP", "tcp_health_check": {"port_specification": "USE_SERVING_PORT"}, **times}
    http = {"port_specification": "USE_SERVING_PORT", "request_path": "/-/healthz"}
    return {"type_": "HTTP", "http_health_check": http, **times}


def scheme(config: GcpConfig) -> str:
    return "INTERNAL_MANAGED" if config.balancer_internal else "EXTERNAL_MANAGED"


def path_matcher(
    none: str,
    backends: list[Backend],
    http: dict[str, str],
    grpc: dict[str, str],
    versions: dict[tuple[str, bool], str],
) -> dict[str, Any]:
    """The rules, first match first: a request that names its backend; one that names an unknown one (503); gRPC by
    weight; the rest by weight.

    Args:
        none: link of the backend service without backends, which answers 503.
        http, grpc: links of each backend's own service, by its id.
        versions: links of the services of a version's clusters with traffic, by version and whether gRPC."""
    rules: list[dict[str, Any]] = []
    for backend in backends:
        named = {"header_name": BACKEND_HEADER, "exact_match": backend.id}
        if backend.id in grpc:
            rules.append({"match_rules": [_match(named, _GRPC)], "service": grpc[backend.id]})
        told = json.dumps([backend.id, backend.version_id])
        rules.append({"match_rules": [_match(named)], "service": http.get(backend.id, none), "description": told})
    present = {"header_name": BACKEND_HEADER, "present_match": True}
    rules.append({"match_rules": [_match(present)], "service": none})
    weights = shares(backends)
    for is_grpc in (True, False):
        shared = {versions[v, is_grpc]: w for v, w in weights.items() if (v, is_grpc) in versions}
        if is_grpc and shared:
            rules.append({"match_rules": [_match(_GRPC)], "route_action": _weighed(shared, ["connect-failure"])})
        elif shared:
            safe = [_match({"header_name": ":method", "exact_match": method}) for method in IDEMPOTENT]
            # Google has no word for a broken connection alone (HttpRetryPolicy.retry_conditions).
            again = ["connect-failure", "refused-stream", "gateway-error"]
            rules.append({"match_rules": safe, "route_action": _weighed(shared, again)})
            rules.append({"match_rules": [_match()], "route_action": _weighed(shared, again[:2])})
    for priority, rule in enumerate(rules, 1):
        rule["priority"] = priority
    return {"name": MATCHER, "default_service": none, "route_rules": rules}


def shares(backends: list[Backend]) -> dict[str, int]:
    """Weights by version, of those with traffic, as Google takes them."""
    found = {b.version_id: b.weight for b in backends if b.weight}
    most = max(found.values(), default=0)
    return {v: w if most <= MAX_WEIGHT else max(1, w * MAX_WEIGHT // most) for v, w in found.items()}


def listed(url_map: Any) -> list[tuple[str, str, str]]:
    """(backend id, version id, name of its backend service) in the order in which they were given."""
    matcher = next((m for m in url_map.path_matchers if m.name == MATCHER), None)
    found = []
    for rule in sorted(matcher.route_rules if matcher else [], key=lambda r: r.priority):
        if rule.description:
            backend_id, version_id = json.loads(rule.description)
            found.append((backend_id, version_id, name_of(rule.service)))
    return found


def services_of(url_map: Any) -> set[str]:
    """Names of all backend services that it sends requests to."""
    found = {name_of(url_map.default_service)}
    for matcher in url_map.path_matchers:
        found.add(name_of(matcher.default_service))
        for rule in matcher.route_rules:
            found.add(name_of(rule.service))
            found |= {name_of(w.backend_service) for w in rule.route_action.weighted_backend_services}
    return found - {""}


def holds(held: dict[str, Any]) -> bool:
    """Whether a URL map's description says which backends it has."""
    try:
        return isinstance(held["revision"], int) and bool(datetime.fromisoformat(held["changed_at"]))
    except (KeyError, ValueError, TypeError):
        return False


def subnetwork(config: GcpConfig) -> str:
    name = config.subnetwork
    return name if "/" in name else f"projects/{config.project}/regions/{config.region}/subnetworks/{name}"


def network(config: GcpConfig) -> str:
    name = config.network
    return name if "/" in name else f"projects/{config.project}/global/networks/{name}"


def rule_labels(spec: EndpointSpec) -> dict[str, str]:
    return {OWNER_TAG: spec.installation_id}


def _match(*headers: dict[str, Any]) -> dict[str, Any]:
    return {"prefix_match": "/", "header_matches": list(headers)}


def _weighed(shared: dict[str, int], retried: list[str]) -> dict[str, Any]:
    return {
        "weighted_backend_services": [{"backend_service": link, "weight": w} for link, w in sorted(shared.items())],
        "retry_policy": {"num_retries": 2, "retry_conditions": retried},
        "timeout": {"seconds": STREAM_S},
    }


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
