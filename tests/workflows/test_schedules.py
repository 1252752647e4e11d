"""A schedule's turn is a job like a person's. Temporal's overlap policy sees turns, so one lives as long as its job."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from temporalio.client import (
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleHandle,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
    WorkflowFailureError,
)

from heliostat.models.common import new_id, utcnow
from heliostat.models.jobs import JobState
from heliostat.models.schedules import ScheduleConfig
from runtime.messages.jobs import ScheduledRunInput
from store.tables import jobs, schedules
from tests.workflows.world import RunPlan, World


async def apply(
    world: World, overlap: ScheduleOverlapPolicy, cluster_id: str | None = None
) -> tuple[str, ScheduleHandle]:
    schedule_id = new_id("sch")
    frozen = world.job_input(cluster_id).model_copy(update={"job_id": "", "schedule_id": schedule_id})
    config = ScheduleConfig(job_config=frozen.config, cron_expression="@hourly")
    now = utcnow()
    async with world.db.begin() as conn:
        await conn.execute(
            schedules.insert().values(
                id=schedule_id,
                project_id="prj_1",
                name="nightly",
                config=config.model_dump(mode="json"),
                input=frozen.model_dump(mode="json"),
                created_by="ann",
                created_at=now,
                updated_at=now,
            )
        )
    handle = await world.client.create_schedule(
        schedule_id,
        Schedule(
            action=ScheduleActionStartWorkflow(
                "ScheduledRunWorkflow",
                ScheduledRunInput(schedule_id=schedule_id),
                id=f"{schedule_id}-turn",
                task_queue=world.settings.task_queue,
            ),
            spec=ScheduleSpec(),
            policy=SchedulePolicy(overlap=overlap, catchup_window=timedelta(minutes=1)),
        ),
    )
    return schedule_id, handle


async def jobs_of(world: World, schedule_id: str) -> list[str]:
    async with world.db.read() as conn:
        found = await conn.scalars(
            jobs.select()
            .with_only_columns(jobs.c.id)
            .where(jobs.c.schedule_id == schedule_id)
            .order_by(jobs.c.created_at)
        )
        ids = list(found)
    world.ids += [i for i in ids if i not in world.ids]
    return ids


async def until_jobs(world: World, schedule_id: str, count: int) -> list[str]:
    async def look() -> list[str] | None:
        found = await jobs_of(world, schedule_id)
        return found if len(found) == count else None

    found = await world.until(look, f"{count} jobs of {schedule_id}")
    assert found is not None
    return found


async def test_a_turn_is_an_ordinary_job(world: World) -> None:
    schedule_id, handle = await apply(world, ScheduleOverlapPolicy.SKIP)
    await handle.trigger()
    (job_id,) = await until_jobs(world, schedule_id, 1)
    job = await world.until_job(job_id, JobState.SUCCEEDED)
    assert job.schedule_id == schedule_id
    assert job.created_by == "ann"
    await world.until_ended(job_id)
    await world.until_gone()
    await handle.delete()


async def test_skip_starts_no_second_job_while_the_first_runs(world: World) -> None:
    world.fleet.run_plans = [RunPlan(hold=True)]
    cluster_id = await world.running_cluster()
    schedule_id, handle = await apply(world, ScheduleOverlapPolicy.SKIP, cluster_id)
    await handle.trigger()
    (job_id,) = await until_jobs(world, schedule_id, 1)
    run_id = await world.until_run(job_id)
    await handle.trigger()

    async def skipped() -> bool:
        return (await handle.describe()).info.num_actions_skipped_overlap == 1

    await world.until(skipped, "the second turn to be skipped")
    assert await jobs_of(world, schedule_id) == [job_id]
    await world.head(cluster_id).end_run(run_id)
    await world.until_ended(job_id)

    async def free() -> bool:
        return not (await handle.describe()).info.running_actions

    await world.until(free, "the turn to be over")
    await handle.trigger()
    await until_jobs(world, schedule_id, 2)
    await handle.delete()


async def test_cancel_other_ends_the_job_before_with_its_cluster(world: World) -> None:
    world.fleet.run_plans = [RunPlan(hold=True), RunPlan(hold=True)]
    schedule_id, handle = await apply(world, ScheduleOverlapPolicy.CANCEL_OTHER)
    await handle.trigger()
    (first,) = await until_jobs(world, schedule_id, 1)
    await world.until_run(first)
    await handle.trigger()
    _, second = await until_jobs(world, schedule_id, 2)
    job = await world.until_job(first, JobState.TERMINATED)
    assert "cancelled in Temporal" in job.reason
    run_id = await world.until_run(second)

    async def alone() -> bool:
        return len(world.alive()) == 1

    await world.until(alone, "the first job's cluster to be gone")
    await world.head((await world.job(second)).cluster_id or "").end_run(run_id)
    await world.until_job(second, JobState.SUCCEEDED)
    await handle.delete()


async def test_a_turn_of_a_deleted_schedule_fails_and_makes_nothing(world: World) -> None:
    with pytest.raises(WorkflowFailureError):
        await world.client.execute_workflow(
            "ScheduledRunWorkflow",
            ScheduledRunInput(schedule_id="sch_gone"),
            id=new_id("turn"),
            task_queue=world.settings.task_queue,
        )
    assert not world.alive()


async def test_a_turn_terminated_by_hand_leaves_its_job_running(world: World) -> None:
    world.fleet.run_plans = [RunPlan(hold=True)]
    schedule_id, handle = await apply(world, ScheduleOverlapPolicy.SKIP)
    await handle.trigger()
    (job_id,) = await until_jobs(world, schedule_id, 1)
    run_id = await world.until_run(job_id)

    async def turn() -> list[Any]:
        return list((await handle.describe()).info.running_actions)

    running = await world.until(turn, "the turn to be shown")
    await world.client.get_workflow_handle(running[0].workflow_id).terminate("by hand")
    await world.head((await world.job(job_id)).cluster_id or "").end_run(run_id)
    await world.until_job(job_id, JobState.SUCCEEDED)
    await handle.delete()
