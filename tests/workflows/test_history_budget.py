"""What a cluster and a job cost in history events; fails when it grows. The numbers are printed (``pytest -s``)."""

from __future__ import annotations

from heliostat.models.agents import FactKind
from heliostat.models.clusters import ClusterState, NodeState
from heliostat.models.compute_configs import ComputeConfig, WorkerNodeGroupConfig
from heliostat.models.jobs import JobState
from runtime.messages.clusters import Release
from tests.workflows.clusters.test_ending import lease
from tests.workflows.clusters.test_scaling import limits, until_running
from tests.workflows.world import RunPlan, World

CONFIG = ComputeConfig(worker_nodes=[WorkerNodeGroupConfig(name="w", min_nodes=1, max_nodes=3)])

WHOLE_JOB = 30
PER_CHANGE = 10
OF_THE_TEST = ("WORKFLOW_EXECUTION_OPTIONS_UPDATED", "WORKFLOW_EXECUTION_TIME_SKIPPING")
"""Events that skipping time itself writes."""


async def written(world: World, id: str) -> list[str]:
    """The events, but for a slow machine's: a task of the workflow that failed or came too late is given again."""
    kept: list[str] = []
    for event in await world.events_of(id):
        kept.append(event)
        if event in ("WORKFLOW_TASK_FAILED", "WORKFLOW_TASK_TIMED_OUT"):
            given = max(n for n, name in enumerate(kept) if name == "WORKFLOW_TASK_SCHEDULED")
            kept[given:] = [name for name in kept[given:] if not name.startswith("WORKFLOW_TASK_")]
    return kept


async def count(world: World, id: str) -> int:
    await world.until_quiet(id)
    return len(await written(world, id))


def within(what: str, events: int, budget: int) -> None:
    print(f"BUDGET {what}: {events} events of {budget}")
    assert events <= budget, f"{what} costs {events} history events, the budget is {budget}"


async def test_a_whole_job_on_a_warm_cluster(world: World) -> None:
    cluster_id = await world.running_cluster(CONFIG)
    await world.until_quiet(cluster_id)
    for activity_facts in (True, False):
        world.fleet.activity_facts = activity_facts
        before = await count(world, cluster_id)
        world.fleet.run_plans = [RunPlan(hold=True)]  # a run of some length: its start and end are two messages
        job_id = await world.start_job(cluster_id)
        run_id = await world.until_run(job_id)
        await world.until_job(job_id, JobState.RUNNING)
        await world.until_quiet(job_id)
        await world.head(cluster_id).end_run(run_id)
        await world.until_ended(job_id)
        within("whole job on a warm cluster, the job", len(await written(world, job_id)), WHOLE_JOB)
        told = "lease, busy, idle, release" if activity_facts else "lease, release"
        changes = 4 if activity_facts else 2
        within(
            f"whole job on a warm cluster, the cluster ({told})",
            await count(world, cluster_id) - before,
            PER_CHANGE * changes,
        )


async def test_a_cluster_to_which_nothing_happens_costs_nothing(world: World) -> None:
    """After the one timer that was set while it started has fired and found nothing to do."""
    never = await world.running_cluster(CONFIG.model_copy(update={"idle_termination_minutes": 0}))
    busy = await world.running_cluster(CONFIG)
    await world.head(busy).tell_activity("busy")
    for cluster_id, what in ((never, "an idle cluster that is never ended"), (busy, "a busy cluster")):
        await world.until_quiet(cluster_id)
        await world.skip(cluster_id, 3 * 3600)
        before = await count(world, cluster_id)
        await world.skip(cluster_id, 7 * 24 * 3600)
        await world.until_quiet(cluster_id)
        cost = [e for e in (await written(world, cluster_id))[before:] if not e.startswith(OF_THE_TEST)]
        within(f"{what}, a week", len(cost), 0)


async def test_per_change(world: World) -> None:
    cluster_id = await world.running_cluster(CONFIG)
    head = world.head(cluster_id)
    before = await count(world, cluster_id)

    async def cost(what: str, changes: int = 1) -> None:
        nonlocal before
        now = await count(world, cluster_id)
        within(what, now - before, PER_CHANGE * changes)
        before = now

    await lease(world, cluster_id, "user:ann")
    await cost("lease")
    await world.handle(cluster_id).signal("release", Release(holder="user:ann"))
    await cost("release")
    await head.tell_activity("busy")
    await cost("busy")
    await head.tell_activity("idle")
    await cost("idle")
    await head.tell(FactKind.DESIRED, desired={"w": 2}, remove=[])
    await until_running(world, cluster_id, w=2)
    await cost("one worker more: wanted, launched, registered, up", 3)
    await limits(world, cluster_id, "w", max_nodes=2)
    await cost("new bounds")
    await head.tell(FactKind.DESIRED, desired={"w": 1}, remove=[])
    await until_running(world, cluster_id, w=1)
    await cost("one worker less: unwanted, ended", 2)
    worker = await world.node(cluster_id, "w")
    await world.skip(cluster_id, 120)
    before = await count(world, cluster_id)
    await head.tell(FactKind.NODE_LOST, node_id=worker.id, reason="gone")

    async def replaced() -> bool:
        found = [n.state for n in await world.nodes(cluster_id) if n.slot == worker.slot]
        return NodeState.RUNNING in found and set(found) == {NodeState.RUNNING, NodeState.TERMINATED}

    await world.until(replaced, "the next generation")
    await cost("one worker lost and replaced: lost, ended, launched, registered, up", 4)


async def test_a_whole_life(world: World) -> None:
    cluster_id = await world.running_cluster(CONFIG)
    up = await count(world, cluster_id)
    within("start of a head and one worker", up, 45)
    await world.terminate(cluster_id)
    await world.until_cluster(cluster_id, ClusterState.TERMINATED)
    await world.until_ended(cluster_id)
    within("end of both", len(await written(world, cluster_id)) - up, 20)
