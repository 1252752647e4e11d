"""Nodes die; clusters heal, or say why they can't."""

from __future__ import annotations

from datetime import timedelta

from heliostat.models.agents import FactKind
from heliostat.models.clusters import ClusterState, Node, NodeState
from heliostat.models.common import utcnow
from heliostat.models.compute_configs import ComputeConfig, WorkerNodeGroupConfig
from heliostat.models.jobs import JobState, RunCause, RunState
from runtime.messages.clusters import HeadSilent
from runtime.messages.common import Limits
from tests.workflows.world import RunPlan, World

ONE_WORKER = ComputeConfig(worker_nodes=[WorkerNodeGroupConfig(min_nodes=1)])


async def silent(world: World, cluster_id: str, node_id: str, seconds: float = 30, mass: bool = False) -> None:
    """What the monitor says; again and again, so once the workflow knows the machine: before, it passes it over."""
    await world.until_machine_known(cluster_id, node_id)
    message = HeadSilent(
        event_id=f"{node_id}/{seconds}",
        node_id=node_id,
        since=utcnow() - timedelta(seconds=seconds),
        silent_s=seconds,
        mass=mass,
    )
    await world.handle(cluster_id).signal("head_silent", message)


async def test_a_lost_worker_is_replaced_in_its_slot(world: World) -> None:
    cluster_id = await world.running_cluster(ONE_WORKER)
    first = await world.node(cluster_id, "workers")
    await world.skip(cluster_id, 120)  # it lived long enough not to be suspect
    await world.kill_machine(first)
    await world.head(cluster_id).tell(FactKind.NODE_LOST, node_id=first.id, reason="raylet died")

    async def replaced() -> bool:
        return any(n.generation == 2 and n.state == NodeState.RUNNING for n in await world.nodes(cluster_id))

    await world.until(replaced, "the second generation")
    await world.until_quiet(cluster_id)
    nodes = {(n.slot, n.generation): n for n in await world.nodes(cluster_id)}
    assert set(nodes) == {(0, 1), (1, 1), (1, 2)}
    assert (nodes[1, 1].state, nodes[1, 1].reason) == (NodeState.TERMINATED, "raylet died")
    assert (await world.cluster(cluster_id)).state == ClusterState.RUNNING
    assert len(world.alive()) == 2


async def test_a_worker_that_dies_young_again_and_again_is_replaced_with_back_off(world: World) -> None:
    cluster_id = await world.running_cluster(ONE_WORKER)
    for generation in (1, 2, 3, 4):

        async def up(generation: int = generation) -> Node | None:
            found = [n for n in await world.nodes(cluster_id) if n.slot == 1 and n.state == NodeState.RUNNING]
            return found[0] if [n.generation for n in found] == [generation] else None

        worker = await world.until(up, f"generation {generation}")
        assert worker is not None
        assert worker.running_at is not None
        if generation > 1:
            waited = worker.running_at - worker.created_at
            assert waited >= timedelta(seconds=2 ** (generation - 1)), "it was asked for when the one before died"
        await world.head(cluster_id).tell(FactKind.NODE_LOST, node_id=worker.id, reason="oom")
        await world.until_quiet(cluster_id)
        await world.skip(cluster_id, 2**generation + 0.5)


async def test_a_lost_head_is_replaced_and_lease_holders_are_told(world: World) -> None:
    cluster_id = await world.running_cluster(ONE_WORKER)
    world.fleet.run_plans = [RunPlan(hold=True)]
    job_id = await world.start_job(cluster_id)
    await world.until_run(job_id)
    head = await world.node(cluster_id)
    await world.kill_machine(head)
    await silent(world, cluster_id, head.id)

    async def recovered() -> bool:
        cluster = await world.cluster(cluster_id)
        heads = [n for n in await world.nodes(cluster_id) if n.group == "head" and n.state == NodeState.RUNNING]
        return cluster.state == ClusterState.RUNNING and [n.generation for n in heads] == [2]

    await world.until(recovered, "the second head")
    job = await world.until_job(job_id, JobState.SUCCEEDED)
    assert [(r.state, r.cause) for r in job.runs] == [
        (RunState.FAILED, RunCause.INFRASTRUCTURE),
        (RunState.SUCCEEDED, None),
    ]
    states = [e.message for e in await world.story(cluster_id) if e.kind == "state"]
    assert states[1].startswith("RECOVERING: head lost")
    assert states[2].startswith("RUNNING")
    assert len(world.alive()) == 2, "old head and its workers are ended"


