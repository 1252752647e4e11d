"""A cluster's history is cut again and again by a server that suggests it after few events: nothing is lost, nothing
is launched twice. And messages that come twice, late, or from the dead change nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from temporalio.client import Client

from heliostat.models.agents import FactKind
from heliostat.models.clusters import ClusterState, NodeState
from heliostat.models.compute_configs import ComputeConfig, WorkerNodeGroupConfig
from heliostat.models.jobs import JobState
from runtime.messages.clusters import NodeRegistered, Release
from tests.workflows.clusters.test_ending import lease
from tests.workflows.clusters.test_healing import silent
from tests.workflows.clusters.test_scaling import until_running
from tests.workflows.world import World, make_world, temporal_server

CONFIG = ComputeConfig(
    worker_nodes=[WorkerNodeGroupConfig(name="w", min_nodes=1, max_nodes=3)], idle_termination_minutes=10
)


@pytest.fixture(scope="module")
async def forgetful_temporal() -> AsyncIterator[Client]:
    async with temporal_server(limit__historyCount__suggestContinueAsNew="8") as client:
        yield client


@pytest.fixture
async def forgetful(forgetful_temporal: Client, tmp_path: Path) -> AsyncIterator[World]:
    async with make_world(forgetful_temporal, tmp_path) as world:
        yield world


async def runs_of_workflow(world: World, id: str) -> list[str]:
    """Ids of all its runs, oldest first."""
    runs = [(await world.handle(id).describe()).raw_description.workflow_execution_info.first_run_id]
    while True:
        history = await world.client.get_workflow_handle(id, run_id=runs[-1]).fetch_history()
        attributes = history.events[-1].workflow_execution_continued_as_new_event_attributes
        if not attributes.new_execution_run_id:
            return runs
        runs.append(attributes.new_execution_run_id)


@pytest.mark.long
async def test_a_whole_life_over_many_runs(forgetful: World) -> None:
    world = forgetful
    cluster_id = await world.running_cluster(CONFIG)
    await world.until_quiet(cluster_id)
    head = world.head(cluster_id)
    job_ids = [await world.start_job(cluster_id) for _ in range(3)]
    for job_id in job_ids:
        await world.until_job(job_id, JobState.SUCCEEDED)
        await world.until_ended(job_id)
    await head.tell(FactKind.DESIRED, desired={"w": 3}, remove=[])
    await until_running(world, cluster_id, w=3)
    await lease(world, cluster_id, "user:ann")
    await head.tell(FactKind.DESIRED, desired={"w": 1}, remove=[])
    await until_running(world, cluster_id, w=1)
    await silent(world, cluster_id, head.node_id, seconds=130)

    async def second_head() -> bool:
        found = [n for n in await world.nodes(cluster_id) if n.generation == 2 and n.group == "head"]
        return bool(found) and found[0].state == NodeState.RUNNING

    await world.until(second_head, "the second head")
    cluster = await world.until_cluster(cluster_id, ClusterState.RUNNING)
    assert [x.holder for x in cluster.leases] == ["user:ann"]
    await world.until_quiet(cluster_id)
    runs = await runs_of_workflow(world, cluster_id)
    assert len(runs) >= 5, "it continued as new in between"
    await world.skip(cluster_id, 3600)
    await world.until_quiet(cluster_id)
    assert len(await runs_of_workflow(world, cluster_id)) <= len(runs) + 2, "and does not while nothing happens"
    await world.handle(cluster_id).signal("release", Release(holder="user:ann"))
    await world.until_quiet(cluster_id)
    await world.skip(cluster_id, 11 * 60)
    await world.until_cluster(cluster_id, ClusterState.TERMINATED)
    assert "idle" in (await world.cluster(cluster_id)).reason
    assert not world.alive()
    tokens = {(n.slot, n.generation) for n in await world.nodes(cluster_id)}
    assert sum(world.machines.boots.values()) == len(tokens)


async def test_an_event_seen_before_is_not_seen_again_in_the_next_run(forgetful: World) -> None:
    world = forgetful
    cluster_id = await world.running_cluster(CONFIG)
    head = world.head(cluster_id)
    up = head.fact(FactKind.DESIRED, desired={"w": 3}, remove=[])
    down = head.fact(FactKind.DESIRED, desired={"w": 1}, remove=[])
    handle = world.handle(cluster_id)
    await handle.signal("fact", up)
    await until_running(world, cluster_id, w=3)
    await handle.signal("fact", down)
    await until_running(world, cluster_id, w=1)
    launched = world.machines.calls["launch"]
    await handle.signal("fact", up)  # delivered again, late
    await until_running(world, cluster_id, w=1)
    assert world.machines.calls["launch"] == launched


async def test_a_terminate_just_after_a_new_run_began(forgetful: World) -> None:
    world = forgetful
    cluster_id = await world.running_cluster(CONFIG)
    await world.terminate(cluster_id)
    await world.until_cluster(cluster_id, ClusterState.TERMINATED)
    assert not world.alive()


# --- duplicates, reordering, words of the dead: on a server that does not cut -------------------------------------


async def test_messages_twice_and_out_of_order(world: World) -> None:
    cluster_id = await world.running_cluster(CONFIG)
    head, worker = await world.node(cluster_id), await world.node(cluster_id, "w")
    handle = world.handle(cluster_id)
    for node in (worker, head):
        await handle.signal(
            "node_registered",
            NodeRegistered(event_id=f"{node.id}/registered/1/boot", node_id=node.id, generation=1, ip="10.9.9.9"),
        )
        await handle.signal(
            "node_registered",
            NodeRegistered(event_id=f"{node.id}/registered/1/other", node_id=node.id, generation=1, ip=node.ip or ""),
        )
        ready = world.head(cluster_id).fact(FactKind.RAY_READY, node_id=node.id)
        await handle.signal("fact", ready)
        await handle.signal("fact", ready)
    await until_running(world, cluster_id, w=1)
    assert (await world.node(cluster_id)).ip == head.ip
    assert [e.kind for e in await world.story(cluster_id)].count("node_running") == 2


async def test_what_a_replaced_head_says_no_longer_counts(world: World) -> None:
    cluster_id = await world.running_cluster(CONFIG)
    old = world.head(cluster_id)
    await silent(world, cluster_id, old.node_id, seconds=130)

    async def second_head() -> bool:
        return cluster_id in world.fleet.heads and world.fleet.heads[cluster_id] is not old

    await world.until(second_head, "the second head")
    await world.until_cluster(cluster_id, ClusterState.RUNNING)
    await world.until_quiet(cluster_id)
    worker = await world.node(cluster_id, "w")
    await old.tell(FactKind.DESIRED, desired={"w": 3}, remove=[])
    await old.tell(FactKind.NODE_LOST, node_id=worker.id, reason="says the dead")
    await old.tell(FactKind.STOPPING, reason="says the dead")
    await old.tell_activity("busy")
    await until_running(world, cluster_id, w=1)
    assert (await world.node(cluster_id, "w")).id == worker.id
    assert (await world.cluster(cluster_id)).state == ClusterState.RUNNING
    assert (await world.cluster(cluster_id)).activity == "idle"


async def test_ray_may_be_ready_before_the_registration_is_heard(world: World) -> None:
    cluster_id = await world.running_cluster(CONFIG)
    head = world.head(cluster_id)
    from tests.workflows.world import NodePlan

    world.fleet.node_plan = lambda spec: NodePlan(register=False)
    await head.tell(FactKind.DESIRED, desired={"w": 2}, remove=[])

    async def launched() -> bool:
        return any(n.state == NodeState.LAUNCHED for n in await world.nodes(cluster_id))

    await world.until(launched, "the second worker's machine")
    node = await world.node(cluster_id, "w", NodeState.LAUNCHED)
    await head.tell(FactKind.RAY_READY, node_id=node.id)
    await world.handle(cluster_id).signal(
        "node_registered", NodeRegistered(event_id="late", node_id=node.id, generation=1, ip="10.0.0.77")
    )
    await until_running(world, cluster_id, w=2)
    assert node.id in {n.id for n in await world.nodes(cluster_id) if n.ip == "10.0.0.77"}
