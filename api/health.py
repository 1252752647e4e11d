"""Whether this process is alive and ready, and its metrics."""

from __future__ import annotations

from datetime import timedelta

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from api.kit.context import Context, Ctx
from api.kit.temporal import calling
from heliostat.errors import HeliostatError
from heliostat.models.common import utcnow
from runtime.telemetry import render_metrics
from store.heartbeats import HEARING_GAP_S
from store.reports import last_received

router = APIRouter(tags=["health"])

CHECK_S = 2.0


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """This process answers."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"description": "What is missing."}})
async def readyz(ctx: Ctx) -> JSONResponse:
    """200 when requests can be handled: the records and Temporal answer, and nodes' reports are written."""
    checks = {"records": await _records(ctx), "temporal": await _temporal(ctx)}
    checks["hearing"] = await _hearing(ctx)  # words: ok
    ready = all(found == "ok" for found in checks.values())
    return JSONResponse({"ready": ready, "checks": checks}, status_code=200 if ready else 503)


async def _records(ctx: Context) -> str:
    try:
        async with ctx.db.read() as conn:
            await last_received(conn)
    except HeliostatError as e:
        return e.message
    return "ok"


async def _temporal(ctx: Context) -> str:
    try:
        async with calling(CHECK_S):
            await ctx.temporal.service_client.check_health(timeout=timedelta(seconds=CHECK_S))
    except HeliostatError as e:
        return e.message
    return "ok"


async def _hearing(ctx: Context) -> str:
    try:
        async with ctx.db.read() as conn:
            last = await last_received(conn)
    except HeliostatError as e:
        return e.message
    if last is None or (utcnow() - last).total_seconds() > HEARING_GAP_S:
        return "This API has not been able to write reports of nodes lately."
    return "ok"


@router.get("/metrics", include_in_schema=False)
async def metrics() -> Response:
    body, media_type = render_metrics()
    return Response(body, media_type=media_type)
