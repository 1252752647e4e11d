"""Subnetwork, way out, firewall and what load balancers want: whether machines reach each other and us."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Any

from clouds.checklist import SERVE_PORTS, Checklist, address_of
from clouds.gcp.account.session import Session, name_of
from clouds.gcp.balancer.url_map import network, subnetwork
from clouds.gcp.setup.verify_machines import held
from heliostat.models.clouds import GcpConfig

PROBES = ("35.191.0.0/16", "130.211.0.0/22")
"""Where Google's health checks come from (https://cloud.google.com/load-balancing/docs/health-check-concepts)."""
EVERYWHERE = "0.0.0.0/0"
_PROXIES = "REGIONAL_MANAGED_PROXY"
_SUBNETWORK = re.compile(r"projects/(?P<project>[^/]+)/regions/(?P<region>[^/]+)/subnetworks/(?P<name>[^/]+)")


def looked_at(found: Checklist, session: Session, config: GcpConfig, api_url: str) -> None:
    subnet = _subnetwork(found, session, config)
    if subnet is not None:
        _way_out(found, session, config, subnet, api_url)
    rules = found.ask("firewall", lambda: _rules(session, config), needed=False)
    proxies = _proxies(found, session, config)
    if rules is not None:
        block = subnet.ip_cidr_range if subnet is not None else ""
        _among_themselves(found, config, rules, block)
        _from_outside(found, rules)
        if proxies is not None:
            _from_balancers(found, rules, [*PROBES, *proxies])
    for certificate in config.balancer_certificates:
        _certificate(found, session, config, certificate)


# -- subnetwork


def _subnetwork(found: Checklist, session: Session, config: GcpConfig) -> Any | None:
    path = _SUBNETWORK.fullmatch(subnetwork(config))
    name = f"subnetwork {config.subnetwork}"
    if path is None:
        found.fail(
            name,
            "It is neither a name nor a path.",
            "Write projects/<host project>/regions/<region>/subnetworks/<name>.",
        )
        return None
    if path["region"] != config.region:
        found.fail(name, f"It is in {path['region']}, and the cloud in {config.region}.", "Name one of the region.")
        return None
    request = {"project": path["project"], "region": path["region"], "subnetwork": path["name"]}
    doing = f"look at subnetwork {path['name']}"
    answer = found.ask(name, lambda: held(session, "Subnetworks", "get", request, doing), needed=False)
    if answer is None:
        return None
    if not answer:
        found.fail(name, f"There is none of that name in {config.region}.", "Correct the cloud's subnetwork.")
        return None
    subnet = answer[0]
    if name_of(subnet.network) != name_of(network(config)):
        found.fail(
            name,
            f"It is of network {name_of(subnet.network)}, not of {name_of(network(config))}.",
            "Correct the cloud's network: load balancers are made there.",
        )
        return None
    found.ok(name, f"{subnet.ip_cidr_range} of network {name_of(subnet.network)}.")
    return subnet


def _way_out(found: Checklist, session: Session, config: GcpConfig, subnet: Any, api_url: str) -> None:
    """To us, by a public address, Cloud NAT or a private route; to the bucket, by Private Google Access at least."""
    name = "way out"
    if config.external_ip:
        found.ok(name, "Machines have public addresses.")
        return
    path = _SUBNETWORK.search(subnetwork(config))
    assert path is not None  # looked at before
    request = {"project": path["project"], "region": config.region}
    routers = found.ask(name, lambda: session.call("Routers", "list", request, "list routers"), needed=False)
    if routers is None:
        return
    address = address_of(api_url)
    nat = next(
        (
            n.name
            for r in routers
            if name_of(r.network) == name_of(subnet.network)
            for n in r.nats
            if _serves(n, subnet)
        ),
        "",
    )
    if nat:
        found.ok(name, f"By Cloud NAT {nat}.")
    elif address is not None and not address.is_global:
        found.warn(
            name, f"No Cloud NAT serves the subnetwork, and {address} is private.", "Is there a private route to it?"
        )
    else:
        found.fail(
            name,
            f"Its machines have no route to the control plane ({api_url}): no public address, and no Cloud NAT "
            "serves the subnetwork.",
            "Make a Cloud NAT in its region, or set external_ip.",
        )
    if not subnet.private_ip_google_access:
        found.warn(
            "Private Google Access",
            "It is off: the bucket and Google's APIs are reached by the way out, which costs money for each GiB.",
            "Turn it on in the subnetwork.",
        )


def _serves(nat: Any, subnet: Any) -> bool:
    if nat.source_subnetwork_ip_ranges_to_nat != "LIST_OF_SUBNETWORKS":
        return True
    return any(name_of(one.name) == subnet.name for one in nat.subnetworks)


# -- firewall


def _rules(session: Session, config: GcpConfig) -> list[Any]:
    """Those that let something in to our machines. Of policies above the network nothing is told here."""
    path = network(config).split("/")
    rules = session.call("Firewalls", "list", {"project": path[1]}, "list firewall rules")
    ours = set(config.network_tags)
    return [
        rule
        for rule in rules
        if name_of(rule.network) == path[-1]
        and rule.direction == "INGRESS"
        and not rule.disabled
        and not list(rule.denied)
        and (not list(rule.target_tags) or ours & set(rule.target_tags))
        and (not list(rule.target_service_accounts) or config.node_service_account in rule.target_service_accounts)
    ]


