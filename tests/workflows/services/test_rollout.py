"""From one version to the next: by steps, watched, steered by people, with little extra capacity, and back again. The
holds are real seconds, for an activity watches them; the limits in minutes and hours are skipped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from sqlalchemy import select
from temporalio.client import Client, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError

from heliostat.models.agents import CommandKind
from heliostat.models.common import EventLevel
from heliostat.models.services import RolloutAction, RolloutConfig, Service, ServiceState, ServiceVersionState
from runtime.messages.services import GateOrder, GateTokens, VersionSpec
from store.commands import OpenCommand
from store.tables import service_deploys
from tests.workflows.service_world import AT_ONCE, IN_STEPS, ServiceWorld, make_service_world
from tests.workflows.serving import FakeServe
from tests.workflows.test_continue_as_new import runs_of_workflow
from tests.workflows.world import WAIT_S, ServePlan, temporal_server
from workflows import policies

LONG = IN_STEPS.model_copy(update={"hold_s": 600})
"""Held until somebody steers."""


async def rolling(
    world: ServiceWorld, plan: ServePlan | None = None, rules: RolloutConfig = IN_STEPS, **request: object
) -> tuple[str, VersionSpec, VersionSpec]:
    """A service whose second version has its first share."""
    service_id, first = await world.running_service()
    second = world.version(service_id, plan, rollout=rules)
    await world.deploy(service_id, second, **request)
    await world.until_share(service_id, second, 25)
    return service_id, first, second


def is_paused(service: Service) -> bool:
    return service.rollout is not None and service.rollout.state == "paused"


# --- by steps -------------------------------------------------------------------------------------------------------


async def test_traffic_moves_by_the_steps_and_the_old_version_is_drained(services: ServiceWorld) -> None:
    world = services
    world.people.per_s = 400
    service_id, first, second = await rolling(world)
    (old,) = world.heads_of(first)
    held = await world.until_service(
        service_id, "to hold the first step", lambda s: s.rollout is not None and s.rollout.state == "holding"
    )
    assert held.rollout is not None
    assert held.state == ServiceState.ROLLING_OUT
    assert held.rollout.percent in (25, 50), "the second, where this machine stood still through the first"
    assert held.rollout.version_id == second.id
    assert held.rollout.from_version_id == first.id
    assert held.rollout.holds_until is not None
    assert (held.primary_version, held.canary_version) == (first.id, second.id)
    assert held.waits_for
    await world.until_finished(service_id, second)
    await world.until_released(service_id, first)
    assert world.balancer.shares_over_time(service_id, second.id) == [0, 25, 50, 100]
    assert world.balancer.shares_over_time(service_id, first.id) == [0, 100, 75, 50, 0]
    assert old.serve.drained
    story = await world.story(service_id)
    steps = [e.at for e in story if e.kind == "step"][1:]  # the first one is the first version's own
    assert all(b - a >= timedelta(seconds=1) for a, b in pairwise(steps)), "each is held"
    assert any(e.kind == "drained" for e in story)
    assert not world.people.lost
    assert world.people.sent[second.id]
    service = await world.service(service_id)
    assert service.canary_version is None
    assert [v.weight for v in service.versions] == [0, 100]


@pytest.mark.long
async def test_a_version_on_two_clusters_shares_alike(services: ServiceWorld) -> None:
    world = services
    service_id, first = await world.running_service(cluster_replicas=2)
    second = world.version(service_id, cluster_replicas=2, rollout=IN_STEPS)
    await world.deploy(service_id, second)
    await world.until_share(service_id, second, 25)
    weights = sorted((b.version_id == second.id, b.weight) for b in world.balancer.backends(service_id))
    assert weights == [(False, 75), (False, 75), (True, 25), (True, 25)]
    await world.until_finished(service_id, second)
    await world.until_released(service_id, first)
    assert len(world.alive()) == 2


# --- the canary -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (ServePlan(error_share=0.5), "answers failed"),
        pytest.param(ServePlan(latency_ms=2000), "p95", marks=pytest.mark.long),
        (ServePlan(hang=True), "waits for its answer"),
        (ServePlan(sick_in_traffic="replica died: CUDA error"), "CUDA error"),
    ],
    ids=["errors", "latency", "hang", "serve"],
)
async def test_a_bad_canary_loses_its_traffic_at_once_and_is_kept(
    services: ServiceWorld, plan: ServePlan, words: str
) -> None:
    world = services
    world.people.per_s = 800
    service_id, first, second = await rolling(world, plan, LONG)
    bad = await world.until_version(service_id, second, ServiceVersionState.UNHEALTHY)
    service = await world.until_finished(service_id, first)
    assert world.balancer.shares_over_time(service_id, second.id) == [0, 25, 0]
    assert words in bad.reason
    assert words in service.reason
    assert (bad.weight, bad.ended_at) == (0, None)
    assert bad.kept_until is not None
    assert world.heads_of(second), "it can be looked at"
    story = await world.story(service_id)
    began = next(e.at for e in story if e.kind == "step" and "25 %" in e.message)
    back = next(e for e in story if e.kind == "rolled_back")
    assert (back.at - began).total_seconds() < 60, "of 600"
    assert back.level == EventLevel.WARNING
    await world.until_quiet(service_id)
    await world.skip(service_id, AT_ONCE.keep_failed_s - 60)
    assert world.heads_of(second)
    await world.skip(service_id, 120)
    await world.until_released(service_id, second)
    await world.until_finished(service_id, first)


@pytest.mark.long
async def test_a_kept_version_takes_new_tokens_and_may_be_chosen_after_all(services: ServiceWorld) -> None:
    """What people give weights to is theirs: it does not end when it would have been kept long enough."""
    world, plan = services, ServePlan(error_share=0.5)
    world.people.per_s = 800
    service_id, first, second = await rolling(world, plan, LONG)
    await world.until_version(service_id, second, ServiceVersionState.UNHEALTHY)
    await world.until_finished(service_id, first)
    (kept,) = world.heads_of(second)
    only_new = GateTokens(enabled=True, hashes=["cd" * 32])
    await world.update(service_id, "set_gate", GateOrder(actor="user:ann", gate=only_new))

    async def told() -> bool:
        return kept.serve.gate == only_new.model_dump(mode="json")

    await world.until(told, "the kept version to ask for the new token")
    plan.error_share = 0
    await world.deploy(service_id, weights={second.id: 100})
    await world.until_finished(service_id, second)
    await world.until_released(service_id, first)
    assert world.heads_of(second) == [kept], "as it stands"
    await world.skip(service_id, second.rollout.keep_failed_s + 60)
    await world.until_finished(service_id, second)


@pytest.mark.long
async def test_too_few_answers_are_no_evidence(services: ServiceWorld) -> None:
    services.people.per_s = 6
    service_id, _, second = await rolling(services, ServePlan(error_share=1))
    await services.until_finished(service_id, second)


@pytest.mark.long
async def test_errors_that_the_running_version_has_too_are_not_held_against_the_new_one(
    services: ServiceWorld,
) -> None:
    world = services
    world.people.per_s = 400
    service_id, _ = await world.running_service(ServePlan(error_share=0.3))
    second = world.version(service_id, ServePlan(error_share=0.3), rollout=IN_STEPS)
    await world.deploy(service_id, second)
    await world.until_finished(service_id, second)


@pytest.mark.long
async def test_a_latency_that_is_small_in_itself_is_no_breach(services: ServiceWorld) -> None:
    world = services
    world.people.per_s = 400
    service_id, _ = await world.running_service(ServePlan(latency_ms=2))
    second = world.version(service_id, ServePlan(latency_ms=60), rollout=IN_STEPS)
    await world.deploy(service_id, second)
    await world.until_finished(service_id, second)


@pytest.mark.long
async def test_a_rollout_has_a_deadline(services: ServiceWorld) -> None:
    world = services
    rules = LONG.model_copy(update={"timeout_s": 3})
    service_id, first, second = await rolling(world, rules=rules)
    await world.until_version(service_id, second, ServiceVersionState.UNHEALTHY)
    await world.until_finished(service_id, first)
    assert world.balancer.shares_over_time(service_id, second.id) == [0, 25, 0]


# --- steered by people ----------------------------------------------------------------------------------------------


async def test_paused_and_resumed(services: ServiceWorld) -> None:
    world = services
    service_id, _, second = await rolling(world)
    await world.order(service_id, RolloutAction.PAUSE)
    await world.until_service(service_id, "to be paused", is_paused)
    await world.until_quiet(service_id)
    service = await world.service(service_id)
    assert service.state == ServiceState.ROLLING_OUT
    assert service.rollout is not None
    percent = service.rollout.percent
    assert percent in (25, 50)
    assert world.balancer.shares(service_id)[second.id] == percent
    await world.order(service_id, RolloutAction.RESUME)
    await world.until_finished(service_id, second)
    assert world.balancer.shares_over_time(service_id, second.id) == [0, 25, 50, 100]
    assert {e.actor for e in await world.story(service_id) if e.kind == "rollout_paused"} == {"user:ann"}


@pytest.mark.long
@pytest.mark.parametrize("turns", [{"error_share": 0.5}, {"sick_in_traffic": "CUDA error"}], ids=["errors", "serve"])
async def test_a_canary_that_turns_bad_while_it_is_paused_loses_its_traffic(
    services: ServiceWorld, turns: dict[str, object]
) -> None:
    world, plan = services, ServePlan()
    world.people.per_s = 800
    service_id, first, second = await rolling(world, plan, canary_percent=25)
    await world.until_service(service_id, "to be paused", is_paused)
    for name, value in turns.items():
        setattr(plan, name, value)
    await world.until_version(service_id, second, ServiceVersionState.UNHEALTHY)
    service = await world.until_finished(service_id, first)
    assert "at 25 %" in service.reason
    assert world.balancer.shares_over_time(service_id, second.id) == [0, 25, 0]


async def test_promoted_out_of_a_hold(services: ServiceWorld) -> None:
    world = services
    service_id, _, second = await rolling(world, rules=LONG)
    await world.order(service_id, RolloutAction.PROMOTE)
    await world.until_finished(service_id, second)
    assert world.balancer.shares_over_time(service_id, second.id) == [0, 25, 100]


@pytest.mark.long
async def test_promoted_to_a_share_stops_there(services: ServiceWorld) -> None:
    world = services
    service_id, _, second = await rolling(world)
    await world.order(service_id, RolloutAction.PAUSE)
    await world.until_service(service_id, "to be paused", is_paused)
    await world.order(service_id, RolloutAction.PROMOTE, 60)
    await world.until_share(service_id, second, 60)
    await world.until_service(service_id, "to be paused at 60", lambda s: is_paused(s) and s.rollout is not None
                              and s.rollout.percent == 60)  # fmt: skip
    await world.order(service_id, RolloutAction.PROMOTE)
    await world.until_finished(service_id, second)
    assert world.balancer.shares_over_time(service_id, second.id)[-2:] == [60, 100]


async def test_aborted(services: ServiceWorld) -> None:
    world = services
    service_id, first, second = await rolling(world, rules=LONG)
    await world.order(service_id, RolloutAction.ABORT)
    await world.until_finished(service_id, first)
    await world.until_released(service_id, second)
    assert "aborted by user:ann" in (await world.version_of(service_id, second)).reason
    assert world.balancer.shares_over_time(service_id, second.id) == [0, 25, 0]
    assert len(world.alive()) == 1


@pytest.mark.long
@pytest.mark.parametrize("action", list(RolloutAction))
async def test_nothing_to_steer_is_said(services: ServiceWorld, action: RolloutAction) -> None:
    service_id, first = await services.running_service()
    with pytest.raises(WorkflowUpdateFailedError) as error:
        await services.order(service_id, action)
    assert isinstance(error.value.cause, ApplicationError)
    assert error.value.cause.type == "conflict"
    await services.until_finished(service_id, first)


@pytest.mark.long
async def test_canary_percent_stops_there_and_resume_goes_on(services: ServiceWorld) -> None:
    world = services
    service_id, first, second = await rolling(world, canary_percent=40)
    service = await world.until_service(service_id, "to be paused", is_paused)
    assert service.rollout is not None
    assert (service.rollout.percent, service.canary_version) == (40, second.id)
    assert "paused" in service.waits_for
    assert world.balancer.shares(service_id) == {first.id: 60, second.id: 40}
    await world.order(service_id, RolloutAction.RESUME)
    await world.until_finished(service_id, second)
    assert world.balancer.shares_over_time(service_id, second.id) == [0, 25, 40, 50, 100]


@pytest.mark.long
async def test_canary_percent_zero_is_fit_but_has_nothing(services: ServiceWorld) -> None:
    world = services
    service_id, first = await world.running_service()
    second = world.version(service_id)
    await world.deploy(service_id, second, canary_percent=0)
    await world.until_service(service_id, "to be paused", is_paused)
    assert world.balancer.shares(service_id) == {first.id: 100}
    assert all(h.serve.probed for h in world.heads_of(second))
    await world.order(service_id, RolloutAction.PROMOTE)
    await world.until_finished(service_id, second)


@pytest.mark.long
async def test_a_deploy_during_a_rollout_supersedes_it(services: ServiceWorld) -> None:
    world = services
    service_id, first, second = await rolling(world, rules=LONG)
    third = world.version(service_id, rollout=IN_STEPS)
    await world.deploy(service_id, third)
    await world.until_finished(service_id, third)
    await world.until_released(service_id, second)
    await world.until_released(service_id, first)
    assert "superseded by v3" in (await world.version_of(service_id, second)).reason
    assert world.balancer.shares_over_time(service_id, second.id) == [0, 25, 0]
    assert world.balancer.shares_over_time(service_id, third.id) == [0, 25, 50, 100]
    assert any("superseded by v3" in e.message for e in await world.story(service_id))


def added_while_probed(
    world: ServiceWorld, service_id: str, old: FakeServe, monkeypatch: pytest.MonkeyPatch
) -> tuple[GateTokens, asyncio.Event, asyncio.Event]:
    """A token is added while a new head is probed, which hears of it later. The tokens of then; set when they were
    added; to be set for the new head to hear of them."""
    both = GateTokens(enabled=True, hashes=["ab" * 32, "cd" * 32])
    real, added, may_hear = FakeServe.result, asyncio.Event(), asyncio.Event()

    async def result(serve: FakeServe, command: OpenCommand) -> dict[str, object] | None:
        if command.kind == CommandKind.SERVE_GATE and serve is not old:
            await may_hear.wait()
        answer = await real(serve, command)
        if command.kind == CommandKind.SERVE_PROBE and not added.is_set():
            await world.update(service_id, "set_gate", GateOrder(actor="user:ann", gate=both))
            added.set()
        return answer

    monkeypatch.setattr(FakeServe, "result", result)
    return both, added, may_hear


async def test_a_version_has_no_traffic_before_its_proxies_know_the_tokens_of_now(
    services: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token is added while the new version is probed. Who has been told that it is active must be let in by
    whatever answers."""
    world = services
    service_id, first = await world.running_service()
    (old_head,) = world.heads_of(first)
    second = world.version(service_id)
    both, added, may_hear = added_while_probed(world, service_id, old_head.serve, monkeypatch)
    await world.deploy(service_id, second)
    await asyncio.wait_for(added.wait(), WAIT_S)

    async def fit() -> bool:
        told_so = [e for e in await world.story(service_id) if e.kind == "fit"]
        return any(e.message.startswith(f"{second.name}:") for e in told_so)

    await world.until(fit, "the new version to be fit")
    await asyncio.sleep(0.5)
    assert world.balancer.shares_over_time(service_id, second.id) == [0]
    assert (await world.service(service_id)).gate_hashes == []
    may_hear.set()
    await world.until_finished(service_id, second)
    await world.until_service(service_id, "both tokens to count", lambda s: sorted(s.gate_hashes) == both.hashes)


