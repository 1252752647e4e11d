"""Plays the scenarios below in a world of its own and saves the histories of their workflows, which
``test_replay.py`` replays for ever after:

    python -m tests.workflows.record [SCENARIO…]

Record anew only what a *new* kind of history needs: old files are what running installations hold, and the code must
go on replaying them (with ``workflow.patched``) until none of that kind can be running any more.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

from temporalio.client import ScheduleOverlapPolicy, WorkflowHistory

import store.services
from clouds.contract.errors import BadConfig, QuotaExceeded
from heliostat.models.agents import CommandKind, FactKind
from heliostat.models.clouds import Market
from heliostat.models.clusters import ClusterState, NodeState
from heliostat.models.compute_configs import ComputeConfig, HeadNodeConfig, WorkerNodeGroupConfig
from heliostat.models.jobs import JobState
from heliostat.models.services import RolloutAction, Service, ServiceState, ServiceVersionState
from runtime.messages.services import GateOrder, GateTokens
from store.commands import OpenCommand
from tests.workflows.balancer import WatchedBalancer
from tests.workflows.clusters.test_healing import silent
from tests.workflows.clusters.test_scaling import limits, until_running
from tests.workflows.plans import ServePlan
from tests.workflows.service_world import AT_ONCE, IN_STEPS, ServiceWorld, make_service_world
from tests.workflows.services.test_notices import announce, until_told
from tests.workflows.services.test_rollout import LONG, is_paused
from tests.workflows.serving import FakeServe
from tests.workflows.test_continue_as_new import runs_of_workflow
from tests.workflows.test_schedules import apply, until_jobs
from tests.workflows.test_sweep import stray, sweep
from tests.workflows.world import WAIT_S, NodePlan, RunPlan, World, make_world, temporal_server
from workflows import ids

FOLDER = Path(__file__).parent / "histories"
WORKERS = ComputeConfig(
    worker_nodes=[WorkerNodeGroupConfig(name="w", min_nodes=1, max_nodes=3)], idle_termination_minutes=10
)
Saved = dict[str, str | tuple[str, str]]
"""Name of the file → workflow id, or that and a run id."""


async def job_with_retry_on_its_own_cluster(world: World) -> Saved:
    world.fleet.run_plans = [RunPlan(exit_code=3)]
    job_id = await world.start_job(compute=WORKERS)
    await world.until_ended(job_id)
    cluster_id = ids.job_cluster_id(job_id, 1)
    await world.until_ended(cluster_id)
    return {"job": job_id, "cluster": cluster_id}


async def job_on_a_given_cluster(world: World) -> Saved:
    cluster_id = await world.running_cluster(WORKERS)
    world.fleet.run_plans = [RunPlan(hold=True)]
    job_id = await world.start_job(cluster_id, timeout_s=600)
    run_id = await world.until_run(job_id)
    await world.until_job(job_id, JobState.RUNNING)
    await world.head(cluster_id).end_run(run_id)
    await world.until_ended(job_id)
    await world.until_quiet(cluster_id)
    return {"job": job_id, "cluster": cluster_id}


async def head_lost_under_a_job(world: World) -> Saved:
    world.fleet.run_plans = [RunPlan(hold=True)]
    job_id = await world.start_job(compute=WORKERS)
    await world.until_run(job_id)
    cluster_id = ids.job_cluster_id(job_id, 1)
    head = await world.node(cluster_id)
    await world.kill_machine(head)
    await silent(world, cluster_id, head.id)
    await world.until_ended(job_id)
    await world.until_ended(cluster_id)
    return {"job": job_id, "cluster": cluster_id}


async def idle_fence_lifted_then_ended(world: World) -> Saved:
    cluster_id = await world.running_cluster(WORKERS)
    await world.until_quiet(cluster_id)
    world.head(cluster_id).fence_answer = {"activity": "busy", "reason": "a driver"}
    await world.skip(cluster_id, 660)
    await world.until_quiet(cluster_id)
    world.head(cluster_id).fence_answer = None
    await world.skip(cluster_id, 660)
    await world.until_ended(cluster_id)
    return {"cluster": cluster_id}


async def scaled_and_bounded(world: World) -> Saved:
    cluster_id = await world.running_cluster(WORKERS)
    head = world.head(cluster_id)
    await head.tell(FactKind.DESIRED, desired={"w": 3}, remove=[])
    await until_running(world, cluster_id, w=3)
    await limits(world, cluster_id, "w", max_nodes=2)
    await until_running(world, cluster_id, w=2)
    worker = await world.node(cluster_id, "w")
    await head.tell(FactKind.NODE_LOST, node_id=worker.id, reason="raylet died")
    await world.until_quiet(cluster_id)
    await world.skip(cluster_id, 3)
    await until_running(world, cluster_id, w=2)
    await world.terminate(cluster_id)
    await world.until_ended(cluster_id)
    return {"cluster": cluster_id}


async def no_capacity_then_a_silent_machine(world: World) -> Saved:
    world.machines.no_capacity(2)
    plans = [NodePlan(register=False)]
    world.fleet.node_plan = lambda spec: plans.pop() if plans else NodePlan()
    cluster_id = await world.start_cluster()

    async def launched() -> bool:
        await world.skip(cluster_id, 3)
        return any(n.state == NodeState.LAUNCHED for n in await world.nodes(cluster_id))

    await world.until(launched, "a machine")
    await world.skip(cluster_id, 310)
    await world.until_cluster(cluster_id, ClusterState.RUNNING)
    await world.handle(cluster_id).cancel()
    await world.until_ended(cluster_id)
    return {"cluster": cluster_id}


async def places_walked(world: World) -> Saved:
    """Zones and types in vain, then all of them, then spot that is returned to."""
    group = WorkerNodeGroupConfig(name="w", min_nodes=1, max_nodes=3, market_type=Market.PREFER_SPOT)
    head = HeadNodeConfig(instance_types=["big", "bigger"])
    config = ComputeConfig(zones=["zone-a", "zone-b"], head_node=head, worker_nodes=[group])
    world.machines.no_capacity(5, zone="zone-a")
    world.machines.no_capacity(1, instance_type="big", error=QuotaExceeded)
    world.machines.no_capacity(1, market=Market.SPOT)
    cluster_id = await world.start_cluster(config)

    async def running() -> bool:
        await world.skip(cluster_id, 3)
        return (await world.cluster(cluster_id)).state == ClusterState.RUNNING

    await world.until(running, "the cluster")
    await world.skip(cluster_id, 700)
    await world.head(cluster_id).tell(FactKind.DESIRED, desired={"w": 2}, remove=[])
    await until_running(world, cluster_id, w=2)
    await world.terminate(cluster_id)
    await world.until_ended(cluster_id)
    return {"cluster": cluster_id}


async def terminated_while_running(world: World) -> Saved:
    world.fleet.run_plans = [RunPlan(hold=True)]
    job_id = await world.start_job()
    await world.until_run(job_id)
    await world.terminate(job_id)
    await world.until_ended(job_id)
    cluster_id = ids.job_cluster_id(job_id, 1)
    await world.until_ended(cluster_id)
    return {"job": job_id, "cluster": cluster_id}


async def scheduled_turn_and_sweep(world: World) -> Saved:
    schedule_id, handle = await apply(world, ScheduleOverlapPolicy.SKIP)
    await handle.trigger()
    (job_id,) = await until_jobs(world, schedule_id, 1)
    await world.until_job(job_id, JobState.SUCCEEDED)
    turn = (await handle.describe()).info.recent_actions[0].action.workflow_id  # type: ignore[union-attr]
    await world.until_ended(job_id)
    await world.until_ended(turn)
    await handle.delete()
    stray(world.machines)
    result = await sweep(world)
    assert len(result.ended) == 1
    return {"turn": turn, "sweep": f"{world.settings.task_queue}-sweep"}


async def continued_as_new(world: World) -> Saved:
    """On a server that suggests it after few events; the first two runs are saved."""
    cluster_id = await world.running_cluster(WORKERS)
    await world.until_quiet(cluster_id)
    job_id = await world.start_job(cluster_id)
    await world.until_ended(job_id)
    await world.until_quiet(cluster_id)
    first, second = (await runs_of_workflow(world, cluster_id))[:2]
    return {"first": (cluster_id, first), "second": (cluster_id, second)}


async def service_steered(world: ServiceWorld) -> Saved:
    """Paused at its canary's share, promoted; new tokens; in place and back; superseded, aborted, terminated."""
    service_id, first = await world.running_service()
    second = world.version(service_id, rollout=IN_STEPS)
    await world.deploy(service_id, second, canary_percent=40)
    await world.until_service(service_id, "to be paused", is_paused)
    await world.until_quiet(service_id)
    both = GateTokens(enabled=True, hashes=["ab" * 32, "cd" * 32])
    await world.update(service_id, "set_gate", GateOrder(actor="user:ann", gate=both))
    await world.order(service_id, RolloutAction.PROMOTE)
    await world.until_finished(service_id, second)
    await world.until_released(service_id, first)
    third = world.version(service_id)
    await world.deploy(service_id, third, in_place=True)
    await world.until_finished(service_id, third)
    await world.rollback(service_id)
    await world.until_finished(service_id, second)
    fourth, fifth = (world.version(service_id, rollout=LONG) for _ in range(2))
    await world.deploy(service_id, fourth)
    await world.until_share(service_id, fourth, 25)
    await world.deploy(service_id, fifth)
    await world.until_share(service_id, fifth, 25)
    await world.order(service_id, RolloutAction.ABORT)
    await world.until_finished(service_id, second)
    await world.until_released(service_id, fifth)
    await world.terminate(service_id)
    await world.nothing_left(service_id)
    return {"service": service_id}


