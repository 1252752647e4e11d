"""A cluster comes up, or says why it does not."""

from __future__ import annotations

import threading

from sqlalchemy import Table

from clouds.contract.machines import Machine, MachineSpec
from heliostat.models.agents import FactKind
from heliostat.models.clouds import Market
from heliostat.models.clusters import Cluster, ClusterState, NodeRole, NodeState
from heliostat.models.compute_configs import ComputeConfig, WorkerNodeGroupConfig
from runtime.messages.clusters import start_cluster
from runtime.messages.common import Limits
from store.tables import clusters
from tests.workflows.world import WAIT_S, NodePlan, World

SANDBOXED = True


def two_groups() -> ComputeConfig:
    return ComputeConfig(
        worker_nodes=[
            WorkerNodeGroupConfig(name="small", min_nodes=2, max_nodes=4, resources={"CPU": 2}),
            WorkerNodeGroupConfig(name="gpu", min_nodes=1, max_nodes=1, resources={"GPU": 1}, labels={"kind": "gpu"}),
            WorkerNodeGroupConfig(name="spare", min_nodes=0, max_nodes=3),
        ]
    )


async def test_running_means_head_and_every_minimum_is_up(world: World) -> None:
    world.fleet.node_plan = lambda spec: NodePlan(ready=spec.gpu == 0)
    cluster_id = await world.start_cluster(two_groups())

    async def all_but_the_gpu() -> bool:
        nodes = await world.nodes(cluster_id)
        return (
            sum(n.state == NodeState.RUNNING for n in nodes) == 3
            and sum(n.state == NodeState.REGISTERED for n in nodes) == 1
        )

    await world.until(all_but_the_gpu, "head and two small workers")
    cluster = await world.cluster(cluster_id)
    assert cluster.state == ClusterState.STARTING
    assert "1 of gpu" in cluster.waits_for

    (held,) = [a for a in world.fleet.agents.values() if not a.up]
    await world.head(cluster_id).tell(FactKind.RAY_READY, node_id=held.node_id)
    cluster = await world.until_cluster(cluster_id, ClusterState.RUNNING)
    assert cluster.desired == {"small": 2, "gpu": 1, "spare": 0}
    assert set(cluster.phase_seconds) == {"head_launched", "head_registered", "head_ready", "workers_ready"}
    assert cluster.ray_version == "2.60.0"
    assert cluster.waits_for == ""
    groups = sorted(n.group for n in await world.nodes(cluster_id))
    assert groups == ["gpu", "head", "small", "small"]


async def test_no_capacity_waits_in_sight_and_starts_when_there_is_some(world: World) -> None:
    world.machines.no_capacity(2)
    cluster_id = await world.start_cluster()

    async def waiting() -> Cluster | None:
        cluster = await world.cluster(cluster_id)
        return cluster if "no_capacity" in cluster.waits_for else None

    cluster = await world.until(waiting, "the wait to be visible")
    assert cluster is not None
    assert cluster.state == ClusterState.STARTING
    assert "next try" in cluster.waits_for
    capacity = next(c for c in cluster.conditions if c.type == "CapacityAvailable")
    assert (capacity.status, capacity.reason) == (False, "no_capacity")
    await world.skip(cluster_id, 10)
    cluster = await world.until_cluster(cluster_id, ClusterState.RUNNING)
    assert next(c for c in cluster.conditions if c.type == "CapacityAvailable").status
    assert (await world.node(cluster_id)).generation == 3


async def test_no_capacity_until_the_deadline_fails_with_that_reason(world: World) -> None:
    world.limits = Limits(capacity_timeout_s=60, head_start_timeout_s=20, worker_start_timeout_s=20)
    world.machines.no_capacity()
    cluster_id = await world.start_cluster()
    await world.skip(cluster_id, 61)
    cluster = await world.until_cluster(cluster_id, ClusterState.FAILED)
    assert "deadline" in cluster.reason
    assert "no_capacity" in cluster.reason
    assert len(await world.nodes(cluster_id)) <= 8, "back-off"
    assert not world.alive()


async def test_bad_config_fails_at_once_with_the_clouds_words(world: World) -> None:
    world.machines.bad_config = "no such machine shape"
    cluster_id = await world.start_cluster(two_groups())
    cluster = await world.until_cluster(cluster_id, ClusterState.FAILED)
    assert "no such machine shape" in cluster.reason
    assert not world.alive()
    assert {n.state for n in await world.nodes(cluster_id)} == {NodeState.TERMINATED}


async def test_denied_fails_but_ending_goes_on_until_the_right_is_back(world: World) -> None:
    cluster_id = await world.running_cluster()
    world.machines.denied = "no right"
    await world.terminate(cluster_id)
    cluster = await world.until_cluster(cluster_id, ClusterState.TERMINATING)
    assert "confirm" in cluster.waits_for
    world.machines.denied = ""
    await world.skip(cluster_id, 60)  # the back-off of the activity
    await world.until_cluster(cluster_id, ClusterState.TERMINATED)
    assert not world.alive()


async def test_throttled_launches_are_tried_again(world: World) -> None:
    world.machines.throttle(3)
    cluster_id = await world.start_cluster()

    async def throttled() -> bool:
        return world.machines.calls["launch"] >= 1

    await world.until(throttled, "a throttled launch")
    for _ in range(3):
        await world.skip(cluster_id, 6)
    await world.until_cluster(cluster_id, ClusterState.RUNNING)
    assert [n.generation for n in await world.nodes(cluster_id)] == [1], "the same request again, not another machine"


