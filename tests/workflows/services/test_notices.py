"""The cloud announces that it takes back a head's machine under a service: another cluster answers before it goes, and
nobody's request is lost."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from heliostat.models.agents import CommandKind, FactKind
from heliostat.models.clusters import ClusterState
from heliostat.models.common import utcnow
from heliostat.models.services import RolloutAction, Service, ServiceState, ServiceVersionState
from runtime.messages.services import VersionSpec
from store.commands import OpenCommand
from tests.workflows.fleet import FakeAgent
from tests.workflows.plans import NodePlan, ServePlan
from tests.workflows.service_world import ServiceWorld
from tests.workflows.services.test_rollout import LONG, added_while_probed, rolling
from tests.workflows.serving import FakeServe
from tests.workflows.world import WAIT_S

SAID = "Google moves this machine's host for maintenance"


async def announce(world: ServiceWorld, cluster_id: str) -> None:
    deadline = (utcnow() + timedelta(minutes=30)).isoformat()
    await world.head(cluster_id).tell(FactKind.SPOT_NOTICE, kind="maintenance", deadline=deadline, reason=SAID)


async def until_told(
    world: ServiceWorld, service_id: str, kind: str, times: int = 1, timeout_s: float = WAIT_S
) -> None:
    async def told() -> bool:
        return (await world.kinds(service_id)).count(kind) >= times

    await world.until(told, f"{kind}, {times} times", timeout_s)


async def until_replaced(world: ServiceWorld, service_id: str, version: VersionSpec, old: str) -> str:
    """The cluster in whose place another one serves is gone; that other one."""
    await until_told(world, service_id, "relieved")
    await world.until_cluster(old, ClusterState.TERMINATED)
    await until_told(world, service_id, "released")
    await world.until_finished(service_id, version)
    (now,) = [h.cluster_id for h in world.heads_of(version)]
    assert [b.id for b in world.balancer.backends(service_id)] == [now]
    return now


def shown(service: Service) -> dict[str, str]:
    return {c.cluster_id: c.message for v in service.versions for c in v.clusters}


async def test_another_cluster_answers_before_the_head_is_taken(services: ServiceWorld) -> None:
    world = services
    world.people.per_s = 400
    service_id, version = await world.running_service()
    (head,) = world.heads_of(version)
    plans = [NodePlan(ready=False)]
    world.fleet.node_plan = lambda spec: plans.pop() if plans else NodePlan()
    await announce(world, head.cluster_id)
    await until_told(world, service_id, "relief")
    service = await world.until_service(service_id, "both clusters", lambda s: len(shown(s)) == 2)
    assert shown(service)[head.cluster_id] == SAID
    assert [b.id for b in world.balancer.backends(service_id) if b.weight] == [head.cluster_id], "it serves on"
    details = (await world.handle(service_id).query("__temporal_workflow_metadata")).current_details
    assert f"interruption of cluster 1's head: {SAID}" in details
    assert "cluster 2 starts, to replace cluster 1" in details
    await announce(world, head.cluster_id)  # said again: one is on its way

    relief = next(iter(set(await world.clusters_of(service_id)) - {head.cluster_id}))
    await bring_up(world, relief)
    now = await until_replaced(world, service_id, version, head.cluster_id)
    assert now == relief
    assert head.serve.drained
    assert len(await world.clusters_of(service_id)) == 2
    story = await world.story(service_id)
    (notice,) = [e.message for e in story if e.kind == "head_notice"]
    assert SAID in notice
    kinds = [e.kind for e in story]
    assert [k for k in kinds if k in ("head_notice", "relief", "fit", "relieved", "drained", "released")] == [
        "fit",
        "head_notice",
        "relief",
        "fit",
        "relieved",
        "drained",
        "released",
    ]
    assert not [e.message for e in story if "UNHEALTHY" in e.message]
    assert not world.people.lost
    assert len(world.alive()) == 1
    await announce(world, now)  # and the next one likewise
    await until_told(world, service_id, "released", 2)
    await world.until_finished(service_id, version)
    assert len(await world.clusters_of(service_id)) == 3
    await world.terminate(service_id)
    await world.nothing_left(service_id)


async def test_a_replacement_gets_no_traffic_before_its_proxy_has_the_current_tokens(
    services: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token is added while it is probed, and is active where the traffic is."""
    world = services
    service_id, version = await world.running_service()
    (head,) = world.heads_of(version)
    both, _, may_hear = added_while_probed(world, service_id, head.serve, monkeypatch)
    await announce(world, head.cluster_id)
    await until_told(world, service_id, "fit", 2)
    await asyncio.sleep(0.5)
    assert "relieved" not in await world.kinds(service_id)
    may_hear.set()
    await until_replaced(world, service_id, version, head.cluster_id)
    await world.until_service(service_id, "both tokens to count", lambda s: sorted(s.gate_hashes) == both.hashes)


