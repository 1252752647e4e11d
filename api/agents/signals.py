"""One way to tell Temporal something and to learn what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from temporalio.service import RPCError, RPCStatusCode

from heliostat.errors import InvalidRequest, Unavailable


async def told(call: Awaitable[Any], timeout_s: float) -> bool:
    """Awaits a message to a workflow or the completion of an activity. True: Temporal has it safely; False:
    what it was meant for has ended or never was.

    Raises:
        Unavailable: Temporal did not take it in time; the same may be tried again.
        InvalidRequest: it never will take this.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await call
    except RPCError as e:
        if e.status == RPCStatusCode.NOT_FOUND:
            return False
        if e.status == RPCStatusCode.INVALID_ARGUMENT:
            raise InvalidRequest(f"Temporal refuses this message: {e.message}") from e
        raise Unavailable(f"Temporal does not answer: {e.message}", remedy="Try again.") from e
    except (TimeoutError, RuntimeError) as e:  # RuntimeError: how a lazy client says that it can't connect
        raise Unavailable(f"Temporal does not answer: {str(e) or 'timed out'}", remedy="Try again.") from e
    return True
