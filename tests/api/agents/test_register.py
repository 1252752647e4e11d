from __future__ import annotations

import asyncio
import hashlib
from typing import Any, cast

import httpx
import pytest
from sqlalchemy import select
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from api.agents.registrations import Registrations
from heliostat.errors import InvalidRequest
from heliostat.models.agents import NodeConfigAnswer, RegisterRequest
from heliostat.models.clusters import ClusterState, NodeRole, NodeState
from heliostat.models.common import utcnow
from heliostat.models.compute_configs import ComputeConfig, PhysicalResources, WorkerNodeGroupConfig
from store.tables import nodes
from tests.api.agents.conftest import World


async def test_a_head_gets_all_that_it_needs_to_start_ray(world: World, http: httpx.AsyncClient) -> None:
    group = WorkerNodeGroupConfig(
        name="small",
        min_nodes=1,
        max_nodes=3,
        required_resources=PhysicalResources(CPU=2, memory=2**30),
        labels={"t": "x"},
    )
    cluster = await world.cluster(ComputeConfig(worker_nodes=[group], maximum_uptime_minutes=60))
    head = await world.node(cluster, NodeRole.HEAD)
    answer = await world.agent(head, http).register()
    assert answer.status_code == 200
    config = NodeConfigAnswer.model_validate(answer.json())
    assert (config.node_id, config.cluster_id, config.cluster_name) == (head.id, cluster.id, cluster.name)
    assert (config.role, config.group, config.resources, config.labels) == ("head", "head", {"CPU": 2.0}, {"a": "b"})
    assert config.ray_token == world.keys.ray_token(cluster.id)
    assert [g.model_dump() for g in config.groups] == [
        {
            "name": "small",
            "resources": {"CPU": 2, "memory": 2**30},
            "labels": {"t": "x"},
            "min_nodes": 1,
            "max_nodes": 3,
        }
    ]
    assert config.desired == {"small": 1}
    assert config.log_prefix == f"logs/{cluster.id}/{head.id}"
    assert config.deadman_s == world.settings.deadman_s
    assert config.maximum_uptime_at is not None
    assert (config.maximum_uptime_at - cluster.created_at).total_seconds() >= 3600
    assert await world.heard(cluster.id) == [f"registered {head.id} 1 127.0.9.1"]


async def test_who_comes_while_a_message_is_under_way_goes_with_the_next(world: World) -> None:
    cluster = await world.cluster()
    nodes = [await world.node(cluster, NodeRole.WORKER) for _ in range(5)]
    passing = asyncio.Event()

    class Slow:
        """Temporal, but for the time that a message takes."""

        def get_workflow_handle(self, id: str) -> Any:
            handle = world.temporal.get_workflow_handle(id)

            class Handle:
                async def signal(self, *args: Any, **more: Any) -> None:
                    await passing.wait()
                    await handle.signal(*args, **more)

            return Handle()

    registrations = Registrations(cast(Client, Slow()))
    telling = [
        asyncio.create_task(
            registrations.signal(
                cluster.id,
                RegisterRequest(
                    protocol=1, node_id=n.id, generation=1, bootstrap_token="", ip="127.0.9.1", boot_id="b"
                ),
            )
        )
        for n in nodes
    ]
    await asyncio.sleep(0.05)
    telling[3].cancel()  # its caller has gone; the others are told all the same
    passing.set()
    await asyncio.gather(*telling, return_exceptions=True)
    assert [t.cancelled() for t in telling] == [False, False, False, True, False]
    assert [t.exception() for t in telling if not t.cancelled()] == [None] * 4
    assert [said.split()[1] for said in await world.heard(cluster.id)] == [n.id for n in nodes]
    events = [e async for e in world.temporal.get_workflow_handle(cluster.id).fetch_history_events()]
    names = [e.workflow_execution_signaled_event_attributes.signal_name for e in events]
    assert [n for n in names if n] == ["nodes_registered"]


async def test_a_message_that_temporal_never_takes_costs_nobody_but_its_own(world: World) -> None:
    heard: list[list[str]] = []
    passing = asyncio.Event()

    class Handle:
        async def signal(self, name: str, said: Any, **more: Any) -> None:
            await passing.wait()
            ids = [m.node_id for m in (said if isinstance(said, list) else [said])]
            if "nd_bad" in ids:
                raise RPCError("blob size exceeds limit", RPCStatusCode.INVALID_ARGUMENT, b"")
            heard.append(ids)

    class Temporal:
        def get_workflow_handle(self, id: str) -> Handle:
            return Handle()

    registrations = Registrations(cast(Client, Temporal()))

    def body(node_id: str) -> RegisterRequest:
        return RegisterRequest(protocol=1, node_id=node_id, generation=1, bootstrap_token="", ip="127.0.9.1")

    told = [asyncio.create_task(registrations.signal("cl_1", body(id))) for id in ("nd_1", "nd_bad", "nd_2")]
    await asyncio.sleep(0.05)
    passing.set()
    answers = await asyncio.gather(*told, return_exceptions=True)
    assert [type(a) for a in answers] == [type(None), InvalidRequest, type(None)]
    assert heard == [["nd_1"], ["nd_2"]]