async def service_in_trouble(world: ServiceWorld) -> Saved:
    """A canary that breaches and is kept, a head that is lost, a version that never comes up, static weights, idle."""
    world.people.per_s = 400
    service_id, first = await world.running_service()
    bad = world.version(service_id, ServePlan(error_share=0.5), rollout=LONG)
    await world.deploy(service_id, bad)
    await world.until_version(service_id, bad, ServiceVersionState.UNHEALTHY)
    await world.until_finished(service_id, first)
    (cluster_id,) = world.fleet.deployed[first.id]
    await world.lose_head(cluster_id)
    await world.until_state(service_id, ServiceState.UNHEALTHY)
    await world.until_state(service_id, ServiceState.RUNNING)
    never = world.version(service_id, ServePlan(failed="no module named app"))
    await world.deploy(service_id, never)
    await world.until_version(service_id, never, ServiceVersionState.UNHEALTHY)
    await world.until_finished(service_id, first)
    a, b = (world.version(service_id, idle_termination_minutes=10) for _ in range(2))
    await world.deploy(service_id, a, b, weights={a.id: 70, b.id: 30})
    await world.until_released(service_id, first)
    await world.until_quiet(service_id)
    world.people.per_s = 0
    world.balancer.forgiven.add(service_id)  # it ends by itself, as it was asked to
    await world.skip(service_id, 1300)
    await world.nothing_left(service_id)
    return {"service": service_id}


