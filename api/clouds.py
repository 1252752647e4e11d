"""The places that machines come from. They are registered where the server is set up, and looked at here."""

from __future__ import annotations

from fastapi import APIRouter, Request
from sqlalchemy import select

from api import lookup
from api.auth import Me
from api.pagination import Cursor, Limit, page
from heliostat.models.clouds import Cloud
from heliostat.models.common import Page
from store.tables import clouds

router = APIRouter(prefix="/v1/clouds", tags=["clouds"])


@router.get("")
async def list_all(request: Request, me: Me, limit: Limit = 50, cursor: Cursor = None) -> Page[Cloud]:
    query = select(clouds).where(clouds.c.organization_id == me.organization_id)
    make = lambda r: Cloud.model_validate(r._mapping)  # noqa: E731
    async with request.app.state.db.read() as conn:
        return await page(conn, query, (clouds.c.created_at, clouds.c.id), make, limit, cursor)


@router.get("/{ref}")
async def get(request: Request, me: Me, ref: str) -> Cloud:
    async with request.app.state.db.read() as conn:
        return await lookup.cloud(conn, me, ref)
