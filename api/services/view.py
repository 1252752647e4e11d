"""A service as answers show it: its row and those of its versions, the traffic that its heads reported last, and its
tokens. Joined here, where it costs no event."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from api.kit.context import Context
from heliostat.errors import NotFound
from heliostat.models.agents import ServeTraffic
from heliostat.models.common import utcnow
from heliostat.models.services import LATENCY_BOUNDS_MS, QueryToken, Service, ServiceVersion, Traffic, quantile
from store.encrypted_values import read_sealed
from store.services.rows import ServiceRow, StoredToken, load_service, versions_of
from store.services.traffic import latest_traffic

ENDED_SHOWN = 5
"""How many versions that have ended are shown with the others."""
FRESH_S = 15.0
"""A report older than this says nothing about now: its head is silent. Its totals still count."""
BUCKETS = len(LATENCY_BOUNDS_MS) + 1


async def answer(ctx: Context, id: str, newest: int | None = None) -> Service:
    """With tokens: for people of its project only. ``newest``: without versions of a greater number, for the answer to
    the deploy that created this one."""
    row = await load_service(ctx.db, id)
    if row is None or row.withdrawn:
        raise NotFound(f"Service {id} was deleted meanwhile.", resource=id)
    async with ctx.db.read() as conn:
        rows = await versions_of(conn, id, ENDED_SHOWN)
    service = in_list(row.service)
    service.versions = [v.version for v in rows if newest is None or v.number <= newest]
    await _add_traffic(ctx, [v for v in service.versions if v.ended_at is None])
    service.query_auth_tokens = [await decrypted(ctx, row, token) for token in row.valid_tokens]
    service.query_auth_token = service.query_auth_tokens[0].token if service.query_auth_tokens else None
    return service


def in_list(service: Service) -> Service:
    """As lists show it."""
    return service.model_copy(update={"gate_hashes": []})


async def decrypted(ctx: Context, row: ServiceRow, token: StoredToken) -> QueryToken:
    """Raises NotFound when it was deleted meanwhile."""
    value = await read_sealed(ctx.db, ctx.keys, token.id)
    if value is None:
        raise NotFound(f"Token {token.id} was deleted meanwhile.", resource=row.id)
    return QueryToken(
        id=token.id,
        token=value["token"],
        created_at=token.created_at,
        primary=token.id == row.valid_tokens[0].id,
        active=token.sha256 in row.service.gate_hashes,
    )


async def _add_traffic(ctx: Context, versions: list[ServiceVersion]) -> None:
    by_version = {v.id: [c.cluster_id for c in v.clusters] for v in versions}
    found = await latest_traffic(ctx.db, {c for ids in by_version.values() for c in ids})
    now = utcnow()
    for version in versions:
        reported = [found[c] for c in by_version[version.id] if c in found and found[c][0].version_id == version.id]
        version.traffic = merged(reported, now)


def merged(reported: Collection[tuple[ServeTraffic, datetime]], now: datetime) -> Traffic | None:
    """Of one version over its clusters; None when no head has reported."""
    if not reported:
        return None
    fresh = [t for t, at in reported if t.alive and (now - at).total_seconds() < FRESH_S]
    rated = [t for t in fresh if t.window_s > 0]
    buckets = [0] * BUCKETS
    for traffic in rated:
        if len(traffic.window_buckets) == BUCKETS:
            buckets = [a + b for a, b in zip(buckets, traffic.window_buckets, strict=True)]
    return Traffic(
        requests=sum(t.requests for t, _ in reported),
        errors=sum(t.errors for t, _ in reported),
        ongoing=sum(t.ongoing for t in fresh),
        connections=sum(t.connections for t in fresh),
        window_s=max((t.window_s for t in rated), default=0),
        requests_per_s=round(sum(t.window_requests / t.window_s for t in rated), 3),
        errors_per_s=round(sum(t.window_errors / t.window_s for t in rated), 3),
        p50_ms=quantile(buckets, 0.5),
        p95_ms=quantile(buckets, 0.95),
        last_request_at=max((t.last_request_at for t, _ in reported if t.last_request_at), default=None),
    )
