"""The worker dies between any two activity calls of a service that is deployed, rolled out by steps, updated in place
and terminated, before or after the call did its work: each phase ends as it should, no cluster is made twice, none is
left, and no request would have been lost."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from temporalio.client import Client

from heliostat.models.clusters import ClusterState
from heliostat.models.services import ServiceVersionState
from tests.workflows.crashes import Crashes
from tests.workflows.service_world import AT_ONCE, ServiceWorld, make_service_world
from tests.workflows.services.test_notices import announce, until_told

RULES = AT_ONCE.model_copy(update={"steps": [50, 100]})
AT_ONE_TIME = 8
"""Worlds beside each other: they mostly wait for back-offs."""
LIMIT_S = 90


Life = Callable[[ServiceWorld], Awaitable[None]]


async def lifecycle(
    temporal: Client, folder: Path, plan: dict[int, str], *, cold: bool, die: bool, life: Life | None = None
) -> Crashes:
    """See ``test_crash_points.lifecycle``. ``life``: what is done in it; default: ``live``."""
    crashes = Crashes(plan)
    folder.mkdir()
    cached = 1 if cold else 100
    async with make_service_world(
        temporal, folder, interceptors=[crashes], worker_max_cached_workflows=cached, worker_shutdown_s=0.05
    ) as world:
        if die:
            crashes.restart = world.restart_worker
        try:
            await (life or live)(world)
        except Exception as error:
            error.add_note(f"plan {plan}, cold={cold}, die={die}; crashed {crashes.crashed}; steps {crashes.names}")
            raise
        finally:
            await crashes.settled()
    return crashes


async def live(world: ServiceWorld) -> None:
    world.people.per_s = 200
    service_id = await world.new_service()
    first, second, third = (world.version(service_id, rollout=RULES) for _ in range(3))
    await world.deploy(service_id, first)
    await world.until_finished(service_id, first, LIMIT_S)
    await world.deploy(service_id, second)
    await world.until_finished(service_id, second, LIMIT_S)
    await world.until_version(service_id, first, ServiceVersionState.TERMINATED, LIMIT_S)
    await world.deploy(service_id, third, in_place=True)
    await world.until_finished(service_id, third, LIMIT_S)
    await world.terminate(service_id)
    await world.nothing_left(service_id, LIMIT_S)
    assert world.balancer.shares_over_time(service_id, second.id) in ([0, 50, 100, 0], [0, 50, 100])
    assert len(await world.clusters_of(service_id)) == 2
    assert sum(world.machines.boots.values()) == 2
    assert not world.people.lost
    story = await world.story(service_id)
    assert [e.kind for e in story].count("rollout_done") == 3
    assert not [e.message for e in story if "UNHEALTHY" in e.message]
    ends = [e.message for e in story if e.kind == "state" and e.message.startswith("TERMINATED")]
    assert len(ends) == 1, ends
    assert "WORKFLOW_EXECUTION_FAILED" not in await world.events_of(service_id)


async def live_on(world: ServiceWorld) -> None:
    """Its cloud takes the head's machine back."""
    world.people.per_s = 200
    service_id = await world.new_service()
    version = world.version(service_id, rollout=RULES)
    await world.deploy(service_id, version)
    await world.until_finished(service_id, version, LIMIT_S)
    (head,) = world.heads_of(version)
    await announce(world, head.cluster_id)
    await until_told(world, service_id, "released", timeout_s=LIMIT_S)
    await world.until_cluster(head.cluster_id, ClusterState.TERMINATED, LIMIT_S)
    await world.until_finished(service_id, version, LIMIT_S)
    await world.terminate(service_id)
    await world.nothing_left(service_id, LIMIT_S)
    assert len(await world.clusters_of(service_id)) == 2
    assert sum(world.machines.boots.values()) == 2
    assert not world.people.lost
    kinds = await world.kinds(service_id)
    assert [kinds.count(kind) for kind in ("head_notice", "relief", "relieved", "released")] == [1] * 4
    assert "WORKFLOW_EXECUTION_FAILED" not in await world.events_of(service_id)


async def many(
    temporal: Client, folder: Path, plans: list[tuple[dict[int, str], bool, bool]], life: Life | None = None
) -> list[Crashes]:
    gate = asyncio.Semaphore(AT_ONE_TIME)

    async def one(number: int, plan: dict[int, str], cold: bool, die: bool) -> Crashes:
        async with gate:
            began = time.monotonic()
            lived = await lifecycle(temporal, folder / f"{number}", plan, cold=cold, die=die, life=life)
            print(f"LIFE {time.monotonic() - began:.1f} s: {lived.crashed}, cold={cold}, die={die}")
            return lived

    found = await asyncio.gather(*(one(n, *p) for n, p in enumerate(plans)), return_exceptions=True)
    failed = [f for f in found if isinstance(f, BaseException)]
    if failed:
        raise BaseExceptionGroup(f"{len(failed)} of {len(plans)} lives went wrong", failed)
    return [f for f in found if isinstance(f, Crashes)]


async def steps_of_a_life(temporal: Client, folder: Path) -> int:
    return (await lifecycle(temporal, folder / "dry", {}, cold=False, die=False)).step


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_at_some_steps(temporal: Client, tmp_path: Path) -> None:
    """Every twelfth step, before and after, dying and going on; the long tests have all combinations."""
    steps = await steps_of_a_life(temporal, tmp_path)
    assert steps >= 30
    plans = [({k: "after" if k % 8 else "before"}, False, k % 24 == 0) for k in range(0, steps, 12)]
    found = await many(temporal, tmp_path, plans)
    assert sum(len(c.crashed) for c in found) >= len(plans) - 2, "steps are not quite the same in each life"


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_while_a_cluster_is_replaced(temporal: Client, tmp_path: Path) -> None:
    """Every step, before and after, dying or going on."""
    steps = (await lifecycle(temporal, tmp_path / "dry", {}, cold=False, die=False, life=live_on)).step
    plans = [({k: mode}, k % 2 == 0, k % 3 == 0) for k in range(steps) for mode in ("before", "after")]
    await many(temporal, tmp_path, plans, live_on)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("die", [False, True], ids=["answer-lost", "worker-dies"])
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
async def test_at_every_step_in_every_way(temporal: Client, tmp_path: Path, cold: bool, die: bool) -> None:
    steps = await steps_of_a_life(temporal, tmp_path)
    plans = [({k: mode}, cold, die) for k in range(steps) for mode in ("before", "after")]
    await many(temporal, tmp_path, plans)


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_at_random_steps(temporal: Client, tmp_path: Path) -> None:
    """100 seeded schedules of up to six crashes each."""
    steps = await steps_of_a_life(temporal, tmp_path)
    dice = random.Random(20261126)
    plans = []
    for _ in range(100):
        plan = {dice.randrange(steps + 6): dice.choice(["before", "after"]) for _ in range(dice.randint(1, 6))}
        plans.append((plan, dice.random() < 0.3, dice.random() < 0.5))
    await many(temporal, tmp_path, plans)
