"""What heads hand on: the next one has it, it ends with the cluster, and nothing of it is left whatever happens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from temporalio.client import Client

from clouds.contract.errors import Denied, NotOffered
from clouds.contract.machines import MachineSpec
from clouds.fake.retained import FakeRetained
from heliostat.models.agents import FactKind
from heliostat.models.clusters import ClusterState, NodeState
from heliostat.models.compute_configs import ComputeConfig, HeadNodeConfig, RetainedVolume, WorkerNodeGroupConfig
from tests.workflows.clusters.test_healing import silent
from tests.workflows.clusters.test_placement import noted
from tests.workflows.crashes import Crashes
from tests.workflows.test_sweep import sweep
from tests.workflows.world import World, make_world

HEAD = HeadNodeConfig(
    retained_volume=RetainedVolume(size=50 * 2**30, mount_path="/mnt/head"), fixed_address=True, instance_types=["big"]
)
CONFIG = ComputeConfig(head_node=HEAD, zones=["zone-a", "zone-b"])


def kept(world: World, cluster_id: str) -> dict[str, FakeRetained]:
    """By zone; {}: nothing is left of it."""
    return world.machines.retained.held.get(cluster_id, {})


async def lose_head(world: World, cluster_id: str) -> None:
    """Its machine dies; waits for the next one."""
    head = await world.node(cluster_id)
    await world.kill_machine(head)
    await silent(world, cluster_id, head.id)

    async def recovered() -> bool:
        cluster = await world.cluster(cluster_id)
        heads = [n for n in await world.nodes(cluster_id) if n.group == "head" and n.state == NodeState.RUNNING]
        return cluster.state == ClusterState.RUNNING and [n.generation > head.generation for n in heads] == [True]

    await world.until(recovered, "the next head")
    await world.until_quiet(cluster_id)


async def test_the_next_head_has_the_disk_and_the_address_of_the_one_before(world: World) -> None:
    specs = noted(world)
    cluster_id = await world.running_cluster(CONFIG)
    await world.until_quiet(cluster_id)
    first = await world.node(cluster_id)
    (before,) = kept(world, cluster_id).values()
    assert before.holder == first.machine_id
    await lose_head(world, cluster_id)
    second = await world.node(cluster_id)
    assert second.machine_id != first.machine_id
    assert kept(world, cluster_id) == {"zone-a": before}
    assert before.holders == [first.machine_id, second.machine_id]
    assert (first.ip, second.ip) == (before.ip, before.ip)
    assert [s.keep.had for s in specs if s.keep] == [False, True]
    assert all('"path": "/mnt/head"' in s.user_data for s in specs)
    await world.terminate(cluster_id)
    await world.until_cluster(cluster_id, ClusterState.TERMINATED)
    assert kept(world, cluster_id) == {}


async def test_the_first_head_goes_where_there_is_a_machine_and_the_next_one_there_too(world: World) -> None:
    specs = noted(world)
    world.machines.no_capacity(zone="zone-a")
    cluster_id = await world.running_cluster(CONFIG)
    await world.until_quiet(cluster_id)
    assert list(kept(world, cluster_id)) == ["zone-b"], "what the try in zone-a has left is deleted"
    world.machines.restock()
    await world.skip(cluster_id, 700)
    await lose_head(world, cluster_id)
    assert [s.zone for s in specs] == ["zone-b", "zone-b"]


async def test_a_head_walks_on_from_where_it_can_not_be_and_workers_do_not_mind(world: World) -> None:
    """A zone may be none for a head with an address (a public subnet) though it has machines for others."""
    world.machines.no_capacity(1, zone="zone-a", error=NotOffered)
    specs = noted(world)
    group = WorkerNodeGroupConfig(name="w", max_nodes=1, instance_types=["big"])
    cluster_id = await world.running_cluster(CONFIG.model_copy(update={"worker_nodes": [group]}))
    assert [s.zone for s in specs] == ["zone-b"]
    await world.head(cluster_id).tell(FactKind.DESIRED, desired={"w": 1}, remove=[])

    async def joined() -> bool:
        return any(n.group == "w" and n.state == NodeState.RUNNING for n in await world.nodes(cluster_id))

    await world.until(joined, "the worker")
    assert [s.zone for s in specs] == ["zone-b", "zone-a"]


async def test_a_cluster_that_never_came_up_leaves_nothing(world: World) -> None:
    world.machines.no_capacity()
    cluster_id = await world.start_cluster(CONFIG)
    await world.until_quiet(cluster_id)
    assert set(kept(world, cluster_id)) == {"zone-a", "zone-b"}
    await world.terminate(cluster_id)
    await world.until_cluster(cluster_id, ClusterState.TERMINATED)
    assert kept(world, cluster_id) == {}


async def test_a_head_that_is_not_given_its_disk_is_given_up_and_says_why(world: World) -> None:
    def attach_retained(cluster_id: str, machine_id: str | None) -> None:
        if machine_id is not None:
            raise Denied("The role may not attach volumes.")
        real(cluster_id, machine_id)

    real, world.machines.attach_retained = world.machines.attach_retained, attach_retained  # type: ignore[method-assign]
    world.machines.boot = None  # without its disk the agent does not begin
    cluster_id = await world.start_cluster(CONFIG)
    cluster = await world.until_cluster(cluster_id, ClusterState.FAILED)
    assert "may not attach volumes" in cluster.reason
    assert kept(world, cluster_id) == {}
    assert world.alive() == []


async def test_a_disk_that_is_not_free_yet_is_waited_for(world: World) -> None:
    times = 0

    def attach_retained(cluster_id: str, machine_id: str | None) -> None:
        nonlocal times
        times += 1
        try:
            real(cluster_id, machine_id)
        finally:
            world.machines.boot_s = 0  # it runs from now on

    real, world.machines.attach_retained = world.machines.attach_retained, attach_retained  # type: ignore[method-assign]
    world.machines.boot_s = 3600
    cluster_id = await world.running_cluster(CONFIG)
    await world.until_quiet(cluster_id)
    (found,) = kept(world, cluster_id).values()
    assert found.holder is not None
    assert times == 2, "once too early"


async def test_the_sweep_spares_it_while_the_cluster_lives_and_deletes_it_after(world: World) -> None:
    cluster_id = await world.running_cluster(CONFIG)
    await world.until_quiet(cluster_id)
    (before,) = kept(world, cluster_id).values()
    world.machines.no_capacity()
    head = await world.node(cluster_id)
    await world.kill_machine(head)
    await silent(world, cluster_id, head.id)
    await world.until_cluster(cluster_id, ClusterState.RECOVERING)
    await world.until_gone()
    assert (await sweep(world)).leftovers == [], "between two heads it belongs to no machine"
    assert kept(world, cluster_id) == {"zone-a": before}
    await world.until_quiet(cluster_id)  # no launch is under way, which would make it anew
    await world.handle(cluster_id).terminate("by hand")
    assert (await sweep(world)).leftovers == [before.volume]
    assert kept(world, cluster_id) == {}


async def lifecycle(temporal: Client, folder: Path, plan: dict[int, str], *, die: bool) -> Crashes:
    """``zone-a`` has no machine; the head in ``zone-b`` dies once; the cluster is ended."""
    crashes = Crashes(plan)
    folder.mkdir()
    async with make_world(temporal, folder, interceptors=[crashes], worker_shutdown_s=0.05) as world:
        if die:
            crashes.restart = world.restart_worker
        specs: list[MachineSpec] = noted(world)
        world.machines.no_capacity(zone="zone-a")
        cluster_id = await world.start_cluster(CONFIG)
        try:
            await world.until_cluster(cluster_id, ClusterState.RUNNING, timeout_s=60)
            await world.until_quiet(cluster_id)  # the first head has its disk
            await lose_head(world, cluster_id)
            (found,) = kept(world, cluster_id).values()
            assert len(found.holders) == len(set(found.holders)) == 2
            await world.terminate(cluster_id)
            await world.until_ended(cluster_id, timeout_s=60)
            assert {s.zone for s in specs} == {"zone-b"}
            assert not world.alive()
            assert kept(world, cluster_id) == {}
            assert "WORKFLOW_EXECUTION_FAILED" not in await world.events_of(cluster_id)
        except Exception as error:
            error.add_note(f"plan {plan}, die={die}; crashed {crashes.crashed}; steps {crashes.names}")
            raise
        finally:
            await crashes.settled()
    return crashes


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("die", [False, True], ids=["answer-lost", "worker-dies"])
async def test_the_worker_dies_at_each_step_of_what_is_kept(temporal: Client, tmp_path: Path, die: bool) -> None:
    dry = await lifecycle(temporal, tmp_path / "dry", {}, die=False)
    steps = [n for n, name in enumerate(dry.names) if name in ("launch_node", "hand_over", "end_machines")]
    assert dry.names.count("hand_over") == 3, "two heads, and the end"
    gate = asyncio.Semaphore(6)

    async def one(step: int, mode: str) -> Crashes:
        async with gate:
            return await lifecycle(temporal, tmp_path / f"{step}-{mode}", {step: mode}, die=die)

    found = await asyncio.gather(*(one(s, m) for s in steps for m in ("before", "after")), return_exceptions=True)
    failed = [f for f in found if isinstance(f, BaseException)]
    if failed:
        raise BaseExceptionGroup(f"{len(failed)} of {len(found)} lives went wrong", failed)
