"""What this API process knows of the nodes that call it: whose token it is, and what their cluster looks like now.

The worker writes the records, so everything here is a cache by the cluster's revision: one query
for all clusters whose nodes call, at most twice a second, tells which of them have changed.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy import select

from heliostat.errors import Gone, PermissionDenied, Unauthenticated
from heliostat.models.agents import GroupConfig, NodeBrief
from heliostat.models.clusters import Cluster, NodeRole, NodeState
from heliostat.models.common import utcnow
from store.database import Database
from store.tables import clusters, commands, followers, nodes
from workflows.clusters.state import resources_of

FRESH_S = 0.5
"""How old a cluster's view may be when a node is answered from it."""
RECHECK_S = 10.0
"""A token is looked up again so often; until then one that was replaced through another API is still taken."""
FORGET_S = 120.0
"""A cluster whose nodes have not called for so long is no longer asked after."""
UPTIME_GRACE = timedelta(minutes=2)
"""Agents enforce maximum uptime so much later than the workflow: in order first, by the switch if nobody did."""

ENDED = (NodeState.LOST, NodeState.TERMINATED)


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
    project_id: str
    cloud_id: str
    revision: int
    states: dict[str, NodeState]
    """Of all its nodes that have not ended."""
    workers: list[NodeBrief]
    desired: dict[str, int]
    """Workers wanted now by group, after our bounds."""
    groups: list[GroupConfig]
    maximum_uptime_at: datetime | None
    """When agents stop their machines by themselves; see UPTIME_GRACE."""
    follow: bool = False
    service_id: str | None = None
    """The service that it serves, if any."""


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def gone(node_id: str) -> Gone:
    return Gone(
        f"Node {node_id} has been ended or replaced.", remedy="End Ray and stop this machine.", resource=node_id
    )


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
        """Raises Unauthenticated for a token that we never issued or have replaced, Gone for a node that ended."""
        digest = sha256(token)
        known = self._nodes.get(digest)
        if known is None or time.monotonic() - known.checked_at > RECHECK_S:
            self._nodes.pop(digest, None)
            known = await self._look_up(digest)
        if not await self.has(known.cluster_id, known.id):
            self._nodes.pop(digest, None)
            raise gone(known.id)
        return known

    async def has(self, cluster_id: str, node_id: str) -> bool:
        """Whether the cluster has this node and it has not ended. "No" ends a machine, so it is never said from
        a view that may be older than the node."""
        view = await self.view(cluster_id)
        if view.states.get(node_id, NodeState.LOST) in ENDED:
            view = await self.view(cluster_id, at_least=time.monotonic())
        return view.states.get(node_id, NodeState.LOST) not in ENDED

    async def _look_up(self, digest: str) -> CallingNode:
        n = nodes.c
        async with self.db.read() as conn:
            row = (
                await conn.execute(
                    select(n.id, n.cluster_id, n.role, n.generation, n.boot_id, n.authenticated, n.gcs_address).where(
                        n.token_sha256 == digest
                    )
                )
            ).first()
        if row is None:
            raise Unauthenticated(
                "This node token is unknown or was replaced by a later registration.",
                remedy="Register again with the bootstrap token of the node's user-data.",
            )
        found = CallingNode(
            id=row.id,
            cluster_id=row.cluster_id,
            role=NodeRole(row.role),
            generation=row.generation,
            boot_id=row.boot_id or "",
            authenticated=row.authenticated,
            gcs_address=row.gcs_address,
            checked_at=time.monotonic(),
        )
        self._nodes[digest] = found
        return found

    def calling(self, role: NodeRole) -> int:
        """How many nodes of this role call this process."""
        return sum(n.role == role for n in self._nodes.values())

    async def view(self, cluster_id: str, at_least: float | None = None) -> ClusterView:
        """The cluster as it was FRESH_S ago or, with ``at_least``, at that moment (``time.monotonic``), or
        later. An unknown one has no nodes."""
        now = time.monotonic()
        self._called_at[cluster_id] = now
        since = now - FRESH_S if at_least is None else at_least
        if cluster_id not in self._views or self._polled_at < since:
            async with self._lock:  # whoever comes while a poll is under way is served by the next one, together
                if cluster_id not in self._views or self._polled_at < since:
                    await self._poll()
        return self._views[cluster_id]

    async def _poll(self) -> None:
        began = time.monotonic()
        self._forget(began)
        wanted = list(self._called_at)
        c, n = clusters.c, nodes.c
        now = utcnow()
        async with self.db.read() as conn:
            rows = (
                await conn.execute(
                    select(c.id, c.revision, followers.c.until)
                    .select_from(clusters.outerjoin(followers, followers.c.cluster_id == c.id))
                    .where(c.id.in_(wanted))
                )
            ).all()
            revisions = {r.id: r.revision for r in rows}
            known = {i: v.revision for i, v in self._views.items()}
            changed = [i for i in wanted if i not in known or revisions.get(i, -1) != known[i]]
            if changed:
                docs = (
                    await conn.execute(
                        select(c.id, c.project_id, c.cloud_id, c.service_id, c.doc).where(c.id.in_(changed))
                    )
                ).all()
                members = (
                    await conn.execute(
                        select(n.cluster_id, n.id, n.role, n.state, n.doc)
                        .where(n.cluster_id.in_(changed), n.ended_at.is_(None))
                        .order_by(n.created_at, n.id)
                    )
                ).all()
        if changed:
            for cluster_id in changed:
                self._views[cluster_id] = ClusterView(
                    cluster_id, "", "", revisions.get(cluster_id, -1), {}, [], {}, [], None
                )
            for d in docs:
                view = self._views[d.id]
                view.project_id, view.cloud_id, view.service_id = d.project_id, d.cloud_id, d.service_id
                cluster = Cluster.model_validate(d.doc)
                view.desired, view.groups = cluster.desired, worker_groups(cluster)
                view.maximum_uptime_at = maximum_uptime_at(cluster)
            for m in members:
                view, node_state = self._views[m.cluster_id], NodeState(m.state)
                view.states[m.id] = node_state
                if m.role == NodeRole.WORKER:
                    group, ip, leaving = m.doc["group"], m.doc.get("ip"), bool(m.doc.get("notice"))
                    brief = NodeBrief(id=m.id, group=group, state=node_state, ip=ip, leaving=leaving)
                    view.workers.append(brief)
        for r in rows:
            self._views[r.id].follow = r.until is not None and r.until > now
        self._polled_at = began

    def _forget(self, now: float) -> None:
        for cluster_id in [i for i, at in self._called_at.items() if now - at > FORGET_S]:
            del self._called_at[cluster_id]
            self._views.pop(cluster_id, None)
            self._runs = {pair for pair in self._runs if pair[0] != cluster_id}
        for digest in [d for d, node in self._nodes.items() if now - node.checked_at > FORGET_S]:
            node = self._nodes.pop(digest)
            self.streams = {pair for pair in self.streams if pair[0] != node.id}

    async def runs_here(self, cluster_id: str, run_id: str) -> bool:
        """Whether this run was given to this cluster: its submit command says so."""
        if (cluster_id, run_id) in self._runs:
            return True
        async with self.db.read() as conn:
            found = await conn.scalar(
                select(commands.c.id)
                .where(
                    commands.c.done.in_([True, False]),  # lets the index on (done, cluster_id) serve
                    commands.c.cluster_id == cluster_id,
                    commands.c.kind == "submit_run",
                    commands.c.args["run_id"].as_string() == run_id,
                )
                .limit(1)
            )
        if found is not None:
            self._runs.add((cluster_id, run_id))
        return found is not None


def worker_groups(cluster: Cluster) -> list[GroupConfig]:
    """With the bounds of now. A head is told them when it registers and in each report's answer, and checks them anew
    when they differ: the two must be made alike."""
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


async def calling_node(request: Request) -> CallingNode:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated(
            "This call needs a node token.", remedy="Send it as 'Authorization: Bearer <node token>'."
        )
    fleet: Fleet = request.app.state.fleet
    return await fleet.node(token.strip())


async def calling_head(node: Annotated[CallingNode, Depends(calling_node)]) -> CallingNode:
    if node.role != NodeRole.HEAD:
        raise PermissionDenied(
            f"Node {node.id} is a worker; only the head of its cluster may call this.",
            remedy="Make this call from the head's agent.",
            resource=node.id,
        )
    return node


AnyNode = Annotated[CallingNode, Depends(calling_node)]
HeadNode = Annotated[CallingNode, Depends(calling_head)]