# --- back -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
async def test_rolled_back_during_a_rollout(services: ServiceWorld) -> None:
    world = services
    service_id, first, second = await rolling(world, rules=LONG)
    await world.rollback(service_id)
    await world.until_finished(service_id, first)
    await world.until_released(service_id, second)
    assert "it is slow" in (await world.version_of(service_id, second)).reason
    assert len(await world.clusters_of(service_id)) == 2


@pytest.mark.parametrize("how", ["rollback", "abort"])
async def test_what_is_given_up_before_it_began_changes_nothing(services: ServiceWorld, how: str) -> None:
    """A deploy and its rollback, or abort, that no worker was there for come together: what ran runs on, and not the
    version before it."""
    world = services
    service_id, first = await world.running_service()
    second = world.version(service_id)
    await world.deploy(service_id, second)
    await world.until_finished(service_id, second)
    await world.until_released(service_id, first)
    await world.until_quiet(service_id)
    await world.stop_worker()
    third = world.version(service_id)
    deploy = await world.deploy(service_id, third)
    order = world.rollback(service_id) if how == "rollback" else world.order(service_id, RolloutAction.ABORT)
    given_up = asyncio.create_task(order)
    await asyncio.sleep(0.3)
    await world.handle(service_id).describe()  # by the time of its answer the order before it waits for a worker
    await asyncio.sleep(0.3)
    await world.start_worker()
    await given_up
    await world.until_version(service_id, third, ServiceVersionState.TERMINATED)
    await world.until_finished(service_id, second)
    await world.until_quiet(service_id)
    assert world.balancer.shares_over_time(service_id, second.id) == [0, 100]
    assert "cancelled" in (await world.version_of(service_id, third)).reason
    assert len(await world.clusters_of(service_id)) == 2
    async with world.db.read() as conn:
        claimed = select(service_deploys.c.started).where(service_deploys.c.id == deploy.id)
        assert await conn.scalar(claimed), "else the monitor would give it to the workflow again and again"


