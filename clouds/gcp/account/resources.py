"""Addresses and parts of load balancers: every kind of resource is made, read and deleted the same way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from clouds.contract.errors import Gone
from clouds.gcp.account import errors
from clouds.gcp.account.operations import done, reached
from clouds.gcp.account.session import Session, name_of
from heliostat.errors import CloudError

OPERATION_WAIT_S = 90.0
"""Regional load balancing operations take 5 to 30 s."""
POLL_S = 1.0


@dataclass(frozen=True)
class Kind:
    client: str
    field: str
    """Its name in requests."""
    collection: str
    """Its name in links."""
    zonal: bool = False


ADDRESS = Kind("Addresses", "address", "addresses")
HEALTH = Kind("RegionHealthChecks", "health_check", "healthChecks")
GROUP = Kind("NetworkEndpointGroups", "network_endpoint_group", "networkEndpointGroups", zonal=True)
SERVICE = Kind("RegionBackendServices", "backend_service", "backendServices")
MAP = Kind("RegionUrlMaps", "url_map", "urlMaps")
HTTP = Kind("RegionTargetHttpProxies", "target_http_proxy", "targetHttpProxies")
HTTPS = Kind("RegionTargetHttpsProxies", "target_https_proxy", "targetHttpsProxies")
RULE = Kind("ForwardingRules", "forwarding_rule", "forwardingRules")


class Resources:
    """Args:
    session: the project's.
    region: where the resources are.
    poll_s: between two looks at an operation.
    """

    def __init__(self, session: Session, region: str, poll_s: float = POLL_S) -> None:
        self._session, self._region, self._poll_s = session, region, poll_s

    def link(self, kind: Kind, name: str, zone: str = "") -> str:
        place = f"zones/{zone}" if kind.zonal else f"regions/{self._region}"
        return f"projects/{self._session.project}/{place}/{kind.collection}/{name}"

    def get(self, kind: Kind, name: str) -> Any | None:
        try:
            return self._session.call(
                kind.client, "get", {**self._place(), kind.field: name}, f"look at {kind.field} {name}", name
            )
        except Gone:
            return None

    def make(self, kind: Kind, name: str, fields: dict[str, Any], zone: str = "") -> bool:
        """Makes it if it is not there, and waits until it is; whether it was made now."""
        request = {**self._place(zone), f"{kind.field}_resource": {"name": name, **fields}}
        try:
            self.wait(self._session.call(kind.client, "insert_unary", request, f"make {kind.field} {name}", name))
        except errors.Exists:
            return False
        return True

    def patch(self, kind: Kind, name: str, fields: dict[str, Any]) -> None:
        """``fields`` hold the fingerprint. Raises ``errors.Changed`` when it is not the newest."""
        request = {**self._place(), kind.field: name, f"{kind.field}_resource": fields}
        self.wait(self._session.call(kind.client, "patch_unary", request, f"change {kind.field} {name}", name))

    def certify(self, name: str, certificates: list[str]) -> None:
        """Gives a target HTTPS proxy these certificates, the first one for who names no host, instead of its own."""
        wanted = {"ssl_certificates": certificates}
        request = {
            **self._place(),
            HTTPS.field: name,
            "region_target_https_proxies_set_ssl_certificates_request_resource": wanted,
        }
        self.wait(
            self._session.call(HTTPS.client, "set_ssl_certificates_unary", request, f"certify proxy {name}", name)
        )

    def attach(self, name: str, zone: str, endpoint: dict[str, Any]) -> None:
        """Adds an endpoint to a group; one that is there already is no other one."""
        wanted = {"network_endpoints": [endpoint]}
        request = {
            **self._place(zone),
            GROUP.field: name,
            "network_endpoint_groups_attach_endpoints_request_resource": wanted,
        }
        self.wait(
            self._session.call(GROUP.client, "attach_network_endpoints_unary", request, f"fill group {name}", name)
        )

    def delete(self, kind: Kind, name: str, zone: str = "") -> None:
        """Returns when it is gone. Already gone is done."""
        request = {**self._place(zone), kind.field: name}
        try:
            self.wait(self._session.call(kind.client, "delete_unary", request, f"delete {kind.field} {name}", name))
        except Gone:
            pass

    def list(self, kind: Kind, pattern: str) -> list[Any]:
        """Those whose whole name matches, in all zones where they are zonal."""
        wanted = {"filter": f'name eq "{pattern}"'}
        if kind.zonal:
            pages = self._session.call(kind.client, "aggregated_list", wanted, f"list {kind.collection}")
            return [r for _, page in pages for r in reached(page).network_endpoint_groups]
        found: list[Any] = self._session.call(
            kind.client, "list", {**self._place(), **wanted}, f"list {kind.collection}"
        )
        return found

    def healthy(self, service: Any) -> bool:
        """Whether every endpoint of a backend service (a resource) is up by its health checks; False for none."""
        states = []
        for backend in service.backends:
            request = {
                **self._place(),
                SERVICE.field: service.name,
                "resource_group_reference_resource": {"group": backend.group},
            }
            answer = self._session.call(
                SERVICE.client, "get_health", request, f"ask for the health of {service.name}", service.name
            )
            states += [status.health_state for status in answer.health_status]
        return bool(states) and all(state == "HEALTHY" for state in states)

    def wait(self, op: Any) -> None:
        """Until the operation is done. Raises what it failed for; CloudError when it takes too long."""
        zone, name = name_of(op.zone), op.name
        client, place = ("ZoneOperations", {"zone": zone}) if zone else ("RegionOperations", self._place())
        doing = f"{op.operation_type} {name_of(op.target_link)}"
        deadline = time.monotonic() + OPERATION_WAIT_S
        wait = min(self._poll_s, 0.1)
        while not done(op):
            if time.monotonic() > deadline:
                raise CloudError(
                    f"Google Cloud still works on {doing} after {OPERATION_WAIT_S:.0f} s.", remedy="Try again."
                )
            time.sleep(wait)
            wait = min(wait * 2, self._poll_s)
            op = self._session.call(client, "get", {**place, "operation": name}, f"wait for {doing}")
        failed = errors.operation_error(op, doing, name_of(op.target_link))
        if failed is not None:
            raise failed

    def _place(self, zone: str = "") -> dict[str, str]:
        return {"zone": zone} if zone else {"region": self._region}
