"""A job is terminated at any moment, and nothing of it is left."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest
from temporalio.client import WorkflowUpdateFailedError
from temporalio.service import RPCError

from heliostat.models.clusters import ClusterState
from heliostat.models.jobs import JobState, RunState
from store import clusters as cluster_records
from tests.workflows.clusters.test_healing import silent
from tests.workflows.world import NodePlan, RunPlan, World
from workflows import ids, policies


async def at_once(world: World) -> str:
    world.fleet.run_plans = [RunPlan(hold=True)]  # however late it is told: not after its end
    return await world.start_job()


async def cluster_launching(world: World) -> str:
    world.machines.latency_s = {"launch": 0.3}
    world.fleet.run_plans = [RunPlan(hold=True)]
    job_id = await world.start_job()

    async def under_way() -> bool:
        return world.machines.calls["launch"] > 0

    await world.until(under_way, "the launch")
    return job_id


async def cluster_waiting(world: World) -> str:
    world.machines.no_capacity()
    job_id = await world.start_job()

    async def refused() -> bool:
        return world.machines.calls["launch"] > 0

    await world.until(refused, "the launch")
    return job_id


async def cluster_booting(world: World) -> str:
    world.fleet.node_plan = lambda spec: NodePlan(register=False)
    job_id = await world.start_job()

    async def up() -> bool:
        return bool(world.alive())

    await world.until(up, "the machine")
    return job_id


async def submitting(world: World) -> str:
    world.fleet.run_plans = [RunPlan(silent=True)]
    job_id = await world.start_job()

    async def given() -> bool:
        return not world.fleet.run_plans

    await world.until(given, "the submission")
    return job_id


async def running(world: World) -> str:
    world.fleet.run_plans = [RunPlan(hold=True)]
    job_id = await world.start_job()
    await world.until_run(job_id)
    return job_id


async def between_runs(world: World) -> str:
    world.fleet.run_plan = RunPlan(error="driver_lost")
    job_id = await world.start_job()

    async def waits() -> bool:
        return "before the next attempt" in (await world.job(job_id)).waits_for

    await world.until(waits, "the back-off")
    return job_id


async def head_recovering(world: World) -> str:
    job_id = await running(world)
    cluster_id = ids.job_cluster_id(job_id, 1)
    world.machines.no_capacity()
    head = await world.node(cluster_id)
    await world.kill_machine(head)
    await silent(world, cluster_id, head.id)
    await world.until_cluster(cluster_id, ClusterState.RECOVERING)
    return job_id


MOMENTS = [
    at_once, cluster_launching, cluster_waiting, cluster_booting, submitting, running, between_runs, head_recovering,
]  # fmt: skip


async def all_is_over(world: World, job_id: str) -> None:
    job = await world.until_job(job_id, JobState.TERMINATED)
    assert all(run.state in (RunState.STOPPED, RunState.FAILED) for run in job.runs)
    await world.until_ended(job_id)
    await world.until_gone()

    if await cluster_records.load_cluster(world.db, ids.job_cluster_id(job_id, 1)) is not None:
        await world.until_cluster(ids.job_cluster_id(job_id, 1), ClusterState.TERMINATED)


@pytest.mark.parametrize("moment", MOMENTS)
async def test_terminate_at_every_moment(world: World, moment: Callable[[World], Awaitable[str]]) -> None:
    job_id = await moment(world)
    await world.terminate(job_id, "changed my mind")
    await all_is_over(world, job_id)
    assert (await world.job(job_id)).reason == "terminated by user:ann: changed my mind"


@pytest.mark.parametrize(
    "moment",
    [m if m in (at_once, cluster_launching, submitting, running) else pytest.param(m, marks=pytest.mark.long)
     for m in MOMENTS],
)  # fmt: skip
async def test_cancel_in_the_ui_at_every_moment(world: World, moment: Callable[[World], Awaitable[str]]) -> None:
    job_id = await moment(world)
    await world.handle(job_id).cancel()
    await all_is_over(world, job_id)
    assert "cancelled in Temporal" in (await world.job(job_id)).reason


async def test_terminate_on_a_given_cluster_stops_the_run_and_leaves_the_cluster(world: World) -> None:
    world.fleet.run_plans = [RunPlan(hold=True)]
    cluster_id = await world.running_cluster()
    job_id = await world.start_job(cluster_id)
    run_id = await world.until_run(job_id)
    await world.terminate(job_id)
    job = await world.until_job(job_id, JobState.TERMINATED)
    assert [r.state for r in job.runs] == [RunState.STOPPED]
    assert world.head(cluster_id).ended[run_id]["status"] == "STOPPED"
    await world.until_ended(job_id)
    await world.until_quiet(cluster_id)
    cluster = await world.cluster(cluster_id)
    assert (cluster.state, cluster.leases) == (ClusterState.RUNNING, [])


async def test_a_run_that_was_faster_than_the_stop_counts(world: World) -> None:
    world.fleet.run_plans = [RunPlan(hold=True)]
    cluster_id = await world.running_cluster()
    job_id = await world.start_job(cluster_id)
    run_id = await world.until_run(job_id)
    world.head(cluster_id).deaf = True
    await world.terminate(job_id)
    await world.head(cluster_id).end_run(run_id)
    world.head(cluster_id).deaf = False
    job = await world.until_job(job_id, JobState.SUCCEEDED)
    assert [r.state for r in job.runs] == [RunState.SUCCEEDED]


async def test_a_head_that_cannot_confirm_the_stop_does_not_hold_the_job(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "STOP_TIMEOUT", timedelta(seconds=0.5))
    job_id = await running(world)
    world.head(ids.job_cluster_id(job_id, 1)).deaf = True
    await world.terminate(job_id)
    await all_is_over(world, job_id)
    assert "stop_unconfirmed" in await world.kinds(job_id)


async def test_a_job_that_has_ended_is_told_so(world: World) -> None:
    job_id = await world.start_job(await world.running_cluster())
    await world.until_ended(job_id)
    with pytest.raises((RPCError, WorkflowUpdateFailedError)):
        await world.terminate(job_id)
    assert (await world.job(job_id)).state == JobState.SUCCEEDED