async def test_rolled_back_to_the_version_before_and_forth_again(services: ServiceWorld) -> None:
    world = services
    service_id, first = await world.running_service()
    second = world.version(service_id, rollout=IN_STEPS)
    await world.deploy(service_id, second)
    await world.until_finished(service_id, second)
    await world.until_released(service_id, first)
    assert (await world.service(service_id)).previous_version == first.id
    await world.rollback(service_id)
    await world.until_finished(service_id, first)
    await world.until_released(service_id, second)
    assert (await world.service(service_id)).previous_version == second.id
    states = [e.message.partition(":")[0] for e in await world.story(service_id) if e.kind == "state"]
    assert "ROLLING_BACK" in states
    assert len(await world.clusters_of(service_id)) == 3, "the first version's clusters were gone"
    await world.rollback(service_id)
    await world.until_finished(service_id, second)
    await world.until_released(service_id, first)
    assert len(world.alive()) == 1


@pytest.mark.long
async def test_a_version_that_is_being_drained_comes_back_on_its_clusters(services: ServiceWorld) -> None:
    world = services
    service_id, first = await world.running_service(ServePlan(silent=frozenset({CommandKind.SERVE_DRAIN})))
    (head,) = world.heads_of(first)
    second = world.version(service_id)
    await world.deploy(service_id, second)
    await world.until_finished(service_id, second)

    async def drains() -> bool:
        return any(c.kind == CommandKind.SERVE_DRAIN for c in head.commands)

    await world.until(drains, "the drain to be given")
    await world.rollback(service_id)
    await world.until_finished(service_id, first)
    await world.until_released(service_id, second)
    assert head.up
    assert world.heads_of(first) == [head]
    assert not head.serve.draining, "it takes connections that are kept again"
    assert len(await world.clusters_of(service_id)) == 2


