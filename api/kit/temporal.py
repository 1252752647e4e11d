"""Calls of Temporal with our errors: each has a time limit, and an unreachable Temporal is always Unavailable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from temporalio.client import WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from heliostat.errors import BY_CODE, Conflict, HeliostatError, InternalError, NotFound, Unavailable

log = structlog.get_logger(__name__)

CALL_S = 5.0
"""To start a workflow or describe a schedule: milliseconds when Temporal is healthy."""
UPDATE_S = 10.0
"""A worker answers an update; when none does for this long, the caller gets Unavailable."""

_UNAVAILABLE = {
    RPCStatusCode.UNAVAILABLE,
    RPCStatusCode.DEADLINE_EXCEEDED,
    RPCStatusCode.CANCELLED,
    RPCStatusCode.RESOURCE_EXHAUSTED,
    RPCStatusCode.ABORTED,
    RPCStatusCode.FAILED_PRECONDITION,  # its last workflow task failed (a slow machine is enough) and is tried again
}


class WorkflowGone(NotFound):
    """No workflow with this id runs: it has ended, or it was never started."""


@asynccontextmanager
async def calling(limit_s: float = CALL_S) -> AsyncIterator[None]:
    """A time limit, and Temporal's errors as ours: WorkflowGone, Unavailable, else InternalError."""
    try:
        async with asyncio.timeout(limit_s):
            yield
    except RPCError as e:
        if e.status == RPCStatusCode.NOT_FOUND:
            raise WorkflowGone("Temporal has no such workflow.", remedy="Try again in a moment.") from e
        if e.status in _UNAVAILABLE:
            raise _unavailable(e) from e
        log.error("Temporal refused a call", status=e.status.name, why=e.message)
        raise InternalError(
            f"Temporal refused the call ({e.status.name}).",
            remedy="Tell the operator: the API's log has the reason.",
        ) from e
    except (TimeoutError, WorkflowUpdateRPCTimeoutOrCancelledError) as e:
        raise _unavailable(e) from e
    except RuntimeError as e:  # how the SDK says that a lazy client could not connect
        if "connect" not in str(e):
            raise
        raise _unavailable(e) from e


def _unavailable(cause: Exception) -> Unavailable:
    log.warning("Temporal does not answer", why=str(cause)[:300] or type(cause).__name__)
    return Unavailable(
        "Temporal does not answer.", remedy="Try again. If it persists, check that Temporal and a worker are running."
    )


@asynccontextmanager
async def updating(noun: str, id: str, limit_s: float = UPDATE_S + 2) -> AsyncIterator[None]:
    """Bounds an update of the workflow of ``noun`` ``id``, which is sent inside with ``timeout_s=UPDATE_S``. Raises
    WorkflowGone when it is not running, the error that the workflow answered with, or Unavailable."""
    try:
        async with calling(limit_s):
            yield
    except WorkflowUpdateFailedError as e:
        raise _answered(e, id, noun) from e


def _answered(error: WorkflowUpdateFailedError, id: str, noun: str) -> HeliostatError:
    cause = error.cause
    if not isinstance(cause, ApplicationError):
        return InternalError(
            f"The workflow of {noun} {id} failed to handle the message.", remedy="Tell the operator.", resource=id
        )
    if cause.type == "AcceptedUpdateCompletedWorkflow":
        return WorkflowGone(f"The {noun} ended before it handled the message.", resource=id)
    cls = BY_CODE.get(cause.type or "", Conflict)
    return cls(_sentence(cause.message), remedy=f"GET it to see its state: {noun} {id}.", resource=id)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
