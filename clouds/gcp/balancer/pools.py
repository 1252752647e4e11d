"""The targets of a load balancer: backend services of network endpoint groups, made before they are used,
deleted after.

A group is one endpoint of one machine, a backend service one or several groups; both are named by what is in them and
never changed, so the URL map alone decides, at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from clouds.contract.balancer import Backend, EndpointSpec
from clouds.contract.machines import CLUSTER_TAG
from clouds.gcp.account.operations import label, reached
from clouds.gcp.account.resources import GROUP, HEALTH, SERVICE, Resources
from clouds.gcp.account.session import Session, matching, name_of
from clouds.gcp.balancer import url_map as maps
from clouds.gcp.balancer.url_map import Group, Target
from heliostat.models.clouds import GcpConfig

HEALTH_WAIT_S = 25.0
"""For the first health checks of new groups to pass, before requests go there: two intervals of 5 s and Google's own
delay, within the minute of ``workflows.policies.ENDPOINT``."""
AT_ONCE = 8
"""Operations of one call side by side: each takes seconds."""

Item = TypeVar("Item")


class Pools:
    """Args:
    poll_s: between two looks at health.
    health_wait_s: what is not healthy by then is as any other backend that is down.
    """

    def __init__(
        self,
        config: GcpConfig,
        session: Session,
        resources: Resources,
        *,
        poll_s: float,
        health_wait_s: float = HEALTH_WAIT_S,
    ) -> None:
        self._config, self._session, self._resources = config, session, resources
        self._poll_s, self._health_wait_s = poll_s, health_wait_s

    def make_none(self, name: str, spec: EndpointSpec) -> None:
        """The service without backends, which answers 503."""
        fields = maps.service(self._config, self._health(name, False), [], False)
        self._resources.make(SERVICE, f"{name}-none", {"description": maps.described(spec), **fields})

    def prepare(self, name: str, description: str, backends: list[Backend], used: set[str]) -> dict[str, Any]:
        """Makes what the backends need, waits until it is healthy, and gives the rules that send requests there.

        Args:
            description: of every resource that is made.
            used: names of the services that requests go to now; they are not waited for.
        """
        targets = self._targets(backends)
        groups = {b.id: maps.groups(name, b, targets.get(b.id)) for b in backends}
        sharing: dict[tuple[str, bool], list[Group]] = {}
        for b in backends:
            for group in groups[b.id] if b.weight else []:
                sharing.setdefault((b.version_id, group.grpc), []).append(group)
        every = [group for found in groups.values() for group in found]
        self._make_groups(name, description, every)
        self._make_services(name, description, [*([g] for g in every), *sharing.values()], used)

        def link(members: Iterable[Group]) -> str:
            return self._resources.link(SERVICE, maps.service_name(name, members))

        http = {i: link(own) for i, found in groups.items() if (own := [g for g in found if not g.grpc])}
        grpc = {i: link(own) for i, found in groups.items() if (own := [g for g in found if g.grpc])}
        versions = {key: link(members) for key, members in sharing.items()}
        return maps.path_matcher(self._resources.link(SERVICE, f"{name}-none"), backends, http, grpc, versions)

    def clear(self, name: str, kept: set[str]) -> None:
        """Deletes the backend services that are not kept, and the groups that no kept one has. Nothing kept: all."""
        used: set[str] = set()
        unused: list[str] = []
        for service in self._resources.list(SERVICE, f"{name}-.*"):
            if service.name in kept or (kept and service.name == f"{name}-none"):
                used |= {name_of(backend.group) for backend in service.backends}
            else:
                unused.append(service.name)
        _all(lambda service: self._resources.delete(SERVICE, service), unused)
        groups = [g for g in self._resources.list(GROUP, f"{name}-n-.*") if g.name not in used]
        _all(lambda group: self._resources.delete(GROUP, group.name, name_of(group.zone)), groups)

    def _make_groups(self, name: str, description: str, groups: list[Group]) -> None:
        filled = {g.name for g in self._resources.list(GROUP, f"{name}-n-.*") if g.size} if groups else set()
        fields = {
            "description": description,
            "network_endpoint_type": "GCE_VM_IP_PORT",
            "network": maps.network(self._config),
            "subnetwork": maps.subnetwork(self._config),
        }

        def make(group: Group) -> None:
            self._resources.make(GROUP, group.name, fields, group.target.zone)
            self._resources.attach(group.name, group.target.zone, group.endpoint)

        _all(make, [g for g in groups if g.name not in filled])

    def _make_services(self, name: str, description: str, wanted: list[list[Group]], used: set[str]) -> None:
        new = {n: members for members in wanted if (n := maps.service_name(name, members)) not in used}
        if not new:
            return
        there = {service.name for service in self._resources.list(SERVICE, f"{name}-s-.*")}

        def make(service: str) -> None:
            members = new[service]
            links = [self._resources.link(GROUP, g.name, g.target.zone) for g in members]
            fields = maps.service(self._config, self._health(name, members[0].grpc), links, members[0].grpc)
            self._resources.make(SERVICE, service, {"description": description, **fields})

        _all(make, [service for service in new if service not in there])
        deadline = time.monotonic() + self._health_wait_s
        waiting = [s for s in self._resources.list(SERVICE, f"{name}-s-.*") if s.name in new]
        while (waiting := [s for s in waiting if not self._resources.healthy(s)]) and time.monotonic() < deadline:
            time.sleep(self._poll_s)

    def _targets(self, backends: list[Backend]) -> dict[str, Target]:
        """The machine of each backend, by its cluster's label and its address. One list."""
        if not backends:
            return {}
        wanted = {label(b.id): b for b in backends}
        pages = self._session.call(
            "Instances",
            "aggregated_list",
            {"filter": matching(f"labels.{CLUSTER_TAG}", wanted)},
            "list the machines of a service's clusters",
        )
        found: dict[str, Target] = {}
        for instance in (i for _, page in pages for i in reached(page).instances):
            backend = wanted.get(instance.labels.get(CLUSTER_TAG, ""))
            addresses = {interface.network_i_p for interface in instance.network_interfaces}
            if backend is not None and backend.http.rpartition(":")[0] in addresses:
                zone = name_of(instance.zone)
                link = f"projects/{self._config.project}/zones/{zone}/instances/{instance.name}"
                found[backend.id] = Target(link, zone)
        return found

    def _health(self, name: str, grpc: bool) -> str:
        return self._resources.link(HEALTH, f"{name}-{'tcp' if grpc else 'http'}")


def _all(do: Callable[[Item], None], items: list[Item]) -> None:
    """In parallel; raises the first failure after all have ended."""
    if not items:
        return
    with ThreadPoolExecutor(min(AT_ONCE, len(items))) as pool:
        answers = [pool.submit(do, item) for item in items]
    for answer in answers:
        answer.result()
