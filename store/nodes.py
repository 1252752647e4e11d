"""The rows of nodes and of their clusters as the agents' API reads and writes them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.agents import HeadAddress, NodeBrief
from heliostat.models.clusters import Cluster, NodeRole, NodeState
from store.tables import clusters, followers, nodes

ENDED = (NodeState.LOST, NodeState.TERMINATED)


@dataclass(frozen=True)
class RegisteringNode:
    """A node and its cluster when its agent registers."""

    id: str
    cluster_id: str
    cluster_name: str
    role: NodeRole
    group: str
    generation: int
    ended: bool
    """It, or its cluster."""
    authenticated: bool
    boot_id: str | None
    resources: dict[str, float]
    labels: dict[str, str]
    """What Ray on it gets."""
    service_id: str | None
    cluster: Cluster


@dataclass(frozen=True)
class NodeToken:
    """The node that a token belongs to."""

    id: str
    cluster_id: str
    role: NodeRole
    generation: int
    boot_id: str
    authenticated: bool
    gcs_address: str | None


@dataclass(frozen=True)
class ClusterRevision:
    id: str
    revision: int
    followed_until: datetime | None
    """Somebody follows its logs until then."""


@dataclass(frozen=True)
class ClusterMembers:
    id: str
    project_id: str
    cloud_id: str
    service_id: str | None
    cluster: Cluster
    states: dict[str, NodeState]
    """Of its nodes that have not ended."""
    workers: list[NodeBrief]
    """Those of them that are workers, oldest first."""


async def registering_node(conn: AsyncConnection, node_id: str) -> RegisteringNode | None:
    n, c = nodes.c, clusters.c
    row = (
        await conn.execute(
            select(
                n.id, n.cluster_id, n.role, n.generation, n.state, n.doc, n.config, n.authenticated, n.boot_id,
                n.ended_at, c.ended_at.label("cluster_ended_at"), c.name.label("cluster_name"),
                c.service_id, c.doc.label("cluster_doc"),
            )
            .select_from(nodes.join(clusters, c.id == n.cluster_id))
            .where(n.id == node_id)
        )
    ).first()  # fmt: skip
    if row is None:
        return None
    return RegisteringNode(
        id=row.id,
        cluster_id=row.cluster_id,
        cluster_name=row.cluster_name,
        role=NodeRole(row.role),
        group=row.doc["group"],
        generation=row.generation,
        ended=row.ended_at is not None or row.state in ENDED or row.cluster_ended_at is not None,
        authenticated=row.authenticated,
        boot_id=row.boot_id,
        resources=(row.config or {}).get("resources") or {},
        labels=(row.config or {}).get("labels") or {},
        service_id=row.service_id,
        cluster=Cluster.model_validate(row.cluster_doc),
    )


async def set_node_token(conn: AsyncConnection, node_id: str, token_sha256: str, boot_id: str) -> bool:
    """A registration. False: the node has ended, or another boot has reported as it."""
    taken = await conn.execute(
        update(nodes)
        .where(
            nodes.c.id == node_id,
            nodes.c.authenticated.is_(False) | (nodes.c.boot_id == boot_id),
            nodes.c.ended_at.is_(None),
        )
        .values(token_sha256=token_sha256, boot_id=boot_id[:64])
    )
    return bool(taken.rowcount)


async def node_of_token(conn: AsyncConnection, token_sha256: str) -> NodeToken | None:
    n = nodes.c
    row = (
        await conn.execute(
            select(n.id, n.cluster_id, n.role, n.generation, n.boot_id, n.authenticated, n.gcs_address).where(
                n.token_sha256 == token_sha256
            )
        )
    ).first()
    if row is None:
        return None
    return NodeToken(
        id=row.id,
        cluster_id=row.cluster_id,
        role=NodeRole(row.role),
        generation=row.generation,
        boot_id=row.boot_id or "",
        authenticated=row.authenticated,
        gcs_address=row.gcs_address,
    )


async def write_first_report(conn: AsyncConnection, node_id: str, gcs_address: str | None) -> None:
    """Closes the node's registration; ``gcs_address``: of a head that has reported it."""
    values: dict[str, bool | str] = {"authenticated": True}
    if gcs_address is not None:
        values["gcs_address"] = gcs_address[:100]
    await conn.execute(update(nodes).where(nodes.c.id == node_id).values(**values))


async def head_generation(conn: AsyncConnection, cluster_id: str) -> int:
    """Of the cluster's newest head; 1 before there is one."""
    n = nodes.c
    found = await conn.scalar(
        select(n.generation)
        .where(n.cluster_id == cluster_id, n.role == NodeRole.HEAD, n.state != NodeState.TERMINATED)
        .order_by(n.generation.desc())
        .limit(1)
    )
    return found or 1


async def head_addresses(conn: AsyncConnection, cluster_ids: Collection[str]) -> dict[str, HeadAddress]:
    """By cluster id; only of heads that have reported theirs."""
    n = nodes.c
    rows = await conn.execute(
        select(n.cluster_id, n.generation, n.gcs_address)
        .where(
            n.cluster_id.in_(cluster_ids), n.role == NodeRole.HEAD, n.ended_at.is_(None), n.state.not_in(ENDED)
        )
        .order_by(n.generation)
    )  # fmt: skip
    # The newest head counts, also while it has no address yet: the one before it is being replaced.
    newest = {r.cluster_id: r for r in rows}
    return {
        r.cluster_id: HeadAddress(generation=r.generation, gcs_address=r.gcs_address)
        for r in newest.values()
        if r.gcs_address
    }


async def cluster_revisions(conn: AsyncConnection, cluster_ids: Collection[str]) -> list[ClusterRevision]:
    c = clusters.c
    rows = await conn.execute(
        select(c.id, c.revision, followers.c.until)
        .select_from(clusters.outerjoin(followers, followers.c.cluster_id == c.id))
        .where(c.id.in_(cluster_ids))
    )
    return [ClusterRevision(r.id, r.revision, r.until) for r in rows]


async def cluster_members(conn: AsyncConnection, cluster_ids: Collection[str]) -> list[ClusterMembers]:
    c, n = clusters.c, nodes.c
    rows = await conn.execute(
        select(c.id, c.project_id, c.cloud_id, c.service_id, c.doc).where(c.id.in_(cluster_ids))
    )  # fmt: skip
    found = {
        r.id: ClusterMembers(r.id, r.project_id, r.cloud_id, r.service_id, Cluster.model_validate(r.doc), {}, [])
        for r in rows
    }
    members = await conn.execute(
        select(n.cluster_id, n.id, n.role, n.state, n.doc)
        .where(n.cluster_id.in_(cluster_ids), n.ended_at.is_(None))
        .order_by(n.created_at, n.id)
    )
    for m in members:
        of, state = found[m.cluster_id], NodeState(m.state)
        of.states[m.id] = state
        if m.role == NodeRole.WORKER:
            group, ip, leaving = m.doc["group"], m.doc.get("ip"), bool(m.doc.get("notice"))
            of.workers.append(NodeBrief(id=m.id, group=group, state=state, ip=ip, leaving=leaving))
    return list(found.values())
