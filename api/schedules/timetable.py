"""The Temporal Schedule of a schedule."""

from __future__ import annotations

from datetime import datetime, timedelta

from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
    ScheduleState,
    ScheduleUpdate,
    ScheduleUpdateInput,
)
from temporalio.common import SearchAttributePair, TypedSearchAttributes

from api.kit.temporal import CALL_S, WorkflowGone, calling
from api.schedules.cron import parse
from runtime.messages.common import KIND, NAME, PROJECT
from runtime.messages.jobs import ScheduledRunInput
from store.schedules import ScheduleRow

RPC = timedelta(seconds=CALL_S)


async def put(
    client: Client, task_queue: str, row: ScheduleRow, crons: list[str] | None, *, only_if_lost: bool
) -> None:
    """Creates it, or changes an existing one unless ``only_if_lost``. ``crons``: of the expression, if it is parsed
    already."""
    wanted = _wanted(task_queue, row, crons or parse(row.config.cron_expression))

    async def change(_: ScheduleUpdateInput) -> ScheduleUpdate:
        return ScheduleUpdate(schedule=wanted)

    async with calling():
        try:
            await client.create_schedule(row.id, wanted, rpc_timeout=RPC)
        except ScheduleAlreadyRunningError:
            if not only_if_lost:
                await client.get_schedule_handle(row.id).update(change, rpc_timeout=RPC)


async def next_time(client: Client, id: str) -> datetime | None:
    async with calling():
        times = (await client.get_schedule_handle(id).describe(rpc_timeout=RPC)).info.next_action_times
    return times[0] if times else None


async def delete(client: Client, id: str) -> None:
    """One that Temporal does not have is fine."""
    try:
        async with calling():
            await client.get_schedule_handle(id).delete(rpc_timeout=RPC)
    except WorkflowGone:
        pass


def _wanted(task_queue: str, row: ScheduleRow, crons: list[str]) -> Schedule:
    config = row.config
    attributes = [
        SearchAttributePair(KIND, "schedule"),
        SearchAttributePair(PROJECT, row.project),
        SearchAttributePair(NAME, row.name),
    ]
    return Schedule(
        action=ScheduleActionStartWorkflow(
            "ScheduledRunWorkflow",
            ScheduledRunInput(schedule_id=row.id),
            id=f"{row.id}-turn",
            task_queue=task_queue,
            typed_search_attributes=TypedSearchAttributes(attributes),
            static_summary=f"schedule {row.name}: a turn",
        ),
        spec=ScheduleSpec(cron_expressions=crons, time_zone_name=config.timezone),
        policy=SchedulePolicy(
            overlap=ScheduleOverlapPolicy[config.overlap_policy.name],
            catchup_window=timedelta(seconds=config.catchup_window_s),
        ),
        state=ScheduleState(paused=row.paused, note=f"{config.cron_expression} {config.timezone}"),
    )
