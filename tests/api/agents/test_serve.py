"""Heads of services' clusters: what they are given for Serve, and where what they tell goes."""

from __future__ import annotations

import uuid
from typing import Any

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.registry import CollectorRegistry
from sqlalchemy import select
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import ActivityError

from activities.commands import CommandRequest
from api.agents.serve_metrics import ServeTotals
from heliostat.models.agents import CommandKind, ServeStatus, ServeTraffic
from heliostat.models.clusters import NodeRole
from heliostat.models.common import new_id, utcnow
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.services import (
    LATENCY_BOUNDS_MS,
    Service,
    ServiceConfig,
    ServiceState,
    ServiceVersion,
    ServiceVersionState,
)
from heliostat.models.uploads import upload_key
from runtime.messages.services import ServiceInput, VersionSpec
from store.commands import put_command
from store.encrypted_values import write_sealed
from store.services.deploys import insert_service, insert_version
from store.services.traffic import latest_traffic
from store.tables import commands, service_versions, services
from tests.api.agents.conftest import Agent, World, fact
from tests.api.agents.test_commands import Asks, asking
from tests.api.agents.test_reports import seen, stored_report

CONFIG = ServiceConfig(
    name="chat",
    applications=[
        {"import_path": "main:app", "args": {"model": "small"}, "deployments": [{"name": "Chat", "num_replicas": 2}]},
        {
            "import_path": "other:app",
            "name": "other",
            "route_prefix": "/other",
            "logging_config": {"encoding": "JSON"},
            "runtime_env": {
                "working_dir": "https://host/other.zip",
                "py_modules": ["upload:" + "b" * 64],
                "env_vars": {"B": "theirs", "C": "hunter3"},
                "pip": ["numpy"],
            },
        },
    ],
    working_dir="upload:" + "a" * 64,
    requirements=["requests==2.32.0"],
    env_vars={"A": "hunter2", "B": "ours"},
    http_options={"request_timeout_s": 30},
    grpc_options={"grpc_servicer_functions": ["pb:add"]},
    logging_config={"log_level": "DEBUG"},
)
BUCKETS = len(LATENCY_BOUNDS_MS) + 1

__all__ = ["asking"]  # a fixture


async def a_version(world: World, config: ServiceConfig = CONFIG, *, env: bool = True) -> tuple[str, str]:
    """Ids of a service and its version."""
    now, id, version_id = utcnow(), new_id("svc"), new_id("sv")
    service = Service(
        id=id, name=f"chat-{id[-6:]}", project="default", cloud="local", state=ServiceState.STARTING,
        created_by="ann", created_at=now, state_since=now,
    )  # fmt: skip
    arg = ServiceInput(
        service_id=id, name=service.name, project_id="prj_1", project="default", cloud_id="cloud_1", cloud="local",
        created_by="ann", created_at=now,
    )  # fmt: skip
    spec = VersionSpec(
        id=version_id, name="v1", number=1, compute_config=ComputeConfig(), created_by="ann", created_at=now
    )
    version = ServiceVersion(
        id=version_id, service_id=id, name="v1", number=1, state=ServiceVersionState.STARTING, config=config.masked(),
        created_by="ann", created_at=now, state_since=now,
    )  # fmt: skip
    env_ref = new_id("env")
    async with world.db.begin() as conn:
        assert await insert_service(conn, service, arg, [])
        await insert_version(conn, "prj_1", "dp_1", spec, version, env_ref if config.secrets() else None)
        if env:
            await write_sealed(conn, world.keys, env_ref, "prj_1", config.secrets())
    await world.record(id)
    return id, version_id


async def deploy(world: World, head: Agent, version_id: str) -> str:
    command_id = f"{head.node.cluster_id}/{uuid.uuid4().hex[:6]}"
    args = {"version_id": version_id, "target_capacity": None, "gate": {"enabled": True, "hashes": ["0" * 64]}}
    kind = CommandKind.SERVE_DEPLOY
    await put_command(world.db, command_id, head.node.cluster_id, head.node.id, kind, args, b"nobody")
    return command_id