@pytest.mark.long
async def test_nothing_to_go_back_to_is_said(services: ServiceWorld) -> None:
    service_id, _ = await services.running_service()
    with pytest.raises(WorkflowUpdateFailedError) as error:
        await services.rollback(service_id)
    assert isinstance(error.value.cause, ApplicationError)
    assert error.value.cause.type == "conflict"


# --- capacity -------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("surge", [0, 10, 25, 60])
async def test_no_more_capacity_than_max_surge_allows(services: ServiceWorld, surge: int) -> None:
    world = services
    service_id, first = await world.running_service()
    second = world.version(service_id, rollout=IN_STEPS)
    await world.deploy(service_id, second, max_surge_percent=surge)
    await world.until_finished(service_id, second)
    await world.until_released(service_id, first)
    now: dict[str, int] = {}
    for version_id, percent in world.fleet.capacities:
        now[version_id] = percent
        if percent < 100:  # in the end the old version is let go, with what little it had left
            assert sum(now.values()) <= 100 + max(surge, 1), world.fleet.capacities
    old = [100, *(percent for version_id, percent in world.fleet.capacities if version_id == first.id)]
    drops = [a - b for a, b in pairwise(old)]
    assert max(drops) <= max(surge, policies.GIVE_PERCENT), "the old version never has much less than its share"
    assert not any("UNHEALTHY" in e.message for e in await world.story(service_id))
    assert now[second.id] == 100
    shares = world.balancer.shares_over_time(service_id, second.id)
    assert shares == sorted(shares)
    assert shares[-1] == 100


