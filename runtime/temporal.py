"""The way to Temporal: connecting, and what its namespace must hold before anything is started.

Where Temporal is, and how to prove who we are, comes by ``temporalio.envconfig`` (``TEMPORAL_ADDRESS``,
``TEMPORAL_NAMESPACE``, ``TEMPORAL_API_KEY``, ``TEMPORAL_TLS_*``, a profile in ``temporal.toml``), so
Temporal Cloud or any other cluster is a matter of configuration. Without any of it: the embedded
server on this machine.
"""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import structlog
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.client import (
    Client,
    Interceptor,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
    ScheduleUpdate,
    ScheduleUpdateInput,
)
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.envconfig import ClientConfig
from temporalio.service import RPCError, RPCStatusCode

from heliostat.errors import Unavailable
from runtime.messages.common import MONITOR_ID, SEARCH_ATTRIBUTES, SWEEP_SCHEDULE_ID
from runtime.settings import Settings

log = structlog.get_logger(__name__)


async def connect(settings: Settings, *, lazy: bool = False, timeout_s: float = 30.0, **kw: Any) -> Client:
    """Connects with the pydantic data converter, and with tracing where an endpoint is configured.

    Args:
        lazy: returns at once and connects at the first call (the API, which must answer while Temporal is
            away); such a client cannot back a worker.
        timeout_s: how long an absent server is tried again before giving up.
        kw: more of ``Client.connect`` (``runtime``, ``interceptors``, ``retry_config``, …).

    Raises:
        Unavailable: the server did not answer in time, or refused us.
    """
    found: dict[str, Any] = dict(ClientConfig.load_client_connect_config())
    found.setdefault("target_host", f"127.0.0.1:{settings.temporal_port}")
    interceptors: list[Interceptor] = list(kw.pop("interceptors", []))
    if settings.otel_endpoint:
        from temporalio.contrib.opentelemetry import TracingInterceptor  # a tenth of the start-up, for who wants it

        interceptors.append(TracingInterceptor())
    found |= {"data_converter": pydantic_data_converter, "interceptors": interceptors, "lazy": lazy, **kw}
    deadline, pause = time.monotonic() + timeout_s, 0.1
    while True:
        try:
            return await Client.connect(**found)
        except (RuntimeError, ValueError) as error:  # the SDK's own two ways to say that it could not
            left = deadline - time.monotonic()
            if isinstance(error, ValueError) or left <= 0:
                raise Unavailable(
                    f"Temporal at {found['target_host']} can't be reached: {error}",
                    remedy="Start it (`make up` runs one), or set TEMPORAL_ADDRESS and its TLS or API key settings.",
                    resource=str(found["target_host"]),
                ) from error
            log.info("waiting for Temporal", address=found["target_host"], seconds_left=round(left))
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 2, 2.0)


async def ensure_namespace_ready(client: Client, settings: Settings) -> None:
    """Search attributes, the sweep's schedule and the monitor. Repeatable; every worker does it when it starts.

    Raises:
        Unavailable: the namespace lacks a search attribute and we may not add it.
        RPCError: Temporal is away.
    """
    await _ensure_search_attributes(client)
    await _ensure_sweep(client, settings)
    await client.start_workflow(
        "MonitorWorkflow",
        id=MONITOR_ID,
        task_queue=settings.task_queue,
        id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        static_summary="finds silent heads and accepted requests that nobody started",
    )


async def _ensure_search_attributes(client: Client) -> None:
    wanted = {key.name: IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD for key in SEARCH_ATTRIBUTES}
    try:
        answer = await client.operator_service.list_search_attributes(
            ListSearchAttributesRequest(namespace=client.namespace)
        )
        missing = {name: kind for name, kind in wanted.items() if name not in answer.custom_attributes}
        if missing:
            await client.operator_service.add_search_attributes(
                AddSearchAttributesRequest(namespace=client.namespace, search_attributes=missing)
            )
            log.info("search attributes added", names=sorted(missing))
    except RPCError as error:
        if error.status == RPCStatusCode.ALREADY_EXISTS:
            return  # another worker was quicker
        if error.status not in (RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNIMPLEMENTED):
            raise
        # Temporal Cloud lets nobody list or add them here: what counts is whether they can be requested.
        lacking = [name for name in wanted if not await _can_be_asked_for(client, name)]
        if lacking:
            raise Unavailable(
                f"The namespace {client.namespace} lacks search attributes, and we may not add them ({error.message}).",
                remedy=f"Give it the keyword search attributes {', '.join(lacking)} by the means of your Temporal.",
                resource=client.namespace,
            ) from error


async def _can_be_asked_for(client: Client, name: str) -> bool:
    try:
        await client.count_workflows(f"{name} = 'x'")
    except RPCError as error:
        if error.status == RPCStatusCode.INVALID_ARGUMENT:
            return False
        raise
    return True


async def _ensure_sweep(client: Client, settings: Settings) -> None:
    wanted = Schedule(
        action=ScheduleActionStartWorkflow(
            "SweepWorkflow",
            id=SWEEP_SCHEDULE_ID,
            task_queue=settings.task_queue,
            # Bounded, since it owns nothing: a sweep that hangs must not stop all later ones (overlap SKIP).
            execution_timeout=timedelta(hours=1),
            static_summary="ends machines that no cluster owns",
        ),
        spec=ScheduleSpec(intervals=[ScheduleIntervalSpec(every=timedelta(seconds=settings.sweep_interval_s))]),
        # After an outage one sweep is enough: it reads both sides in full and takes no input.
        policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP, catchup_window=timedelta(minutes=1)),
    )
    try:
        await client.create_schedule(SWEEP_SCHEDULE_ID, wanted)
        return
    except ScheduleAlreadyRunningError:
        pass
    handle = client.get_schedule_handle(SWEEP_SCHEDULE_ID)
    there = (await handle.describe()).schedule
    same_queue = (
        isinstance(there.action, ScheduleActionStartWorkflow) and there.action.task_queue == settings.task_queue
    )
    if same_queue and [i.every for i in there.spec.intervals] == [i.every for i in wanted.spec.intervals]:
        return

    def changed(seen: ScheduleUpdateInput) -> ScheduleUpdate:
        wanted.state = seen.description.schedule.state  # somebody may have paused it on purpose
        return ScheduleUpdate(wanted)

    await handle.update(changed)
    log.info("sweep schedule changed", every_s=settings.sweep_interval_s)
