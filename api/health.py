"""Whether this process lives, whether it can work, and its metrics."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy import select, text

from api.kit.temporal import calling
from heliostat.errors import HeliostatError
from heliostat.models.common import utcnow
from runtime.telemetry import render_metrics
from store.heartbeats import HEARING_GAP_S
from store.tables import hearing

router = APIRouter(tags=["health"])

CHECK_S = 2.0


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """This process answers."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"description": "What is missing."}})
async def readyz(request: Request) -> JSONResponse:
    """200 when requests can be carried out: the records and Temporal answer, and nodes' reports are heard."""
    state = request.app.state
    checks = {"records": await _records(state), "temporal": await _temporal(state), "hearing": await _hearing(state)}
    ready = all(found == "ok" for found in checks.values())
    return JSONResponse({"ready": ready, "checks": checks}, status_code=200 if ready else 503)


async def _records(state: Any) -> str:
    try:
        async with state.db.read() as conn:
            await conn.execute(text("SELECT 1"))
    except HeliostatError as e:
        return e.message
    return "ok"


async def _temporal(state: Any) -> str:
    try:
        async with calling(CHECK_S):
            await state.temporal.service_client.check_health(timeout=timedelta(seconds=CHECK_S))
    except HeliostatError as e:
        return e.message
    return "ok"


async def _hearing(state: Any) -> str:
    try:
        async with state.db.read() as conn:
            last = await conn.scalar(select(hearing.c.last))
    except HeliostatError as e:
        return e.message
    if last is None or (utcnow() - last).total_seconds() > HEARING_GAP_S:
        return "No report of a node could be written down lately."
    return "ok"


@router.get("/metrics", include_in_schema=False)
async def metrics() -> Response:
    body, media_type = render_metrics()
    return Response(body, media_type=media_type)
