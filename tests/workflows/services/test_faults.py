"""Heads, clusters, the load balancer, the records and the worker fail beside a service, at rest and in a rollout: it
heals by itself, and while anybody is there who can answer, somebody does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from temporalio.client import WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.sweep.services import ServiceSweepActivities
from clouds.contract.errors import BadConfig
from clouds.fake.machines import FakeMachines
from heliostat.errors import Unavailable
from heliostat.models.agents import CommandKind, FactKind
from heliostat.models.clusters import ClusterState
from heliostat.models.common import new_id
from heliostat.models.services import RolloutAction, Service, ServiceState, ServiceVersionState
from runtime.messages.services import EndpointLost, EndpointTrouble
from store.services import rows as service_rows
from store.tables import clusters
from tests.workflows.balancer import WatchedBalancer
from tests.workflows.plans import NodePlan, ServePlan
from tests.workflows.service_world import AT_ONCE, IN_STEPS, TOKENS, ServiceWorld, make_service_world
from tests.workflows.services.test_rollout import LONG, rolling
from tests.workflows.test_continue_as_new import runs_of_workflow
from tests.workflows.test_sweep import sweep
from tests.workflows.world import KEYS, WAIT_S, temporal_server
from workflows import policies

DEPLOY = CommandKind.SERVE_DEPLOY


async def until_heads(world: ServiceWorld, service_id: str, number: int) -> None:
    """So many of its backends have traffic."""

    async def look() -> bool:
        return sum(1 for b in world.balancer.backends(service_id) if b.weight) == number

    await world.until(look, f"{number} backends with traffic")


# --- lost heads -----------------------------------------------------------------------------------------------------


async def test_one_of_two_heads_is_lost_and_comes_back(services: ServiceWorld) -> None:
    world = services
    service_id, version = await world.running_service(cluster_replicas=2)
    await until_heads(world, service_id, 2)
    lost, other = (h.cluster_id for h in world.heads_of(version))
    before = world.head(lost)
    world.machines.no_capacity()
    await world.lose_head(lost)
    await until_heads(world, service_id, 1)
    assert [b.id for b in world.balancer.backends(service_id) if b.weight] == [other]

    def says(service: Service) -> bool:
        ready = {c.cluster_id: c.ready for v in service.versions for c in v.clusters}
        return "1 of 2" in service.reason and ready == {lost: False, other: True}

    service = await world.until_service(service_id, "to say that one is missing", says)
    assert service.state == ServiceState.RUNNING
    world.machines.restock()

    async def back() -> bool:
        await world.skip(lost, 30)
        return lost in world.fleet.heads

    await world.until(back, "the next head")
    await until_heads(world, service_id, 2)
    after = world.head(lost)
    assert after is not before
    assert after.serve.serving == version.id
    assert after.serve.gate == TOKENS.model_dump(mode="json")
    assert {b.http for b in world.balancer.backends(service_id)} == {h.serve.address for h in world.heads_of(version)}
    await world.until_service(
        service_id, "to be whole", lambda s: s.state == ServiceState.RUNNING and "of 2" not in s.reason
    )
    assert len(await world.clusters_of(service_id)) == 2


async def test_the_only_head_is_lost_and_comes_back(services: ServiceWorld) -> None:
    world = services
    service_id, version = await world.running_service()
    (head,) = world.heads_of(version)
    await world.lose_head(head.cluster_id)
    await world.until_was(service_id, ServiceState.UNHEALTHY)
    await world.until_finished(service_id, version)
    (after,) = world.heads_of(version)
    assert after is not head
    assert after.cluster_id == head.cluster_id
    assert [c.kind for c in after.commands] == [DEPLOY, CommandKind.SERVE_PROBE]


async def test_a_canary_that_loses_its_head_loses_its_traffic(services: ServiceWorld) -> None:
    world = services
    service_id, first, second = await rolling(world, rules=LONG)
    (head,) = world.heads_of(second)
    await world.lose_head(head.cluster_id)
    bad = await world.until_version(service_id, second, ServiceVersionState.UNHEALTHY)
    assert bad.kept_until is not None
    await world.until_finished(service_id, first)


@pytest.mark.long
async def test_the_running_version_loses_its_head_in_a_rollout(services: ServiceWorld) -> None:
    world = services
    service_id, first, second = await rolling(world)
    (head,) = world.heads_of(first)
    await world.lose_head(head.cluster_id)
    await world.until_finished(service_id, second)
    await world.until_released(service_id, first)
    assert len(world.alive()) == 1


@pytest.mark.long
async def test_a_head_is_lost_in_an_update_in_place(services: ServiceWorld) -> None:
    world = services
    service_id, first = await world.running_service()
    second = world.version(service_id, ServePlan(healthy=False))
    await world.deploy(service_id, second, in_place=True)
    (head,) = world.heads_of(first)

    async def given() -> bool:
        return head.serve.status.version_id == second.id

    await world.until(given, "the update to be given")
    world.fleet.serve_plans[second.id] = ServePlan()
    await world.lose_head(head.cluster_id)
    await world.until_finished(service_id, second)
    assert len(await world.clusters_of(service_id)) == 1


@pytest.mark.long
async def test_a_head_that_is_lost_while_it_drains_is_drained(services: ServiceWorld) -> None:
    world = services
    service_id, first = await world.running_service(ServePlan(silent=frozenset({CommandKind.SERVE_DRAIN})))
    (head,) = world.heads_of(first)
    second = world.version(service_id)
    await world.deploy(service_id, second)

    async def drains() -> bool:
        return any(c.kind == CommandKind.SERVE_DRAIN for c in head.commands)

    await world.until(drains, "the drain to be given")
    await world.lose_head(head.cluster_id)
    await world.until_released(service_id, first)
    await world.until_finished(service_id, second)


# --- lost clusters --------------------------------------------------------------------------------------------------


async def test_a_cluster_that_ends_is_replaced(services: ServiceWorld) -> None:
    world = services
    service_id, version = await world.running_service(cluster_replicas=2)
    ended, other = (h.cluster_id for h in world.heads_of(version))
    world.balancer.forgiven.add(ended)
    await world.terminate(ended, "somebody thought that it was idle")
    await world.until_cluster(ended, ClusterState.TERMINATED)

    async def replaced() -> bool:
        living = {b.id for b in world.balancer.backends(service_id) if b.weight}
        return len(living) == 2 and ended not in living and other in living

    await world.until(replaced, "another cluster in its place")
    assert len(await world.clusters_of(service_id)) == 3
    await world.until_finished(service_id, version)


@pytest.mark.long
async def test_clusters_that_come_to_nothing_are_made_again_with_back_off(services: ServiceWorld) -> None:
    world = services
    world.fleet.node_plan = lambda spec: NodePlan(failed="no libcuda", ready=False)
    service_id = await world.new_service()
    version = world.version(service_id)
    await world.deploy(service_id, version)

    async def several() -> bool:
        made = await world.clusters_of(service_id)
        for cluster_id, state in made.items():
            if not state.settled:
                await world.until_quiet(cluster_id)
                await world.skip(cluster_id, 120)
        await world.skip(service_id, 5)
        return len(made) >= 2

    await world.until(several, "a second cluster", timeout_s=60)
    world.fleet.node_plan = lambda spec: NodePlan()

    async def up() -> bool:
        for cluster_id, state in (await world.clusters_of(service_id)).items():
            if not state.settled:
                await world.skip(cluster_id, 120)
        await world.skip(service_id, 30)
        return (await world.service(service_id)).state == ServiceState.RUNNING

    await world.until(up, "the service to run", timeout_s=60)
    await world.until_finished(service_id, version)


async def test_a_config_that_no_cloud_takes_fails_the_rollout_at_once(services: ServiceWorld) -> None:
    world = services
    service_id, first = await world.running_service()
    world.machines.bad_config = "no such instance type"
    second = world.version(service_id)
    await world.deploy(service_id, second)
    bad = await world.until_version(service_id, second, ServiceVersionState.UNHEALTHY)
    assert "no such instance type" in bad.reason
    await world.until_finished(service_id, first)


@pytest.mark.long
async def test_a_cluster_whose_workflow_was_terminated_by_hand_is_replaced(services: ServiceWorld) -> None:
    world = services
    service_id, version = await world.running_service()
    (head,) = world.heads_of(version)
    world.balancer.forgiven.add(head.cluster_id)
    await world.handle(head.cluster_id).terminate("by hand")
    await sweep(world)

    async def replaced() -> bool:
        living = [b.id for b in world.balancer.backends(service_id) if b.weight]
        return len(living) == 1 and living[0] != head.cluster_id

    await world.until(replaced, "another cluster in its place")
    await world.until_finished(service_id, version)
    assert len(world.alive()) == 1


async def test_a_service_whose_workflow_was_terminated_by_hand_is_settled_by_the_sweep(services: ServiceWorld) -> None:
    world = services
    service_id, _, _ = await rolling(world, rules=LONG)
    world.balancer.forgiven.add(service_id)
    await world.handle(service_id).terminate("by hand")

    async def settled() -> bool:
        await sweep(world)
        return (await world.service(service_id)).state == ServiceState.TERMINATED

    await world.until(settled, "the sweep to settle it")
    for cluster_id in await world.clusters_of(service_id):
        await world.until_cluster(cluster_id, ClusterState.TERMINATED)
    await world.until_gone()
    assert world.balancer.url_of(service_id) is None


@pytest.mark.long
async def test_a_deploy_right_after_its_workflow_was_terminated_by_hand_starts_anew(services: ServiceWorld) -> None:
    """Before any sweep: the load balancer goes by the new workflow's weights, and the clusters of the first one end."""
    world = services
    service_id, _ = await world.running_service()
    (old,) = await world.clusters_of(service_id)
    world.balancer.forgiven.add(service_id)
    await world.until_quiet(service_id)
    await world.handle(service_id).terminate("by hand")
    record = await world.service(service_id)
    world.inputs[service_id] = world.inputs[service_id].model_copy(update={"revision": record.revision + 1})
    second = world.version(service_id)
    await world.deploy(service_id, second, gate=TOKENS)
    await world.until_service(service_id, "the second to serve", lambda s: s.primary_version == second.id)

    async def released() -> bool:
        await sweep(world)
        return (await world.clusters_of(service_id))[old] == ClusterState.TERMINATED

    await world.until(released, "the first workflow's cluster to be released")
    await world.until_finished(service_id, second)
    assert len(world.alive()) == 1


