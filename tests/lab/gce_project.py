"""What a Google Cloud project has beside machines, as far as ``cloud verify`` looks at it: region with its quotas,
machine types, images, network. ``furnish`` gives a project what the template of ``cloud setup`` would."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tests.lab import gce_types
from tests.lab.gce_filter import Refused, Resource

if TYPE_CHECKING:
    from tests.lab.gce_state import GceState

_PATH = re.compile(
    r"(?P<regions>regions/[\w-]+)|zones/(?P<zone>[\w-]+)/machineTypes/(?P<type>[\w-]+)"
    r"|global/images/(?:family/)?(?P<image>[\w-]+)"
)
PUBLIC = {"debian-cloud", "deeplearning-platform-release"}
"""Projects whose images everybody may use."""


def told(state: GceState, path: str) -> tuple[str, Resource] | None:
    """(collection, resource); None for what is none of these. Raises Refused for what is not there."""
    found = _PATH.fullmatch(path)
    if found is None:
        return None
    if found["regions"]:
        if found["regions"] != f"regions/{state.region}":
            raise _missing(state, path)
        zones = [f"https://www.googleapis.com/compute/v1/projects/{state.project}/zones/{zone}" for zone in state.zones]
        quotas = [{"metric": m, "limit": limit, "usage": usage} for m, (limit, usage) in state.quotas.items()]
        return "regions", {"name": state.region, "status": "UP", "zones": zones, "quotas": quotas}
    if found["zone"]:
        listed = next((t for t in gce_types.listed() if t["name"] == found["type"]), None)
        if found["zone"] not in state.zones or listed is None or not state.machine_types(found["zone"], found["type"]):
            raise _missing(state, path)
        return "machineTypes", listed
    if found["image"] not in state.images:
        raise _missing(state, path)
    arm = "arm64" in found["image"]
    return "images", {
        "name": found["image"],
        "status": "READY",
        "diskSizeGb": "10",
        "architecture": "ARM64" if arm else "X86_64",
    }


def furnish(state: GceState) -> None:
    """A network with a way out and the firewall rules that a cloud wants."""
    region = f"regions/{state.region}"
    network = state.link("global", "networks", "default")

    def have(scope: str, collection: str, name: str, **fields: object) -> None:
        link = state.link(scope, collection, name)
        state.resources[scope, collection, name] = {"name": name, "selfLink": link, "network": network, **fields}

    have(region, "subnetworks", "default", ipCidrRange="10.128.0.0/20", privateIpGoogleAccess=True, purpose="PRIVATE")
    have(region, "subnetworks", "proxies", ipCidrRange="10.129.0.0/23", purpose="REGIONAL_MANAGED_PROXY", role="ACTIVE")
    nat = {"name": "nat", "sourceSubnetworkIpRangesToNat": "ALL_SUBNETWORKS_ALL_IP_RANGES"}
    have(region, "routers", "router", nats=[nat])
    allowed = [{"IPProtocol": "tcp", "ports": ["0-65535"]}, {"IPProtocol": "udp"}, {"IPProtocol": "icmp"}]
    have("global", "firewalls", "internal", direction="INGRESS", sourceRanges=["10.128.0.0/9"], allowed=allowed)
    sources = ["35.191.0.0/16", "130.211.0.0/22", "10.129.0.0/23"]
    serve = [{"IPProtocol": "tcp", "ports": ["8000", "9000"]}]
    have("global", "firewalls", "serve", direction="INGRESS", sourceRanges=sources, allowed=serve)


def _missing(state: GceState, path: str) -> Refused:
    return Refused(404, "notFound", f"The resource 'projects/{state.project}/{path}' was not found")