async def test_lost_answers_of_launches_make_no_second_machine(world: World) -> None:
    world.machines.lose_answers(2)
    cluster_id = await world.start_cluster()

    async def lost() -> bool:
        return world.machines.calls["launch"] >= 1

    await world.until(lost, "a lost answer")
    await world.skip(cluster_id, 10)
    await world.until_cluster(cluster_id, ClusterState.RUNNING)
    assert len(world.alive()) == 1


async def test_a_node_that_never_registers_is_replaced_and_its_console_kept(world: World) -> None:
    world.machines.console = "booting\nkernel panic: no root\n\n"
    plans: list[NodePlan] = [NodePlan(register=False)]
    world.fleet.node_plan = lambda spec: plans.pop() if plans else NodePlan()
    cluster_id = await world.start_cluster()

    async def launched() -> bool:
        return any(n.state == NodeState.LAUNCHED for n in await world.nodes(cluster_id))

    await world.until(launched, "the head's machine")
    await world.skip(cluster_id, 301)
    await world.until_cluster(cluster_id, ClusterState.RUNNING)
    first, second = await world.nodes(cluster_id)
    assert (first.slot, first.generation, first.state) == (0, 1, NodeState.TERMINATED)
    assert "did not register after its launch (HELIOSTAT_HEAD_START_TIMEOUT_S)" in first.reason
    assert first.reason.endswith("its console ends with: kernel panic: no root")
    assert (second.slot, second.generation) == (0, 2)
    assert [e.message for e in await world.story(cluster_id) if e.kind == "console"] == [world.machines.console]
    assert len(world.alive()) == 1


async def test_a_machine_that_pulls_its_image_has_longer_to_register_and_ray_has_not(world: World) -> None:
    world.limits = Limits(register_timeout_s=900)
    plans = [NodePlan(register=False), NodePlan(ready=False)]
    world.fleet.node_plan = lambda spec: plans.pop(0) if plans else NodePlan()
    cluster_id = await world.start_cluster()

    async def reaches(generation: int, state: NodeState) -> None:
        async def is_there() -> bool:
            return any(n.generation == generation and n.state == state for n in await world.nodes(cluster_id))

        await world.until(is_there, f"generation {generation} {state}")

    await reaches(1, NodeState.LAUNCHED)
    await world.skip(cluster_id, 800)
    assert [n.state for n in await world.nodes(cluster_id)] == [NodeState.LAUNCHED], "900 s are not over"
    await world.skip(cluster_id, 101)
    await reaches(2, NodeState.REGISTERED)
    assert (await world.cluster(cluster_id)).state == ClusterState.STARTING, "the cluster has as much longer"
    await world.skip(cluster_id, 301)
    await world.until_cluster(cluster_id, ClusterState.RUNNING)
    first, second, _ = await world.nodes(cluster_id)
    assert "did not register after its launch (HELIOSTAT_REGISTER_TIMEOUT_S) by its deadline" in first.reason
    assert "did not start Ray after its registration (HELIOSTAT_HEAD_START_TIMEOUT_S)" in second.reason
    assert sum(e.kind == "node_lost" for e in await world.story(cluster_id)) == 2


async def test_a_node_whose_ray_does_not_start_is_replaced(world: World) -> None:
    plans = [NodePlan(ready=False, failed="port taken")]
    world.fleet.node_plan = lambda spec: plans.pop() if plans and spec.role == NodeRole.WORKER else NodePlan()
    cluster_id = await world.start_cluster(ComputeConfig(worker_nodes=[WorkerNodeGroupConfig(min_nodes=1)]))

    async def failed() -> bool:
        return not plans

    await world.until(failed, "the failure")
    await world.skip(cluster_id, 5)
    await world.until_cluster(cluster_id, ClusterState.RUNNING)
    workers = [n for n in await world.nodes(cluster_id) if n.role == NodeRole.WORKER]
    assert [(n.slot, n.generation) for n in workers] == [(1, 1), (1, 2)]
    assert workers[0].reason == "port taken"


async def test_zones_and_then_the_market_fall_back(world: World) -> None:
    config = ComputeConfig(
        zones=["zone-a", "zone-b"],
        worker_nodes=[WorkerNodeGroupConfig(min_nodes=1, market_type=Market.PREFER_SPOT)],
    )
    world.machines.no_capacity(market=Market.SPOT)
    world.machines.no_capacity(zone="zone-a")
    launch, head_up = world.machines.launch, threading.Event()

    def after_the_head(spec: MachineSpec) -> Machine:
        assert spec.role == NodeRole.HEAD or head_up.wait(WAIT_S)
        machine = launch(spec)
        head_up.set()
        return machine

    world.machines.launch = after_the_head  # type: ignore[method-assign]
    specs: list[MachineSpec] = []
    world.fleet.node_plan = lambda spec: specs.append(spec) or NodePlan()  # type: ignore[func-returns-value]
    cluster_id = await world.running_cluster(config)
    where = {s.role: (s.zone, s.market) for s in specs}
    assert where == {
        NodeRole.HEAD: ("zone-b", Market.ON_DEMAND),
        NodeRole.WORKER: ("zone-b", Market.ON_DEMAND),
    }
    failed = [e.message for e in await world.story(cluster_id) if e.kind == "launch_failed"]
    assert len(failed) == 3, "the worker knows of zone-a by the head's try"


async def test_a_withdrawn_acceptance_makes_nothing(world: World) -> None:
    arg = world.cluster_input()
    await world.accept_cluster(arg)
    await withdraw(world, clusters, arg.cluster_id)
    await start_cluster(world.client, world.settings.task_queue, arg)
    assert await world.until_ended(arg.cluster_id) == "withdrawn"
    assert world.machines.calls["launch"] == 0


async def withdraw(world: World, t: Table, id: str) -> None:
    async with world.db.begin() as conn:
        await conn.execute(t.update().where(t.c.id == id).values(withdrawn=True))