async def test_the_sweep_leaves_a_cluster_alone_that_its_service_has_released(
    services: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end takes minutes on some clouds, and the service holds it no more."""
    world = services
    service_id, first = await world.running_service()
    (old,) = await world.clusters_of(service_id)
    real, may_end = FakeMachines.terminate, threading.Event()

    def terminate(machines: FakeMachines, machine_ids: Iterable[str]) -> None:
        may_end.wait(WAIT_S)
        real(machines, machine_ids)

    monkeypatch.setattr(FakeMachines, "terminate", terminate)
    await world.deploy(service_id, world.version(service_id))
    await world.until_version(service_id, first, ServiceVersionState.TERMINATED)
    await world.until_cluster(old, ClusterState.TERMINATING)
    activities = ServiceSweepActivities(
        world.db, world.client, {}, KEYS.installation_id(), world.settings.newborn_grace_s
    )
    found = await ActivityEnvironment().run(activities.sweep_services)
    may_end.set()
    assert (found.orphaned, found.released) == ([], [])
    await world.until_cluster(old, ClusterState.TERMINATED)


# --- what Serve says later ------------------------------------------------------------------------------------------


async def test_serve_falls_ill_and_recovers(services: ServiceWorld) -> None:
    world = services
    service_id, version = await world.running_service()
    (head,) = world.heads_of(version)
    await head.serve.become(False, "replica Model#1 died: OOM")
    service = await world.until_state(service_id, ServiceState.UNHEALTHY)
    assert "OOM" in service.reason
    assert world.balancer.shares(service_id) == {version.id: 100}, "what still answers goes on answering"
    await head.serve.become(True)
    await world.until_finished(service_id, version)
    assert [c.kind for c in head.commands].count(DEPLOY) == 1


async def test_facts_twice_late_and_of_the_dead_change_nothing(services: ServiceWorld) -> None:
    world = services
    service_id, version = await world.running_service()
    (head,) = world.heads_of(version)
    status = head.serve.status
    ill = head.fact(FactKind.SERVE, **status.model_copy(update={"healthy": False}).model_dump(mode="json"))
    old = head.fact(
        FactKind.SERVE,
        **status.model_copy(update={"healthy": False, "deploy": "an-earlier-one"}).model_dump(mode="json"),
    )
    stranger = ill.model_copy(update={"event_id": "x", "cluster_id": "cl_that_never_was"})
    handle = world.handle(service_id)
    await handle.signal("serve_fact", old)
    await handle.signal("serve_fact", stranger)
    await world.until_quiet(service_id)
    assert (await world.service(service_id)).state == ServiceState.RUNNING
    await handle.signal("serve_fact", ill)
    await world.until_state(service_id, ServiceState.UNHEALTHY)
    await head.serve.become(True)
    await world.until_state(service_id, ServiceState.RUNNING)
    await handle.signal("serve_fact", ill)  # delivered again, late
    await world.until_quiet(service_id)
    assert (await world.service(service_id)).state == ServiceState.RUNNING


@pytest.mark.long
async def test_a_head_that_could_not_even_try_is_asked_again(services: ServiceWorld) -> None:
    world = services
    plan = ServePlan(refuse="Ray is starting", retryable=True)
    service_id, version = await world.running_service(plan)
    (head,) = world.heads_of(version)
    assert [c.kind for c in head.commands].count(DEPLOY) == 2
    assert len({c.id for c in head.commands if c.kind == DEPLOY}) == 1, "the same command"
    assert (await world.service(service_id)).state == ServiceState.RUNNING


# --- the load balancer ----------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("method", ["ensure", "set_backends"])
async def test_errors_of_the_load_balancer_are_tried_again(services: ServiceWorld, method: str) -> None:
    world = services
    world.balancer.fail(1, method)
    world.balancer.lose_answers(1, method)
    service_id, first = await world.running_service()
    world.balancer.fail(1)
    world.balancer.lose_answers(1)
    second = world.version(service_id, rollout=IN_STEPS)
    await world.deploy(service_id, second)
    await world.until_finished(service_id, second)
    await world.until_released(service_id, first)
    assert world.balancer.shares_over_time(service_id, second.id) == [0, 25, 50, 100]


async def test_an_endpoint_that_cannot_be_made_is_said_and_made_when_it_can(services: ServiceWorld) -> None:
    world = services
    world.balancer.bad_config = "port 8443 is taken by another program"
    service_id = await world.new_service()
    version = world.version(service_id)
    await world.deploy(service_id, version)
    await world.until_service(service_id, "to say why", lambda s: "port 8443 is taken" in s.waits_for)
    world.balancer.bad_config = ""

    async def made() -> bool:
        await world.skip(service_id, policies.STEP_AGAIN.total_seconds())
        return world.balancer.url_of(service_id) is not None

    await world.until(made, "the endpoint")
    service = await world.until_finished(service_id, version)
    assert service.waits_for == ""


async def test_an_endpoint_that_somebody_removed_comes_back(services: ServiceWorld) -> None:
    """When the monitor says so, or at the next change."""
    world = services
    service_id, first = await world.running_service()
    before = world.balancer.backends(service_id)
    world.balancer.remove(service_id)
    lost = EndpointLost(event_id=new_id("ev"), reason="its load balancer no longer exists")
    for _ in range(2):
        await world.handle(service_id).signal("endpoint_lost", lost)

    async def back() -> bool:
        return world.balancer.backends(service_id) == before

    await world.until(back, "the endpoint with its backends")
    assert (await world.kinds(service_id)).count("endpoint_lost") == 1
    await world.until_finished(service_id, first)
    world.balancer.remove(service_id)
    second = world.version(service_id)
    await world.deploy(service_id, second)
    await world.until_finished(service_id, second)
    assert world.balancer.url_of(service_id) is not None


async def test_a_service_whose_endpoint_somebody_removed_ends_at_once(services: ServiceWorld) -> None:
    """It is not told again and again that it has no backends."""
    world = services
    service_id, _ = await world.running_service()
    world.balancer.remove(service_id)
    before = world.balancer.calls["set_backends"]
    await world.terminate(service_id)
    await world.nothing_left(service_id)
    assert world.balancer.calls["set_backends"] - before <= 2


async def test_a_load_balancer_that_cannot_be_mended_is_said_until_it_is_well(services: ServiceWorld) -> None:
    world = services
    service_id, _ = await world.running_service()

    async def say(trouble: str) -> None:
        message = EndpointTrouble(event_id=new_id("ev"), trouble=trouble)
        await world.handle(service_id).signal("endpoint_trouble", message)

    await say("port 8443 is taken by another program")
    await say("port 8443 is taken by another program")
    service = await world.until_state(service_id, ServiceState.UNHEALTHY)
    assert "port 8443 is taken" in service.reason
    assert "port 8443 is taken" in service.waits_for
    assert service.endpoint_trouble
    await say("")
    service = await world.until_state(service_id, ServiceState.RUNNING)
    assert (service.endpoint_trouble, service.waits_for) == ("", "")
    assert (await world.kinds(service_id)).count("endpoint_trouble") == 2


@pytest.mark.long
async def test_a_slow_load_balancer_costs_no_request(services: ServiceWorld) -> None:
    world = services
    world.people.per_s = 200
    service_id, _ = await world.running_service()
    world.balancer.latency_s = {"set_backends": 0.3}
    second = world.version(service_id, rollout=IN_STEPS)
    await world.deploy(service_id, second)
    await world.until_finished(service_id, second)
    await world.deploy(service_id, world.version(service_id), in_place=True)
    await world.until_state(service_id, ServiceState.UPDATING)
    await world.until_state(service_id, ServiceState.RUNNING)
    assert not world.people.lost


@pytest.mark.long
async def test_a_breach_goes_back_over_a_load_balancer_that_fails_at_first(services: ServiceWorld) -> None:
    world = services
    world.people.per_s = 800
    service_id, first = await world.running_service()
    second = world.version(service_id, ServePlan(error_share=1), rollout=LONG)
    await world.deploy(service_id, second, canary_percent=25)

    async def has_traffic() -> bool:
        return 25 in world.balancer.shares_over_time(service_id, second.id)

    world.balancer.lose_answers(1)
    await world.until(has_traffic, "the canary's share")
    world.balancer.fail(1)
    await world.until_version(service_id, second, ServiceVersionState.UNHEALTHY)
    await world.until_finished(service_id, first)


async def test_a_load_balancer_that_failed_over_new_weights_is_told_the_old_ones_again(
    services: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has written them down, and goes by them as soon as it is mended, whatever the rollout has come to since."""
    world, often = services, timedelta(hours=3)
    monkeypatch.setattr(policies, "STEP_AGAIN", often)
    monkeypatch.setattr(policies, "STEP_AGAIN_MAX", often)
    service_id, first = await world.running_service()
    second = world.version(service_id, rollout=IN_STEPS.model_copy(update={"keep_failed_s": 7 * 86_400}))
    real, failed = WatchedBalancer.set_backends, asyncio.Event()
    loop = asyncio.get_running_loop()

    def set_backends(self: WatchedBalancer, *told: Any) -> None:
        real(self, *told)
        if any(b.version_id == second.id and b.weight for b in told[-1]) and not failed.is_set():
            loop.call_soon_threadsafe(failed.set)
            raise BadConfig("its port is taken by another program")

    monkeypatch.setattr(WatchedBalancer, "set_backends", set_backends)
    await world.deploy(service_id, second)
    await asyncio.wait_for(failed.wait(), WAIT_S)

    async def said(kind: str) -> bool:
        return any(e.kind == kind for e in await world.story(service_id))

    await world.until(lambda: said("endpoint_failed"), "the failure to be told")
    assert world.balancer.shares(service_id) == {first.id: 75, second.id: 25}
    await world.skip(service_id, second.rollout.timeout_s)  # the rollout's deadline

    async def back() -> bool:
        await world.skip(service_id, 3600)
        return (await world.service(service_id)).state == ServiceState.RUNNING

    await world.until(back, "the service to run as before")
    assert world.balancer.shares(service_id) == {first.id: 100}
    await world.until_version(service_id, second, ServiceVersionState.UNHEALTHY)
    (head,) = world.heads_of(second)
    await world.skip(service_id, 7 * 86_400)
    await world.until_released(service_id, second)
    assert head.serve.drained, "it may have had traffic"


# --- worker and records ---------------------------------------------------------------------------------------------


@pytest.mark.long
async def test_the_worker_is_replaced_in_the_middle_of_a_hold(services: ServiceWorld) -> None:
    world = services
    world.people.per_s = 400
    service_id, first, second = await rolling(world)
    await world.restart_worker()
    await world.until_finished(service_id, second)
    await world.until_released(service_id, first)
    assert world.balancer.shares_over_time(service_id, second.id) == [0, 25, 50, 100]


@pytest.mark.long
async def test_without_a_worker_everything_stays_as_it_is(services: ServiceWorld) -> None:
    """Also what was said meanwhile is done afterwards."""
    world = services
    service_id, first, second = await rolling(world, rules=LONG)
    await world.stop_worker()
    told = len(world.balancer.applied)
    third = world.version(service_id)
    await world.deploy(service_id, third)
    await asyncio.sleep(0.3)
    assert world.balancer.shares(service_id) == {first.id: 75, second.id: 25}
    assert len(world.balancer.applied) == told
    await world.start_worker()
    await world.until_finished(service_id, third)
    await world.until_released(service_id, second)


@pytest.mark.long
async def test_the_records_are_away_while_it_is_rolled_out(
    services: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = services
    service_id, first = await world.running_service()
    real = service_rows.write_service
    away = True

    async def write(*args: Any) -> bool:
        if away:
            raise Unavailable("The records are away.")
        return await real(*args)

    monkeypatch.setattr(service_rows, "write_service", write)
    second = world.version(service_id)
    await world.deploy(service_id, second)
    await world.until_share(service_id, second, 100)
    away = False

    async def written() -> bool:
        await world.skip(service_id, 30)
        service: Service = await world.service(service_id)
        return service.primary_version == second.id and service.state == ServiceState.RUNNING

    await world.until(written, "the records to catch up")
    await world.until_released(service_id, first)
    kinds = await world.kinds(service_id)
    assert kinds.count("rollout_done") == 2
    ids = [e.id for e in await world.story(service_id)]
    assert len(ids) == len(set(ids))


@pytest.mark.long
async def test_silent_commands_end_at_their_limits(services: ServiceWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that takes a command and never answers costs no more than the command's own limit."""
    world = services
    monkeypatch.setattr(policies, "DEPLOY_TIMEOUT", timedelta(seconds=0.5))
    monkeypatch.setattr(policies, "PROBE_TIMEOUT", timedelta(seconds=0.3))
    monkeypatch.setattr(policies, "PROBE_ANSWER", timedelta(seconds=0.2))
    service_id, first = await world.running_service()
    rules = AT_ONCE.model_copy(update={"health_timeout_s": 3})
    for kind in (DEPLOY, CommandKind.SERVE_PROBE):
        version = world.version(service_id, ServePlan(silent=frozenset({kind})), rollout=rules)
        await world.deploy(service_id, version)
        await world.until_version(service_id, version, ServiceVersionState.UNHEALTHY)
        await world.until_finished(service_id, first)
    assert world.balancer.shares_over_time(service_id, first.id) == [0, 100]


@pytest.mark.long
async def test_steering_while_the_load_balancer_is_slow(services: ServiceWorld) -> None:
    """Orders come while weights are on their way: the last one counts, and the end is consistent."""
    world = services
    service_id, first = await world.running_service()
    world.balancer.latency_s = {"set_backends": 0.2}
    second = world.version(service_id, rollout=LONG)
    await world.deploy(service_id, second)
    await world.until_service(service_id, "to shift", lambda s: s.rollout is not None and s.rollout.percent == 25)
    await world.order(service_id, RolloutAction.PAUSE)
    await world.order(service_id, RolloutAction.RESUME)
    await world.order(service_id, RolloutAction.PROMOTE)
    await world.until_finished(service_id, second)
    await world.until_released(service_id, first)
    shares = world.balancer.shares_over_time(service_id, second.id)
    assert shares == sorted(shares)


# --- found by reading, each once ------------------------------------------------------------------------------------


@pytest.mark.long
async def test_records_that_are_away_while_a_deploy_is_taken_up_end_nothing(
    services: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure of a local activity would fail the workflow itself, were it let through."""
    world = services
    service_id, first = await world.running_service()
    real, tries = service_rows.claim_deploy, 0

    async def claim(*args: Any, **more: Any) -> bool:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ApplicationError("the records are away for good", non_retryable=True)
        return await real(*args, **more)

    monkeypatch.setattr(service_rows, "claim_deploy", claim)
    second = world.version(service_id)
    await world.deploy(service_id, second)

    async def finished() -> bool:
        await world.skip(service_id, policies.STEP_AGAIN.total_seconds())
        return (await world.service(service_id)).primary_version == second.id

    await world.until(finished, "the deploy to be taken up after all")
    await world.until_released(service_id, first)
    assert tries >= 2


@pytest.mark.long
async def test_an_update_in_place_mends_a_cluster_that_failed(services: ServiceWorld) -> None:
    """What failed with the old config says nothing of the new one."""
    world = services
    service_id, first = await world.running_service(cluster_replicas=2)
    head = world.heads_of(first)[0]
    await head.serve.become(False, "CUDA error", failed=True)
    await world.until_service(service_id, "to serve on one", lambda s: "1 of 2" in s.reason)
    second = world.version(service_id, cluster_replicas=2)
    await world.deploy(service_id, second, in_place=True)
    await world.until_finished(service_id, second)
    assert len(await world.clusters_of(service_id)) == 2


@pytest.mark.long
async def test_a_load_balancer_that_cannot_be_told_holds_no_cluster_back(
    services: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backends are being told for minutes; nothing of that is waited for once TERMINATE_UNTOLD is over."""
    world = services
    monkeypatch.setattr(policies, "TERMINATE_UNTOLD", timedelta(seconds=1))
    service_id, _ = await world.running_service()
    world.balancer.forgiven.add(service_id)
    world.balancer.fail(None)
    await world.terminate(service_id)
    (cluster_id,) = await world.clusters_of(service_id)
    await world.until_state(service_id, ServiceState.TERMINATING)

    async def ended() -> bool:
        return (await world.clusters_of(service_id))[cluster_id] == ClusterState.TERMINATED

    await world.until(ended, "its cluster to end", 30)
    world.balancer.fail(0)
    await world.nothing_left(service_id)


@pytest.mark.long
async def test_a_termination_waits_for_no_drain_that_began_before_it(
    services: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = services
    monkeypatch.setattr(policies, "TERMINATE_DRAIN", timedelta(seconds=1))
    slow = AT_ONCE.model_copy(update={"drain_timeout_s": 3600})
    service_id, first = await world.running_service(
        ServePlan(silent=frozenset({CommandKind.SERVE_DRAIN})), rollout=slow
    )
    second = world.version(service_id)
    await world.deploy(service_id, second)
    await world.until_finished(service_id, second)
    await world.until_version(service_id, first, ServiceVersionState.TERMINATING)
    await world.terminate(service_id)
    await world.nothing_left(service_id)
    assert any(e.kind == "drain_deadline" for e in await world.story(service_id))


async def test_a_deploy_between_the_records_end_of_a_service_and_its_workflows_is_taken_up(
    services: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records say TERMINATED first, and who waits for that may deploy at once: Temporal gives it to the workflow
    that is about to end."""
    world = services
    service_id, first = await world.running_service()
    second = world.version(service_id)
    real, again = service_rows.write_service, asyncio.Event()

    async def write(db: Any, service: Service, *more: Any) -> bool:
        wanted = await real(db, service, *more)
        if service.state == ServiceState.TERMINATED and not again.is_set():
            life = await world.reopen(service_id)
            await world.deploy(service_id, second, gate=TOKENS, life=life)
            again.set()
        return wanted

    monkeypatch.setattr(service_rows, "write_service", write)
    await world.terminate(service_id)
    await asyncio.wait_for(again.wait(), WAIT_S)
    await world.until_finished(service_id, second)
    assert (await world.version_of(service_id, first)).state == ServiceVersionState.TERMINATED
    old, new = (await world.clusters_of(service_id)).items()
    assert (old[1].settled, new[1]) == (True, ClusterState.RUNNING)


async def test_a_deploy_that_is_told_again_after_the_services_end_starts_nothing(services: ServiceWorld) -> None:
    """A monitor has found it not started; until it tells the workflow, another one has, and the service was ended."""
    world = services
    service_id = await world.new_service()
    deploy = await world.deploy(service_id, world.version(service_id))
    await world.terminate(service_id)
    await world.nothing_left(service_id)
    made = await world.clusters_of(service_id)
    await world.send(service_id, deploy)
    assert await world.until_ended(service_id) == "withdrawn"
    assert await world.clusters_of(service_id) == made
    assert (await world.service(service_id)).state == ServiceState.TERMINATED


@pytest.mark.long
async def test_a_service_that_comes_again_while_its_old_cluster_still_ends(services: ServiceWorld) -> None:
    """A cluster holds its name until its machines are gone, which may take minutes."""
    world = services
    service_id, _ = await world.running_service()
    (old,) = await world.clusters_of(service_id)
    await world.terminate(service_id)
    await world.nothing_left(service_id)
    async with world.db.begin() as conn:
        await conn.execute(update(clusters).where(clusters.c.id == old).values(live_name=clusters.c.name))
    world.balancer.forgiven.discard(service_id)
    life = await world.reopen(service_id)
    second = world.version(service_id)
    await world.deploy(service_id, second, gate=TOKENS, life=life)
    await world.until_finished(service_id, second)


@pytest.mark.long
async def test_a_rollback_after_new_weights_goes_to_what_gave_its_traffic(services: ServiceWorld) -> None:
    """Not to a version that was replaced in place long ago, and not onto clusters of another shape."""
    world = services
    service_id, _ = await world.running_service()
    second = world.version(service_id)
    await world.deploy(service_id, second, in_place=True)
    await world.until_finished(service_id, second)
    third = world.version(service_id)
    await world.deploy(service_id, third, weights={second.id: 40, third.id: 60})
    await world.until_share(service_id, third, 60)
    await world.until_service(service_id, "both to serve", lambda s: s.rollout is None)
    await world.deploy(service_id, weights={third.id: 100})
    await world.until_finished(service_id, third)
    await world.rollback(service_id)
    await world.until_finished(service_id, second)
    await world.until_released(service_id, third)
    assert len(await world.clusters_of(service_id)) <= 3


async def test_an_update_in_place_has_nothing_to_promote(services: ServiceWorld) -> None:
    world = services
    service_id, first = await world.running_service()
    second = world.version(service_id, ServePlan(healthy=False))
    await world.deploy(service_id, second, in_place=True)
    await world.until_service(service_id, "to be updated", lambda s: s.rollout is not None)
    with pytest.raises(WorkflowUpdateFailedError) as error:
        await world.order(service_id, RolloutAction.PROMOTE)
    assert "no steps" in str(error.value.cause)
    await world.order(service_id, RolloutAction.ABORT)
    await world.until_finished(service_id, first)


@pytest.mark.long
async def test_a_probe_that_fails_for_good_leaves_the_history_short(tmp_path: Path) -> None:
    """Tried again and again, it must not grow to Temporal's limit, at which the whole service would be ended."""
    async with (
        temporal_server(limit__historyCount__suggestContinueAsNew="8") as client,
        make_service_world(client, tmp_path) as world,
    ):
        plan = ServePlan()
        service_id, version = await world.running_service(plan)
        plan.probe = "answered 503"
        (head,) = world.heads_of(version)
        await world.lose_head(head.cluster_id)
        await world.until_state(service_id, ServiceState.UNHEALTHY)
        before = len(await runs_of_workflow(world, service_id))

        async def cut() -> bool:
            await world.skip(service_id, policies.STEP_AGAIN_MAX.total_seconds())
            return len(await runs_of_workflow(world, service_id)) > before + 1

        await world.until(cut, "it to continue as new between two tries")
        plan.probe = ""

        async def back() -> bool:
            await world.skip(service_id, policies.STEP_AGAIN_MAX.total_seconds())
            return (await world.service(service_id)).state == ServiceState.RUNNING

        await world.until(back, "it to serve again")
