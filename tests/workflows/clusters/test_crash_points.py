"""The worker dies between any two activity calls of a job with its own cluster, before or after the call did its work:
the job ends exactly once and as it should, no machine is launched twice, none is left."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from temporalio.client import Client

from heliostat.models.clusters import ClusterState, NodeState
from heliostat.models.compute_configs import ComputeConfig, WorkerNodeGroupConfig
from heliostat.models.jobs import JobState, RunCause
from tests.workflows.crashes import Crashes
from tests.workflows.faults import live_through
from tests.workflows.world import RunPlan, World, make_world

CONFIG = ComputeConfig(worker_nodes=[WorkerNodeGroupConfig(name="w", min_nodes=1, max_nodes=2)])
AT_ONCE = 8
"""Worlds beside each other: they mostly wait for back-offs."""


async def lifecycle(temporal: Client, folder: Path, plan: dict[int, str], *, cold: bool, die: bool) -> Crashes:
    """One job, whose first run fails, on a cluster of its own. ``cold``: workers remember one workflow only.
    ``die``: each crash ends the worker, and another one takes over; else only the answer is lost."""
    crashes = Crashes(plan)
    folder.mkdir()
    cached = 1 if cold else 100  # with 0 each local activity costs a workflow task's timeout of 10 s
    async with make_world(
        temporal, folder, interceptors=[crashes], worker_max_cached_workflows=cached, worker_shutdown_s=0.05
    ) as world:
        if die:
            crashes.restart = world.restart_worker
        world.fleet.run_plans = [RunPlan(exit_code=7)]
        job_id = await world.start_job(compute=CONFIG)
        try:
            await check(world, job_id)
        except Exception as error:
            error.add_note(f"plan {plan}, cold={cold}, die={die}; crashed {crashes.crashed}; steps {crashes.names}")
            raise
        finally:
            await crashes.settled()
    return crashes


async def check(world: World, job_id: str) -> None:
    job = await world.until_job(job_id, JobState.SUCCEEDED, timeout_s=60)
    assert [(r.cause, r.exit_code) for r in job.runs] == [(RunCause.APPLICATION, 7), (None, 0)]
    assert world.fleet.started == [f"{job_id}-1", f"{job_id}-2"]
    await world.until_ended(job_id, timeout_s=60)
    assert job.cluster_id is not None
    await world.until_cluster(job.cluster_id, ClusterState.TERMINATED, timeout_s=60)
    await world.until_ended(job.cluster_id, timeout_s=60)
    nodes = await world.nodes(job.cluster_id)
    assert sorted((n.slot, n.generation, n.state) for n in nodes) == [
        (0, 1, NodeState.TERMINATED),
        (1, 1, NodeState.TERMINATED),
    ]
    assert sum(world.machines.boots.values()) == 2
    assert not world.alive()
    for id, last in ((job_id, "SUCCEEDED"), (job.cluster_id, "TERMINATED")):
        ends = [e.message for e in await world.story(id) if e.kind == "state" and e.message.startswith(last)]
        assert len(ends) == 1, ends
        assert "WORKFLOW_EXECUTION_FAILED" not in await world.events_of(id)


async def many(temporal: Client, folder: Path, plans: list[tuple[dict[int, str], bool, bool]]) -> list[Crashes]:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, plan: dict[int, str], cold: bool, die: bool) -> Crashes:
        async with gate:
            began = time.monotonic()
            life = await lifecycle(temporal, folder / f"{number}", plan, cold=cold, die=die)
            print(f"LIFE {time.monotonic() - began:.1f} s: {life.crashed}, cold={cold}, die={die}")
            return life

    found = await asyncio.gather(*(one(n, *p) for n, p in enumerate(plans)), return_exceptions=True)
    failed = [f for f in found if isinstance(f, BaseException)]
    if failed:
        raise BaseExceptionGroup(f"{len(failed)} of {len(plans)} lives went wrong", failed)
    return [f for f in found if isinstance(f, Crashes)]


async def steps_of_a_life(temporal: Client, folder: Path) -> int:
    crashes = await lifecycle(temporal, folder / "dry", {}, cold=False, die=False)
    return crashes.step


async def test_at_some_steps(temporal: Client, tmp_path: Path) -> None:
    """Every third step, alternating before and after, dying and going on; the long tests have all combinations."""
    steps = await steps_of_a_life(temporal, tmp_path)
    assert steps >= 12
    plans = [({k: "after" if n % 2 else "before"}, False, n % 3 == 0) for n, k in enumerate(range(0, steps, 3))]
    found = await many(temporal, tmp_path, plans)
    assert sum(len(c.crashed) for c in found) > len(plans) / 2, "a busy machine's life has fewer, larger steps"


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("die", [False, True], ids=["answer-lost", "worker-dies"])
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
async def test_at_every_step_in_every_way(temporal: Client, tmp_path: Path, cold: bool, die: bool) -> None:
    steps = await steps_of_a_life(temporal, tmp_path)
    plans = [({k: mode}, cold, die) for k in range(steps) for mode in ("before", "after")]
    await many(temporal, tmp_path, plans)


SEED = 20261126


async def leaks(temporal: Client, folder: Path, seeds: list[int]) -> None:
    """Each seed is a life under faults (``tests.workflows.faults``), or the one of HELIOSTAT_FAULT_SEED."""
    if os.environ.get("HELIOSTAT_FAULT_SEED"):
        seeds = [int(os.environ["HELIOSTAT_FAULT_SEED"])]
    gate = asyncio.Semaphore(AT_ONCE)
    struck: list[str] = []

    async def one(seed: int) -> None:
        async with gate:
            began = time.monotonic()
            life = await live_through(temporal, folder / f"{seed}", seed)
            took = time.monotonic() - began
            print(f"SEED {seed}: {took:.1f} s, struck {life.struck}, crashed {life.crashes.crashed}, {life.swept=}")
            struck.extend(life.struck)

    found = await asyncio.gather(*(one(seed) for seed in seeds), return_exceptions=True)
    failed = [f for f in found if isinstance(f, BaseException)]
    if failed:
        raise BaseExceptionGroup(f"{len(failed)} of {len(seeds)} lives went wrong", failed)
    assert len(struck) >= len(seeds) / 2, "faults strike at all"


async def test_no_schedule_of_faults_leaks(temporal: Client, tmp_path: Path) -> None:
    """Three lives, of which one went wrong once (its job was ended by hand before it knew of its cluster); the long
    tests live 500."""
    await leaks(temporal, tmp_path, [SEED - 1, SEED - 2, 20261320])


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(20))
async def test_no_schedule_of_faults_leaks_in_500_lives(temporal: Client, tmp_path: Path, part: int) -> None:
    await leaks(temporal, tmp_path, [SEED + 25 * part + n for n in range(25)])
