"""One way to deliver a message to Temporal within a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from temporalio.service import RPCError, RPCStatusCode

from heliostat.errors import InvalidRequest, Unavailable

Answer = TypeVar("Answer")


async def delivered(call: Awaitable[Answer], timeout_s: float) -> bool:
    """Awaits a message to a workflow or the completion of an activity. True: Temporal has stored it; False: the
    workflow or activity has ended or never existed.

    Raises:
        Unavailable: Temporal did not answer in time; the same call may be repeated.
        InvalidRequest: Temporal refuses this message for good.
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