async def test_a_head_that_runs_gets_more_time_and_is_then_replaced(world: World) -> None:
    cluster_id = await world.running_cluster()
    head = await world.node(cluster_id)
    await silent(world, cluster_id, head.id, seconds=60)
    await world.until_quiet(cluster_id)
    assert (await world.cluster(cluster_id)).state == ClusterState.RUNNING
    await silent(world, cluster_id, head.id, seconds=130, mass=True)
    await world.until_quiet(cluster_id)
    assert (await world.node(cluster_id)).generation == 1, "in a mass silence only the cloud's word counts"
    await silent(world, cluster_id, head.id, seconds=131)

    async def replaced() -> bool:
        return any(n.generation == 2 and n.state == NodeState.RUNNING for n in await world.nodes(cluster_id))

    await world.until(replaced, "the second head")
    assert len(world.alive()) == 1, "the old head was fenced by ending its machine"


async def test_silence_of_another_node_or_an_old_head_changes_nothing(world: World) -> None:
    cluster_id = await world.running_cluster(ONE_WORKER)
    await silent(world, cluster_id, "nd_unknown", seconds=500)
    await silent(world, cluster_id, (await world.node(cluster_id, "workers")).id, seconds=500)
    await world.until_quiet(cluster_id)
    assert {n.generation for n in await world.nodes(cluster_id)} == {1}


async def test_two_heads_never_live_at_once(world: World) -> None:
    cluster_id = await world.running_cluster()
    head = await world.node(cluster_id)
    world.machines.stop_s = 3600  # the cloud takes its time
    await silent(world, cluster_id, head.id, seconds=130)
    cluster = await world.until_cluster(cluster_id, ClusterState.RECOVERING)

    async def waits() -> bool:
        return "to end" in (await world.cluster(cluster_id)).waits_for

    await world.until(waits, "the wait for the old machine")
    assert world.machines.calls["launch"] == 1
    assert cluster.state == ClusterState.RECOVERING
    world.machines.stop_s = 0
    await world.until_cluster(cluster_id, ClusterState.RUNNING)


async def test_a_head_lost_too_often_fails_the_cluster(world: World) -> None:
    cluster_id = await world.running_cluster()
    for generation in (1, 2, 3, 4):

        async def up(generation: int = generation) -> bool:
            found = await world.nodes(cluster_id)
            return any(n.generation == generation and n.state == NodeState.RUNNING for n in found)

        await world.until(up, f"head {generation}")
        await world.until_cluster(cluster_id, ClusterState.RUNNING)
        await world.kill_machine(await world.node(cluster_id))
        await silent(world, cluster_id, (await world.node(cluster_id)).id)
        if generation < 4:
            await world.until_cluster(cluster_id, ClusterState.RECOVERING)
            await world.skip(cluster_id, 10)
    cluster = await world.until_cluster(cluster_id, ClusterState.FAILED)
    assert "head lost 4 times within 30 minutes" in cluster.reason
    assert not world.alive()


async def test_recovery_has_a_deadline(world: World) -> None:
    world.limits = Limits(capacity_timeout_s=60)
    cluster_id = await world.running_cluster()
    world.machines.no_capacity()
    await world.kill_machine(await world.node(cluster_id))
    await silent(world, cluster_id, (await world.node(cluster_id)).id)
    await world.until_cluster(cluster_id, ClusterState.RECOVERING)
    await world.skip(cluster_id, 61)
    cluster = await world.until_cluster(cluster_id, ClusterState.FAILED)
    assert "deadline" in cluster.reason
    assert not world.alive()
