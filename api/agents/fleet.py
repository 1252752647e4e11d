"""What this API process knows of the nodes that call it: whose token it is, and what their cluster looks like now.

The worker process writes the records, so everything here is a cache by the cluster's revision: one query
for all clusters whose nodes call, at most twice a second, shows which of them have changed.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from heliostat.errors import Gone, Unauthenticated
from heliostat.models.agents import GroupConfig, NodeBrief
from heliostat.models.clusters import Cluster, NodeRole, NodeState
from heliostat.models.common import utcnow
from heliostat.models.compute_configs import resources_of
from store.commands import run_submitted_to
from store.database import Database
from store.nodes import ENDED, cluster_members, cluster_revisions, node_of_token

FRESH_S = 0.5
"""How old a cluster's view may be when a node is answered from it."""
RECHECK_S = 10.0
"""How often a token is looked up again; until then one that was replaced through another API is still accepted."""
FORGET_S = 120.0
"""A cluster whose nodes have not called for this long leaves the cache."""
UPTIME_GRACE = timedelta(minutes=2)
"""Agents enforce maximum uptime so much later than the workflow, which ends the cluster in order if it can."""


@dataclass
class CallingNode:
    id: str
    cluster_id: str
    role: NodeRole
    generation: int
    boot_id: str
    authenticated: bool
    gcs_address: str | None
    checked_at: float


@dataclass
class ClusterView:
    id: str
    revision: int
    project_id: str = ""
    cloud_id: str = ""
    states: dict[str, NodeState] = field(default_factory=dict)
    """Of all its nodes that have not ended."""
    workers: list[NodeBrief] = field(default_factory=list)
    desired: dict[str, int] = field(default_factory=dict)
    """Workers wanted now by group, within the limits."""
    groups: list[GroupConfig] = field(default_factory=list)
    maximum_uptime_at: datetime | None = None
    """When agents stop their machines by themselves; see UPTIME_GRACE."""
    follow: bool = False
    service_id: str | None = None
    """The service that it serves, if any."""


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def gone(node_id: str) -> Gone:
    return Gone(f"Node {node_id} has ended or was replaced.", remedy="Stop Ray and this machine.", resource=node_id)


@dataclass
class Fleet:
    db: Database
    _nodes: dict[str, CallingNode] = field(default_factory=dict)
    _views: dict[str, ClusterView] = field(default_factory=dict)
    _called_at: dict[str, float] = field(default_factory=dict)
    _polled_at: float = -1e9
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _runs: set[tuple[str, str]] = field(default_factory=set)
    """(cluster id, run id) known to belong together."""
    streams: set[tuple[str, str]] = field(default_factory=set)
    """(node id, stream) known to be registered."""

    async def node(self, token: str) -> CallingNode:
        """Raises Unauthenticated for a token that was never issued or has been replaced, Gone for a node that ended."""
        digest = sha256(token)
        known = self._nodes.get(digest)
        if known is None or time.monotonic() - known.checked_at > RECHECK_S:
            self._nodes.pop(digest, None)
            known = await self._find(digest)
        if not await self.has(known.cluster_id, known.id):
            self._nodes.pop(digest, None)
            raise gone(known.id)
        return known

    async def has(self, cluster_id: str, node_id: str) -> bool:
        """Whether the cluster has this node and it has not ended. False ends a machine, so it is never answered from
        a view that may be older than the node."""
        view = await self.view(cluster_id)
        if view.states.get(node_id, NodeState.LOST) in ENDED:
            view = await self.view(cluster_id, at_least=time.monotonic())
        return view.states.get(node_id, NodeState.LOST) not in ENDED

    async def _find(self, digest: str) -> CallingNode:
        async with self.db.read() as conn:
            row = await node_of_token(conn, digest)
        if row is None:
            raise Unauthenticated(
                "This node token is unknown, or a later registration has replaced it.",
                remedy="Register again with the bootstrap token from the node's user-data.",
            )
        found = CallingNode(**vars(row), checked_at=time.monotonic())
        self._nodes[digest] = found
        return found

    def calling(self, role: NodeRole) -> int:
        """How many nodes of this role call this process."""
        return sum(n.role == role for n in self._nodes.values())

    async def view(self, cluster_id: str, at_least: float | None = None) -> ClusterView:
        """The cluster as it was FRESH_S ago or later; with ``at_least``, as it was at that moment
        (``time.monotonic``) or later. An unknown one has no nodes."""
        now = time.monotonic()
        self._called_at[cluster_id] = now
        since = now - FRESH_S if at_least is None else at_least
        if cluster_id not in self._views or self._polled_at < since:
            async with self._lock:  # callers that arrive during a poll share the next one
                if cluster_id not in self._views or self._polled_at < since:
                    await self._poll()
        return self._views[cluster_id]

    async def _poll(self) -> None:
        began = time.monotonic()
        self._forget(began)
        wanted = list(self._called_at)
        now = utcnow()
        async with self.db.read() as conn:
            rows = await cluster_revisions(conn, wanted)
            revisions = {r.id: r.revision for r in rows}
            known = {i: v.revision for i, v in self._views.items()}
            changed = [i for i in wanted if i not in known or revisions.get(i, -1) != known[i]]
            members = await cluster_members(conn, changed) if changed else []
        for cluster_id in changed:
            self._views[cluster_id] = ClusterView(cluster_id, revisions.get(cluster_id, -1))
        for m in members:
            view = self._views[m.id]
            view.project_id, view.cloud_id, view.service_id = m.project_id, m.cloud_id, m.service_id
            view.desired, view.groups = m.cluster.desired, worker_groups(m.cluster)
            view.maximum_uptime_at = maximum_uptime_at(m.cluster)
            view.states, view.workers = m.states, m.workers
        for r in rows:
            self._views[r.id].follow = r.followed_until is not None and r.followed_until > now
        self._polled_at = began

    def _forget(self, now: float) -> None:
        for cluster_id in [i for i, at in self._called_at.items() if now - at > FORGET_S]:
            del self._called_at[cluster_id]
            self._views.pop(cluster_id, None)
            self._runs = {pair for pair in self._runs if pair[0] != cluster_id}
        for digest in [d for d, node in self._nodes.items() if now - node.checked_at > FORGET_S]:
            node = self._nodes.pop(digest)
            self.streams = {pair for pair in self.streams if pair[0] != node.id}

    async def has_run(self, cluster_id: str, run_id: str) -> bool:
        """Whether this run was submitted to this cluster."""
        if (cluster_id, run_id) in self._runs:
            return True
        async with self.db.read() as conn:
            found = await run_submitted_to(conn, cluster_id, run_id)
        if found:
            self._runs.add((cluster_id, run_id))
        return found


def worker_groups(cluster: Cluster) -> list[GroupConfig]:
    """With the limits of now. A head gets them when it registers and in each report's answer, and checks them again
    when they differ: both must be built alike."""
    return [
        GroupConfig(
            name=group.name,
            resources=resources_of(group),
            labels=group.labels,
            min_nodes=group.min_nodes,
            max_nodes=group.max_nodes,
        )
        for group in cluster.compute_config.worker_nodes
    ]


def maximum_uptime_at(cluster: Cluster) -> datetime | None:
    minutes = cluster.compute_config.maximum_uptime_minutes
    return None if minutes is None else cluster.created_at + timedelta(minutes=minutes) + UPTIME_GRACE
