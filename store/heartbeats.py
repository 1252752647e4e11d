"""Which heads are silent, judged by the time in which the API could receive their reports."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import and_, func, or_, select

from heliostat.models.clusters import ClusterState, NodeRole, NodeState
from store.database import Database
from store.tables import clusters, hearing, nodes, reports

HEARING_GAP_S = 5.0
"""The API notes every second or so that it can receive. Not noted for so long: it can't, and silence means nothing."""


@dataclass(frozen=True)
class SilentHeads:
    heard_since: datetime | None
    """Since when the API could receive without a gap; None: it can't now."""
    total: int
    """Heads of running clusters."""
    silent: list[tuple[str, str, datetime]]
    """(cluster id, node id, last heard)."""


async def silent_heads(db: Database, now: datetime, silence_s: float) -> SilentHeads:
    """Running clusters whose current head has sent no report for ``silence_s``, counted from when the API could receive
    at the earliest. Nobody is silent while it can't."""
    current = and_(
        clusters.c.state == ClusterState.RUNNING,
        clusters.c.ended_at.is_(None),
        nodes.c.role == NodeRole.HEAD,
        nodes.c.state == NodeState.RUNNING,
        nodes.c.ended_at.is_(None),
    )
    async with db.read() as conn:
        heard = (await conn.execute(select(hearing.c.since, hearing.c.last))).first()
        heads = nodes.join(clusters, clusters.c.id == nodes.c.cluster_id)
        if heard is None or (now - heard.last).total_seconds() > HEARING_GAP_S:
            return SilentHeads(None, await conn.scalar(select(func.count()).select_from(heads).where(current)) or 0, [])
        limit = now - timedelta(seconds=silence_s)
        last = func.coalesce(reports.c.at, nodes.c.created_at)
        quiet = or_(reports.c.at < limit, and_(reports.c.at.is_(None), nodes.c.created_at < limit))
        rows = await conn.execute(
            # The newest head only: a replaced one may not be marked as ended yet.
            select(nodes.c.cluster_id, nodes.c.id, last.label("at"), quiet.label("quiet"))
            .select_from(heads.outerjoin(reports, reports.c.node_id == nodes.c.id))
            .where(current)
            .order_by(nodes.c.cluster_id, nodes.c.generation)
        )
        newest = {r.cluster_id: r for r in rows}
    silent: list[tuple[str, str, datetime]] = []
    if heard.since <= limit:
        silent = [(r.cluster_id, r.id, max(r.at, heard.since)) for r in newest.values() if r.quiet]
    return SilentHeads(heard.since, len(newest), silent)


async def heads_never_heard(db: Database, now: datetime, silence_s: float) -> list[tuple[str, str, datetime]]:
    """Heads whose machine was launched longer than ``silence_s`` ago and that have sent no report since, while the API
    could receive: (cluster, node, since). A machine may die before its agent sends anything."""
    launched = (NodeState.LAUNCHED, NodeState.REGISTERED)
    async with db.read() as conn:
        heard = (await conn.execute(select(hearing.c.since, hearing.c.last))).first()
        limit = now - timedelta(seconds=silence_s)
        if heard is None or (now - heard.last).total_seconds() > HEARING_GAP_S or heard.since > limit:
            return []
        last = func.coalesce(reports.c.at, nodes.c.created_at)
        rows = await conn.execute(
            select(nodes.c.cluster_id, nodes.c.id, last.label("at"))
            .select_from(
                nodes.join(clusters, clusters.c.id == nodes.c.cluster_id).outerjoin(
                    reports, reports.c.node_id == nodes.c.id
                )
            )
            .where(
                clusters.c.state.in_((ClusterState.STARTING, ClusterState.RECOVERING)),
                clusters.c.ended_at.is_(None),
                nodes.c.role == NodeRole.HEAD,
                nodes.c.state.in_(launched),
                nodes.c.ended_at.is_(None),
                last < limit,
            )
        )
        return [(row.cluster_id, row.id, max(row.at, heard.since)) for row in rows]