async def a_head(world: World, http: httpx.AsyncClient, service_id: str | None) -> Agent:
    return await world.joined(await world.cluster(service_id=service_id), NodeRole.HEAD, http)


async def take(head: Agent) -> list[dict[str, Any]]:
    answer = await head.get("/commands", wait=0)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["commands"]
    return found


async def test_a_head_is_given_serves_config(world: World, http: httpx.AsyncClient) -> None:
    service_id, version_id = await a_version(world)
    for digest in ("a" * 64, "b" * 64):
        world.bucket.put(upload_key("prj_1", digest), b"zip")
    head = await a_head(world, http, service_id)
    await deploy(world, head, version_id)
    (command,) = await take(head)
    args = command["args"]
    assert (args["version_id"], args["gate"]["hashes"]) == (version_id, ["0" * 64])
    config = args["config"]
    assert config.keys() == {"applications", "http_options", "grpc_options", "logging_config"}
    assert config["http_options"] == {"request_timeout_s": 30}
    assert config["grpc_options"] == {"grpc_servicer_functions": ["pb:add"]}
    assert config["logging_config"] == {"log_level": "DEBUG"}
    first, second = config["applications"]
    assert ("logging_config" in first, second["logging_config"]) == (False, {"encoding": "JSON"})
    assert (first["name"], first["route_prefix"], first["import_path"]) == ("default", "/", "main:app")
    assert (first["args"], first["deployments"]) == ({"model": "small"}, [{"name": "Chat", "num_replicas": 2}])
    assert first["runtime_env"]["env_vars"] == {"A": "hunter2", "B": "ours"}
    assert first["runtime_env"]["working_dir"]["sha256"] == "a" * 64
    assert first["runtime_env"]["working_dir"]["url"].startswith("http://bucket/")
    assert first["runtime_env"]["pip"] == {"packages": ["requests==2.32.0"], "pip_check": False}
    assert "py_modules" not in first["runtime_env"]
    assert second["runtime_env"]["env_vars"] == {"A": "hunter2", "B": "theirs", "C": "hunter3"}
    assert second["runtime_env"]["working_dir"] == {"remote": "https://host/other.zip"}
    assert [m["sha256"] for m in second["runtime_env"]["py_modules"]] == ["b" * 64]
    assert second["runtime_env"]["pip"] == {"packages": ["numpy"], "pip_check": False}


NOWHERE = {
    "another's version": "is not one of the service of cluster",
    "no service": "is not one of the service of cluster",
    "no version": "is not one of the service of cluster",
    "env gone": "env values have been deleted",
    "upload gone": "has been deleted by the retention policy",
}


@pytest.mark.parametrize("what", NOWHERE)
async def test_what_leads_nowhere_is_told_to_the_workflow(
    world: World, http: httpx.AsyncClient, asking: str, what: str
) -> None:
    service_id, version_id = await a_version(world, env=what != "env gone")
    other_id, _ = await a_version(world)
    if what != "upload gone":
        for digest in ("a" * 64, "b" * 64):
            world.bucket.put(upload_key("prj_1", digest), b"zip")
    cluster_of = {"another's version": other_id, "no service": None}.get(what, service_id)
    head = await a_head(world, http, cluster_of)
    request = CommandRequest(
        id=f"{head.node.cluster_id}/serve/1",
        cluster_id=head.node.cluster_id,
        node_id=head.node.id,
        kind=CommandKind.SERVE_DEPLOY,
        args={"version_id": "sv_none" if what == "no version" else version_id},
    )
    handle = await world.temporal.start_workflow(Asks.run, request, id=uuid.uuid4().hex, task_queue=asking)

    async def finished() -> bool:
        assert await take(head) == []  # never handed over
        async with world.db.read() as conn:
            return bool(await conn.scalar(select(commands.c.done).where(commands.c.id == request.id)))

    await seen(finished, 20)
    with pytest.raises(WorkflowFailureError) as failure:
        await handle.result()
    cause = failure.value.cause
    assert isinstance(cause, ActivityError)
    assert NOWHERE[what] in str(cause.cause)


