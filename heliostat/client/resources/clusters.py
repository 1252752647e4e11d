"""Clusters and their nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from heliostat.client.effects import Flow, Sleep, Stream
from heliostat.client.groups import Group, M, many, one
from heliostat.client.logs import LogText, follow_pages
from heliostat.client.resources import lists
from heliostat.client.transport import PATIENT, TRIES, Api, path_of
from heliostat.errors import ClusterFailed, WaitTimeout
from heliostat.models.clusters import Cluster, ClusterCreate, ClusterState, ClusterTerminate, Node, ScaleLimits
from heliostat.models.common import Event
from heliostat.models.jobs import LogPage
from heliostat.models.plans import Plan

CLUSTERS = "clusters"


class Clusters(Group[M]):
    @one
    def create(self, request: ClusterCreate | None = None, *, idempotency_key: str | None = None) -> Flow[Cluster]:
        """Creates a cluster. Returns as soon as the request is accepted; ``wait`` waits until it runs."""
        body = request or ClusterCreate()
        return (yield from self._api.call("POST", path_of(CLUSTERS), Cluster, body=body, key=idempotency_key))

    @one
    def plan(self, request: ClusterCreate | None = None) -> Flow[Plan]:
        """What ``create`` would create, and its price per hour where the operator's price table has it. Everything is
        checked, nothing is created."""
        body = request or ClusterCreate()
        return (yield from self._api.call("POST", path_of(CLUSTERS), Plan, body=body, params={"dry_run": True}))

    @one
    def get(self, ref: str, *, project: str | None = None) -> Flow[Cluster]:
        """By id or name; a running cluster is preferred to an ended one of that name. ``project``, here and below: the
        project of the name; needed only when several of your projects have it."""
        return (yield from get(self._api, ref, project))

    @many
    def list(
        self,
        *,
        state: ClusterState | str | Sequence[ClusterState | str] | None = None,
        name: str | None = None,
        project: str | None = None,
        cloud: str | None = None,
        tags: Mapping[str, str] | None = None,
        page_size: int = lists.PAGE_SIZE,
    ) -> Stream[Cluster]:
        """Newest first; pages are fetched as you iterate."""
        filters = {"state": state, "name": name, "project": project, "cloud": cloud, "tag": lists.tag_filter(tags)}
        return lists.pages(self._api, path_of(CLUSTERS), Cluster, page_size=page_size, **filters)

    @one
    def terminate(self, ref: str, *, reason: str = "", project: str | None = None) -> Flow[Cluster]:
        """Requests termination, also while work runs; wait for TERMINATED to see it done."""
        path, params = path_of(CLUSTERS, ref, "terminate"), {"project": project}
        return (yield from self._api.call("POST", path, Cluster, params=params, body=ClusterTerminate(reason=reason)))

    @one
    def set_limits(self, ref: str, limits: ScaleLimits, *, project: str | None = None) -> Flow[Cluster]:
        """Sets minimum and maximum of one worker group, for this cluster only."""
        path, params = path_of(CLUSTERS, ref, "limits"), {"project": project}
        return (yield from self._api.call("PATCH", path, Cluster, params=params, body=limits))

    @many
    def nodes(self, ref: str, *, project: str | None = None) -> Stream[Node]:
        """Every node that it has ever requested, oldest first."""
        return lists.pages(self._api, path_of(CLUSTERS, ref, "nodes"), Node, project=project)

    @many
    def events(self, ref: str, *, project: str | None = None) -> Stream[Event]:
        """Its events, oldest first."""
        return lists.events(self._api, CLUSTERS, ref, project)

    @many
    def logs(
        self,
        ref: str,
        *,
        node: str | None = None,
        follow: bool = False,
        tail: int | None = None,
        project: str | None = None,
    ) -> Stream[LogText]:
        """The logs of its nodes (agent and Ray); the ``stream`` of each piece names node and file. ``node``: id of one
        node. Readable after the cluster has ended."""
        cluster = yield from get(self._api, ref, project)
        pages = partial(_page, self._api, cluster.id, node, follow)
        yield from follow_pages(self._api, pages, follow, tail)

    @one
    def wait(
        self,
        ref: str,
        *,
        state: ClusterState | str = ClusterState.RUNNING,
        timeout: float | None = None,
        on_change: Callable[[Cluster], None] | None = None,
        project: str | None = None,
    ) -> Flow[Cluster]:
        """Waits until the cluster is in ``state``, at most ``timeout`` seconds (default: no limit). ``on_change`` gets
        the cluster at first and after each change.
        Raises ClusterFailed as soon as the cluster can no longer reach the state; WaitTimeout."""
        wanted = ClusterState(state)
        pace = lists.Pace(timeout)
        cluster = yield from get(self._api, ref, project)
        seen: Cluster | None = None
        while not reached(cluster, wanted):
            if on_change and cluster != seen:
                on_change(cluster)
            seen = cluster
            if pace.expired:
                raise WaitTimeout(
                    f"Cluster {cluster.name} ({cluster.id}) is {cluster.state} after {timeout:g} s, not {wanted}.",
                    remedy=f"It is not affected. `heliostat cluster get {cluster.id}` shows what it waits for.",
                    resource=cluster.id,
                )
            yield Sleep(pace.next())
            cluster = yield from get(self._api, cluster.id, tries=TRIES if timeout is not None else PATIENT)
        return cluster


def get(api: Api, ref: str, project: str | None = None, *, tries: float = TRIES) -> Flow[Cluster]:
    return (yield from api.call("GET", path_of(CLUSTERS, ref), Cluster, params={"project": project}, tries=tries))


def _page(api: Api, cluster_id: str, node: str | None, follow: bool, *, tries: float) -> Flow[LogPage]:
    params = {"node": node, "follow": follow or None}
    return (yield from api.call("GET", path_of(CLUSTERS, cluster_id, "logs"), LogPage, params=params, tries=tries))


def reached(cluster: Cluster, wanted: ClusterState) -> bool:
    """Raises ClusterFailed when it has ended in another state."""
    if cluster.state == wanted:
        return True
    if wanted is ClusterState.TERMINATED and cluster.state is ClusterState.FAILED:
        return True  # it has ended, which is what the caller waits for
    ending = cluster.state is ClusterState.TERMINATING and wanted not in (ClusterState.TERMINATED, ClusterState.FAILED)
    if cluster.state.settled or ending:
        raise ClusterFailed(
            f"Cluster {cluster.name} ({cluster.id}) is {cluster.state}"
            + (f": {cluster.reason.rstrip('.')}." if cluster.reason else "."),
            remedy=f"`heliostat cluster events {cluster.id}` shows what happened.",
            resource=cluster.id,
        )
    return False
