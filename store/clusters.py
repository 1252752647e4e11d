"""The rows of clusters and of their nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, func, null, select
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.clusters import Cluster, ClusterState, Node
from heliostat.models.common import Event
from runtime.messages.clusters import ClusterInput
from store.commands import close_commands
from store.database import Database, insert, insert_new
from store.revisions import insert_events, newer, takes_writes
from store.tables import clusters, nodes

_UPDATE_CLUSTER = newer(clusters)
_END_CLUSTER = _UPDATE_CLUSTER.values(live_name=null())


@dataclass(frozen=True)
class ClusterRow:
    id: str
    project_id: str
    cloud_id: str
    job_id: str | None
    service_id: str | None
    started: bool
    withdrawn: bool
    revision: int
    cluster: Cluster
    input: ClusterInput
    """As accepted: whoever starts the workflow starts it with exactly this."""


async def write_cluster(
    db: Database, cluster: Cluster, nodes: list[Node], node_configs: dict[str, dict[str, Any]], events: list[Event]
) -> bool:
    """The cluster, those of its nodes that are given, and what happened. ``node_configs``: by node id, what
    Ray on it gets; once per node is enough. False: there is no such row, or it was withdrawn."""
    async with db.begin() as conn:
        values = {
            "its_id": cluster.id,
            "its_revision": cluster.revision,
            "state": cluster.state,
            "revision": cluster.revision,
            "doc": cluster.model_dump(mode="json"),
            "ended_at": cluster.ended_at,
        }
        wrote = await conn.execute(_END_CLUSTER if cluster.state.settled else _UPDATE_CLUSTER, values)
        if wrote.rowcount:
            await _write_nodes(conn, cluster.revision, nodes, node_configs)
        elif not await takes_writes(conn, clusters, cluster.id):
            return False
        await insert_events(conn, events)
        return True


async def insert_cluster(conn: AsyncConnection, cluster: Cluster, arg: ClusterInput) -> bool:
    """Insert-or-ignore by id and by living name; False: nothing was inserted."""
    row = {
        "id": cluster.id,
        "project_id": arg.project_id,
        "cloud_id": arg.cloud_id,
        "name": cluster.name,
        "live_name": cluster.name,
        "state": cluster.state,
        "revision": cluster.revision,
        "doc": cluster.model_dump(mode="json"),
        "input": arg.model_dump(mode="json"),
        "job_id": arg.job_id,
        "service_id": arg.service_id,
        "created_at": cluster.created_at,
    }
    return await insert_new(conn, clusters, row)


async def insert_made_cluster(db: Database, cluster: Cluster, arg: ClusterInput) -> bool:
    """The row of a cluster that was made for a job or a service; its id is derived from theirs, so a repeat changes
    nothing. False: there is none, for another cluster has the name."""
    async with db.begin() as conn:
        if await insert_cluster(conn, cluster, arg):
            return True
        return await conn.scalar(select(clusters.c.id).where(clusters.c.id == cluster.id)) is not None


async def count_clusters(db: Database) -> dict[ClusterState, int]:
    """Those that have not ended, by state."""
    c = clusters.c
    async with db.read() as conn:
        rows = await conn.execute(select(c.state, func.count()).where(c.ended_at.is_(None)).group_by(c.state))
        return {ClusterState(state): int(number) for state, number in rows}


async def load_cluster(db: Database, id: str) -> ClusterRow | None:
    async with db.read() as conn:
        row = (await conn.execute(select(clusters).where(clusters.c.id == id))).first()
        return _cluster_row(row) if row else None


async def load_nodes(db: Database, cluster_id: str) -> list[Node]:
    """All nodes that the cluster ever asked for, oldest first."""
    async with db.read() as conn:
        rows = await conn.execute(
            select(nodes.c.doc).where(nodes.c.cluster_id == cluster_id).order_by(nodes.c.created_at, nodes.c.id)
        )
        return [Node.model_validate(r.doc) for r in rows]


async def _write_nodes(
    conn: AsyncConnection, revision: int, items: list[Node], configs: dict[str, dict[str, Any]]
) -> None:
    for node in items:
        values: dict[str, Any] = {
            "role": node.role,
            "generation": node.generation,
            "state": node.state,
            "revision": revision,
            "doc": node.model_dump(mode="json"),
            "ended_at": node.ended_at,
        }
        if node.id in configs:
            values["config"] = configs[node.id]
        await conn.execute(
            insert(conn, nodes)
            .values(id=node.id, cluster_id=node.cluster_id, created_at=node.created_at, **values)
            .on_conflict_do_update(index_elements=["id"], set_=values)
        )
    if ended := [node.id for node in items if node.ended_at is not None]:
        await close_commands(conn, ended)


def _cluster_row(r: Row[Any]) -> ClusterRow:
    return ClusterRow(
        id=r.id,
        project_id=r.project_id,
        cloud_id=r.cloud_id,
        job_id=r.job_id,
        service_id=r.service_id,
        started=r.started,
        withdrawn=r.withdrawn,
        revision=r.revision,
        cluster=Cluster.model_validate(r.doc),
        input=ClusterInput.model_validate(r.input),
    )