async def service_whose_heads_are_taken(world: ServiceWorld) -> Saved:
    """A head is announced and relieved; the next one is taken before its relief is up, which then is not needed."""
    service_id, version = await world.running_service()
    (head,) = world.heads_of(version)
    await announce(world, head.cluster_id)
    await until_told(world, service_id, "released")
    await world.until_cluster(head.cluster_id, ClusterState.TERMINATED)
    await world.until_finished(service_id, version)
    (head,) = world.heads_of(version)
    cluster_id = head.cluster_id
    world.fleet.node_plan = lambda spec: NodePlan(register=spec.cluster_id == cluster_id)
    await announce(world, cluster_id)
    await until_told(world, service_id, "relief", 2)
    await world.lose_head(cluster_id)
    await until_told(world, service_id, "released", 2)
    await world.until_finished(service_id, version)
    await world.terminate(service_id)
    await world.nothing_left(service_id)
    return {"service": service_id}


async def service_given_up_and_born_again(world: ServiceWorld) -> Saved:
    """A deploy that is given up before a worker takes it up; a load balancer that fails over new weights, a token that
    is added while a version is probed; deployed once more in the moment in which it ends."""
    service_id, first = await world.running_service()
    second, third, last = (world.version(service_id, rollout=AT_ONCE) for _ in range(3))
    both = GateTokens(enabled=True, hashes=["ab" * 32, "cd" * 32])
    set_backends, result, write = WatchedBalancer.set_backends, FakeServe.result, store.services.write_service
    failed, probed, again = asyncio.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def fails_once(balancer: WatchedBalancer, *told: Any) -> None:
        set_backends(balancer, *told)
        if any(b.version_id == third.id and b.weight for b in told[-1]) and not failed.is_set():
            loop.call_soon_threadsafe(failed.set)
            raise BadConfig("its port is taken by another program")

    async def token_meanwhile(serve: FakeServe, command: OpenCommand) -> dict[str, object] | None:
        answer = await result(serve, command)
        if command.kind == CommandKind.SERVE_PROBE and not probed.is_set():
            probed.set()
            await world.update(service_id, "set_gate", GateOrder(actor="user:ann", gate=both))
        return answer

    async def deployed_as_it_ends(db: Any, service: Service, *more: Any) -> bool:
        wanted = await write(db, service, *more)
        if service.state == ServiceState.TERMINATED and not again.is_set():
            again.set()
            await world.deploy(service_id, last, gate=both, life=await world.reopen(service_id))
        return wanted

    with (
        mock.patch.object(WatchedBalancer, "set_backends", fails_once),
        mock.patch.object(FakeServe, "result", token_meanwhile),
        mock.patch.object(store.services, "write_service", deployed_as_it_ends),
    ):
        await world.until_quiet(service_id)
        await world.stop_worker()
        await world.deploy(service_id, second)
        given_up = asyncio.create_task(world.rollback(service_id))
        await asyncio.sleep(1)  # it waits for a worker
        await world.start_worker()
        await given_up
        await world.until_version(service_id, second, ServiceVersionState.TERMINATED)
        await world.until_finished(service_id, first)
        await world.deploy(service_id, third)
        await asyncio.wait_for(failed.wait(), WAIT_S)
        await world.until_finished(service_id, third)
        await world.until_released(service_id, first)
        await world.terminate(service_id)
        await world.until_finished(service_id, last)
        await world.terminate(service_id)
        await world.nothing_left(service_id)
    old, new = (await runs_of_workflow(world, service_id))[:2]
    return {"old": (service_id, old), "new": (service_id, new)}


