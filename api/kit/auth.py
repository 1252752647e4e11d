"""The dependency that names the caller of a route. Nodes have tokens of their own, see ``api/agents/context.py``."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.kit.callers import Caller
from api.kit.context import Ctx
from heliostat.errors import Unauthenticated

_bearer = HTTPBearer(auto_error=False, description="A user's token, see POST /v1/tokens.")


async def _caller(ctx: Ctx, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Caller:
    if credentials is None:
        raise Unauthenticated(
            "There is no bearer token in this request.", remedy="Send 'Authorization: Bearer <token>'."
        )
    return await ctx.callers.identify(credentials.credentials)


Me = Annotated[Caller, Depends(_caller)]
"""The caller of a route; 401 without a valid token."""