def _among_themselves(found: Checklist, config: GcpConfig, rules: list[Any], block: str) -> None:
    name = "machines among themselves"
    ours = set(config.network_tags)
    own = [
        rule
        for rule in rules
        if ours & set(rule.source_tags)
        or config.node_service_account in rule.source_service_accounts
        or (block and _holds(rule.source_ranges, block))
    ]
    if any(_covers(rule, range(1, 65536)) for rule in own):
        found.ok(name, "All ports of TCP.")
    else:
        found.fail(
            name,
            "No firewall rule lets machines reach all TCP ports of each other: Ray's nodes cannot join their head.",
            f"gcloud compute firewall-rules create heliostat-internal --network={name_of(network(config))} "
            f"--allow=tcp,udp,icmp --source-ranges={block or '<the subnetwork>'}",
        )


def _from_outside(found: Checklist, rules: list[Any]) -> None:
    name = "machines from outside"
    opened = sorted(rule.name for rule in rules if EVERYWHERE in rule.source_ranges)
    if opened:
        found.warn(
            name,
            f"Machines are open to the internet by {', '.join(opened)}.",
            "Remove the rule, or give machines a tag that it does not name: Heliostat does not need it.",
        )
    else:
        found.ok(name, "Not open to the internet.")


def _proxies(found: Checklist, session: Session, config: GcpConfig) -> list[str] | None:
    """Ranges of the network's proxy-only subnetwork in the region; None: no services here."""
    name = "proxy-only subnetwork"
    path = network(config).split("/")
    request = {"project": path[1], "region": config.region}
    listed = found.ask(name, lambda: session.call("Subnetworks", "list", request, "list subnetworks"), needed=False)
    if listed is None:
        return None
    blocks = [s.ip_cidr_range for s in listed if s.purpose == _PROXIES and name_of(s.network) == path[-1]]
    if blocks:
        found.ok(name, ", ".join(blocks))
        return blocks
    found.warn(
        name,
        f"Network {path[-1]} has none in {config.region}: services cannot have endpoints.",
        f"gcloud compute networks subnets create heliostat-proxies --purpose={_PROXIES} --role=ACTIVE "
        f"--region={config.region} --network={path[-1]} --range=<a free /23>",
    )
    return None


def _from_balancers(found: Checklist, rules: list[Any], sources: list[str]) -> None:
    name = "load balancers to machines"
    lacking = [
        block
        for block in sources
        if not all(any(_holds(r.source_ranges, block) and _covers(r, [port]) for r in rules) for port in SERVE_PORTS)
    ]
    if lacking:
        ports = ",".join(f"tcp:{port}" for port in SERVE_PORTS)
        found.fail(
            name,
            f"No firewall rule lets {', '.join(lacking)} reach the machines' ports of Serve.",
            f"gcloud compute firewall-rules create heliostat-serve --allow={ports} --source-ranges={','.join(sources)}",
        )
    else:
        found.ok(name, f"Google's probes and proxies reach TCP {' and '.join(map(str, SERVE_PORTS))}.")


def _holds(blocks: Iterable[str], wanted: str) -> bool:
    """Whether one of the blocks has all of the wanted one in it."""
    inner = ipaddress.ip_network(wanted)
    outer = [ipaddress.ip_network(block) for block in blocks]
    return any(isinstance(inner, type(o)) and inner.subnet_of(o) for o in outer)  # type: ignore[arg-type]


def _covers(rule: Any, ports: Iterable[int]) -> bool:
    """Whether TCP to all of these ports is let in."""
    wanted = set(ports)
    for allowed in rule.allowed:
        if allowed.I_p_protocol in ("all", "tcp", "6"):
            if not list(allowed.ports):
                return True
            for given in allowed.ports:
                first, _, last = given.partition("-")
                wanted -= set(range(int(first), int(last or first) + 1))
    return not wanted


# -- certificates


def _certificate(found: Checklist, session: Session, config: GcpConfig, certificate: str) -> None:
    name = f"certificate {name_of(certificate)}"
    if f"/regions/{config.region}/" not in certificate:
        found.fail(name, f"It is none of region {config.region}.", "A load balancer takes those of its own region.")
        return
    request = {"region": config.region, "ssl_certificate": name_of(certificate)}
    answer = found.ask(
        name,
        lambda: held(session, "RegionSslCertificates", "get", request, f"look at {name}"),
        needed=False,
    )
    if answer is None:
        return
    if not answer:
        found.fail(name, "There is none of that name.", "Make it, or correct the cloud's config.")
    elif answer[0].managed.status and answer[0].managed.status != "ACTIVE":
        found.fail(name, f"It is {answer[0].managed.status}.", "Google must see its domains first.")
    else:
        found.ok(name, f"Until {answer[0].expire_time}." if answer[0].expire_time else "")