async def test_one_of_two_clusters_is_announced(services: ServiceWorld) -> None:
    world = services
    service_id, version = await world.running_service(cluster_replicas=2)
    first, other = (h.cluster_id for h in world.heads_of(version))
    await announce(world, first)
    await until_told(world, service_id, "released")
    await world.until_cluster(first, ClusterState.TERMINATED)
    backends = {b.id for b in world.balancer.backends(service_id) if b.weight}
    assert other in backends
    assert (len(backends), first in backends) == (2, False)
    for _, _, told in list(world.balancer.applied)[-3:]:
        assert sum(1 for b in told if b.weight) == 2, "never only one"


async def test_a_head_that_is_back_before_its_replacement_is_up_needs_none(services: ServiceWorld) -> None:
    world = services
    service_id, version = await world.running_service()
    (head,) = world.heads_of(version)
    cluster_id = head.cluster_id
    world.fleet.node_plan = lambda spec: NodePlan(register=spec.cluster_id == cluster_id)
    await announce(world, cluster_id)
    await until_told(world, service_id, "relief")
    await world.lose_head(cluster_id)
    await until_told(world, service_id, "released")
    await world.until_finished(service_id, version)
    assert [b.id for b in world.balancer.backends(service_id)] == [cluster_id]
    (relief,) = set(await world.clusters_of(service_id)) - {cluster_id}
    await world.until_cluster(relief, ClusterState.TERMINATED)
    assert "relieved" not in await world.kinds(service_id)
    assert shown(await world.service(service_id)) == {cluster_id: "head and workers are up"}


async def test_a_head_that_is_taken_before_its_replacement_is_up_is_replaced_too(
    services: ServiceWorld,
) -> None:
    world = services
    service_id, version = await world.running_service()
    (head,) = world.heads_of(version)
    lost = head.cluster_id
    world.fleet.node_plan = lambda s: NodePlan(register=False) if s.cluster_id == lost else NodePlan(ready=False)
    await announce(world, head.cluster_id)
    relief = await world.until(lambda: newest(world, service_id, 2), "the replacement")
    await world.lose_head(head.cluster_id)
    await until_told(world, service_id, "cluster_lost")
    await bring_up(world, relief)
    assert await until_replaced(world, service_id, version, head.cluster_id) == relief


async def test_beside_a_rollout_only_what_serves_is_replaced(services: ServiceWorld) -> None:
    world = services
    service_id, first, second = await rolling(world, rules=LONG)
    (old,), (canary,) = world.heads_of(first), world.heads_of(second)
    await announce(world, canary.cluster_id)
    await announce(world, old.cluster_id)
    await until_told(world, service_id, "released")
    await world.until_share(service_id, second, 25)
    (relieved,) = [e.message for e in await world.story(service_id) if e.kind == "relieved"]
    assert relieved.startswith("v1:"), "the canary's would change whom the watch looks at"
    assert (await world.service(service_id)).rollout is not None, "it goes on"
    await world.order(service_id, RolloutAction.PROMOTE)
    await world.until_released(service_id, first)
    await until_told(world, service_id, "relieved", 2)
    await world.until_finished(service_id, second)
    await world.terminate(service_id)
    await world.nothing_left(service_id)


async def test_where_nothing_extra_may_exist_it_waits_for_the_rollouts_end(services: ServiceWorld) -> None:
    world = services
    service_id, first, _ = await rolling(world, rules=LONG, max_surge_percent=50)
    (old,) = world.heads_of(first)
    await announce(world, old.cluster_id)
    await until_told(world, service_id, "head_notice")
    await world.until_quiet(service_id)
    assert "relief" not in await world.kinds(service_id)
    await world.order(service_id, RolloutAction.ABORT)
    await until_told(world, service_id, "released")
    await world.until_finished(service_id, first)
    assert old.cluster_id not in {b.id for b in world.balancer.backends(service_id)}


@pytest.mark.parametrize("how", ["deploy", "in place", "terminate"])
@pytest.mark.long
async def test_what_ends_the_version_ends_its_replacement(services: ServiceWorld, how: str) -> None:
    world = services
    service_id, version = await world.running_service()
    (head,) = world.heads_of(version)
    world.fleet.node_plan = lambda spec: NodePlan(register=False)
    await announce(world, head.cluster_id)
    relief = await world.until(lambda: newest(world, service_id, 2), "the replacement")
    world.fleet.node_plan = lambda spec: NodePlan()
    if how != "terminate":
        second = world.version(service_id)
        await world.deploy(service_id, second, in_place=how == "in place")
        await world.until_version(service_id, version, ServiceVersionState.TERMINATED)
        await world.until_cluster(relief, ClusterState.TERMINATED)
        await world.until_finished(service_id, second)
        if how == "in place":  # its cluster is the next version's now, with what was announced
            await until_told(world, service_id, "relieved")
            await world.until_cluster(head.cluster_id, ClusterState.TERMINATED)
    await world.terminate(service_id)
    await world.nothing_left(service_id)


