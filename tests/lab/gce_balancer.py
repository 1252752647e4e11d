"""Load balancing of the Google Cloud fake: what holds between its parts, and which backend a request would reach."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.lab import gce_disks
from tests.lab.gce_filter import Refused, Resource, fingerprint
from tests.lab.gce_state import Key, Operation

if TYPE_CHECKING:
    from tests.lab.gce_state import GceState

COLLECTIONS = {
    "addresses",
    "backendServices",
    "forwardingRules",
    "healthChecks",
    "networkEndpointGroups",
    "targetHttpProxies",
    "targetHttpsProxies",
    "urlMaps",
}
RETRIED = {
    "5xx", "gateway-error", "connect-failure", "retriable-4xx", "refused-stream", "cancelled", "deadline-exceeded",
    "internal", "resource-exhausted", "unavailable",
}  # fmt: skip
"""All that a retry policy may name (``compute_v1.HttpRetryPolicy.retry_conditions``)."""
_LINK = re.compile(r"(?:.*/)?((?:regions|zones)/[\w-]+|global)/(\w+)/([\w-]+)")


def links(value: Any) -> Iterator[Key]:
    """Every load balancing part that a resource names."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name != "selfLink":
                yield from links(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from links(inner)
    elif isinstance(value, str) and (found := _LINK.fullmatch(value)) is not None and found[2] in COLLECTIONS:
        yield found[1], found[2], found[3]


def check(state: GceState, collection: str, body: Resource) -> None:
    """Refuses what names something that is not there."""
    if collection not in COLLECTIONS:
        raise Refused(404, "notFound", f"no such collection: {collection}")
    for rule in (r for m in body.get("pathMatchers", []) for r in m.get("routeRules", [])):
        for retried in rule.get("routeAction", {}).get("retryPolicy", {}).get("retryConditions", []):
            if retried not in RETRIED:
                where = "resource.pathMatchers[0].routeRules.routeAction.retryPolicy.retryConditions"
                raise Refused(400, "invalid", f"Invalid value for field '{where}': '{retried}'.")
    for key in links(body):
        if key not in state.resources:
            raise Refused(
                400,
                "invalid",
                f"Invalid value for field 'resource': '{'/'.join(key)}'. The referenced resource cannot be found.",
            )


def check_unused(state: GceState, key: Key) -> None:
    for other, r in state.resources.items():
        if key in set(links(r)):
            raise Refused(
                400,
                "resourceInUseByAnotherResource",
                f"The {key[1]} resource '{key[2]}' is already being used by '{'/'.join(other)}'",
            )


def made(state: GceState, key: Key, body: Resource) -> Resource:
    number = len(state.resources) + 1
    r = {**body, "id": str(10**18 + number), "creationTimestamp": state.stamp(), "selfLink": state.link(*key)}
    if key[1] == "addresses":
        own = body.get("purpose") == "GCE_ENDPOINT"
        r |= {"address": gce_disks.internal(state) if own else f"203.0.113.{number % 250 + 1}", "status": "RESERVED"}
    if key[1] == "forwardingRules":
        address = state.at(body["IPAddress"]) if "/" in body.get("IPAddress", "") else None
        r["IPAddress"] = address["address"] if address is not None else body["IPAddress"]
    if key[1] == "networkEndpointGroups":
        r |= {"_endpoints": [], "size": 0, "zone": state.link("zones", "", "").replace("zones//", key[0])}
    if key[1] == "targetHttpsProxies":
        r["sslCertificates"] = certificates(state, body)
    return r | {"fingerprint": fingerprint(body)}


def certificates(state: GceState, body: Resource) -> list[str]:
    """As whole URLs, whatever they are named by. That they exist is not asked."""
    return [state.link(*state.key(link)) for link in body.get("sslCertificates", [])]


def changed(
    state: GceState, verb: str, key: Key, found: Resource, body: Resource, given: dict[str, str]
) -> Operation | Resource:
    """``patch``, and the verbs of endpoint groups, certificates and health."""
    if verb == "patch":
        if body.get("fingerprint") != found["fingerprint"]:
            raise Refused(412, "conditionNotMet", "Invalid fingerprint.")
        check(state, key[1], body)
        new = {k: v for k, v in body.items() if k != "fingerprint"}
        found["fingerprint"] = fingerprint([found["fingerprint"], body])
        return state.operate("patch", key, apply=lambda: found.update(new), **given)
    if verb == "setSslCertificates":
        new = {"sslCertificates": certificates(state, body)}
        found["fingerprint"] = fingerprint([found["fingerprint"], body])
        return state.operate(verb, key, apply=lambda: found.update(new), **given)
    if verb == "attachNetworkEndpoints":
        if any(e in found["_endpoints"] for e in body["networkEndpoints"]):
            raise Refused(400, "invalid", "The network endpoint is attached already.")
        found["_endpoints"] += body["networkEndpoints"]
        found["size"] = len(found["_endpoints"])
        return state.operate(verb, key, **given)
    if verb == "detachNetworkEndpoints":
        found["_endpoints"] = [e for e in found["_endpoints"] if e not in body["networkEndpoints"]]
        return state.operate(verb, key, **given)
    if verb == "listNetworkEndpoints":
        return {"items": [{"networkEndpoint": e} for e in found["_endpoints"]]}
    if verb == "getHealth":
        group = state.at(body["group"])
        down = state.traffic.down  # type: ignore[attr-defined] # GceFake's
        return {
            "healthStatus": [
                {
                    "ipAddress": e["ipAddress"],
                    "port": e["port"],
                    "healthState": "UNHEALTHY" if f"{e['ipAddress']}:{e['port']}" in down else "HEALTHY",
                }
                for e in (group or {}).get("_endpoints", [])
            ]
        }
    raise Refused(404, "notFound", f"no such method: {verb} of {key[1]}")


@dataclass
class Traffic:
    """Where requests go: the URL map's rules in their order, then weights, then endpoints that are up, in turn. As on
    Google's, a backend service whose endpoints are all down keeps its share, and answers 503."""

    state: GceState
    down: set[str] = field(default_factory=set)
    """``ip:port`` of endpoints that fail their health checks."""
    credit: dict[str, Counter[str]] = field(default_factory=dict)

    def request(self, url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
        """``ip:port`` of who gets a request to the endpoint at ``url``; None: the load balancer answers 503. Raises
        LookupError when nobody listens there."""
        self.state.advance()
        address = url.partition("://")[2].partition(":")[0]
        rules = [r for key, r in self.state.resources.items() if key[1] == "forwardingRules"]
        rule = next((r for r in rules if r["IPAddress"] == address), None)
        proxy = None if rule is None else self.state.at(rule["target"])
        url_map = None if proxy is None else self.state.at(proxy["urlMap"])
        if url_map is None:
            raise LookupError(f"nobody listens at {address}")
        given = {name.lower(): value for name, value in headers.items()} | {":method": method}
        return self._endpoint(self._service(url_map, given))

    def _service(self, url_map: Resource, headers: Mapping[str, str]) -> str:
        (matcher,) = url_map.get("pathMatchers") or [{}]
        for rule in sorted(matcher.get("routeRules", []), key=lambda r: int(r["priority"])):
            if any(_matches(m, headers) for m in rule["matchRules"]):
                return self._weighed(rule)
        return self._weighed(matcher) if "defaultService" in matcher else str(url_map["defaultService"])

    def _weighed(self, rule: Resource) -> str:
        weighted = rule.get("routeAction", {}).get("weightedBackendServices")
        if not weighted:
            return str(rule.get("service") or rule["defaultService"])
        weights = {w["backendService"]: int(w["weight"]) for w in weighted}
        return _turn(self.credit.setdefault(str(sorted(weights)), Counter()), weights)

    def _endpoint(self, service: str) -> str | None:
        found = self.state.at(service)
        groups = [self.state.at(b["group"]) for b in (found or {}).get("backends", [])]
        up = [
            f"{e['ipAddress']}:{e['port']}"
            for g in groups
            for e in (g or {}).get("_endpoints", [])
            if f"{e['ipAddress']}:{e['port']}" not in self.down
        ]
        return _turn(self.credit.setdefault(service, Counter()), dict.fromkeys(up, 1)) if up else None


def _matches(rule: Resource, headers: Mapping[str, str]) -> bool:
    for m in rule.get("headerMatches", []):
        value = headers.get(m["headerName"].lower())
        if m.get("presentMatch") and value is None:
            return False
        if "exactMatch" in m and value != m["exactMatch"]:
            return False
        if "prefixMatch" in m and not (value or "").startswith(m["prefixMatch"]):
            return False
    return True


def _turn(credit: Counter[str], weights: Mapping[str, int]) -> str:
    """Smooth weighted round-robin."""
    for name, weight in weights.items():
        credit[name] += weight
    chosen = max(weights, key=lambda name: credit[name])
    credit[chosen] -= sum(weights.values())
    return chosen
