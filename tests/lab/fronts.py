"""What the vendors were told of load balancers, in one form: fronts with rules, first match first."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moto.elbv2.models import ELBv2Backend, FakeTargetGroup

from tests.lab.gce import GceFake
from tests.lab.gce_filter import Resource

ALL = "PathPrefix(`/`)"


@dataclass(frozen=True)
class Pool:
    """Targets of which each request gets one."""

    targets: tuple[str, ...]
    """``ip:port``."""
    grpc: bool = False
    fails_open: bool = False
    """Where none is up, all get requests."""
    health_path: str = "/-/healthz"


@dataclass(frozen=True)
class Rule:
    match: str
    """In Traefik's words."""
    pools: tuple[tuple[Pool, int], ...]
    """And their weights."""
    tries: int = 1


@dataclass(frozen=True)
class Front:
    name: str
    address: str
    port: int
    rules: tuple[Rule, ...]


def albs(elb: ELBv2Backend, address_of: Callable[[str], str]) -> list[Front]:
    """``address_of``: the address of a DNS name."""
    found = []
    for balancer in list(elb.load_balancers.values()):
        for listener in list(balancer.listeners.values()):
            rules = sorted((r for r in listener.rules.values() if not r.is_default), key=lambda r: int(r.priority))
            told = [Rule(_conditions(r.conditions), _forward(elb, r.actions)) for r in rules]
            told.append(Rule(ALL, _forward(elb, listener.default_actions)))
            address = address_of(str(balancer.dns_name))
            found.append(Front(str(balancer.name), address, int(listener.port), tuple(told)))
    return found


def _conditions(conditions: list[dict[str, Any]]) -> str:
    """All of them; of each one's patterns any. ``*`` and ``?`` are wildcards, and letters' case does not count."""
    said = []
    for condition in conditions:
        header = condition["HttpHeaderConfig"]
        patterns = "|".join(fnmatch.translate(value).removesuffix("\\Z") for value in header["Values"])
        said.append(f"HeaderRegexp(`{header['HttpHeaderName']}`, `(?i)^({patterns})$`)")
    return " && ".join(said)


def _forward(elb: ELBv2Backend, actions: list[Any]) -> tuple[tuple[Pool, int], ...]:
    data = actions[0].data
    if data["Type"] != "forward":
        return ()
    groups = data["ForwardConfig"]["TargetGroups"]
    return tuple((_group(elb.target_groups[g["TargetGroupArn"]]), int(g["Weight"])) for g in groups)


def _group(group: FakeTargetGroup) -> Pool:
    targets = sorted(f"{t['Id']}:{t['Port']}" for t in group.targets.values())
    return Pool(tuple(targets), grpc=group.protocol_version == "GRPC", fails_open=True)


def googles(fake: GceFake) -> list[Front]:
    found = []
    for (_, collection, name), rule in sorted(fake.resources.items()):
        if collection != "forwardingRules":
            continue
        proxy = fake.at(rule["target"])
        url_map = None if proxy is None else fake.at(proxy["urlMap"])
        if url_map is not None:
            port = int(str(rule.get("portRange") or rule.get("ports", ["80"])[0]).partition("-")[0])
            found.append(Front(name, str(rule["IPAddress"]), port, tuple(_map_rules(fake, url_map))))
    return found


def _map_rules(fake: GceFake, url_map: Resource) -> list[Rule]:
    (matcher,) = url_map.get("pathMatchers") or [{}]
    rules = [
        Rule(" || ".join(f"({_match(m)})" for m in rule["matchRules"]), *_action(fake, rule))
        for rule in sorted(matcher.get("routeRules", []), key=lambda r: int(r["priority"]))
    ]
    default = matcher if "defaultService" in matcher else url_map
    return [*rules, Rule(ALL, *_action(fake, default))]


def _match(match: Resource) -> str:
    said = []
    for header in match.get("headerMatches", []):
        name = header["headerName"]
        if name == ":method":
            said.append(f"Method(`{header['exactMatch']}`)")
        elif header.get("presentMatch"):
            said.append(f"HeaderRegexp(`{name}`, `.*`)")
        elif "exactMatch" in header:
            said.append(f"Header(`{name}`, `{header['exactMatch']}`)")
        else:
            said.append(f"HeaderRegexp(`{name}`, `^{re.escape(header['prefixMatch'])}`)")
    return " && ".join(said) or ALL


def _action(fake: GceFake, rule: Resource) -> tuple[tuple[tuple[Pool, int], ...], int]:
    action = rule.get("routeAction", {})
    weighted = action.get("weightedBackendServices")
    tries = 1 + int(action.get("retryPolicy", {}).get("numRetries", 0))
    if weighted:
        return tuple((_service(fake, w["backendService"]), int(w["weight"])) for w in weighted), tries
    return ((_service(fake, str(rule.get("service") or rule["defaultService"])), 1),), tries


def _service(fake: GceFake, link: str) -> Pool:
    service = fake.at(link) or {}
    groups = [fake.at(b["group"]) or {} for b in service.get("backends", [])]
    targets = sorted(f"{e['ipAddress']}:{e['port']}" for g in groups for e in g.get("_endpoints", []))
    return Pool(tuple(targets), grpc=service.get("protocol") == "H2C")