async def service_continued_as_new(world: ServiceWorld) -> Saved:
    """On a server that suggests it after few events; the second run begins within a rollout that is paused."""
    service_id, _ = await world.running_service()
    second = world.version(service_id, rollout=IN_STEPS)
    await world.deploy(service_id, second, canary_percent=40)
    await world.until_service(service_id, "to be paused", is_paused)
    await world.until_quiet(service_id)
    await world.order(service_id, RolloutAction.RESUME)
    await world.until_finished(service_id, second)
    await world.until_quiet(service_id)
    runs = await runs_of_workflow(world, service_id)
    return {f"run{n}": (service_id, run) for n, run in enumerate(runs[:3], 1)}


SCENARIOS: list[Callable[[Any], Awaitable[Saved]]] = [
    job_with_retry_on_its_own_cluster,
    job_on_a_given_cluster,
    head_lost_under_a_job,
    idle_fence_lifted_then_ended,
    scaled_and_bounded,
    no_capacity_then_a_silent_machine,
    places_walked,
    terminated_while_running,
    scheduled_turn_and_sweep,
    continued_as_new,
    service_steered,
    service_in_trouble,
    service_whose_heads_are_taken,
    service_given_up_and_born_again,
    service_continued_as_new,
]


def scrubbed(value: Any) -> Any:
    """Without what tells of the machine that recorded it."""
    if isinstance(value, dict):
        return {k: scrubbed(v) for k, v in value.items() if k not in ("identity", "stackTrace", "workerIdentity")}
    return [scrubbed(v) for v in value] if isinstance(value, list) else value


def saved(history: WorkflowHistory) -> str:
    return json.dumps({"id": history.workflow_id, **scrubbed(json.loads(history.to_json()))}, indent=0) + "\n"


async def record(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for scenario in SCENARIOS:
        name = scenario.__name__
        if names and name not in names:
            continue
        cut = {"limit__historyCount__suggestContinueAsNew": "8"} if "continued_as_new" in name else {}
        make = make_service_world if name.startswith("service_") else make_world
        async with temporal_server(**cut) as client:
            with tempfile.TemporaryDirectory() as folder:
                async with make(client, Path(folder)) as world:
                    for what, id in (await scenario(world)).items():
                        of, run_id = (id, None) if isinstance(id, str) else id
                        history = await client.get_workflow_handle(of, run_id=run_id).fetch_history()
                        path = FOLDER / f"{name}.{what}.json"
                        path.write_text(saved(history))
                        print(f"{path.name}: {len(history.events)} events")


if __name__ == "__main__":
    asyncio.run(record(sys.argv[1:]))
    sys.stdout.flush()
    os._exit(0)  # threads of the SDK's core may abort at interpreter exit (sdk-python#300)
