"""A cluster ends: when it is told to, at any moment, when nobody needs it, and when its time is up. Nothing is left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest
from temporalio.client import WorkflowExecutionStatus
from temporalio.common import RetryPolicy
from temporalio.exceptions import ApplicationError

from activities import nodes
from heliostat.errors import CloudError
from heliostat.models.agents import CommandKind, FactKind
from heliostat.models.clusters import Activity, ClusterState, NodeState
from heliostat.models.compute_configs import ComputeConfig, WorkerNodeGroupConfig
from runtime.messages.clusters import LeaseAnswer, LeaseRequest, LimitsUpdate, Release
from tests.workflows.world import WAIT_S, NodePlan, RunPlan, World
from workflows import policies

TWO_WORKERS = [WorkerNodeGroupConfig(name="w", min_nodes=2, max_nodes=3)]
IDLE_10 = ComputeConfig(idle_termination_minutes=10)
MINUTE = 60.0


async def ended_clean(world: World, cluster_id: str, state: ClusterState = ClusterState.TERMINATED) -> None:
    cluster = await world.until_cluster(cluster_id, state)
    assert cluster.ended_at is not None
    assert not world.alive()
    nodes = await world.nodes(cluster_id)
    assert {n.state for n in nodes} <= {NodeState.TERMINATED}
    assert all(n.ended_at for n in nodes)
    await world.until_ended(cluster_id)
    description = await world.handle(cluster_id).describe()
    assert description.status == WorkflowExecutionStatus.COMPLETED


# --- by somebody's word, in every phase ---------------------------------------------------------------------------


async def asked(world: World) -> str:
    return await world.start_cluster(ComputeConfig(worker_nodes=TWO_WORKERS))


async def launching(world: World) -> str:
    """Goes on for a moment after it was seen, for as long as it takes until then."""
    seen = threading.Event()
    world.machines.latency_s, world.machines.sleep = {"launch": WAIT_S}, lambda seconds: void(seen.wait(seconds))
    cluster_id = await asked(world)

    async def under_way() -> bool:
        d = await world.handle(cluster_id).describe()
        return any(a.activity_type.name == "launch_node" for a in d.raw_description.pending_activities)

    await world.until(under_way, "a launch under way")
    asyncio.get_running_loop().call_later(0.3, seen.set)
    return cluster_id


def void(_: object) -> None:
    return None


async def throttled(world: World) -> str:
    world.machines.throttle(None)
    cluster_id = await asked(world)

    async def refused() -> bool:
        d = await world.handle(cluster_id).describe()
        launches = [a for a in d.raw_description.pending_activities if a.activity_type.name == "launch_node"]
        return len(launches) == 3 and all(a.attempt > 1 for a in launches)

    await world.until(refused, "a launch in back-off")
    world.machines.throttle(0)
    return cluster_id


async def without_capacity(world: World) -> str:
    world.machines.no_capacity()
    cluster_id = await asked(world)

    async def waiting() -> bool:
        return "no_capacity" in (await world.cluster(cluster_id)).waits_for

    await world.until(waiting, "back-off")
    return cluster_id


async def booting(world: World) -> str:
    world.fleet.node_plan = lambda spec: NodePlan(register=False)
    cluster_id = await asked(world)

    async def up() -> bool:
        return len(world.alive()) == 3

    await world.until(up, "machines that boot")
    return cluster_id


async def running(world: World) -> str:
    return await world.running_cluster(ComputeConfig(worker_nodes=TWO_WORKERS))


async def recovering(world: World) -> str:
    from tests.workflows.clusters.test_healing import silent

    cluster_id = await running(world)
    world.machines.stop_s = 0.3
    head = await world.node(cluster_id)
    await silent(world, cluster_id, head.id, seconds=130)
    await world.until_cluster(cluster_id, ClusterState.RECOVERING)
    return cluster_id


async def told_bounds(world: World) -> str:
    cluster_id = await running(world)
    world.head(cluster_id).deaf = True
    await world.update(cluster_id, "set_limits", LimitsUpdate(actor="user:ann", group="w", max_nodes=2))
    return cluster_id


PHASES = [asked, launching, throttled, without_capacity, booting, running, recovering, told_bounds]


@pytest.mark.parametrize("phase", PHASES)
async def test_terminate_in_every_phase_leaves_nothing(world: World, phase: Callable[[World], Awaitable[str]]) -> None:
    cluster_id = await phase(world)
    await world.terminate(cluster_id, "not needed")
    await ended_clean(world, cluster_id)
    cluster = await world.cluster(cluster_id)
    assert cluster.reason == "not needed"
    ends = [e for e in await world.story(cluster_id) if e.message.startswith("TERMINATING")]
    assert [e.actor for e in ends] == ["user:ann"]


@pytest.mark.parametrize("phase", [asked, launching, running, recovering])
async def test_cancel_in_the_ui_is_a_terminate(world: World, phase: Callable[[World], Awaitable[str]]) -> None:
    cluster_id = await phase(world)
    await world.handle(cluster_id).cancel()
    await ended_clean(world, cluster_id)
    assert "cancelled in Temporal" in (await world.cluster(cluster_id)).reason


async def test_terminating_twice_and_leasing_an_ending_cluster(world: World) -> None:
    cluster_id = await running(world)
    world.machines.stop_s = 3600  # it can't be over before all was said
    await world.terminate(cluster_id, "first")
    await world.terminate(cluster_id, "second")
    await world.handle(cluster_id).cancel()
    world.machines.stop_s = 0
    await ended_clean(world, cluster_id)
    assert (await world.cluster(cluster_id)).reason == "first"


# --- idle -----------------------------------------------------------------------------------------------------------


async def idle_cluster(world: World, config: ComputeConfig = IDLE_10) -> str:
    cluster_id = await world.running_cluster(config)

    async def idle() -> bool:
        cluster = await world.cluster(cluster_id)
        return cluster.activity == Activity.IDLE and cluster.idle_since is not None

    await world.until(idle, "the cluster to be idle")
    await world.until_quiet(cluster_id)
    return cluster_id


def fences(world: World, cluster_id: str) -> list[str]:
    head = world.fleet.heads.get(cluster_id)
    return [c.kind for c in head.commands] if head is not None else []


async def test_idle_for_the_limit_is_fenced_asked_once_more_and_ended(world: World) -> None:
    cluster_id = await idle_cluster(world)
    cluster = await world.cluster(cluster_id)
    assert cluster.idle_since is not None
    assert cluster.terminates_at == cluster.idle_since + timedelta(minutes=10)
    head = world.head(cluster_id)
    await world.skip(cluster_id, 9.5 * MINUTE)
    assert (await world.cluster(cluster_id)).state == ClusterState.RUNNING
    await world.skip(cluster_id, 1 * MINUTE)
    await ended_clean(world, cluster_id)
    assert [c.kind for c in head.commands] == [CommandKind.FENCE]
    assert "idle for 10 minutes" in (await world.cluster(cluster_id)).reason


@pytest.mark.parametrize("answer", ["busy", "unknown"])
async def test_work_that_slipped_in_lifts_the_fence(world: World, answer: str) -> None:
    cluster_id = await idle_cluster(world)
    head = world.head(cluster_id)
    head.fence_answer = {"activity": answer, "reason": "a driver"}
    await world.skip(cluster_id, 11 * MINUTE)
    await world.until_quiet(cluster_id)
    assert [c.kind for c in head.commands] == [CommandKind.FENCE, CommandKind.UNFENCE]
    assert (await world.cluster(cluster_id)).state == ClusterState.RUNNING
    head.fence_answer = None
    await world.skip(cluster_id, 11 * MINUTE)  # another idle period is asked after again
    await ended_clean(world, cluster_id)


async def test_a_lease_taken_during_the_fence_is_told_when_it_is_lifted(world: World) -> None:
    cluster_id = await idle_cluster(world)
    head = world.head(cluster_id)
    head.deaf = True
    skipping = asyncio.create_task(world.skip(cluster_id, 11 * MINUTE))

    async def fencing() -> bool:
        d = await world.handle(cluster_id).describe()
        return any(a.activity_type.name == "run_command" for a in d.raw_description.pending_activities)

    await world.until(fencing, "the fence to be given")
    job_id = await world.start_job(cluster_id)

    async def leased() -> bool:
        return any(lease.holder == job_id for lease in (await world.cluster(cluster_id)).leases)

    await world.until(leased, "the lease")
    assert not (await world.job(job_id)).runs or not world.fleet.started
    head.deaf = False
    from heliostat.models.jobs import JobState

    await world.until_job(job_id, JobState.SUCCEEDED)
    skipping.cancel()


async def test_a_head_that_does_not_answer_to_the_fence_is_not_known_to_be_idle(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "FENCE_TIMEOUT", timedelta(seconds=0.5))
    cluster_id = await idle_cluster(world)
    head = world.head(cluster_id)
    head.deaf = True
    await world.skip(cluster_id, 11 * MINUTE)

    async def both_failed() -> bool:
        return (await world.kinds(cluster_id)).count("command_failed") == 2

    await world.until(both_failed, "the fence, and its lifting, to be given up")
    await world.until_quiet(cluster_id)
    assert (await world.cluster(cluster_id)).state == ClusterState.RUNNING
    head.deaf = False
    await world.skip(cluster_id, 11 * MINUTE)
    await ended_clean(world, cluster_id)


@pytest.mark.parametrize("activity", ["busy", "unknown"])
async def test_busy_and_unknown_never_run_out(world: World, activity: str) -> None:
    cluster_id = await idle_cluster(world)
    await world.head(cluster_id).tell_activity(activity)
    await world.until_quiet(cluster_id)
    await world.skip(cluster_id, 100 * MINUTE)
    assert (await world.cluster(cluster_id)).state == ClusterState.RUNNING
    assert fences(world, cluster_id) == []
    await world.head(cluster_id).tell_activity("idle")
    await world.until_quiet(cluster_id)
    await world.skip(cluster_id, 11 * MINUTE)
    await ended_clean(world, cluster_id)


async def test_zero_minutes_mean_never(world: World) -> None:
    cluster_id = await world.running_cluster(ComputeConfig(idle_termination_minutes=0))
    await world.until_quiet(cluster_id)
    await world.skip(cluster_id, 30 * 24 * 60 * MINUTE)
    assert (await world.cluster(cluster_id)).state == ClusterState.RUNNING


async def lease(world: World, cluster_id: str, holder: str) -> LeaseAnswer:
    return await world.update(cluster_id, "acquire", LeaseRequest(holder=holder), LeaseAnswer)


async def test_a_lease_blocks_and_its_release_starts_the_clock(world: World) -> None:
    cluster_id = await idle_cluster(world)
    answer = await lease(world, cluster_id, "user:ann")
    assert answer.ready
    assert answer.head_generation == 1
    await world.skip(cluster_id, 100 * MINUTE)
    assert (await world.cluster(cluster_id)).state == ClusterState.RUNNING
    await world.handle(cluster_id).signal("release", Release(holder="user:ann"))
    await world.until_quiet(cluster_id)
    await world.skip(cluster_id, 9 * MINUTE)
    assert (await world.cluster(cluster_id)).state == ClusterState.RUNNING
    await world.skip(cluster_id, 2 * MINUTE)
    await ended_clean(world, cluster_id)


async def test_a_lease_whose_holder_has_ended_is_dropped(world: World) -> None:
    cluster_id = await idle_cluster(world)
    await lease(world, cluster_id, "job_that_never_was")

    async def dropped() -> bool:
        await world.skip(cluster_id, 11 * MINUTE)
        return not (await world.cluster(cluster_id)).leases

    await world.until(dropped, "the lease to be dropped")
    assert "lease_dropped" in await world.kinds(cluster_id)
    await world.skip(cluster_id, 11 * MINUTE)
    await ended_clean(world, cluster_id)


async def test_a_lease_whose_holder_lives_is_kept(world: World) -> None:

    world.fleet.run_plans = [RunPlan(hold=True)]
    cluster_id = await idle_cluster(world)
    job_id = await world.start_job(cluster_id)
    run_id = await world.until_run(job_id)
    await world.until_quiet(cluster_id)
    await world.skip(cluster_id, 100 * MINUTE)
    cluster = await world.cluster(cluster_id)
    assert [x.holder for x in cluster.leases] == [job_id]
    await world.head(cluster_id).end_run(run_id)
    await world.until_ended(job_id)
    await world.until_quiet(cluster_id)
    await world.skip(cluster_id, 11 * MINUTE)
    await ended_clean(world, cluster_id)


# --- time's up ------------------------------------------------------------------------------------------------------


async def test_maximum_uptime_ends_it_whatever_it_does(world: World) -> None:
    cluster_id = await world.running_cluster(ComputeConfig(maximum_uptime_minutes=30, idle_termination_minutes=0))
    await lease(world, cluster_id, "user:ann")
    await world.head(cluster_id).tell_activity("busy")
    await world.until_quiet(cluster_id)
    await world.skip(cluster_id, 29 * MINUTE)
    assert (await world.cluster(cluster_id)).state == ClusterState.RUNNING
    await world.skip(cluster_id, 2 * MINUTE)
    await ended_clean(world, cluster_id)
    assert "maximum uptime of 30 minutes" in (await world.cluster(cluster_id)).reason


async def test_a_head_that_stops_its_machine_by_itself_ends_the_cluster(world: World) -> None:
    cluster_id = await running(world)
    await world.head(cluster_id).tell(FactKind.STOPPING, reason="no contact for 30 minutes")
    await ended_clean(world, cluster_id)
    assert (await world.cluster(cluster_id)).reason == "no contact for 30 minutes"


# --- what a lost answer or a slow neighbour hides -------------------------------------------------------------------


async def test_a_launch_in_back_off_is_not_tried_again_once_nobody_wants_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_minutes(error: CloudError) -> ApplicationError:
        return ApplicationError(str(error), type=error.code, next_retry_delay=timedelta(minutes=10))

    monkeypatch.setattr(nodes, "as_failure", in_minutes)
    cluster_id = await throttled(world)
    tried = world.machines.calls["launch"]
    await world.terminate(cluster_id)
    await ended_clean(world, cluster_id)
    assert world.machines.calls["launch"] == tried


async def test_a_machine_whose_launch_was_never_answered_is_ended_by_its_token(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(policies.LAUNCH, "retry_policy", RetryPolicy(maximum_attempts=1))
    world.fleet.node_plan = lambda spec: NodePlan(register=False)
    world.machines.lose_answers(None)
    cluster_id = await world.start_cluster()

    async def given_up() -> bool:
        return "launch_failed" in await world.kinds(cluster_id)

    await world.until(given_up, "the launch to be given up")
    assert set(world.machines.boots.values()) == {1}
    await world.terminate(cluster_id)
    await ended_clean(world, cluster_id)


async def test_the_records_learn_of_an_end_that_came_while_a_holder_was_told(world: World) -> None:
    """A node that ends between a write and the telling after it is in the next write."""
    world.fleet.run_plans = [RunPlan(hold=True)]
    cluster_id = await running(world)
    job_id = await world.start_job(cluster_id)
    await world.until_run(job_id)
    await world.until_quiet(cluster_id, job_id)
    await world.terminate(cluster_id)
    await ended_clean(world, cluster_id)
