"""Fake agents against a stand-in of the agents' API, which checks what they say with the real models."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from clouds.boot.user_data import user_data
from clouds.fake.agent import Behaviour, FakeFleet, handed_over
from clouds.fake.machines import FakeMachines
from heliostat.models.agents import (
    Command,
    CommandKind,
    CommandList,
    CommandResult,
    Fact,
    FactKind,
    HeadAddress,
    NodeBrief,
    NodeConfigAnswer,
    RegisterRequest,
    ReportAnswer,
    ReportRequest,
    ServeStatus,
    ServeTraffic,
)
from heliostat.models.clusters import NodeRole, NodeState
from heliostat.models.services import LATENCY_BOUNDS_MS, quantile
from tests.clouds.support import Cloud


class Api:
    """One cluster per node id prefix: ``c1-head``, ``c1-w1`` …"""

    def __init__(self) -> None:
        self.facts: dict[str, list[Fact]] = defaultdict(list)
        self.reports: dict[str, ReportRequest] = {}
        self.results: dict[str, list[CommandResult]] = defaultdict(list)
        self.open: dict[str, dict[str, Command]] = defaultdict(dict)
        self.gone: set[str] = set()
        self.away = False
        self.acks = True
        self.tokens: dict[str, str] = {}
        self.gcs: dict[str, str] = {}
        self.changed = asyncio.Event()
        routes = [
            Route("/agent/v1/register", self.register, methods=["POST"]),
            Route("/agent/v1/report", self.report, methods=["POST"]),
            Route("/agent/v1/head", self.head),
            Route("/agent/v1/commands", self.commands),
            Route("/agent/v1/commands/{id}/result", self.result, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def when(self, what: Callable[[], Any]) -> Any:
        async with asyncio.timeout(30):
            while not (value := what()):
                self.changed.clear()
                await self.changed.wait()
        return value

    def kinds(self, node: str) -> list[str]:
        return [fact.kind for fact in self.facts[node]]

    def give(self, node: str, kind: CommandKind, id: str, **args: Any) -> None:
        self.open[node][id] = Command(id=id, kind=kind, args=args)
        self.changed.set()

    def _node(self, request: Request) -> str | Response:
        if self.away:
            return Response(status_code=503)
        node = self.tokens.get(request.headers.get("authorization", "")[len("Bearer ") :])
        if node is None:
            return Response(status_code=401)
        return Response(status_code=410) if node in self.gone else node

    async def register(self, request: Request) -> Response:
        body = RegisterRequest.model_validate(await request.json())
        if self.away:
            return Response(status_code=503)
        assert body.bootstrap_token == f"token of {body.node_id}"
        cluster, _, name = body.node_id.partition("-")
        token = hashlib.sha256(f"{body.node_id}{time.monotonic_ns()}".encode()).hexdigest()
        self.tokens = {t: n for t, n in self.tokens.items() if n != body.node_id} | {token: body.node_id}
        answer = NodeConfigAnswer(
            node_token=token, node_id=body.node_id, cluster_id=cluster, cluster_name=cluster,
            role=NodeRole.HEAD if name == "head" else NodeRole.WORKER, group=name, resources={}, labels={},
            ray_token="t", deadman_s=60,
        )  # fmt: skip
        self.changed.set()
        return JSONResponse(answer.model_dump(mode="json"))

    async def report(self, request: Request) -> Response:
        node = self._node(request)
        if isinstance(node, Response):
            return node
        body = ReportRequest.model_validate(await request.json())
        self.reports[node] = body
        cluster = node.partition("-")[0]
        if body.gcs_address:
            self.gcs[cluster] = body.gcs_address
        if self.acks:
            known = {fact.id for fact in self.facts[node]}
            self.facts[node] += [fact for fact in body.facts if fact.id not in known]
        workers = [
            NodeBrief(id=n, group="w", state=NodeState.RUNNING)
            for n in self.tokens.values()
            if n.startswith(f"{cluster}-w") and n not in self.gone
        ]
        acked = [fact.id for fact in body.facts] if self.acks else []
        self.changed.set()
        return JSONResponse(ReportAnswer(interval_s=0.05, acked=acked, nodes=workers).model_dump(mode="json"))

    async def head(self, request: Request) -> Response:
        node = self._node(request)
        if isinstance(node, Response):
            return node
        found = self.gcs.get(node.partition("-")[0])
        if found is None:
            await asyncio.sleep(0.02)
            return Response(status_code=404)
        return JSONResponse(HeadAddress(generation=1, gcs_address=found).model_dump())

    async def commands(self, request: Request) -> Response:
        node = self._node(request)
        if isinstance(node, Response):
            return node
        for _ in range(100):
            if self.open[node] or node in self.gone:
                break
            await asyncio.sleep(0.005)
        found = CommandList(commands=list(self.open[node].values()))
        return JSONResponse(found.model_dump(mode="json"))

    async def result(self, request: Request) -> Response:
        node = self._node(request)
        if isinstance(node, Response):
            return node
        command = request.path_params["id"]
        self.results[command].append(CommandResult.model_validate(await request.json()))
        self.open[node].pop(command, None)
        self.changed.set()
        return Response(status_code=204)


@pytest_asyncio.fixture
async def api() -> Api:
    return Api()


@pytest_asyncio.fixture
async def fleet(api: Api) -> AsyncIterator[FakeFleet]:
    found = FakeFleet(lambda: httpx.AsyncClient(transport=httpx.ASGITransport(app=api.app)), Behaviour(damp_s=0.1))
    yield found
    await found.stop()
    assert found.errors == []


def script(node: str) -> str:
    return user_data("http://api.test", node, 1, f"token of {node}", "ab" * 32)


async def test_a_run_from_submit_to_end(api: Api, fleet: FakeFleet) -> None:
    fleet.behaviour.run_s = 0.15
    fleet.start(script("c1-head"), "10.0.0.1")
    await api.when(lambda: "activity" in api.kinds("c1-head"))
    ready, idle = api.facts["c1-head"]
    assert (ready.kind, ready.data["gcs_address"]) == (FactKind.RAY_READY, "10.0.0.1:6379")
    assert idle.data["activity"] == "idle"
    api.give("c1-head", CommandKind.SUBMIT_RUN, "cmd-1", run_id="job_1-1", entrypoint="x")
    await api.when(lambda: "run_ended" in api.kinds("c1-head"))
    await api.when(lambda: api.kinds("c1-head")[-1] == "activity" and api.reports["c1-head"].activity == "idle")
    assert api.kinds("c1-head") == ["ray_ready", "activity", "run_running", "activity", "run_ended", "activity"]
    assert api.results["cmd-1"] == [CommandResult(ok=True, result={"accepted": True})]
    ended = next(f for f in api.facts["c1-head"] if f.kind == FactKind.RUN_ENDED)
    assert ended.data == {
        "run_id": "job_1-1", "status": "SUCCEEDED", "exit_code": 0, "message": "", "error": "", "timed_out": False,
    }  # fmt: skip


async def test_commands_are_carried_out_once(api: Api, fleet: FakeFleet) -> None:
    fleet.behaviour.run_s = 100
    head = fleet.start(script("c1-head"))
    api.give("c1-head", CommandKind.SUBMIT_RUN, "a", run_id="r", entrypoint="x")
    await api.when(lambda: api.results["a"])
    api.give("c1-head", CommandKind.SUBMIT_RUN, "a", run_id="r", entrypoint="x")
    api.give("c1-head", CommandKind.SUBMIT_RUN, "b", run_id="r", entrypoint="x")
    await api.when(lambda: len(api.results["a"]) == 2 and api.results["b"])
    assert list(head.runs) == ["r"]
    assert {r.ok for r in api.results["a"] + api.results["b"]} == {True}
    api.give("c1-head", CommandKind.FENCE, "f")
    await api.when(lambda: api.results["f"])
    assert api.results["f"][0].result["activity"] == "busy"
    api.give("c1-head", CommandKind.SUBMIT_RUN, "c", run_id="r2", entrypoint="x")
    await api.when(lambda: api.results["c"])
    assert not api.results["c"][0].ok
    assert "fenced" in api.results["c"][0].error
    api.give("c1-head", CommandKind.STOP_RUN, "s", run_id="r")
    api.give("c1-head", CommandKind.STOP_RUN, "u", run_id="never")
    await api.when(lambda: api.results["s"] and api.results["u"] and "run_ended" in api.kinds("c1-head"))
    assert api.results["s"][0].result == {"status": "STOPPED", "exit_code": None}
    assert api.results["u"][0].result["status"] == "UNKNOWN"
    api.give("c1-head", CommandKind.UNFENCE, "x")
    await api.when(lambda: api.results["x"])
    api.give("c1-head", CommandKind.SUBMIT_RUN, "d", run_id="never", entrypoint="x")
    await api.when(lambda: api.results["d"])
    assert head.runs == {}, "a stopped run never starts afterwards"


async def test_failures_and_timeouts(api: Api, fleet: FakeFleet) -> None:
    fleet.behaviour.run = lambda args: {"fails": (0.0, 7), "slow": (100.0, 0)}[args["entrypoint"]]
    fleet.start(script("c1-head"))
    api.give("c1-head", CommandKind.SUBMIT_RUN, "a", run_id="r1", entrypoint="fails")
    api.give("c1-head", CommandKind.SUBMIT_RUN, "b", run_id="r2", entrypoint="slow", timeout_s=0.05)
    await api.when(lambda: api.kinds("c1-head").count("run_ended") == 2)
    ended = {f.data["run_id"]: f.data for f in api.facts["c1-head"] if f.kind == FactKind.RUN_ENDED}
    assert (ended["r1"]["status"], ended["r1"]["exit_code"], ended["r1"]["timed_out"]) == ("FAILED", 7, False)
    assert (ended["r2"]["status"], ended["r2"]["timed_out"]) == ("FAILED", True)


async def test_workers_are_their_heads_news(api: Api, fleet: FakeFleet) -> None:
    worker = fleet.start(script("c1-w1"))
    other = fleet.start(script("c2-w1"))
    fleet.start(script("c1-head"))
    await api.when(lambda: [f for f in api.facts["c1-head"] if f.data.get("node_id") == "c1-w1"])
    await api.when(lambda: api.reports["c1-head"].workers_alive == ["c1-w1"])
    assert "c2-w1" not in api.reports, "a worker without a head waits for it"
    worker.power_off()
    await api.when(lambda: "node_lost" in api.kinds("c1-head"))
    # The head's first "idle" may be told together with it.
    assert [f.data["node_id"] for f in api.facts["c1-head"] if f.kind == "node_lost"] == ["c1-w1"]
    await api.when(lambda: api.reports["c1-head"].workers_alive == [])
    assert not other.task.done()


async def test_facts_are_kept_while_the_api_is_away(api: Api, fleet: FakeFleet) -> None:
    head = fleet.start(script("c1-head"))
    await api.when(lambda: api.reports.get("c1-head") and api.kinds("c1-head"))
    api.away = True
    head.tell("desired", desired={"w": 2})
    await asyncio.sleep(0.1)
    assert "desired" not in api.kinds("c1-head")
    api.away, api.acks = False, False
    seq = api.reports["c1-head"].seq
    await api.when(lambda: api.reports["c1-head"].seq > seq + 1)
    assert "desired" in [f.kind for f in api.reports["c1-head"].facts], "repeated until it is acknowledged"
    api.acks = True
    await api.when(lambda: "desired" in api.kinds("c1-head"))
    api.tokens.clear()  # the records were restored: 401, and registering again is allowed
    await api.when(lambda: "c1-head" in api.tokens.values())
    seq = api.reports["c1-head"].seq
    await api.when(lambda: api.reports["c1-head"].seq > seq)


async def test_410_ends_the_node(api: Api, fleet: FakeFleet) -> None:
    head = fleet.start(script("c1-head"))
    await api.when(lambda: "c1-head" in api.reports)
    api.gone.add("c1-head")
    await asyncio.wait_for(head.task, 30)
    assert fleet.agents == {}
    assert fleet.heads == {}


async def test_a_node_that_dies_says_nothing(api: Api, fleet: FakeFleet) -> None:
    fleet.behaviour.dies_after_s = 1.5  # after it has told that the run runs, on a busy machine too
    fleet.behaviour.run_s = 1000
    head = fleet.start(script("c1-head"))
    api.give("c1-head", CommandKind.SUBMIT_RUN, "a", run_id="r", entrypoint="x")
    await asyncio.wait_for(head.task, 30)
    assert "run_running" in api.kinds("c1-head")
    assert "run_ended" not in api.kinds("c1-head")


async def test_machines_of_the_fake_cloud_boot_agents(api: Api, fleet: FakeFleet, tmp_path: Path) -> None:
    """In this process, and handed over to it from another one."""
    for number, boot in ((1, fleet.boot), (2, handed_over(tmp_path / "boots"))):
        node = f"c{number}-head"
        machines = FakeMachines(boot=boot)
        watching = asyncio.create_task(fleet.watch(tmp_path / "boots"))
        spec = Cloud(machines, tmp_path).spec(node_id=node, user_data=script(node))
        machine = await asyncio.to_thread(machines.launch, spec)
        await api.when(lambda node=node: node in api.reports)
        agent = fleet.agents[node]
        assert agent.ip == machine.ip
        await asyncio.to_thread(machines.terminate, [machine.machine_id])
        await asyncio.wait_for(agent.task, 30)
        watching.cancel()


async def test_serve_is_deployed_probed_and_drained(api: Api, fleet: FakeFleet) -> None:
    fleet.behaviour.serve_healthy_s = 0.2
    fleet.behaviour.serve_requests_per_s = 500
    head = fleet.start(script("c1-head"), "10.0.0.1")
    await api.when(lambda: "c1-head" in api.reports)
    assert api.reports["c1-head"].serve is None, "before the first deploy there is no proxy"
    gate = {"enabled": True, "hashes": ["ab" * 32]}
    api.give("c1-head", CommandKind.SERVE_DEPLOY, "d", version_id="sv_1", target_capacity=None, gate=gate)
    await api.when(lambda: api.results["d"])
    assert api.results["d"] == [CommandResult(ok=True, result={"http": "10.0.0.1:8000", "grpc": ""})]
    probe = {"version_id": "sv_1", "url": "http://x", "cluster_id": "c1", "probes": [{"application": "default"}]}
    api.give("c1-head", CommandKind.SERVE_PROBE, "p1", **probe)
    await api.when(lambda: api.results["p1"])

    def told() -> list[ServeStatus]:
        return [ServeStatus.model_validate(f.data) for f in api.facts["c1-head"] if f.kind == FactKind.SERVE]

    await api.when(lambda: len(told()) == 2)
    deploying, healthy = told()
    assert (deploying.healthy, deploying.version_id, deploying.deploy) == (False, "sv_1", "d")
    assert deploying.message
    assert (healthy.healthy, healthy.http, healthy.failed) == (True, "10.0.0.1:8000", False)
    api.give("c1-head", CommandKind.SERVE_PROBE, "p2", **probe)
    await api.when(lambda: api.results["p2"])
    assert api.results["p2"][0].result["healthy"]
    assert api.results["p2"][0].result["applications"]["default"]["status"] == 200
    assert head.serve.gate == gate

    def traffic() -> ServeTraffic:
        found = api.reports["c1-head"].serve
        assert found is not None
        return found

    await api.when(lambda: traffic().requests > 20)
    assert traffic().version_id == "sv_1"
    assert sum(traffic().buckets) == traffic().requests
    assert len(traffic().buckets) == len(LATENCY_BOUNDS_MS) + 1
    assert 10 <= (quantile(traffic().window_buckets, 0.5) or 0) <= 15
    api.give("c1-head", CommandKind.SERVE_DRAIN, "e", timeout_s=60)
    await api.when(lambda: api.results["e"])
    assert api.results["e"][0].result["drained"]
    await api.when(lambda: traffic().draining and traffic().connections == 0)
    seen, seq = traffic().requests, api.reports["c1-head"].seq
    await api.when(lambda: api.reports["c1-head"].seq > seq + 1)
    assert traffic().requests == seen, "nobody sends what is drained anything"
    api.give("c1-head", CommandKind.SERVE_GATE, "g", gate=gate, draining=False)
    await api.when(lambda: traffic().requests > seen)


@pytest.mark.long
async def test_two_thousand_runs_at_once(api: Api, fleet: FakeFleet) -> None:
    fleet.behaviour.run_s = 1000
    heads = [f"c{c}-head" for c in range(10)]
    for node in heads:
        fleet.start(script(node))
        for r in range(200):
            api.give(node, CommandKind.SUBMIT_RUN, f"{node}.{r}", run_id=f"{node}.{r}", entrypoint="x")
    await api.when(lambda: sum(len(api.facts[node]) for node in heads) >= 2000)
    await api.when(lambda: sum(api.kinds(node).count("run_running") for node in heads) == 2000)
    assert sum(len(agent.runs) for agent in fleet.agents.values()) == 2000
    for node in heads:
        for r in range(200):
            api.give(node, CommandKind.STOP_RUN, f"stop.{node}.{r}", run_id=f"{node}.{r}")
    await api.when(lambda: sum(len(api.facts[node]) for node in heads) >= 4000)
    await api.when(lambda: sum(api.kinds(node).count("run_ended") for node in heads) == 2000)
    for node in heads:
        ended = [f.data["run_id"] for f in api.facts[node] if f.kind == FactKind.RUN_ENDED]
        assert sorted(ended) == sorted(f"{node}.{r}" for r in range(200))
