"""Messages to workflows: inputs, signals, updates and queries, and how a workflow is started.

They are here, below both sides, because the API and the activities start and message the same workflows, and neither
may import the other. Workflow id = resource id, so nothing starts twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Sequence
from datetime import timedelta
from typing import TypeVar, overload
from uuid import uuid4

from pydantic import BaseModel
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.common import (
    SearchAttributeKey,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from heliostat.models.common import Model

Answer = TypeVar("Answer")

KIND = SearchAttributeKey.for_keyword("HeliostatKind")
STATE = SearchAttributeKey.for_keyword("HeliostatState")
PROJECT = SearchAttributeKey.for_keyword("HeliostatProject")
NAME = SearchAttributeKey.for_keyword("HeliostatName")
SEARCH_ATTRIBUTES = (KIND, STATE, PROJECT, NAME)
MONITOR_ID = "monitor"
SWEEP_SCHEDULE_ID = "sweep"
SYSTEM = "system"
"""The actor of what no user requested: decisions of workflows, the sweep, the monitor."""

QUERY_S = 10.0
"""A query is answered by a worker, from its cache or by a replay."""
UPDATE_RETRY_S = 0.2
"""Between two tries of an update during which a workflow task failed."""


class Limits(Model):
    """The settings of a workflow, fixed when it starts: a replay must see the same ones."""

    head_start_timeout_s: float = 300
    worker_start_timeout_s: float = 300
    register_timeout_s: float | None = None
    """From a machine's launch to its agent's first call; None: as long as its node's start."""
    capacity_timeout_s: float = 900
    infrastructure_retry_s: float = 3600


class TerminateRequest(Model):
    actor: str
    reason: str = ""


class WorkflowHandle:
    """One running workflow. A subclass per noun has one method per message, named as the workflow's handler; a test
    compares both. Each method raises RPCError: ``NOT_FOUND`` when the workflow does not run."""

    def __init__(self, client: Client, id: str) -> None:
        self._handle = client.get_workflow_handle(id)

    async def runs(self) -> bool:
        """False: it has ended, or never was. Asked by id, because visibility lags behind."""
        try:
            description = await self._handle.describe()
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                return False
            raise
        return description.status in (WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.CONTINUED_AS_NEW)

    async def _signal(self, name: str, message: BaseModel | Sequence[BaseModel], timeout_s: float | None) -> None:
        await self._handle.signal(name, message, rpc_timeout=_seconds(timeout_s))

    async def _query(self, name: str, answer: type[Answer]) -> Answer:
        found: Answer = await self._handle.query(name, result_type=answer, rpc_timeout=timedelta(seconds=QUERY_S))
        return found

    @overload
    async def _update(
        self, name: str, message: BaseModel, answer: None, key: str | None, timeout_s: float | None
    ) -> None: ...

    @overload
    async def _update(
        self, name: str, message: BaseModel, answer: type[Answer], key: str | None, timeout_s: float | None
    ) -> Answer: ...

    async def _update(
        self, name: str, message: BaseModel, answer: type[Answer] | None, key: str | None, timeout_s: float | None
    ) -> Answer | None:
        """``key``: an update that is sent again under the same key is carried out once. Within ``timeout_s`` it is sent
        again when the workflow's last task failed: a slow machine is enough for that, and Temporal retries the task."""
        id = hashlib.sha256(f"{name}/{key}".encode()).hexdigest() if key else uuid4().hex
        until = time.monotonic() + (timeout_s or 0)
        while True:
            left = None if timeout_s is None else max(until - time.monotonic(), UPDATE_RETRY_S)
            try:
                answered: Answer | None = await self._handle.execute_update(
                    name, message, id=id, result_type=answer, rpc_timeout=_seconds(left)
                )
                return answered
            except RPCError as error:
                if error.status != RPCStatusCode.FAILED_PRECONDITION or time.monotonic() >= until:
                    raise
            await asyncio.sleep(UPDATE_RETRY_S)


async def reached(message: Awaitable[None]) -> bool:
    """Awaits a signal. False: its workflow has ended, or never was. Raises RPCError when Temporal is away."""
    try:
        await message
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return False
    return True


def _seconds(timeout_s: float | None) -> timedelta | None:
    return None if timeout_s is None else timedelta(seconds=timeout_s)


def _attributes(kind: str, state: str, project: str, name: str) -> TypedSearchAttributes:
    return TypedSearchAttributes(
        [
            SearchAttributePair(KIND, kind),
            SearchAttributePair(STATE, state),
            SearchAttributePair(PROJECT, project),
            SearchAttributePair(NAME, name),
        ]
    )


async def _start(
    client: Client, workflow: str, arg: Model, id: str, queue: str, summary: str, attributes: TypedSearchAttributes
) -> None:
    """Starts it unless it runs or ran: both are success, since the id is the resource's."""
    try:
        await client.start_workflow(
            workflow,
            arg,
            id=id,
            task_queue=queue,
            id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            search_attributes=attributes,
            static_summary=summary,
        )
    except WorkflowAlreadyStartedError:
        pass  # it has run to its end already