async def test_many_at_once(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    agents = [world.agent(await world.node(cluster, NodeRole.WORKER), http) for _ in range(20)]
    answers = await asyncio.gather(*(agent.register() for agent in agents))
    assert {a.status_code for a in answers} == {200}
    heard = await world.heard(cluster.id)
    assert sorted(said.split()[1] for said in heard) == sorted(a.node.id for a in agents)


async def test_of_many_that_come_when_the_cluster_has_ended_each_is_told(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    agents = [world.agent(await world.node(cluster, NodeRole.WORKER), http) for _ in range(5)]
    await world.temporal.get_workflow_handle(cluster.id).terminate()
    answers = await asyncio.gather(*(agent.register() for agent in agents))
    assert {a.status_code for a in answers} == {410}


async def test_the_token_is_stored_as_its_hash_only(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    agent = world.agent(await world.node(cluster, NodeRole.HEAD), http)
    await agent.register()
    async with world.db.read() as conn:
        row = (await conn.execute(select(nodes).where(nodes.c.id == agent.node.id))).one()
    assert row.token_sha256 == hashlib.sha256(agent.token.encode()).hexdigest()
    assert agent.token not in str(row)


async def test_a_worker_hears_nothing_of_the_autoscaler(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    await world.node(cluster, NodeRole.HEAD, generation=3)
    config = (await world.agent(await world.node(cluster, NodeRole.WORKER), http).register()).json()
    assert (config["role"], config["group"], config["groups"], config["desired"]) == ("worker", "small", [], {})
    assert config["head_generation"] == 3


@pytest.mark.parametrize("change", [{"bootstrap_token": "0" * 64}, {"bootstrap_token": "ü"}, {"generation": 2}])
async def test_a_wrong_bootstrap_token_is_refused(
    world: World, http: httpx.AsyncClient, change: dict[str, object]
) -> None:
    cluster = await world.cluster()
    answer = await world.agent(await world.node(cluster, NodeRole.HEAD), http).register(**change)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert await world.heard(cluster.id) == []


async def test_a_token_of_another_node_is_refused(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    one, other = await world.node(cluster, NodeRole.WORKER), await world.node(cluster, NodeRole.WORKER)
    answer = await world.agent(one, http).register(bootstrap_token=world.keys.bootstrap_token(other.id, 1))
    assert answer.status_code == 401


async def test_an_unknown_node_may_try_again(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    agent = world.agent(await world.node(cluster, NodeRole.HEAD), http)
    missing = "nd_00000000000000000000"
    answer = await agent.register(node_id=missing, bootstrap_token=world.keys.bootstrap_token(missing, 1))
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert answer.json()["remedy"].startswith("Try again")


async def test_a_lost_answer_is_repeated_and_the_first_token_dies(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    agent = world.agent(await world.node(cluster, NodeRole.HEAD), http)
    lost = (await agent.register()).json()["node_token"]
    assert (await agent.register()).status_code == 200
    assert agent.token != lost
    assert (
        await http.post("/agent/v1/report", headers={"authorization": f"Bearer {lost}"}, json={})
    ).status_code == 401
    assert (await agent.report()).status_code == 200
    # The workflow is told twice under one event id: it acts once.
    assert len(set(await world.heard(cluster.id))) == 1


async def test_another_boot_may_take_over_only_before_the_first_report(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    node = await world.node(cluster, NodeRole.HEAD)
    first, second, third = (world.agent(node, http) for _ in range(3))
    assert (await first.register()).status_code == 200
    assert (await second.register()).status_code == 200
    assert (await second.report()).status_code == 200
    answer = await third.register()
    assert (answer.status_code, answer.json()["code"]) == (410, "gone")
    assert (await first.report()).status_code == 401
    assert (await second.register()).status_code == 200, "the same process may come again, after a 401 for instance"
    assert (await second.report()).status_code == 200


@pytest.mark.parametrize("state", [NodeState.LOST, NodeState.TERMINATED])
async def test_an_ended_node_is_gone(world: World, http: httpx.AsyncClient, state: NodeState) -> None:
    cluster = await world.cluster()
    agent = world.agent(await world.node(cluster, NodeRole.HEAD), http)
    await agent.register()
    assert (await agent.report()).status_code == 200
    ended = utcnow() if state == NodeState.TERMINATED else None
    await world.change(cluster, agent.node.model_copy(update={"state": state, "ended_at": ended}))
    assert (await agent.register()).status_code == 410
    async with asyncio.timeout(20):  # a view may be half a second old
        while (await agent.report()).status_code != 410:
            await asyncio.sleep(0.05)
    for answer in (
        await agent.report(),
        await agent.get("/commands", wait=0),
        await agent.get("/head", wait=0),
        await agent.post("/logs/sign", {"items": []}),
        await agent.post("/commands/x/result", {"ok": True}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (410, "gone")


async def test_nodes_of_an_ended_cluster_are_gone(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    agent = world.agent(await world.node(cluster, NodeRole.HEAD), http)
    cluster.state, cluster.ended_at = ClusterState.TERMINATED, utcnow()
    await world.change(cluster)
    assert (await agent.register()).status_code == 410


async def test_a_cluster_without_a_workflow_has_no_nodes(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster(record=False)
    assert (await world.agent(await world.node(cluster, NodeRole.HEAD), http).register()).status_code == 410


@pytest.mark.parametrize("protocol", [-1, 2])
async def test_an_unknown_protocol_is_refused_with_the_remedy(
    world: World, http: httpx.AsyncClient, protocol: int
) -> None:
    cluster = await world.cluster()
    agent = world.agent(await world.node(cluster, NodeRole.HEAD), http)
    answer = await agent.register(protocol=protocol)
    assert (answer.status_code, answer.json()["field"]) == (422, "protocol")
    assert "0 and 1" in answer.json()["detail"]
    assert answer.json()["remedy"]


async def test_the_bundle_is_served_by_its_hash(world: World, http: httpx.AsyncClient) -> None:
    digest = hashlib.sha256(b"zip").hexdigest()
    world.bundles[digest] = b"zip"
    answer = await http.get(f"/agent/v1/bundle/{digest}")
    assert (answer.status_code, answer.content) == (200, b"zip")
    assert "immutable" in answer.headers["cache-control"]
    missing = await http.get(f"/agent/v1/bundle/{'0' * 64}")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
