"""Where machines are asked for: markets, zones and instance types in the configured order, each try in sight."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from clouds.contract.errors import NotOffered, QuotaExceeded
from clouds.contract.machines import MachineSpec
from heliostat.models.agents import FactKind
from heliostat.models.clouds import Market
from heliostat.models.clusters import Cluster, ClusterState, NodeRole, NodeState
from heliostat.models.compute_configs import ComputeConfig, HeadNodeConfig, WorkerNodeGroupConfig
from tests.workflows.world import NodePlan, World
from workflows.clusters.placement import Placement, Shortage, add_shortage, choose, unobtainable

HEAD = HeadNodeConfig(instance_types=["big", "bigger"])


def noted(world: World) -> list[MachineSpec]:
    """The machines that boot, from now on."""
    specs: list[MachineSpec] = []
    world.fleet.node_plan = lambda spec: specs.append(spec) or NodePlan()  # type: ignore[func-returns-value]
    return specs


async def failures(world: World, cluster_id: str) -> list[str]:
    return [e.message for e in await world.story(cluster_id) if e.kind == "launch_failed"]


async def test_types_and_zones_are_tried_in_order_and_each_try_is_told(world: World) -> None:
    world.machines.no_capacity(zone="zone-b")
    world.machines.no_capacity(instance_type="big", zone="zone-a")
    specs = noted(world)
    cluster_id = await world.running_cluster(ComputeConfig(head_node=HEAD, zones=["zone-b", "zone-a"]))
    assert [(s.zone, s.instance_type, s.market) for s in specs] == [("zone-a", "bigger", Market.ON_DEMAND)]
    told = await failures(world, cluster_id)
    assert [t.partition(": ")[2].partition(": ")[0] for t in told] == [
        "big in zone-b (ON_DEMAND)",
        "bigger in zone-b (ON_DEMAND)",
        "big in zone-a (ON_DEMAND)",
    ]
    assert [t.partition("; ")[2] for t in told] == [
        "trying bigger in zone-b (ON_DEMAND)",
        "trying big in zone-a (ON_DEMAND)",
        "trying bigger in zone-a (ON_DEMAND)",
    ]
    nodes = await world.nodes(cluster_id)
    assert [(n.generation, n.zone, n.instance_type) for n in nodes] == [
        (1, "zone-b", "big"), (2, "zone-b", "bigger"), (3, "zone-a", "big"), (4, "zone-a", "bigger"),
    ]  # fmt: skip
    assert [n.state for n in nodes] == [NodeState.TERMINATED] * 3 + [NodeState.RUNNING]
    assert len(world.alive()) == 1


async def test_a_quota_is_of_a_type_in_all_zones(world: World) -> None:
    world.machines.no_capacity(instance_type="big", error=QuotaExceeded)
    specs = noted(world)
    cluster_id = await world.running_cluster(ComputeConfig(head_node=HEAD, zones=["zone-a", "zone-b"]))
    assert [(s.zone, s.instance_type) for s in specs] == [("zone-a", "bigger")]
    (told,) = await failures(world, cluster_id)
    assert "quota_exceeded" in told


async def test_what_no_zone_offers_fails_at_once(world: World) -> None:
    world.machines.no_capacity(error=NotOffered)
    cluster_id = await world.start_cluster(ComputeConfig(head_node=HEAD, zones=["zone-a", "zone-b"]))
    cluster = await world.until_cluster(cluster_id, ClusterState.FAILED)
    assert "no zone of the cloud offers the instance types of head" in cluster.reason
    assert world.machines.calls["launch"] == 4
    assert not world.alive()


async def test_a_shortage_that_stays_is_in_sight_and_has_a_deadline(world: World) -> None:
    world.machines.no_capacity()
    cluster_id = await world.start_cluster(ComputeConfig(head_node=HEAD, zones=["zone-a"]))

    async def waits() -> Cluster | None:
        cluster = await world.cluster(cluster_id)
        return cluster if "next try" in cluster.waits_for else None

    cluster = await world.until(waits, "the back-off")
    assert cluster is not None
    assert "bigger in zone-a (ON_DEMAND)" in cluster.waits_for
    assert "trying big in zone-a (ON_DEMAND) at " in cluster.waits_for
    await world.skip(cluster_id, 901)
    cluster = await world.until_cluster(cluster_id, ClusterState.FAILED)
    assert "not ready by its deadline" in cluster.reason
    assert world.machines.calls["launch"] < 30, "back-off"


async def test_spot_falls_back_and_is_returned_to_after_its_cool_down(world: World) -> None:
    group = WorkerNodeGroupConfig(name="w", max_nodes=9, market_type=Market.PREFER_SPOT)
    specs = noted(world)
    cluster_id = await world.running_cluster(ComputeConfig(zones=["zone-a", "zone-b"], worker_nodes=[group]))
    world.machines.no_capacity(market=Market.SPOT)

    async def grown(wanted: int) -> list[tuple[str | None, Market]]:
        await world.head(cluster_id).tell(FactKind.DESIRED, desired={"w": wanted}, remove=[])

        async def there() -> bool:
            workers = [n for n in await world.nodes(cluster_id) if n.role == NodeRole.WORKER]
            return sum(n.state == NodeState.RUNNING for n in workers) == wanted

        await world.until(there, f"{wanted} workers")
        return [(s.zone, s.market) for s in specs if s.role == NodeRole.WORKER]

    assert await grown(1) == [("zone-a", Market.ON_DEMAND)]
    asked = world.machines.calls["launch"]
    assert await grown(3) == [("zone-a", Market.ON_DEMAND)] * 3
    assert world.machines.calls["launch"] == asked + 2, "spot is left alone while it cools down"
    world.machines.restock()
    await world.skip(cluster_id, 61)
    assert (await grown(4))[3:] == [("zone-a", Market.SPOT)]


async def test_many_that_fail_at_once_are_one_failure(world: World) -> None:
    """A wave of launches under way must not be taken for a row of failures, which would wait for minutes."""
    group = WorkerNodeGroupConfig(name="w", min_nodes=12, max_nodes=12)
    world.machines.no_capacity(zone="zone-a")
    specs = noted(world)
    cluster_id = await world.running_cluster(ComputeConfig(zones=["zone-a", "zone-b"], worker_nodes=[group]))
    assert {s.zone for s in specs} == {"zone-b"}
    assert len(await failures(world, cluster_id)) == 1
    assert len(world.alive()) == 13
    assert all(n.generation <= 2 for n in await world.nodes(cluster_id))


# --- the choice alone


NOW = datetime(2026, 1, 1, tzinfo=UTC)
A, B, C = (Placement(zone=z) for z in "abc")


def test_all_short_are_walked_again_in_order_with_a_growing_pause() -> None:
    shortages: dict[str, Shortage] = {}
    now, walked, pauses = NOW, [], []
    for _ in range(6):
        place, at = choose(shortages, [A, B], now)
        pauses.append((at - now).total_seconds() if at else 0)
        now = at or now
        walked.append(place.zone)
        assert add_shortage(shortages, [place], now, now + timedelta(seconds=1), final=False)
        now += timedelta(seconds=1)
    assert walked == ["a", "b", "a", "b", "a", "b"]
    assert pauses[:2] == [0, 0]
    assert all(p > 0 for p in (pauses[2], pauses[4]))
    assert sum(pauses[4:]) > sum(pauses[2:4])


def test_what_is_never_offered_is_not_tried_again_while_another_may_be() -> None:
    shortages: dict[str, Shortage] = {}
    add_shortage(shortages, [A], NOW, NOW, final=True)
    add_shortage(shortages, [B], NOW, NOW, final=False)
    later = NOW + timedelta(hours=1)
    assert choose(shortages, [A, B], later) == (B, None)
    assert not unobtainable(shortages, [A, B])
    assert unobtainable(shortages, [A])
    assert choose(shortages, [A, C], later) == (C, None)


def test_a_launch_that_was_under_way_is_no_news() -> None:
    shortages: dict[str, Shortage] = {}
    assert add_shortage(shortages, [A], NOW, NOW + timedelta(seconds=2), final=False)
    assert not add_shortage(shortages, [A], NOW + timedelta(seconds=1), NOW + timedelta(seconds=3), final=False)
    assert shortages[A.key].times == 1
