"""A service as it is answered: its row and those of its versions, what its heads reported last of the traffic, and its
tokens. Joined here, where it costs no event."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import select

from heliostat.errors import NotFound
from heliostat.models.agents import ServeTraffic
from heliostat.models.common import utcnow
from heliostat.models.services import LATENCY_BOUNDS_MS, QueryToken, Service, ServiceVersion, Traffic, quantile
from store.encrypted_values import read_sealed
from store.services.rows import ServiceRow, StoredToken, load_service, versions_of
from store.services.traffic import latest_traffic
from store.tables import clusters

ENDED_SHOWN = 5
"""So many versions that have ended are shown with those that live."""
FRESH_S = 15.0
"""A report older than this tells nothing of now: its head is silent. What it has counted stays counted."""
BUCKETS = len(LATENCY_BOUNDS_MS) + 1


async def answer(state: Any, id: str, upto: int | None = None) -> Service:
    """With tokens: for people of its project only. ``upto``: without the versions of a greater number, for the answer
    to the deploy that made this one."""
    row = await load_service(state.db, id)
    if row is None or row.withdrawn:
        raise NotFound(f"Service {id} was deleted meanwhile.", resource=id)
    async with state.db.read() as conn:
        rows = await versions_of(conn, id, ENDED_SHOWN)
    service = shown(row.service)
    service.versions = [v.version for v in rows if upto is None or v.number <= upto]
    await _add_traffic(state, [v for v in service.versions if v.ended_at is None])
    service.query_auth_tokens = [await opened(state, row, token) for token in row.valid_tokens]
    service.query_auth_token = service.query_auth_tokens[0].token if service.query_auth_tokens else None
    return service


def shown(service: Service) -> Service:
    """As in lists."""
    return service.model_copy(update={"gate_hashes": []})


async def opened(state: Any, row: ServiceRow, token: StoredToken) -> QueryToken:
    """Raises NotFound when it was deleted meanwhile."""
    value = await read_sealed(state.db, state.keys, token.id)
    if value is None:
        raise NotFound(f"Token {token.id} was deleted meanwhile.", resource=row.id)
    return QueryToken(
        id=token.id,
        token=value["token"],
        created_at=token.created_at,
        primary=token.id == row.valid_tokens[0].id,
        active=token.sha256 in row.service.gate_hashes,
    )


async def _add_traffic(state: Any, versions: list[ServiceVersion]) -> None:
    by_version = {v.id: [c.cluster_id for c in v.clusters] for v in versions}
    found = await latest_traffic(state.db, {c for ids in by_version.values() for c in ids})
    now = utcnow()
    for version in versions:
        told = [found[c] for c in by_version[version.id] if c in found and found[c][0].version_id == version.id]
        version.traffic = merged(told, now)


def merged(told: Collection[tuple[ServeTraffic, datetime]], now: datetime) -> Traffic | None:
    """One version's over its clusters; None when nobody has told."""
    if not told:
        return None
    fresh = [t for t, at in told if t.alive and (now - at).total_seconds() < FRESH_S]
    rated = [t for t in fresh if t.window_s > 0]
    buckets = [0] * BUCKETS
    for traffic in rated:
        if len(traffic.window_buckets) == BUCKETS:
            buckets = [a + b for a, b in zip(buckets, traffic.window_buckets, strict=True)]
    return Traffic(
        requests=sum(t.requests for t, _ in told),
        errors=sum(t.errors for t, _ in told),
        ongoing=sum(t.ongoing for t in fresh),
        connections=sum(t.connections for t in fresh),
        window_s=max((t.window_s for t in rated), default=0),
        requests_per_s=round(sum(t.window_requests / t.window_s for t in rated), 3),
        errors_per_s=round(sum(t.window_errors / t.window_s for t in rated), 3),
        p50_ms=quantile(buckets, 0.5),
        p95_ms=quantile(buckets, 0.95),
        last_request_at=max((t.last_request_at for t, _ in told if t.last_request_at), default=None),
    )


async def clusters_of(state: Any, service_id: str) -> list[str]:
    """All that were ever made for it."""
    async with state.db.read() as conn:
        return list(
            await conn.scalars(
                select(clusters.c.id).where(clusters.c.service_id == service_id).order_by(clusters.c.created_at)
            )
        )
