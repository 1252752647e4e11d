"""Clusters and their nodes."""

from __future__ import annotations

from collections.abc import Mapping

from heliostat._flow import Flow, Group, M, Sleep, Stream, many, one
from heliostat._transport import PATIENT, TRIES, Api, path_of
from heliostat.calls import lists
from heliostat.errors import ClusterFailed, WaitTimeout
from heliostat.models.clusters import Cluster, ClusterCreate, ClusterState, ClusterTerminate, Node, ScaleLimits
from heliostat.models.common import Event

CLUSTERS = "clusters"


class Clusters(Group[M]):
    @one
    def create(self, request: ClusterCreate | None = None, *, idempotency_key: str | None = None) -> Flow[Cluster]:
        """Asks for a cluster; returns as soon as that is accepted. ``wait`` waits until it runs."""
        body = request or ClusterCreate()
        return (yield from self._api.call("POST", path_of(CLUSTERS), Cluster, body=body, key=idempotency_key))

    @one
    def get(self, ref: str) -> Flow[Cluster]:
        """By id or name."""
        return (yield from _get(self._api, ref))

    @many
    def list(
        self,
        *,
        state: ClusterState | str | None = None,
        name: str | None = None,
        project: str | None = None,
        tags: Mapping[str, str] | None = None,
        page_size: int = lists.PAGE_SIZE,
    ) -> Stream[Cluster]:
        """Newest first, fetched page by page as you go on."""
        filters = {"state": state, "name": name, "project": project, "tag": lists.tag_filter(tags)}
        return lists.pages(self._api, path_of(CLUSTERS), Cluster, page_size=page_size, **filters)

    @one
    def terminate(self, ref: str, *, reason: str = "") -> Flow[Cluster]:
        """Asks for its end, whatever it does; wait for TERMINATED to see it done."""
        body = ClusterTerminate(reason=reason)
        return (yield from self._api.call("POST", path_of(CLUSTERS, ref, "terminate"), Cluster, body=body))

    @one
    def set_limits(self, ref: str, limits: ScaleLimits) -> Flow[Cluster]:
        """New minimum and maximum of one worker group, for this cluster only."""
        return (yield from self._api.call("PATCH", path_of(CLUSTERS, ref, "limits"), Cluster, body=limits))

    @many
    def nodes(self, ref: str) -> Stream[Node]:
        return lists.pages(self._api, path_of(CLUSTERS, ref, "nodes"), Node)

    @many
    def events(self, ref: str) -> Stream[Event]:
        """Its story, oldest first."""
        return lists.events(self._api, CLUSTERS, ref)

    @one
    def wait(
        self, ref: str, *, state: ClusterState | str = ClusterState.RUNNING, timeout: float | None = None
    ) -> Flow[Cluster]:
        """Waits until the cluster is in ``state``, without a limit but ``timeout`` (seconds).
        Raises ClusterFailed as soon as the state can't be reached any more; WaitTimeout."""
        wanted = ClusterState(state)
        pace = lists.Pace(timeout)
        cluster = yield from _get(self._api, ref)
        while not reached(cluster, wanted):
            if pace.expired:
                raise WaitTimeout(
                    f"Cluster {cluster.name} ({cluster.id}) is {cluster.state} after {timeout:g} s, not {wanted}.",
                    remedy=f"It goes on: `heliostat cluster get {cluster.id}` tells what it waits for.",
                    resource=cluster.id,
                )
            yield Sleep(pace.next())
            cluster = yield from _get(self._api, cluster.id, tries=TRIES if timeout is not None else PATIENT)
        return cluster


def _get(api: Api, ref: str, *, tries: float = TRIES) -> Flow[Cluster]:
    return (yield from api.call("GET", path_of(CLUSTERS, ref), Cluster, tries=tries))


def reached(cluster: Cluster, wanted: ClusterState) -> bool:
    """Raises ClusterFailed when it is settled in another state than the wanted one."""
    if cluster.state == wanted:
        return True
    if wanted is ClusterState.TERMINATED and cluster.state is ClusterState.FAILED:
        return True  # it is gone, and that is what was waited for
    ending = cluster.state is ClusterState.TERMINATING and wanted not in (ClusterState.TERMINATED, ClusterState.FAILED)
    if cluster.state.settled or ending:
        raise ClusterFailed(
            f"Cluster {cluster.name} ({cluster.id}) is {cluster.state}"
            + (f": {cluster.reason.rstrip('.')}." if cluster.reason else "."),
            remedy=f"`heliostat cluster events {cluster.id}` shows what happened.",
            resource=cluster.id,
        )
    return False
