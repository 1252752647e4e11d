"""The traffic that the proxies of a service reported last."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import select

from heliostat.models.agents import ServeTraffic
from heliostat.models.clusters import NodeRole
from store.database import Database
from store.tables import nodes, reports


async def latest_traffic(db: Database, cluster_ids: Collection[str]) -> dict[str, tuple[ServeTraffic, datetime]]:
    """The last report of each cluster's newest head about its proxies, and when it came. A cluster is left out whose
    newest head has not reported on them."""
    if not cluster_ids:
        return {}
    async with db.read() as conn:
        rows = await conn.execute(
            select(nodes.c.cluster_id, reports.c.doc, reports.c.at)
            .select_from(nodes.outerjoin(reports, reports.c.node_id == nodes.c.id))
            .where(nodes.c.cluster_id.in_(cluster_ids), nodes.c.role == NodeRole.HEAD)
            .order_by(nodes.c.generation)
        )
        newest = {r.cluster_id: r for r in rows}
    told = {id: r for id, r in newest.items() if r.doc and r.doc.get("serve")}
    return {id: (ServeTraffic.model_validate(r.doc["serve"]), r.at) for id, r in told.items()}