@pytest.mark.long
async def test_with_full_surge_no_capacity_is_touched(services: ServiceWorld) -> None:
    service_id, first = await services.running_service()
    second = services.version(service_id, rollout=IN_STEPS)
    await services.deploy(service_id, second)
    await services.until_finished(service_id, second)
    assert services.fleet.capacities == [(first.id, 100), (second.id, 100)]


@pytest.mark.long
async def test_the_old_version_gets_its_capacity_back(services: ServiceWorld) -> None:
    world = services
    rules = LONG.model_copy(update={"steps": [50, 100]})
    service_id, first = await world.running_service()
    second = world.version(service_id, rollout=rules)
    await world.deploy(service_id, second, max_surge_percent=25)
    await world.until_share(service_id, second, 50)
    await world.order(service_id, RolloutAction.ABORT)
    await world.until_finished(service_id, first)

    async def back() -> bool:
        return [c for v, c in world.fleet.capacities if v == first.id][-1] == 100

    await world.until(back, "the old version to have all its replicas")


# --- what does not come up ------------------------------------------------------------------------------------------


async def test_without_machines_it_says_so_and_gives_up_with_the_old_version_untouched(
    services: ServiceWorld,
) -> None:
    world = services
    service_id, first = await world.running_service()
    world.machines.no_capacity()
    second = world.version(service_id)
    await world.deploy(service_id, second)
    service = await world.until_service(service_id, "to say what it waits for", lambda s: "cluster" in s.waits_for)
    assert service.state == ServiceState.ROLLING_OUT
    await world.until_quiet(service_id)
    await world.skip(service_id, second.rollout.health_timeout_s + 1)
    given_up = await world.until_version(service_id, second, ServiceVersionState.UNHEALTHY)
    assert "1800 s" in given_up.reason
    await world.until_finished(service_id, first)
    assert world.balancer.shares_over_time(service_id, first.id) == [0, 100]
    assert world.balancer.shares_over_time(service_id, second.id) == [0]
    await world.skip(service_id, second.rollout.keep_failed_s + 1)
    await world.until_released(service_id, second)
    assert len(world.alive()) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "plan",
    [ServePlan(healthy=False), ServePlan(failed="AttributeError: module main has no app"), ServePlan(refuse="no")],
    ids=["never-healthy", "deploy-failed", "refused"],
)
async def test_a_version_that_never_comes_up_costs_nothing(services: ServiceWorld, plan: ServePlan) -> None:
    world = services
    service_id, first = await world.running_service()
    second = world.version(service_id, plan)
    await world.deploy(service_id, second)

    async def given_up() -> bool:
        if not plan.healthy and world.heads_of(second):
            await world.skip(service_id, 900)
        return (await world.version_of(service_id, second)).state == ServiceVersionState.UNHEALTHY

    await world.until(given_up, "it to be given up")
    bad = await world.version_of(service_id, second)
    assert (plan.failed or plan.refuse or "not ready for traffic") in bad.reason
    await world.until_finished(service_id, first)
    assert world.balancer.shares_over_time(service_id, first.id) == [0, 100]


