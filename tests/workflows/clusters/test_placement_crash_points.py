"""The worker dies between any two activity calls of a cluster whose first place has no machine: each try is ended by
its own token, none is made twice, and none is left."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from temporalio.client import Client

from clouds.contract.machines import MachineSpec
from heliostat.models.clusters import ClusterState, NodeState
from heliostat.models.compute_configs import ComputeConfig, HeadNodeConfig, WorkerNodeGroupConfig
from tests.workflows.crashes import Crashes
from tests.workflows.plans import NodePlan
from tests.workflows.world import make_world

CONFIG = ComputeConfig(
    zones=["zone-a", "zone-b"],
    head_node=HeadNodeConfig(instance_types=["big", "bigger"]),
    worker_nodes=[WorkerNodeGroupConfig(name="w", min_nodes=1, max_nodes=2, instance_types=["big"])],
)
AT_ONCE = 8


async def lifecycle(temporal: Client, folder: Path, plan: dict[int, str], *, die: bool) -> Crashes:
    """``zone-a`` never has a machine; ``zone-b`` has. ``die``: each crash ends the worker, and another one takes over;
    else only the answer is lost."""
    crashes = Crashes(plan)
    folder.mkdir()
    async with make_world(temporal, folder, interceptors=[crashes], worker_shutdown_s=0.05) as world:
        if die:
            crashes.restart = world.restart_worker
        booted: list[MachineSpec] = []
        world.fleet.node_plan = lambda spec: booted.append(spec) or NodePlan()  # type: ignore[func-returns-value]
        world.machines.no_capacity(zone="zone-a")
        cluster_id = await world.start_cluster(CONFIG)
        try:
            await world.until_cluster(cluster_id, ClusterState.RUNNING, timeout_s=60)
            await world.terminate(cluster_id)
            await world.until_cluster(cluster_id, ClusterState.TERMINATED, timeout_s=60)
            await world.until_ended(cluster_id, timeout_s=60)
            nodes = await world.nodes(cluster_id)
            assert {n.state for n in nodes} == {NodeState.TERMINATED}
            assert {(s.zone, s.instance_type) for s in booted} == {("zone-b", "big")}
            assert len({s.token for s in booted}) == len(booted) == sum(world.machines.boots.values()) == 2
            assert not world.alive()
            assert "WORKFLOW_EXECUTION_FAILED" not in await world.events_of(cluster_id)
        except Exception as error:
            error.add_note(f"plan {plan}, die={die}; crashed {crashes.crashed}; steps {crashes.names}")
            raise
        finally:
            await crashes.settled()
    return crashes


async def many(temporal: Client, folder: Path, plans: list[tuple[dict[int, str], bool]]) -> list[Crashes]:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, plan: dict[int, str], die: bool) -> Crashes:
        async with gate:
            return await lifecycle(temporal, folder / f"{number}", plan, die=die)

    found = await asyncio.gather(*(one(n, *p) for n, p in enumerate(plans)), return_exceptions=True)
    failed = [f for f in found if isinstance(f, BaseException)]
    if failed:
        raise BaseExceptionGroup(f"{len(failed)} of {len(plans)} lives went wrong", failed)
    return [f for f in found if isinstance(f, Crashes)]


@pytest.mark.long
async def test_at_each_launch(temporal: Client, tmp_path: Path) -> None:
    """The tries' own steps; the long test has all of them, in every way."""
    dry = await lifecycle(temporal, tmp_path / "dry", {}, die=False)
    tries = [n for n, name in enumerate(dry.names) if name in ("launch_node", "end_machines")]
    assert len(tries) >= 5, "two tries in vain, two that launch, their ends"
    plans = [({k: "after" if i % 2 else "before"}, i % 3 == 0) for i, k in enumerate(tries)]
    await many(temporal, tmp_path, plans)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("die", [False, True], ids=["answer-lost", "worker-dies"])
async def test_at_every_step(temporal: Client, tmp_path: Path, die: bool) -> None:
    dry = await lifecycle(temporal, tmp_path / "dry", {}, die=False)
    plans = [({k: mode}, die) for k in range(dry.step) for mode in ("before", "after")]
    await many(temporal, tmp_path, plans)
