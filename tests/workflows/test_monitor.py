"""The monitor finds silent heads and forgotten rows; it never replaces what it merely could not hear."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import delete
from temporalio.client import Client

from activities.monitor.loop import MonitorActivities
from heliostat.models.clusters import ClusterState, NodeState
from heliostat.models.common import new_id, utcnow
from heliostat.models.jobs import JobState
from store.database import insert
from store.tables import clusters, hearing, jobs, reports
from tests.workflows.world import RunPlan, World, make_world


def monitor(world: World) -> MonitorActivities:
    return MonitorActivities(world.db, world.client, world.settings)


async def heard(world: World, at: datetime, since: datetime, *cluster_ids: str) -> None:
    """What the API writes down: it could hear from ``since`` until ``at``, and had these heads' reports then."""
    async with world.db.begin() as conn:
        await conn.execute(delete(hearing))
        await conn.execute(hearing.insert().values(id=1, since=since, last=at))
        for cluster_id in cluster_ids:
            node_id = (await world.node(cluster_id)).id
            row = insert(conn, reports).values(
                node_id=node_id, cluster_id=cluster_id, is_head=True, seq=1, activity="busy", doc={}, at=at
            )
            await conn.execute(row.on_conflict_do_update(index_elements=["node_id"], set_={"at": at}))


async def running(world: World, count: int) -> list[str]:
    found = [await world.start_cluster() for _ in range(count)]
    for cluster_id in found:
        await world.until_cluster(cluster_id, ClusterState.RUNNING)
    await world.until_quiet(*found)
    return found


async def until_generation(world: World, cluster_id: str, generation: int) -> None:
    async def look() -> bool:
        heads = [n for n in await world.nodes(cluster_id) if n.state == NodeState.RUNNING]
        return [n.generation for n in heads] == [generation]

    await world.until(look, f"head {generation} of {cluster_id}")
    await world.until_quiet(cluster_id)


async def test_a_silent_head_whose_machine_is_gone_is_replaced(world: World) -> None:
    one, two = await running(world, 2)
    start = utcnow() + timedelta(hours=1)
    await heard(world, start, start - timedelta(hours=1), one, two)
    await world.kill_machine(await world.node(one))
    now = start + timedelta(seconds=25)
    await heard(world, now, start - timedelta(hours=1), two)
    await monitor(world).round(now)
    await until_generation(world, one, 2)
    await until_generation(world, two, 1)


async def test_a_silent_head_whose_machine_runs_is_given_time(world: World) -> None:
    (cluster_id,) = await running(world, 1)
    start = utcnow() + timedelta(hours=1)
    await heard(world, start, start - timedelta(hours=1), cluster_id)
    m = monitor(world)
    for seconds in (25, 50, 100):
        now = start + timedelta(seconds=seconds)
        await heard(world, now, start - timedelta(hours=1))
        await m.round(now)
        await until_generation(world, cluster_id, 1)
    asked = world.machines.calls["describe"]
    await m.round(now + timedelta(seconds=1))
    await world.until_quiet(cluster_id)
    assert world.machines.calls["describe"] == asked, "it is not asked after in every round"
    now = start + timedelta(seconds=125)
    await heard(world, now, start - timedelta(hours=1))
    await m.round(now)
    await until_generation(world, cluster_id, 2)
    assert len(world.alive()) == 1


async def test_ten_minutes_without_an_api_replace_no_node(world: World) -> None:
    """Three busy clusters; the API hears nothing for ten minutes, then it is back and the heads report again."""
    found = await running(world, 3)
    for cluster_id in found:
        await world.head(cluster_id).tell_activity("busy")
    await world.until_quiet(*found)
    start = utcnow() + timedelta(hours=1)
    hour = timedelta(hours=1)
    await heard(world, start, start - hour, *found)
    m = monitor(world)
    before = {c: len(await world.events_of(c)) for c in found}
    for seconds in range(2, 600, 14):
        await m.round(start + timedelta(seconds=seconds))
    back = start + timedelta(seconds=600)
    for seconds in range(0, 19, 3):  # it hears again; agents' back-off is up to 15 s
        now = back + timedelta(seconds=seconds)
        await heard(world, now, back)
        await m.round(now)
    await heard(world, now, back, *found)
    for seconds in range(20, 60, 2):
        now = back + timedelta(seconds=seconds)
        await heard(world, now, back, *found)
        await m.round(now)
    await world.until_quiet(*found)
    for cluster_id in found:
        await until_generation(world, cluster_id, 1)
        assert (await world.cluster(cluster_id)).state == ClusterState.RUNNING
    assert {c: len(await world.events_of(c)) for c in found} == before, "not even an event"


@pytest.mark.long
async def test_mass_silence_is_an_alarm_and_only_the_clouds_word_counts(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    found = await running(world, 4)
    start = utcnow() + timedelta(hours=1)
    await heard(world, start, start - timedelta(hours=1), *found)
    await world.kill_machine(await world.node(found[0]))
    m = monitor(world)
    for seconds in (30, 130, 300):
        now = start + timedelta(seconds=seconds)
        await heard(world, now, start - timedelta(hours=1))
        await m.round(now)
        await world.until_quiet(*found)
    await until_generation(world, found[0], 2)
    for cluster_id in found[1:]:
        await until_generation(world, cluster_id, 1)
    assert capsys.readouterr().out.count("mass silence") == 1, "said once, not in every round"


async def test_it_starts_what_was_accepted_and_forgotten(world: World) -> None:
    old = utcnow() - timedelta(minutes=1)
    cluster = world.cluster_input(created_at=old)
    job = world.job_input().model_copy(update={"created_at": old})
    fresh = world.job_input().model_copy(update={"created_at": utcnow() + timedelta(hours=1)})
    await world.accept_cluster(cluster)
    await world.accept_job(job)
    await world.accept_job(fresh)
    world.ids += [cluster.cluster_id, job.job_id]
    await monitor(world).round(utcnow())
    await world.until_cluster(cluster.cluster_id, ClusterState.RUNNING)
    await world.until_job(job.job_id, JobState.SUCCEEDED)
    async with world.db.read() as conn:
        started = await conn.scalars(jobs.select().with_only_columns(jobs.c.id).where(jobs.c.started.is_(True)))
        assert list(started) == [job.job_id], "the API itself is about to start the fresh one"
        assert (await conn.execute(clusters.select().where(clusters.c.started.is_(False)))).first() is None
    await monitor(world).round(utcnow())  # nothing is left to do


async def test_its_workflow_watches_by_itself_and_survives_a_restart(temporal: Client, tmp_path: Path) -> None:
    async with make_world(temporal, tmp_path, monitor_interval_s=0.05) as world:
        id = new_id("monitor")
        world.ids.append(id)
        await world.client.start_workflow("MonitorWorkflow", id=id, task_queue=world.settings.task_queue)
        world.fleet.run_plan = RunPlan()
        for _ in range(2):
            job = world.job_input().model_copy(update={"created_at": utcnow() - timedelta(minutes=1)})
            await world.accept_job(job)
            world.ids.append(job.job_id)
            await world.until_job(job.job_id, JobState.SUCCEEDED)
            await world.restart_worker()
        assert len(await world.events_of(id)) < 20