async def test_a_replacement_on_which_serve_fails_replaces_nothing(services: ServiceWorld) -> None:
    world = services
    service_id, version = await world.running_service()
    (head,) = world.heads_of(version)
    world.fleet.serve_plans[version.id] = ServePlan(healthy=False)
    await announce(world, head.cluster_id)
    relief = await world.until(lambda: newest(world, service_id, 2), "the replacement")
    await world.until_cluster(relief, ClusterState.RUNNING)
    await world.until_quiet(service_id)
    assert [b.id for b in world.balancer.backends(service_id) if b.weight] == [head.cluster_id]
    assert (await world.version_of(service_id, version)).state == ServiceVersionState.RUNNING
    assert "relieved" not in await world.kinds(service_id)
    await world.terminate(service_id)
    await world.nothing_left(service_id)


async def newest(world: ServiceWorld, service_id: str, number: int) -> str | None:
    """The newest of so many clusters."""
    found = list(await world.clusters_of(service_id))
    return found[-1] if len(found) == number else None


async def bring_up(world: ServiceWorld, cluster_id: str) -> None:
    """Ray starts on the head, which has waited with it (``NodePlan.ready``)."""

    async def booted() -> FakeAgent | None:
        return next((a for a in world.fleet.agents.values() if a.cluster_id == cluster_id), None)

    head = await world.until(booted, f"the head of {cluster_id}")
    assert head is not None
    head.plan = NodePlan()
    await head._live()


async def test_a_version_that_returns_in_place_keeps_its_clusters_when_its_replaced_one_goes(
    services: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was replaced in place, and ends for good only when the cluster that was replaced before is drained."""
    world = services
    service_id, first = await world.running_service()
    (head,) = world.heads_of(first)
    real, drained = FakeServe.result, asyncio.Event()

    async def result(serve: FakeServe, command: OpenCommand) -> dict[str, object] | None:
        if command.kind == CommandKind.SERVE_DRAIN and serve is head.serve:
            await drained.wait()
        return await real(serve, command)

    monkeypatch.setattr(FakeServe, "result", result)
    await announce(world, head.cluster_id)
    await until_told(world, service_id, "relieved")
    await world.until_finished(service_id, first)
    second = world.version(service_id)
    await world.deploy(service_id, second, in_place=True)
    await world.until_finished(service_id, second)
    await world.rollback(service_id)
    await until_told(world, service_id, "rollout", 3)
    await asyncio.sleep(0.5)  # for it to take what it must not
    drained.set()
    await until_told(world, service_id, "released")
    await world.until_cluster(head.cluster_id, ClusterState.TERMINATED)
    await world.until_finished(service_id, first)
    await world.until_quiet(service_id)
    (serving,) = world.balancer.backends(service_id)
    assert (await world.clusters_of(service_id))[serving.id] == ClusterState.RUNNING
    assert (await world.version_of(service_id, first)).state == ServiceVersionState.RUNNING


@pytest.mark.parametrize("in_place", [False, True], ids=["by-steps", "in-place"])
async def test_a_rollback_to_a_version_that_is_being_released_does_not_hold_up_a_termination(
    services: ServiceWorld, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    """The rollback waits for the release, and must not bring the version up again after it."""
    world = services
    service_id, first = await world.running_service()
    (head,) = world.heads_of(first)
    real, drained = FakeServe.result, asyncio.Event()

    async def result(serve: FakeServe, command: OpenCommand) -> dict[str, object] | None:
        if command.kind == CommandKind.SERVE_DRAIN and serve is head.serve:
            await drained.wait()
        return await real(serve, command)

    monkeypatch.setattr(FakeServe, "result", result)
    await announce(world, head.cluster_id)
    await until_told(world, service_id, "relieved")
    await world.until_finished(service_id, first)
    second = world.version(service_id)
    await world.deploy(service_id, second, in_place=in_place)
    await world.until_finished(service_id, second)
    await asyncio.sleep(0.5)  # for its own clusters to be drained
    await world.rollback(service_id)
    await until_told(world, service_id, "rollout", 3)
    await asyncio.sleep(0.5)  # for the rollback to wait
    await world.terminate(service_id)
    await world.until_state(service_id, ServiceState.TERMINATING)
    drained.set()
    await world.nothing_left(service_id)