async def test_serve_facts_go_to_the_service(world: World, http: httpx.AsyncClient) -> None:
    service_id, version_id = await a_version(world)
    head = await a_head(world, http, service_id)
    status = ServeStatus(version_id=version_id, healthy=True, http="127.0.9.1:8000", message="x" * 20_000)
    told = fact("serve", **status.model_dump(mode="json"), rubbish={"a": 1})
    bad = fact("serve", applications=3)
    answer = await head.report(told, bad)
    assert set(answer.json()["acked"]) == {told["id"], bad["id"]}  # the bad one can never be delivered
    assert await world.heard(service_id) == [
        f"serve_fact {head.node.id}/{told['id']} {head.node.cluster_id}",
    ]
    (data,) = await world.temporal.get_workflow_handle(service_id).query("all_data")
    assert (data["healthy"], data["http"], len(data["message"]) < 9000) == (True, "127.0.9.1:8000", True)
    assert "rubbish" not in data


async def test_only_heads_of_services_tell_of_serve(world: World, http: httpx.AsyncClient) -> None:
    service_id, _ = await a_version(world)
    cluster = await world.cluster(service_id=service_id)
    worker = await world.joined(cluster, NodeRole.WORKER, http)
    plain = await a_head(world, http, None)
    for agent in (worker, plain):
        told = fact("serve", healthy=True)
        assert (await agent.report(told)).json()["acked"] == [told["id"]]
    assert await world.heard(service_id) == []
    assert [m for m in await world.heard(plain.node.cluster_id) if "serve" in m] == []


async def test_a_services_head_reports_every_second_and_knows_its_service(
    world: World, http: httpx.AsyncClient
) -> None:
    service_id, _ = await a_version(world)
    cluster = await world.cluster(service_id=service_id)
    head = world.agent(await world.node(cluster, NodeRole.HEAD), http)
    given = (await head.register()).json()
    assert (given["service_id"], given["report_interval_s"]) == (service_id, 1.0)
    assert (await head.report()).json()["interval_s"] == 1.0
    worker = world.agent(await world.node(cluster, NodeRole.WORKER), http)
    assert (await worker.register()).json()["report_interval_s"] == world.settings.report_interval_s
    assert (await worker.report()).json()["interval_s"] > world.settings.report_interval_s
    plain = world.agent(await world.node(await world.cluster(), NodeRole.HEAD), http)
    assert (await plain.register()).json()["service_id"] == ""
    assert (await plain.report()).json()["interval_s"] == world.settings.report_interval_s


def traffic(version_id: str, requests: int, errors: int = 0, slow: int = 0) -> dict[str, Any]:
    buckets = [0] * BUCKETS
    buckets[0], buckets[-1] = requests - slow, slow
    found = ServeTraffic(version_id=version_id, requests=requests, errors=errors, buckets=buckets)
    return found.model_dump(mode="json")


async def test_what_the_proxies_saw_stands_in_the_report_and_in_the_metrics(
    world: World, http: httpx.AsyncClient
) -> None:
    service_id, version_id = await a_version(world)
    heads = [await a_head(world, http, service_id) for _ in range(2)]
    for requests in ((10, 0), (25, 5), (3, 5)):  # the first head's proxy starts anew
        for head, count in zip(heads, requests, strict=True):
            answer = await head.report(serve=traffic(version_id, count, errors=min(count, 1)))
            assert answer.status_code == 200
    clusters = [head.node.cluster_id for head in heads]

    async def written() -> Any:
        found = await latest_traffic(world.db, clusters)
        return found if [found[c][0].requests for c in clusters if c in found] == [3, 5] else None

    assert (await seen(written))[clusters[0]][0].version_id == version_id
    assert (await stored_report(world, heads[0].node.id)).doc["serve"]["requests"] == 3
    text = generate_latest().decode()
    name = f"chat-{service_id[-6:]}"
    labels = f'{{project="default",service="{name}",service_id="{service_id}",version="v1"}}'
    # What it saw before it was heard first is not counted: 10 -> 25 are 15, then 3; the other one 0 -> 5.
    assert f"heliostat_service_requests_total{labels} 23.0" in _sorted(text)
    assert f"heliostat_service_errors_total{labels} 2.0" in _sorted(text)


