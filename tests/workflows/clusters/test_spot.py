"""The cloud announces that it takes a machine back: a worker's replacement stands beside it before it goes, a head's
as soon as it is gone; what ran there is the infrastructure's failure."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from heliostat.models.agents import FactKind
from heliostat.models.clusters import ClusterState, Node, NodeState
from heliostat.models.common import utcnow
from heliostat.models.compute_configs import ComputeConfig, WorkerNodeGroupConfig
from heliostat.models.jobs import JobState, RunCause
from tests.workflows.clusters.test_scaling import until_running
from tests.workflows.world import RunPlan, World
from workflows import ids

ONE_WORKER = ComputeConfig(worker_nodes=[WorkerNodeGroupConfig(name="w", min_nodes=1, max_nodes=2)])
SAID = "AWS takes this spot machine back"


async def announce(world: World, node: Node, kind: str = "interruption", **more: Any) -> None:
    deadline = (utcnow() + timedelta(seconds=120)).isoformat()
    data = {"kind": kind, "deadline": deadline, "reason": SAID} | more
    await world.fleet.agents[node.id].tell(FactKind.SPOT_NOTICE, **data)


async def test_a_workers_replacement_is_up_before_the_worker_goes(world: World) -> None:
    cluster_id = await world.running_cluster(ONE_WORKER)
    old = await world.node(cluster_id, "w")
    await announce(world, old)
    await until_running(world, cluster_id, w=2)
    assert (await world.node(cluster_id, "w")).notice == ""
    assert {n.notice for n in await world.nodes(cluster_id) if n.id == old.id} == {SAID}
    assert len(world.alive()) == 3
    cluster = await world.cluster(cluster_id)
    assert (cluster.state, cluster.desired) == (ClusterState.RUNNING, {"w": 1})
    (event,) = [e for e in await world.story(cluster_id) if e.kind == "spot_notice"]
    assert SAID in event.message
    assert "interruption" in event.message
    # The next report of Ray's autoscaler changes nothing, nor do a repeated notice and the end itself.
    await announce(world, old, "rebalance", deadline=None)
    await world.head(cluster_id).tell(FactKind.DESIRED, desired={"w": 1}, remove=[])
    await world.kill_machine(old)
    await world.head(cluster_id).tell(FactKind.NODE_LOST, node_id=old.id, reason="Terminated due to preemption")
    await until_running(world, cluster_id, w=1)
    await world.until_quiet(cluster_id)
    assert len(world.alive()) == 2
    assert len([n for n in await world.nodes(cluster_id) if n.group == "w"]) == 2, "one replacement, not two"


async def test_one_that_its_autoscaler_lets_go_is_the_one_that_leaves(world: World) -> None:
    cluster_id = await world.running_cluster(ONE_WORKER)
    old = await world.node(cluster_id, "w")
    await announce(world, old, "rebalance", deadline=None)
    await until_running(world, cluster_id, w=2)
    await world.head(cluster_id).tell(FactKind.DESIRED, desired={"w": 1}, remove=[old.id])
    await until_running(world, cluster_id, w=1)
    assert (await world.node(cluster_id, "w")).id != old.id


async def test_a_spot_machine_that_dies_young_is_no_sign_of_a_bad_image(world: World) -> None:
    """No back-off: the cloud took it, nothing on it killed it."""
    cluster_id = await world.running_cluster(ONE_WORKER)
    for _ in range(3):
        old = [n for n in await world.nodes(cluster_id) if n.group == "w" and n.state == NodeState.RUNNING][-1]
        await announce(world, old)
        await until_running(world, cluster_id, w=2)
        await world.kill_machine(old)
        await world.head(cluster_id).tell(FactKind.NODE_LOST, node_id=old.id, reason="preempted")
        await until_running(world, cluster_id, w=1)


async def test_a_heads_notice_is_told_to_its_job_which_runs_again_on_the_next_head(world: World) -> None:
    world.fleet.run_plans = [RunPlan(hold=True)]
    job_id = await world.start_job(max_retries=0)
    await world.until_run(job_id)
    await world.until_job(job_id, JobState.RUNNING)
    cluster_id = ids.job_cluster_id(job_id, 1)
    head = await world.node(cluster_id)
    await announce(world, head)

    async def told() -> bool:
        return "head_notice" in await world.kinds(job_id)

    await world.until(told, "the job to be told")
    (event,) = [e for e in await world.story(job_id) if e.kind == "head_notice"]
    assert event.message == f"{SAID}; run 1 continues until then"
    await world.until_quiet(cluster_id, job_id)
    assert len(world.alive()) == 1, "two heads of one cluster never live at once"
    await world.kill_machine(head)
    await world.skip(cluster_id, 121)  # the announced moment: the cloud is asked, nobody waits for silence
    job = await world.until_job(job_id, JobState.SUCCEEDED)
    assert [r.cause for r in job.runs] == [RunCause.INFRASTRUCTURE, None]
    await world.until_ended(job_id)
    await world.until_gone()


async def test_a_head_that_tells_its_own_loss_is_replaced_at_once(world: World) -> None:
    cluster_id = await world.running_cluster()
    head = await world.node(cluster_id)
    await announce(world, head)
    await world.head(cluster_id).tell(FactKind.NODE_LOST, reason=SAID)

    async def replaced() -> bool:
        heads = [n for n in await world.nodes(cluster_id) if n.group == "head" and n.state == NodeState.RUNNING]
        return [n.generation for n in heads] == [2]

    await world.until(replaced, "the next head")
    assert (await world.cluster(cluster_id)).state == ClusterState.RUNNING


async def test_a_head_that_was_spared_after_all_goes_on(world: World) -> None:
    cluster_id = await world.running_cluster()
    head = await world.node(cluster_id)
    await announce(world, head)
    await world.until_quiet(cluster_id)
    await world.skip(cluster_id, 121)
    await world.until_quiet(cluster_id)
    assert (await world.node(cluster_id)).id == head.id
    assert world.machines.calls["describe"] >= 1


async def test_words_that_are_no_notice_do_no_harm(world: World) -> None:
    cluster_id = await world.running_cluster(ONE_WORKER)
    worker, head = await world.node(cluster_id, "w"), await world.node(cluster_id)
    for deadline in ("at noon", 7, "2026-11-26T08:00:00", None, ["x"]):
        await announce(world, head, deadline=deadline)
    await announce(world, worker, deadline={}, reason="")
    await until_running(world, cluster_id, w=2)
    assert await world.task_failures(cluster_id) == []
