"""Endpoints of services on Google Cloud: one regional application load balancer (Envoy, managed by Google) for each
service.

    address ◄─ forwarding rule ─► target proxy ─► URL map ─► backend services ─► network endpoint groups ─► heads
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from clouds.contract.balancer import Backend, BackendCounters, Endpoint, EndpointSpec
from clouds.contract.errors import BackendsLost, BadConfig, Gone, Outdated
from clouds.gcp.account.errors import Changed
from clouds.gcp.account.resources import ADDRESS, GROUP, HEALTH, HTTP, HTTPS, MAP, POLL_S, RULE, SERVICE, Resources
from clouds.gcp.account.session import Session, name_of
from clouds.gcp.balancer import url_map as maps
from clouds.gcp.balancer.pools import HEALTH_WAIT_S, Pools
from heliostat.errors import CloudError
from heliostat.models.clouds import GcpConfig
from heliostat.models.common import utcnow

PROPAGATION_S = 10.0
"""From the operation's end until Google's proxies go by a new URL map; Google promises no number."""
DRAIN_S = 3600
"""What no rule names any more stays this long: it may still serve requests."""
TRIES = 3


class GcpBalancer:
    """Regional application load balancers (``clouds.contract.balancer.LoadBalancer``).

    Where Google's differ from what the contract says:

    - A change takes some seconds to reach all proxies after Google calls it done: ``set_backends`` waits
    ``propagation_s``.
    - An idempotent request is tried again after an answer of 502, 503 or 504 too: to Google that and a broken
      connection are one (``gateway-error``).
    - A version whose clusters are all down keeps its share of the requests, which get 503; a retry goes to another
      cluster of the same version. An only backend that fails its health check gets no requests.
    - ``counters`` reports who is up, and counts nothing: Google counts in Cloud Monitoring, minutes late.
    - gRPC needs a certificate: Google speaks HTTP/2 with clients over TLS alone.
    - A backend must be a machine of this project, known by its cluster's label and its address; one whose machine has
      ended takes no requests.

    The region's network needs a proxy-only subnet, and a firewall rule that lets that subnet's range and
    Google's probes (35.191.0.0/16, 130.211.0.0/22) reach the heads' Serve ports.

    Args:
        config: where endpoints are.
        session: of the same project.
        poll_s: between two polls of an operation, or of health.
        health_wait_s: for new backends' first health checks.
        propagation_s: from Google's word until a change holds.
        clock: now.
    """

    def __init__(
        self,
        config: GcpConfig,
        session: Session,
        *,
        poll_s: float = POLL_S,
        health_wait_s: float = HEALTH_WAIT_S,
        propagation_s: float = PROPAGATION_S,
        clock: Callable[[], datetime] = utcnow,
    ) -> None:
        self._config = config
        self._resources = Resources(session, config.region, poll_s)
        self._pools = Pools(config, session, self._resources, poll_s=poll_s, health_wait_s=health_wait_s)
        self._propagation_s, self._clock = propagation_s, clock

    def ensure(self, spec: EndpointSpec, *, make: bool = True) -> Endpoint:
        """A renewed certificate is one of another name in the config, for Google changes none: the proxy gets it. The
        one before stays in the project, as all certificates are its people's own."""
        name, resources, config = maps.base(spec.service_id), self._resources, self._config
        if spec.grpc and not config.balancer_certificates:
            raise BadConfig(
                f"Service {spec.service_id} speaks gRPC, and the cloud has no certificate for its endpoints.",
                remedy="Name a regional SSL certificate in the cloud's balancer_certificates.",
                resource=spec.service_id,
            )
        held = resources.get(ADDRESS, name)
        if held is None and not make:
            raise self._gone(spec.service_id)
        if held is not None and maps.read(held.description).get("heliostat") != spec.installation_id:
            raise BadConfig(f"{spec.service_id} belongs to another installation.", resource=spec.service_id)
        described = {"description": maps.described(spec)}
        if held is None:
            resources.make(ADDRESS, name, {**described, **self._address()})
        for grpc in (False, True):
            resources.make(HEALTH, f"{name}-{'tcp' if grpc else 'http'}", {**described, **maps.health_check(grpc)})
        self._pools.make_none(name, spec)
        found = resources.get(MAP, name)
        if found is None:
            fields = {"default_service": resources.link(SERVICE, f"{name}-none")}
            resources.make(MAP, name, {**fields, "description": self._revision(described["description"], -1, [])})
        self._front(spec, name, described)
        endpoint = self.describe(spec.service_id)
        if endpoint is None:
            raise CloudError(f"The endpoint of {spec.service_id} was removed meanwhile.", remedy="Try again.")
        if found is not None:
            held_map = maps.read(found.description)
            if not maps.holds(held_map):
                raise BackendsLost(
                    f"The URL map of service {spec.service_id} does not say which backends it has.",
                    remedy="The control plane sets them again.",
                    resource=spec.service_id,
                )
            if self._clock() - datetime.fromisoformat(held_map["changed_at"]) > timedelta(seconds=DRAIN_S):
                self._pools.clear(name, maps.services_of(found))
        return endpoint

    def set_backends(self, service_id: str, revision: int, backends: list[Backend]) -> None:
        """New groups and services first, until their health checks pass; then the URL map, at once, under its
        fingerprint; then what neither it nor the one before names is deleted."""
        name = maps.base(service_id)
        for _ in range(TRIES):
            before = self._resources.get(MAP, name)
            if before is None:
                raise self._gone(service_id)
            held = maps.read(before.description)
            if maps.holds(held):
                if (revision, maps.digest(backends)) == (held["revision"], held["digest"]):
                    return
                if revision <= held["revision"]:
                    raise Outdated.backends(service_id, revision, held["revision"])
            address = self._resources.get(ADDRESS, name)
            if address is None:
                raise CloudError(
                    f"The endpoint of {service_id} must be repaired first.", remedy="Try again after ensure."
                )
            matcher = self._pools.prepare(name, address.description, backends, maps.services_of(before))
            wanted = {
                "name": name,
                "fingerprint": before.fingerprint,
                "description": self._revision(address.description, revision, backends),
                "default_service": self._resources.link(SERVICE, f"{name}-none"),
                "host_rules": [{"hosts": ["*"], "path_matcher": maps.MATCHER}],
                "path_matchers": [matcher],
            }
            try:
                self._resources.patch(MAP, name, wanted)
            except Changed:
                continue  # somebody else was faster: what is wanted is compared with theirs
            time.sleep(self._propagation_s)
            after = self._resources.get(MAP, name)
            self._pools.clear(
                name, maps.services_of(before) | (maps.services_of(after) if after is not None else set())
            )
            return
        raise CloudError(f"The URL map of service {service_id} is changed all the time.", remedy="Try again.")

    def counters(self, service_id: str) -> list[BackendCounters]:
        """``up`` by Google's health checks; ``requests`` is empty (see the class). One call for each backend and one
        more."""
        name = maps.base(service_id)
        url_map = self._resources.get(MAP, name)
        if url_map is None:
            raise self._gone(service_id)
        services = {s.name: s for s in self._resources.list(SERVICE, f"{name}-.*")}
        return [
            BackendCounters(
                backend_id=backend_id,
                version_id=version_id,
                up=used in services and self._resources.healthy(services[used]),
            )
            for backend_id, version_id, used in maps.listed(url_map)
        ]

    def describe(self, service_id: str) -> Endpoint | None:
        """Three reads, and one more with certificates."""
        name = maps.base(service_id)
        address, url_map, rule = (self._resources.get(kind, name) for kind in (ADDRESS, MAP, RULE))
        if address is None and url_map is None:
            return None
        state = "ready"
        if url_map is None or rule is None or address is None:
            missing = (("address", address), ("URL map", url_map), ("forwarding rule", rule))
            state = f"its {' and '.join(what for what, part in missing if part is None)} must be created"
        elif not maps.holds(maps.read(url_map.description)):
            state = "its backends are lost"
        elif self._config.balancer_certificates:
            proxy = self._resources.get(HTTPS, name)
            if proxy is None:
                state = "its target proxy must be created"
            elif not self._certified(proxy):
                state = "its certificates must be changed to those of the cloud's config"
        ip = address.address if address is not None else rule.I_p_address if rule is not None else "0.0.0.0"  # noqa: S104
        protocol = "https" if self._config.balancer_certificates else "http"
        return Endpoint(service_id=service_id, url=f"{protocol}://{ip}", state=state)

    def remove(self, service_id: str) -> None:
        """From the front to the back, since Google deletes nothing that is in use."""
        name = maps.base(service_id)
        for kind in (RULE, HTTP, HTTPS, MAP):
            self._resources.delete(kind, name)
        self._pools.clear(name, set())
        for health in (f"{name}-http", f"{name}-tcp"):
            self._resources.delete(HEALTH, health)
        self._resources.delete(ADDRESS, name)

    def list_owned(self, installation_id: str) -> list[str]:
        """By what any part of them says, so that a half-removed one is found. Six lists."""
        found = set()
        for kind in (ADDRESS, MAP, SERVICE, GROUP, HEALTH, RULE):
            for part in self._resources.list(kind, f"{maps.OURS}.*"):
                stored = maps.read(part.description)
                if stored.get("heliostat") == installation_id:
                    found.add(str(stored["service"]))
        return sorted(found)

    # -- inside

    def _address(self) -> dict[str, Any]:
        if not self._config.balancer_internal:
            return {"address_type": "EXTERNAL"}
        return {
            "address_type": "INTERNAL",
            "purpose": "SHARED_LOADBALANCER_VIP",
            "subnetwork": maps.subnetwork(self._config),
        }

    def _front(self, spec: EndpointSpec, name: str, described: dict[str, str]) -> None:
        """The target proxy and the forwarding rule."""
        config, resources = self._config, self._resources
        proxy: dict[str, Any] = {**described, "url_map": resources.link(MAP, name)}
        if config.balancer_certificates:
            proxy["ssl_certificates"] = list(config.balancer_certificates)
        kind, port = (HTTPS, "443") if config.balancer_certificates else (HTTP, "80")
        made = resources.make(kind, name, proxy)
        if (
            not made
            and kind is HTTPS
            and (held := resources.get(HTTPS, name)) is not None
            and not self._certified(held)
        ):
            resources.certify(name, proxy["ssl_certificates"])
        if resources.get(RULE, name) is None:
            rule: dict[str, Any] = {
                **described,
                "labels": maps.rule_labels(spec),
                "I_p_address": resources.link(ADDRESS, name),
                "I_p_protocol": "TCP",
                "port_range": port,
                "load_balancing_scheme": maps.scheme(config),
                "network": maps.network(self._config),
                "target": resources.link(kind, name),
            }
            if config.balancer_internal:
                rule["subnetwork"] = maps.subnetwork(self._config)
            resources.make(RULE, name, rule)

    def _certified(self, proxy: Any) -> bool:
        """By their names: those of a proxy are of its project and region, which Google writes in its own way."""
        return [name_of(c) for c in proxy.ssl_certificates] == [name_of(c) for c in self._config.balancer_certificates]

    def _revision(self, description: str, revision: int, backends: list[Backend]) -> str:
        """The URL map's description, made from that of the other parts."""
        at = self._clock().isoformat(timespec="seconds")
        more = {"revision": revision, "digest": maps.digest(backends), "changed_at": at}
        return json.dumps(maps.read(description) | more, sort_keys=True)

    def _gone(self, service_id: str) -> Gone:
        return Gone(f"Service {service_id} has no load balancer.", resource=service_id)