def _sorted(text: str) -> str:
    """Labels by name."""
    lines = []
    for line in text.splitlines():
        head, brace, rest = line.partition("{")
        inside, close, value = rest.partition("}")
        lines.append(f"{head}{brace}{','.join(sorted(inside.split(',')))}{close}{value}" if brace else line)
    return "\n".join(lines)


async def test_the_latency_histogram_is_cumulative(world: World) -> None:
    service_id, version_id = await a_version(world)
    totals, registry = ServeTotals(), CollectorRegistry()
    registry.register(totals)
    for seen_so_far in (traffic(version_id, 0), traffic(version_id, 4, slow=1)):
        await totals.add(world.db, "nd_1", service_id, ServeTraffic.model_validate(seen_so_far))
    await totals.add(world.db, "nd_1", service_id, ServeTraffic(version_id=version_id, buckets=[1]))  # no histogram
    await totals.add(world.db, "nd_2", service_id, ServeTraffic(version_id="sv_unknown", requests=1))
    labels = {
        "service_id": service_id, "service": f"chat-{service_id[-6:]}", "version": "v1", "project": "default",
    }  # fmt: skip
    name = "heliostat_service_latency_seconds"

    def value(suffix: str, **more: str) -> float | None:
        return registry.get_sample_value(f"{name}_{suffix}", {**labels, **more})

    assert [value("bucket", le=le) for le in ("0.001", "60.0", "+Inf")] == [3.0, 3.0, 4.0]
    assert value("count") == 4.0
    assert value("sum") == pytest.approx(60 + 3 * 0.0005)
    assert len({s.labels["version"] for m in registry.collect() for s in m.samples}) == 1


async def test_services_and_versions_of_the_same_name_are_told_apart_or_added_up(world: World) -> None:
    """A service was made anew under its name; and the name of a version that the records forgot was given again."""
    first, version_id = await a_version(world)
    second, second_version = await a_version(world)
    again = new_id("sv")
    totals, registry = ServeTotals(), CollectorRegistry()
    registry.register(totals)
    await totals.add(world.db, "nd_1", first, ServeTraffic(version_id=version_id))
    async with world.db.begin() as conn:
        await conn.execute(services.update().where(services.c.id == second).values(name=f"chat-{first[-6:]}"))
        mine = service_versions.c.id == version_id
        await conn.execute(service_versions.update().where(mine).values(id=again))
    told = (("nd_1", first, version_id), ("nd_2", first, again), ("nd_3", second, second_version))
    for count in (0, 4):
        for node, service, version in told:
            seen_so_far = ServeTraffic.model_validate(traffic(version, count, errors=count // 4))
            await totals.add(world.db, node, service, seen_so_far)
    lines = [line.rpartition(" ")[0] for line in generate_latest(registry).decode().splitlines() if line[0] != "#"]
    assert len(set(lines)) == len(lines), "no series twice"
    labels = {"service": f"chat-{first[-6:]}", "version": "v1", "project": "default"}
    for service, requests, errors in ((first, 8, 2), (second, 4, 1)):
        mine = labels | {"service_id": service}
        assert registry.get_sample_value("heliostat_service_requests_total", mine) == requests
        assert registry.get_sample_value("heliostat_service_errors_total", mine) == errors
        assert registry.get_sample_value("heliostat_service_latency_seconds_count", mine) == requests
