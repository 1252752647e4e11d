"""Our OpenID issuer's two documents: public keys and names, for Google's STS, without authentication."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Response

from api.kit.context import FromVendors

router = APIRouter(prefix="/.well-known", tags=["trust"])

CACHE = {"cache-control": "public, max-age=3600"}


@router.get("/openid-configuration")
async def openid_configuration(vendors: FromVendors, response: Response) -> dict[str, Any]:
    """OpenID Connect Discovery 1.0, §3."""
    response.headers.update(CACHE)
    return await asyncio.to_thread(vendors.openid_configuration)


@router.get("/jwks.json")
async def jwks(vendors: FromVendors, response: Response) -> dict[str, Any]:
    """The keys that our tokens are signed by (RFC 7517)."""
    response.headers.update(CACHE)
    return await asyncio.to_thread(vendors.jwks)
