"""Workers come and go: by the autoscaler's word and a person's, within our bounds."""

from __future__ import annotations

import pytest
from temporalio.client import WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError

from heliostat.models.agents import FactKind
from heliostat.models.clusters import ClusterState, NodeState
from heliostat.models.compute_configs import ComputeConfig, WorkerNodeGroupConfig
from runtime.messages.clusters import LimitsUpdate
from tests.workflows.world import World

UP_TO_3 = ComputeConfig(
    worker_nodes=[
        WorkerNodeGroupConfig(name="w", min_nodes=1, max_nodes=3),
        WorkerNodeGroupConfig(name="x", max_nodes=2),
    ]
)


async def running(world: World, cluster_id: str, group: str) -> list[str]:
    return [n.id for n in await world.nodes(cluster_id) if n.group == group and n.state == NodeState.RUNNING]


async def until_running(world: World, cluster_id: str, **counts: int) -> None:
    async def look() -> bool:
        found = {g: len(await running(world, cluster_id, g)) for g in counts}
        living = [n for n in await world.nodes(cluster_id) if n.state != NodeState.TERMINATED and n.group != "head"]
        return found == counts and len(living) == sum(counts.values())

    await world.until(look, f"{counts} workers, {[(n.group, n.state) for n in await world.nodes(cluster_id)]}")
    await world.until_quiet(cluster_id)


async def limits(world: World, cluster_id: str, group: str, **bounds: int) -> None:
    await world.update(cluster_id, "set_limits", LimitsUpdate(actor="user:ann", group=group, **bounds))


async def test_the_autoscalers_counts_are_followed_within_our_bounds(world: World) -> None:
    cluster_id = await world.running_cluster(UP_TO_3)
    head = world.head(cluster_id)
    await head.tell(FactKind.DESIRED, desired={"w": 2, "x": 1, "unknown": 7}, remove=[])
    await until_running(world, cluster_id, w=2, x=1)
    await head.tell(FactKind.DESIRED, desired={"w": 100, "x": 1}, remove=[])
    await until_running(world, cluster_id, w=3, x=1)
    assert (await world.cluster(cluster_id)).desired == {"w": 3, "x": 1}
    await head.tell(FactKind.DESIRED, desired={"w": 0, "x": 0}, remove=[])
    await until_running(world, cluster_id, w=1, x=0)
    assert len(world.alive()) == 2, "head and the minimum"
    actors = {e.actor for e in await world.story(cluster_id) if e.kind == "scale"}
    assert actors == {f"agent:{head.node_id}"}


async def test_the_node_that_the_autoscaler_drained_is_the_one_that_ends(world: World) -> None:
    cluster_id = await world.running_cluster(UP_TO_3)
    head = world.head(cluster_id)
    await head.tell(FactKind.DESIRED, desired={"w": 3}, remove=[])
    await until_running(world, cluster_id, w=3)
    first, second, third = await running(world, cluster_id, "w")
    await head.tell(FactKind.DESIRED, desired={"w": 2}, remove=[first, "nd_of_another_cluster"])
    await until_running(world, cluster_id, w=2)
    assert set(await running(world, cluster_id, "w")) == {second, third}
    await head.tell(FactKind.DESIRED, desired={"w": 2}, remove=[first])  # told again: it is gone already
    await world.until_quiet(cluster_id)
    assert set(await running(world, cluster_id, "w")) == {second, third}


async def test_the_head_is_never_removed(world: World) -> None:
    cluster_id = await world.running_cluster(UP_TO_3)
    head = world.head(cluster_id)
    await head.tell(FactKind.DESIRED, desired={"w": 1}, remove=[head.node_id])
    await world.until_quiet(cluster_id)
    assert (await world.node(cluster_id)).id == head.node_id
    assert (await world.cluster(cluster_id)).state == ClusterState.RUNNING


async def test_garbage_from_a_node_neither_stops_nor_changes_the_cluster(world: World) -> None:
    cluster_id = await world.running_cluster(UP_TO_3)
    head = world.head(cluster_id)
    await head.tell(FactKind.DESIRED, desired={"w": "many", "x": None, "y": -1}, remove={"a": 1})
    await head.tell(FactKind.DESIRED, desired=[1, 2], remove="all")
    await head.tell(FactKind.DESIRED)
    await head.tell(FactKind.ACTIVITY, activity="sleepy")
    await head.tell(FactKind.RAY_READY, node_id="nd_unknown")
    await head.tell(FactKind.NODE_LOST, node_id=["not", "an", "id"])
    await until_running(world, cluster_id, w=1, x=0)
    assert await world.task_failures(cluster_id) == []
    assert (await world.cluster(cluster_id)).activity == "unknown"


async def test_set_limits_scales_and_shows_the_newest_bounds_where_the_head_is_told_them(world: World) -> None:
    cluster_id = await world.running_cluster(UP_TO_3)
    await limits(world, cluster_id, "w", min_nodes=2)
    await limits(world, cluster_id, "w", max_nodes=5)
    await limits(world, cluster_id, "x", min_nodes=1, max_nodes=1)
    await until_running(world, cluster_id, w=2, x=1)
    config = (await world.cluster(cluster_id)).compute_config
    assert [(g.min_nodes, g.max_nodes) for g in config.worker_nodes] == [(2, 5), (1, 1)]
    await limits(world, cluster_id, "w", min_nodes=0, max_nodes=1)
    await until_running(world, cluster_id, w=0, x=1)  # the autoscaler has not wished for any, so the minimum holds
    actors = [e.actor for e in await world.story(cluster_id) if e.kind == "limits_changed"]
    assert actors == ["user:ann"] * 4


@pytest.mark.parametrize(
    ("bounds", "type_", "words"),
    [
        ({"group": "nope", "max_nodes": 1}, "not_found", "it has: w, x"),
        ({"group": "w", "min_nodes": 4}, "invalid_request", "greater than max_nodes"),
        ({"group": "w", "min_nodes": 0, "max_nodes": 0}, "invalid_request", "at least 1"),
        ({"group": "w", "max_nodes": 999}, "invalid_request", "1000"),
    ],
)
async def test_bounds_that_cannot_be_are_refused(world: World, bounds: dict[str, int], type_: str, words: str) -> None:
    cluster_id = await world.running_cluster(UP_TO_3)
    await world.until_quiet(cluster_id)

    async def trace() -> list[str]:
        """But for the tasks in which it was asked: a slow worker's leave one."""
        return [e for e in await world.events_of(cluster_id) if not e.startswith("WORKFLOW_TASK_")]

    before = await trace()
    with pytest.raises(WorkflowUpdateFailedError) as failure:
        await limits(world, cluster_id, **bounds)  # type: ignore[arg-type]
    assert isinstance(failure.value.cause, ApplicationError)
    assert failure.value.cause.type == type_
    assert words in failure.value.cause.message
    assert await trace() == before, "a refusal leaves no trace"


async def test_bounds_that_were_changed_while_there_was_no_head_hold(world: World) -> None:
    cluster_id = await world.start_cluster(UP_TO_3)
    await limits(world, cluster_id, "w", max_nodes=2)  # most likely before the head is up
    await world.until_cluster(cluster_id, ClusterState.RUNNING)
    await world.head(cluster_id).tell(FactKind.DESIRED, desired={"w": 9, "x": 0}, remove=[])
    await until_running(world, cluster_id, w=2, x=0)