@pytest.mark.long
async def test_a_first_version_that_never_comes_up_can_be_replaced(services: ServiceWorld) -> None:
    world = services
    service_id = await world.new_service()
    first = world.version(service_id, ServePlan(failed="broken"))
    await world.deploy(service_id, first)
    service = await world.until_state(service_id, ServiceState.UNHEALTHY)
    assert "broken" in service.reason
    second = world.version(service_id)
    await world.deploy(service_id, second)
    await world.until_finished(service_id, second)
    await world.until_quiet(service_id)
    await world.skip(service_id, first.rollout.keep_failed_s + 1)
    await world.until_released(service_id, first)


# --- the end of a drain ---------------------------------------------------------------------------------------------


async def test_what_a_drain_leaves_at_its_deadline_is_reported(services: ServiceWorld) -> None:
    world = services
    service_id, first = await world.running_service(ServePlan(ongoing=3))
    second = world.version(service_id)
    await world.deploy(service_id, second)
    await world.until_released(service_id, first)
    (told,) = [e for e in await world.story(service_id) if e.kind == "drain_deadline"]
    assert told.level == EventLevel.WARNING
    assert "3 requests" in told.message


@pytest.mark.long
async def test_a_drain_that_is_never_answered_ends_all_the_same(
    services: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = services
    monkeypatch.setattr(policies, "DRAIN_ANSWER", timedelta(seconds=0.5))
    rules = AT_ONCE.model_copy(update={"drain_timeout_s": 0})
    plan = ServePlan(silent=frozenset({CommandKind.SERVE_DRAIN}))
    service_id, first = await world.running_service(plan, rollout=rules)
    (head,) = world.heads_of(first)
    world.balancer.forgiven.add(head.cluster_id)
    second = world.version(service_id)
    await world.deploy(service_id, second)
    await world.until_released(service_id, first)
    assert "drain_unconfirmed" in await world.kinds(service_id)


# --- cut histories --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def forgetful_temporal() -> AsyncIterator[Client]:
    async with temporal_server(limit__historyCount__suggestContinueAsNew="8") as client:
        yield client


@pytest.mark.long
async def test_a_whole_life_over_many_runs(forgetful_temporal: Client, tmp_path: Path) -> None:
    async with make_service_world(forgetful_temporal, tmp_path) as world:
        service_id, first = await world.running_service()
        second = world.version(service_id, rollout=IN_STEPS)
        deploy = await world.deploy(service_id, second, canary_percent=40)
        await world.until_service(service_id, "to be paused", is_paused)
        await world.until_quiet(service_id)
        both = GateTokens(enabled=True, hashes=["ab" * 32, "cd" * 32])
        await world.update(service_id, "set_gate", GateOrder(actor="user:ann", gate=both))
        await world.until_quiet(service_id)
        await world.send(service_id, deploy)  # again, to a run that never saw it
        await world.until_quiet(service_id)
        assert is_paused(await world.service(service_id))
        await world.order(service_id, RolloutAction.PROMOTE)
        await world.until_finished(service_id, second)
        await world.until_released(service_id, first)
        third = world.version(service_id)
        await world.deploy(service_id, third, in_place=True)
        await world.until_finished(service_id, third)
        await world.rollback(service_id)
        await world.until_finished(service_id, second)
        await world.until_quiet(service_id)
        runs = await runs_of_workflow(world, service_id)
        assert len(runs) >= 3, "it continued as new in between"
        await world.skip(service_id, 3600)
        await world.until_quiet(service_id)
        assert len(await runs_of_workflow(world, service_id)) <= len(runs) + 1, "and does not while nothing happens"
        assert len(await world.clusters_of(service_id)) == 2
        await world.terminate(service_id)
        await world.nothing_left(service_id)
