"""A service's life: its first deploy, its tokens, updates in place, static weights, two clusters a version, its end in
every phase. Every test's world also holds it against the workflow when a request would have been lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest
from sqlalchemy import select
from temporalio.client import WorkflowExecutionStatus

from heliostat.models.agents import CommandKind
from heliostat.models.clusters import ClusterState
from heliostat.models.services import Service, ServiceState, ServiceVersionState
from runtime.messages.services import GateOrder, GateTokens
from store.services.deploys import withdraw_deploy
from store.tables import commands
from tests.workflows.service_world import AT_ONCE, TOKENS, ServiceWorld
from tests.workflows.world import NodePlan, ServePlan
from workflows import ids, policies

KINDS = CommandKind


def weights_of(service: Service) -> dict[str, int]:
    return {v.name: v.weight for v in service.versions if v.weight}


# --- the first deploy -----------------------------------------------------------------------------------------------


async def test_a_first_deploy_ends_with_all_the_traffic(services: ServiceWorld) -> None:
    world = services
    service_id, version = await world.running_service()
    service = await world.service(service_id)
    assert (service.query_url, service.primary_version) == (world.balancer.url_of(service_id), version.id)
    assert service.canary_version is None
    assert service.waits_for == ""
    (found,) = service.versions
    assert (found.state, found.weight, found.target_weight) == (ServiceVersionState.RUNNING, 100, 100)
    assert {c.type: c.status for c in found.checklist} == {
        "Cluster": True,
        "Application": True,
        "Endpoint": True,
        "Weight": True,
    }
    (cluster,) = found.clusters
    assert (cluster.cluster_id, cluster.ready) == (ids.service_cluster_id(service_id, 0, 1), True)
    cluster_row = await world.cluster(cluster.cluster_id)
    assert [x.holder for x in cluster_row.leases] == [service_id]
    head = world.head(cluster.cluster_id)
    assert [c.kind for c in head.commands] == [KINDS.SERVE_DEPLOY, KINDS.SERVE_PROBE]
    assert head.serve.gate == TOKENS.model_dump(mode="json")
    assert world.balancer.shares_over_time(service_id, version.id) == [0, 100]
    story = await world.story(service_id)
    assert [e.message.partition(":")[0] for e in story if e.kind == "state"][-1] == "RUNNING"
    assert {e.actor for e in story if e.kind in ("fit", "weight", "version_state")} == {"system"}


async def test_a_version_that_speaks_grpc_alone_is_probed_too(services: ServiceWorld) -> None:
    world = services
    service_id = await world.new_service()
    mute = world.version(service_id, ServePlan(probe="UNIMPLEMENTED"), grpc=True, probes={})
    await world.deploy(service_id, mute)
    await world.until_service(service_id, "to say why", lambda s: "UNIMPLEMENTED" in s.waits_for)
    assert not world.balancer.shares(service_id)
    speaks = world.version(service_id, grpc=True, probes={})
    await world.deploy(service_id, speaks)
    await world.until_finished(service_id, speaks)


async def test_the_query_answers_as_the_records_do(services: ServiceWorld) -> None:
    service_id, version = await services.running_service()
    await services.until_quiet(service_id)
    told = Service.model_validate(await services.handle(service_id).query("status"))
    assert (told.id, told.state, told.primary_version) == (service_id, ServiceState.RUNNING, version.id)
    assert weights_of(told) == {"v1": 100}


async def test_what_a_start_waits_for_is_said(services: ServiceWorld) -> None:
    world = services
    world.machines.no_capacity()
    service_id = await world.new_service()
    version = world.version(service_id)
    await world.deploy(service_id, version)

    def says(s: Service) -> bool:
        words = [s.waits_for, *(c.message for v in s.versions for c in v.checklist if not c.status)]
        return s.state == ServiceState.STARTING and any("cluster" in w for w in words)

    await world.until_service(service_id, "to say that it waits for its cluster", says)
    world.machines.restock()
    cluster_id = ids.service_cluster_id(service_id, 0, 1)

    async def up() -> bool:
        if cluster_id not in await world.clusters_of(service_id):
            return False
        await world.skip(cluster_id, 30)
        return (await world.cluster(cluster_id)).state == ClusterState.RUNNING

    await world.until(up, "the cluster, once there are machines")
    await world.until_finished(service_id, version)


async def test_the_same_deploy_twice_is_one(services: ServiceWorld) -> None:
    world = services
    service_id = await world.new_service()
    deploy = await world.deploy(service_id, world.version(service_id))
    await world.send(service_id, deploy)
    await world.until_finished(service_id, deploy.versions[0])
    await world.send(service_id, deploy)
    await world.until_quiet(service_id)
    assert [v.name for v in (await world.service(service_id)).versions] == ["v1"]
    assert len(await world.clusters_of(service_id)) == 1
    assert (await world.service(service_id)).state == ServiceState.RUNNING


async def test_two_deploys_at_the_same_moment_end_with_the_later_one(services: ServiceWorld) -> None:
    world = services
    service_id = await world.new_service()
    first, second = world.version(service_id), world.version(service_id)
    one, two = world.request(first, gate=TOKENS), world.request(second)
    await world.accept_deploy(service_id, one)
    await world.accept_deploy(service_id, two)
    await asyncio.gather(world.send(service_id, one), world.send(service_id, two))
    service = await world.until_service(
        service_id,
        "to come to rest",
        lambda s: s.state == ServiceState.RUNNING and s.rollout is None and len(weights_of(s)) == 1,
    )
    (winner,) = weights_of(service)
    loser = first if winner == "v2" else second
    await world.until_released(service_id, loser)
    assert any("supersede" in e.message or "supersede" in e.kind for e in await world.story(service_id))


async def test_a_withdrawn_deploy_does_nothing(services: ServiceWorld) -> None:
    world = services
    service_id, first = await world.running_service()
    deploy = world.request(world.version(service_id))
    await world.accept_deploy(service_id, deploy)
    async with world.db.begin() as conn:
        assert await withdraw_deploy(conn, deploy.id)
    await world.send(service_id, deploy)
    await world.until_quiet(service_id)
    service = await world.until_finished(service_id, first)
    assert [v.name for v in service.versions] == ["v1"]
    assert len(await world.clusters_of(service_id)) == 1


async def test_a_withdrawn_first_deploy_leaves_nothing(services: ServiceWorld) -> None:
    world = services
    service_id = await world.new_service()
    deploy = world.request(world.version(service_id), gate=TOKENS)
    await world.accept_deploy(service_id, deploy)
    async with world.db.begin() as conn:
        assert await withdraw_deploy(conn, deploy.id)
    await world.send(service_id, deploy)
    await world.until_ended(service_id)
    assert not await world.clusters_of(service_id)
    assert world.balancer.url_of(service_id) is None
    assert world.balancer.calls["ensure"] == 0


# --- tokens ---------------------------------------------------------------------------------------------------------


async def test_new_tokens_reach_the_proxies_and_later_ones(services: ServiceWorld) -> None:
    world = services
    service_id, version = await world.running_service()
    (head,) = world.heads_of(version)
    both = GateTokens(enabled=True, hashes=["ab" * 32, "cd" * 32])
    await world.update(service_id, "set_gate", GateOrder(actor="user:ann", gate=both))
    wanted = both.model_dump(mode="json")

    async def set_there() -> bool:
        return bool(head.serve.gate == wanted)

    await world.until(set_there, "the new tokens at the proxy")
    await world.until_finished(service_id, version)
    assert not head.serve.draining
    second = world.version(service_id)
    await world.deploy(service_id, second)
    await world.until_finished(service_id, second)
    (head,) = world.heads_of(second)
    assert head.serve.gate == wanted
    await world.until_released(service_id, version)
    async with world.db.read() as conn:
        given = list(await conn.scalars(select(commands.c.args)))
    orders = sorted(args["order"] for args in given)  # two that are given at once are written in any order
    assert orders == list(range(1, len(orders) + 1)), "by it heads tell which one is newer"


# --- in place -------------------------------------------------------------------------------------------------------


async def test_an_update_in_place_stays_on_its_cluster(services: ServiceWorld) -> None:
    world = services
    service_id, first = await world.running_service()
    (head,) = world.heads_of(first)
    second = world.version(service_id)
    await world.deploy(service_id, second, in_place=True)
    await world.until_finished(service_id, second)
    assert [c.kind for c in head.commands].count(KINDS.SERVE_DEPLOY) == 2
    assert head.serve.serving == second.id
    assert second.id in head.serve.probed
    assert not head.serve.draining
    assert len(await world.clusters_of(service_id)) == 1
    over = {"v1": ServiceVersionState.TERMINATED, "v2": ServiceVersionState.RUNNING}
    await world.until_service(
        service_id, "the old version to be over", lambda s: {v.name: v.state for v in s.versions} == over
    )
    assert KINDS.SERVE_DRAIN not in [c.kind for c in head.commands]


@pytest.mark.parametrize(
    "plan",
    [
        ServePlan(failed="ImportError: no module named nonsense"),
        ServePlan(refuse="the package is broken"),
        ServePlan(probe="500 instead of anything below it"),
        ServePlan(healthy=False),
    ],
    ids=["deploy-failed", "refused", "probe-fails", "never-healthy"],
)
async def test_a_bad_update_in_place_is_put_back(services: ServiceWorld, plan: ServePlan) -> None:
    world = services
    # No clock is skipped while a probe is under way: its limit is in real seconds.
    rules = AT_ONCE.model_copy(update={"health_timeout_s": 1 if plan.probe else 60})
    service_id, first = await world.running_service()
    (head,) = world.heads_of(first)
    second = world.version(service_id, plan, rollout=rules)
    await world.deploy(service_id, second, in_place=True)
    await world.until_was(service_id, ServiceState.UPDATING)

    async def back() -> bool:
        if not plan.healthy:
            await world.skip(service_id, 30)
        service = await world.service(service_id)
        return service.state == ServiceState.RUNNING and service.primary_version == first.id

    await world.until(back, "the config before to be put back")
    await world.until_finished(service_id, first)
    assert head.serve.serving == first.id
    assert head.serve.status.version_id == first.id
    assert len(await world.clusters_of(service_id)) == 1
    version = await world.version_of(service_id, second)
    assert version.weight == 0
    assert version.state in (ServiceVersionState.UNHEALTHY, ServiceVersionState.TERMINATED)
    if plan.failed:
        assert plan.failed in version.reason
    third = world.version(service_id)
    await world.deploy(service_id, third, in_place=True)
    await world.until_finished(service_id, third)
    assert head.up, "the cluster was never let go"


async def test_two_clusters_are_updated_one_after_the_other(services: ServiceWorld) -> None:
    world = services
    service_id, first = await world.running_service(cluster_replicas=2)
    heads = world.heads_of(first)
    assert len(heads) == 2
    second = world.version(service_id, ServePlan(failed="broken"), cluster_replicas=2)
    await world.deploy(service_id, second, in_place=True)
    await world.until_version(service_id, second, ServiceVersionState.UNHEALTHY)
    await world.until_finished(service_id, first)
    given = [[c.args["version_id"] for c in h.commands if c.kind == KINDS.SERVE_DEPLOY] for h in heads]
    assert sorted(given, key=len) == [[first.id], [first.id, second.id, first.id]], "the other was never touched"


# --- static weights -------------------------------------------------------------------------------------------------


async def test_static_weights_and_their_change(services: ServiceWorld) -> None:
    world = services
    service_id, first = await world.running_service()
    second, third = world.version(service_id), world.version(service_id)
    await world.deploy(service_id, second, third, weights={first.id: 50, second.id: 30, third.id: 20})
    await world.until_share(service_id, third, 20)
    service = await world.until_state(service_id, ServiceState.RUNNING)
    assert weights_of(service) == {"v1": 50, "v2": 30, "v3": 20}
    assert service.primary_version == first.id
    assert world.balancer.shares(service_id) == {first.id: 50, second.id: 30, third.id: 20}
    assert set(world.balancer.shares_over_time(service_id, first.id)) == {0, 100, 50}, "in one go"
    await world.deploy(service_id, weights={first.id: 0, second.id: 90, third.id: 10})
    await world.until_share(service_id, second, 90)
    await world.until_released(service_id, first)
    await world.deploy(service_id, weights={second.id: 100})
    await world.until_released(service_id, third)
    service = await world.until_finished(service_id, second)
    assert weights_of(service) == {"v2": 100}


async def test_static_weights_move_only_when_all_versions_are_fit(services: ServiceWorld) -> None:
    world = services
    rules = AT_ONCE.model_copy(update={"health_timeout_s": 60})
    service_id, first = await world.running_service()
    good = world.version(service_id, rollout=rules)
    bad = world.version(service_id, ServePlan(failed="broken"), rollout=rules)
    await world.deploy(service_id, good, bad, weights={first.id: 80, good.id: 10, bad.id: 10})
    await world.until_version(service_id, bad, ServiceVersionState.UNHEALTHY)
    await world.until_finished(service_id, first)
    assert world.balancer.shares_over_time(service_id, first.id) == [0, 100]


# --- idle -----------------------------------------------------------------------------------------------------------


async def test_it_is_terminated_after_so_long_without_a_request(services: ServiceWorld) -> None:
    world = services
    world.people.per_s = 50
    service_id, version = await world.running_service(idle_termination_minutes=10)
    await world.until_quiet(service_id)
    for _ in range(4):
        await world.skip(service_id, 8 * 60)
        for _ in range(2):  # the second one is sent when the first one is in the records
            sent = world.people.sent[version.id]

            async def more(sent: int = sent) -> bool:
                return world.people.sent[version.id] > sent

            await world.until(more, "a request in the time that it is now")
    assert (await world.service(service_id)).state == ServiceState.RUNNING
    world.people.per_s = 0
    world.balancer.forgiven.add(service_id)

    async def ended() -> bool:
        await world.skip(service_id, 6 * 60)
        return (await world.service(service_id)).state == ServiceState.TERMINATED

    await world.until(ended, "its end")
    await world.nothing_left(service_id)
    assert "10 min" in (await world.service(service_id)).reason


async def test_without_the_option_it_stays_for_ever(services: ServiceWorld) -> None:
    service_id, version = await services.running_service()
    await services.until_quiet(service_id)
    await services.skip(service_id, 6 * 3600)
    await services.until_finished(service_id, version)
    (cluster_id,) = await services.clusters_of(service_id)
    await services.head(cluster_id).tell_activity("idle")
    await services.skip(cluster_id, 6 * 3600)
    assert (await services.cluster(cluster_id)).state == ClusterState.RUNNING, "a service's cluster is never idle"


# --- its end --------------------------------------------------------------------------------------------------------


async def asked(world: ServiceWorld) -> str:
    service_id = await world.new_service()
    await world.deploy(service_id, world.version(service_id))
    return service_id


async def without_machines(world: ServiceWorld) -> str:
    world.machines.no_capacity()
    service_id = await asked(world)

    async def waiting() -> bool:
        return "no_capacity" in "".join(
            [(await world.cluster(c)).waits_for for c in await world.clusters_of(service_id)]
        )

    await world.until(waiting, "its cluster to wait for machines")
    return service_id


async def booting(world: ServiceWorld) -> str:
    world.fleet.node_plan = lambda spec: NodePlan(register=False)
    service_id = await asked(world)

    async def up() -> bool:
        return bool(world.alive())

    await world.until(up, "a machine that boots")
    return service_id


async def _deployed(world: ServiceWorld, plan: ServePlan, kind: CommandKind) -> str:
    service_id = await world.new_service()
    await world.deploy(service_id, world.version(service_id, plan))

    async def given() -> bool:
        return any(c.kind == kind for h in world.fleet.heads.values() for c in h.commands)

    await world.until(given, f"a {kind} command")
    return service_id


async def deploying(world: ServiceWorld) -> str:
    return await _deployed(world, ServePlan(silent=frozenset({KINDS.SERVE_DEPLOY})), KINDS.SERVE_DEPLOY)


async def not_healthy_yet(world: ServiceWorld) -> str:
    return await _deployed(world, ServePlan(healthy=False), KINDS.SERVE_DEPLOY)


async def probing(world: ServiceWorld) -> str:
    return await _deployed(world, ServePlan(silent=frozenset({KINDS.SERVE_PROBE})), KINDS.SERVE_PROBE)


async def failed(world: ServiceWorld) -> str:
    service_id = await _deployed(world, ServePlan(failed="broken"), KINDS.SERVE_DEPLOY)
    await world.until_state(service_id, ServiceState.UNHEALTHY)
    return service_id


async def running(world: ServiceWorld) -> str:
    return (await world.running_service())[0]


async def holding(world: ServiceWorld) -> str:
    service_id, _ = await world.running_service()
    rules = AT_ONCE.model_copy(update={"steps": [50, 100], "hold_s": 600})
    second = world.version(service_id, rollout=rules)
    await world.deploy(service_id, second)
    await world.until_share(service_id, second, 50)
    return service_id


async def paused(world: ServiceWorld) -> str:
    service_id, _ = await world.running_service()
    second = world.version(service_id)
    await world.deploy(service_id, second, canary_percent=0)
    await world.until_service(service_id, "paused", lambda s: s.rollout is not None and s.rollout.state == "paused")
    return service_id


async def draining(world: ServiceWorld) -> str:
    service_id, first = await world.running_service(ServePlan(silent=frozenset({KINDS.SERVE_DRAIN})))
    (head,) = world.heads_of(first)
    world.balancer.forgiven.add(head.cluster_id)  # nobody waits for long for an answer that never comes
    second = world.version(service_id)
    await world.deploy(service_id, second)

    async def drains() -> bool:
        return any(c.kind == KINDS.SERVE_DRAIN for c in head.commands)

    await world.until(drains, "the drain to be given")
    return service_id


async def updating(world: ServiceWorld) -> str:
    service_id, _ = await world.running_service()
    await world.deploy(service_id, world.version(service_id, ServePlan(healthy=False)), in_place=True)
    await world.until_state(service_id, ServiceState.UPDATING)
    return service_id


async def with_a_failed_version(world: ServiceWorld) -> str:
    service_id, _ = await world.running_service()
    second = world.version(service_id, ServePlan(failed="broken"))
    await world.deploy(service_id, second)
    await world.until_version(service_id, second, ServiceVersionState.UNHEALTHY)
    return service_id


async def healing(world: ServiceWorld) -> str:
    service_id, version = await world.running_service()
    (head,) = world.heads_of(version)
    world.fleet.node_plan = lambda spec: NodePlan(register=False)
    await world.lose_head(head.cluster_id)
    await world.until_cluster(head.cluster_id, ClusterState.RECOVERING)
    return service_id


SHORT = [booting, probing, holding, draining, healing]
LONG = [
    asked, without_machines, deploying, not_healthy_yet, failed, running, paused, updating, with_a_failed_version,
]  # fmt: skip
PHASES = [*SHORT, *(pytest.param(phase, marks=pytest.mark.long) for phase in LONG)]


@pytest.mark.parametrize("phase", PHASES)
async def test_terminate_in_every_phase_leaves_nothing(
    services: ServiceWorld, phase: Callable[[ServiceWorld], Awaitable[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "DRAIN_ANSWER", timedelta(seconds=0.5))
    services.rules = AT_ONCE.model_copy(update={"drain_timeout_s": 0})
    service_id = await phase(services)
    await services.terminate(service_id, "not needed")
    await services.nothing_left(service_id)
    assert "not needed" in (await services.service(service_id)).reason
    assert (await services.handle(service_id).describe()).status == WorkflowExecutionStatus.COMPLETED
    ends = [e for e in await services.story(service_id) if e.message.startswith("TERMINATING")]
    assert [e.actor for e in ends] == ["user:ann"]


@pytest.mark.long
@pytest.mark.parametrize("phase", [asked, booting, running, holding])
async def test_cancel_in_the_ui_is_a_terminate(
    services: ServiceWorld, phase: Callable[[ServiceWorld], Awaitable[str]]
) -> None:
    service_id = await phase(services)
    services.balancer.forgiven.add(service_id)
    await services.handle(service_id).cancel()
    await services.nothing_left(service_id)
    assert "cancelled in Temporal" in (await services.service(service_id)).reason


async def test_terminating_twice_and_cancelling_is_once(services: ServiceWorld) -> None:
    service_id, version = await services.running_service()
    (head,) = services.heads_of(version)
    head.deaf = True  # its drain is not over before all was said
    await services.terminate(service_id, "first")
    await services.terminate(service_id, "second")
    await services.handle(service_id).cancel()
    head.deaf = False
    await services.nothing_left(service_id)
    assert "first" in (await services.service(service_id)).reason


async def test_a_running_service_is_drained_before_its_cluster_ends(services: ServiceWorld) -> None:
    service_id, version = await services.running_service()
    (head,) = services.heads_of(version)
    await services.terminate(service_id)
    await services.nothing_left(service_id)
    assert head.serve.drained


async def test_a_terminated_service_starts_again_from_its_revision(services: ServiceWorld) -> None:
    world = services
    service_id, _ = await world.running_service()
    await world.terminate(service_id)
    await world.nothing_left(service_id)
    world.balancer.forgiven.discard(service_id)
    ended = await world.service(service_id)
    life = await world.reopen(service_id)
    second = world.version(service_id)
    await world.deploy(service_id, second, gate=TOKENS, life=life)
    service = await world.until_finished(service_id, second)
    assert service.revision > ended.revision
    assert service.query_url == ended.query_url or ended.query_url is None
    clusters = await world.clusters_of(service_id)
    assert len(clusters) == 2, "a new cluster, with an id of its own"
