from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from sqlalchemy import select, update
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.service import RPCError, RPCStatusCode
from temporalio.testing import WorkflowEnvironment

from api.agents.facts import FACTS_MAX, Facts
from api.agents.fleet import CallingNode, Fleet
from api.agents.reports import Reports
from api.agents.routes import MAX_REPORTS_PER_S, WORKER_FACTOR, interval_s
from heliostat.errors import Unavailable
from heliostat.models.agents import Fact, ReportRequest
from heliostat.models.clusters import NodeRole, NodeState
from heliostat.models.common import utcnow
from store.database import Database
from store.reports import write_reports
from store.tables import followers, hearing, log_streams, nodes, reports
from tests.api.agents.conftest import TEMPORAL, Agent, Recorder, World, fact


async def seen(condition: Any, seconds: float = 30) -> Any:
    """Waits for an awaitable condition to be true."""
    async with asyncio.timeout(seconds):
        while not (value := await condition()):
            await asyncio.sleep(0.02)
        return value


async def stored_report(world: World, node_id: str) -> Any:
    async with world.db.read() as conn:
        return (await conn.execute(select(reports).where(reports.c.node_id == node_id))).first()


async def test_the_newest_report_is_written_down(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    head = await world.joined(cluster, NodeRole.HEAD, http)
    answer = await head.report(activity="busy", activity_reason="job x", workers_alive=["nd_1"], log_bytes_pending=7)
    assert answer.json()["interval_s"] == world.settings.report_interval_s

    async def newest() -> Any:
        row = await stored_report(world, head.node.id)
        return row if row is not None and row.seq == 2 else None

    row = await seen(newest)
    assert (row.cluster_id, row.is_head, row.activity) == (cluster.id, True, "busy")
    assert row.doc["workers_alive"] == ["nd_1"]
    assert row.doc["log_bytes_pending"] == 7
    assert "facts" not in row.doc


async def test_the_first_report_closes_registration(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    head = await world.joined(cluster, NodeRole.HEAD, http)
    async with world.db.read() as conn:
        assert await conn.scalar(select(nodes.c.authenticated).where(nodes.c.id == head.node.id)) is True
    other = await head.report(boot_id="another process")
    assert other.status_code == 410


async def test_a_head_sees_its_workers_and_what_is_wanted_a_worker_does_not(
    world: World, http: httpx.AsyncClient
) -> None:
    cluster = await world.cluster()
    head = await world.joined(cluster, NodeRole.HEAD, http)
    worker = await world.joined(cluster, NodeRole.WORKER, http)
    ended = await world.node(cluster, NodeRole.WORKER)
    await world.change(cluster, ended.model_copy(update={"state": NodeState.TERMINATED, "ended_at": utcnow()}))
    said = {"state": NodeState.RUNNING, "ip": "127.0.9.2", "notice": "AWS takes this spot machine back"}
    running = worker.node.model_copy(update=said)
    cluster.desired = {"small": 2}
    await world.change(cluster, running)

    async def news() -> Any:
        answer = (await head.report()).json()
        return answer if answer["desired"] == {"small": 2} else None

    answer = await seen(news)
    assert answer["nodes"] == [
        {"id": worker.node.id, "group": "small", "state": "RUNNING", "ip": "127.0.9.2", "leaving": True}
    ]
    assert [(g["name"], g["max_nodes"]) for g in answer["groups"]] == [
        (g.name, g.max_nodes) for g in cluster.compute_config.worker_nodes
    ]
    answer = (await worker.report()).json()
    assert (answer["nodes"], answer["desired"], answer["groups"]) == (None, None, None)


async def test_somebody_follows(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    head = await world.joined(cluster, NodeRole.HEAD, http)
    assert (await head.report()).json()["follow"] is False
    async with world.db.begin() as conn:
        await conn.execute(followers.insert().values(cluster_id=cluster.id, until=utcnow() + timedelta(minutes=5)))

    async def follow() -> bool:
        return bool((await head.report()).json()["follow"])

    async def no_more() -> bool:
        return not await follow()

    await seen(follow)
    async with world.db.begin() as conn:
        await conn.execute(update(followers).values(until=utcnow()))
    await seen(no_more)


async def test_facts_reach_the_workflow_that_owns_the_thing(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    head = await world.joined(cluster, NodeRole.HEAD, http)
    worker = await world.node(cluster, NodeRole.WORKER)
    run_id = await world.submitted(cluster, head.node)
    told = [
        fact("ray_ready", gcs_address="127.0.9.1:6379", ray_version="2.60.0"),
        fact("ray_ready", node_id=worker.id),
        fact("activity", activity="busy"),
        fact("run_running", run_id=run_id),
        fact("run_ended", run_id=run_id, status="SUCCEEDED", exit_code=0),
        fact("node_lost", node_id=worker.id, reason="health check"),
    ]
    answer = await head.report(*told)
    assert answer.json()["acked"] == [f["id"] for f in told]
    events = [f"{head.node.id}/{f['id']}" for f in told]
    assert (await world.heard(cluster.id))[1:] == [
        f"fact {events[0]} ray_ready",
        f"fact {events[1]} ray_ready",
        f"fact {events[2]} activity",
        f"fact {events[5]} node_lost",
    ]
    job = run_id.rpartition("-")[0]
    assert await world.heard(job) == [f"run_fact {events[3]} run_running", f"run_fact {events[4]} run_ended"]
    data = await world.temporal.get_workflow_handle(job).query(Recorder.all_data)
    assert data[1] == {"run_id": run_id, "status": "SUCCEEDED", "exit_code": 0}


async def test_what_a_head_tells_of_many_workers_is_few_messages(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    head = await world.joined(cluster, NodeRole.HEAD, http)
    workers = [await world.node(cluster, NodeRole.WORKER) for _ in range(FACTS_MAX + 2)]
    told = [fact("ray_ready", node_id=w.id) for w in workers]
    told.insert(3, fact("ray_ready", node_id="nd_of_another"))  # refused, and so safe
    told.append(fact("activity", activity="busy"))
    told.append(fact("node_lost", node_id=workers[0].id, reason="r"))
    answer = await head.report(*told)
    assert sorted(answer.json()["acked"]) == sorted(f["id"] for f in told)
    kinds = [said.rpartition(" ")[2] for said in (await world.heard(cluster.id))[1:]]
    assert kinds == ["ray_ready"] * len(workers) + ["activity", "node_lost"]
    heard = [said.split()[1] for said in (await world.heard(cluster.id))[1:]]
    assert heard == [f"{head.node.id}/{f['id']}" for f in told if f["data"].get("node_id") != "nd_of_another"]
    assert await world.temporal.get_workflow_handle(cluster.id).query(Recorder.of_several) == 2


async def test_a_fact_that_temporal_never_takes_costs_no_other(world: World) -> None:
    heard: list[str] = []

    class Handle:
        async def signal(self, name: str, said: Any, **more: Any) -> None:
            facts = said if isinstance(said, list) else [said]
            if any(f.data.get("bad") for f in facts):
                raise RPCError("blob size exceeds limit", RPCStatusCode.INVALID_ARGUMENT, b"")
            heard.extend(f.event_id for f in facts)

    class Temporal:
        def get_workflow_handle(self, id: str) -> Handle:
            return Handle()

    facts = Facts(world.db, cast(Client, Temporal()), Fleet(world.db))
    node = CallingNode("nd_1", "cl_1", NodeRole.HEAD, 1, "b", True, None, 0.0)
    told = [Fact.model_validate(fact("ray_ready", bad=n == 1)) for n in range(3)]
    assert await facts.deliver(node, told) == [f.id for f in told]
    assert heard == [f"nd_1/{told[0].id}", f"nd_1/{told[2].id}"]


async def test_a_repeated_fact_keeps_its_event_id(world: World, http: httpx.AsyncClient) -> None:
    """At least once: the answer was lost, the workflow dedupes by the id."""
    cluster = await world.cluster()
    head = await world.joined(cluster, NodeRole.HEAD, http)
    busy = fact("activity", activity="busy")
    for _ in range(2):
        assert (await head.report(busy)).json()["acked"] == [busy["id"]]
    heard = (await world.heard(cluster.id))[1:]
    assert heard == [f"fact {head.node.id}/{busy['id']} activity"] * 2


async def test_a_fact_for_a_workflow_that_has_ended_is_dropped(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    head = await world.joined(cluster, NodeRole.HEAD, http)
    run_id = await world.submitted(cluster, head.node)
    job = world.temporal.get_workflow_handle(run_id.rpartition("-")[0])
    await job.signal(Recorder.end)
    await job.result()
    ended = fact("run_ended", run_id=run_id, status="STOPPED")
    assert (await head.report(ended)).json()["acked"] == [ended["id"]]


async def test_a_node_tells_of_its_own_cluster_only(world: World, http: httpx.AsyncClient) -> None:
    mine, theirs = await world.cluster(), await world.cluster()
    head = await world.joined(mine, NodeRole.HEAD, http)
    worker = await world.joined(mine, NodeRole.WORKER, http)
    victim = await world.joined(theirs, NodeRole.HEAD, http)
    victims_worker = await world.node(theirs, NodeRole.WORKER)
    victims_run = await world.submitted(theirs, victim.node)
    my_run = await world.submitted(mine, head.node)
    refused: list[tuple[Agent, dict[str, Any]]] = [
        (head, fact("run_ended", run_id=victims_run, status="FAILED")),
        (head, fact("run_running", run_id=victims_run)),
        (head, fact("run_ended", status="FAILED")),
        (head, fact("node_lost", node_id=victims_worker.id)),
        (head, fact("ray_ready", node_id=victims_worker.id)),
        (worker, fact("run_ended", run_id=my_run, status="FAILED")),
        (worker, fact("node_lost", node_id=head.node.id)),
        (worker, fact("ray_ready", node_id=head.node.id)),
        (worker, fact("activity", activity="idle")),
        (worker, fact("desired", desired={"small": 3})),
    ]
    before = {c: await world.heard(c) for c in (mine.id, theirs.id)}
    for agent, told in refused:
        # Acknowledged, so that it is not repeated for ever, and dropped.
        assert (await agent.report(told)).json()["acked"] == [told["id"]]
    assert {c: await world.heard(c) for c in (mine.id, theirs.id)} == before
    for run_id in (victims_run, my_run):
        assert await world.heard(run_id.rpartition("-")[0]) == []


async def test_a_huge_text_is_shortened(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    head = await world.joined(cluster, NodeRole.HEAD, http)
    run_id = await world.submitted(cluster, head.node)
    ended = fact("run_ended", run_id=run_id, message="begin" + "x" * 3_000_000 + "end")
    assert (await head.report(ended)).json()["acked"] == [ended["id"]]
    (data,) = await world.temporal.get_workflow_handle(run_id.rpartition("-")[0]).query(Recorder.all_data)
    assert len(data["message"]) < 10_000
    assert data["message"].startswith("begin")
    assert data["message"].endswith("end")


async def test_the_end_of_a_run_completes_its_log(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    head = await world.joined(cluster, NodeRole.HEAD, http)
    run_id = await world.submitted(cluster, head.node)
    stream = f"runs/{run_id}.log"
    items = [{"stream": stream, "offset": 0}, {"stream": "node/agent.log", "offset": 0}]
    assert (await head.post("/logs/sign", {"items": items})).status_code == 200
    await head.report(fact("run_ended", run_id=run_id, status="SUCCEEDED"))
    async with world.db.read() as conn:
        rows = (await conn.execute(select(log_streams).order_by(log_streams.c.stream))).all()
    assert [(r.stream, r.complete) for r in rows] == [("node/agent.log", False), (stream, True)]


async def test_protocol_0_has_no_follow(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    head = world.agent(await world.node(cluster, NodeRole.HEAD), http)
    head.protocol = 0
    assert (await head.register()).status_code == 200
    answer = await head.report(fact("activity", activity="idle"))
    assert answer.status_code == 200
    assert "follow" not in answer.json()
    assert len(answer.json()["acked"]) == 1
    head.protocol = 7
    assert (await head.report()).status_code == 422


async def test_without_a_token_nothing_is_heard(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    agent = world.agent(await world.node(cluster, NodeRole.HEAD), http)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic x"}, {"authorization": "Bearer"}):
        for method, path in (
            ("POST", "/report"),
            ("GET", "/commands?wait=0"),
            ("GET", "/head?wait=0"),
            ("POST", "/logs/sign"),
            ("POST", "/commands/x/result"),
        ):
            answer = await http.request(method, f"/agent/v1{path}", headers=headers, json={})
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated"), (path, headers)
    assert agent.token == ""


@pytest.mark.long
async def test_temporal_away_keeps_the_facts_with_the_agent(world: World, tmp_path: Path) -> None:
    """Killed and started again on the same file: the agent's repeats arrive, in order; reports went on."""
    args: dict[str, Any] = {
        "data_converter": pydantic_data_converter,
        "dev_server_existing_path": str(TEMPORAL),
        "dev_server_log_level": "error",
        "dev_server_database_filename": str(tmp_path / "temporal.db"),
    }
    env = await WorkflowEnvironment.start_local(**args)
    port = int(env.client.service_client.config.target_host.rpartition(":")[2])
    try:
        async with world.api(temporal=env.client) as http:
            cluster = await world.cluster(record=False)
            await env.client.start_workflow(Recorder.run, id=cluster.id, task_queue=world.queue)
            head = await world.joined(cluster, NodeRole.HEAD, http)
            run_id = await world.submitted(cluster, head.node)
            await env.client.start_workflow(Recorder.run, id=run_id.rpartition("-")[0], task_queue=world.queue)
            await env.shutdown()
            told = [fact("activity", activity="busy"), fact("run_ended", run_id=run_id, status="FAILED")]
            answer = await head.report(*told, activity="busy")
            assert (answer.status_code, answer.json()["acked"]) == (200, [])
            quick = await head.report(*told)
            assert (quick.elapsed.total_seconds() < 1, quick.json()["acked"]) == (True, [])
            assert (await world.agent(await world.node(cluster, NodeRole.WORKER), http).register()).status_code == 503

            async def written() -> bool:
                row = await stored_report(world, head.node.id)
                return row is not None and row.seq == head.seq

            await seen(written)
            env = await WorkflowEnvironment.start_local(**args, port=port)

            async def acked() -> bool:
                return bool((await head.report(*told)).json()["acked"] == [f["id"] for f in told])

            await seen(acked, 20)
            history = await env.client.get_workflow_handle(cluster.id).fetch_history()
            names = [
                e.workflow_execution_signaled_event_attributes.signal_name
                for e in history.events
                if e.HasField("workflow_execution_signaled_event_attributes")
            ]
            assert names == ["node_registered", "fact"]
    finally:
        await env.shutdown()


async def test_temporal_never_reached(world: World) -> None:
    """The API starts before Temporal does: its client is lazy."""
    absent = await Client.connect("127.0.0.1:1", lazy=True, data_converter=pydantic_data_converter)
    async with world.api() as http:
        cluster = await world.cluster()
        head = await world.joined(cluster, NodeRole.HEAD, http)
        token = head.token
    async with world.api(temporal=absent) as http:
        head.http = http
        assert head.token == token
        answer = await head.report(fact("activity", activity="busy"))
        assert (answer.status_code, answer.json()["acked"]) == (200, [])
        assert (await head.register()).status_code == 503


async def test_two_apis_share_the_records(world: World, http: httpx.AsyncClient) -> None:
    other_db = Database(world.db.url)
    async with world.api(db=other_db) as second:
        cluster = await world.cluster()
        head = await world.joined(cluster, NodeRole.HEAD, http)
        head.http = second
        assert (await head.report(gcs_address="127.0.9.1:1")).status_code == 200
        worker = await world.joined(cluster, NodeRole.WORKER, http)
        assert (await worker.get("/head", wait=20)).json()["gcs_address"] == "127.0.9.1:1"
        # Registered anew at one: the other stops taking the old token after its cache's time.
        old = head.headers
        head.http = http
        await head.register()
        assert (await head.report()).status_code == 200
        for node in second.app.state.agents.fleet._nodes.values():  # type: ignore[attr-defined]
            node.checked_at -= 11
        refused = await second.post("/agent/v1/report", json={"seq": 9, "sent_at": utcnow().isoformat()}, headers=old)
        assert refused.status_code == 401
    await other_db.dispose()


async def test_hearing_starts_anew_after_a_gap(world: World) -> None:
    flusher = Reports(world.db)
    await flusher.flush()

    async def heard() -> tuple[Any, Any]:
        async with world.db.read() as conn:
            row = (await conn.execute(select(hearing.c.since, hearing.c.last))).one()
        return row.since, row.last

    since, last = await heard()
    await flusher.flush()
    assert (await heard())[0] == since
    assert (await heard())[1] > last
    old = utcnow() - timedelta(minutes=10)
    for gap, continues in ((timedelta(seconds=1), True), (timedelta(seconds=6), False)):
        before = utcnow()
        async with world.db.begin() as conn:
            await conn.execute(update(hearing).values(since=old, last=before - gap))
        await flusher.flush()
        since, last = await heard()
        assert (since == old) is continues
        assert last >= before


async def test_the_api_hears_without_any_node(world: World, http: httpx.AsyncClient) -> None:
    async def beats() -> list[Any]:
        async with world.db.read() as conn:
            return list((await conn.execute(select(hearing.c.last))).scalars())

    first = await seen(beats)

    async def later() -> bool:
        return await beats() > first

    await seen(later)


async def test_reports_wait_for_the_records(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records are away: the newest report of each node is kept, and nothing says that we can hear."""
    flusher = Reports(world.db)
    cluster = await world.cluster()
    node = CallingNode("nd_1", cluster.id, NodeRole.HEAD, 1, "", True, None, 0.0)

    async def away(*_: Any) -> None:
        raise Unavailable("away")

    monkeypatch.setattr("api.agents.reports.write_reports", away)
    for seq in (1, 2):
        flusher.add(node, ReportRequest(seq=seq, sent_at=utcnow()))
        with contextlib.suppress(Unavailable):
            await flusher.flush()
    monkeypatch.setattr("api.agents.reports.write_reports", write_reports)
    assert await stored_report(world, "nd_1") is None
    await flusher.flush()
    assert (await stored_report(world, "nd_1")).seq == 2


def test_the_interval_stretches_with_the_number_of_nodes(world: World) -> None:
    def fleet(heads: int, workers: int) -> Fleet:
        found = Fleet(world.db)
        for i in range(heads + workers):
            role = NodeRole.HEAD if i < heads else NodeRole.WORKER
            found._nodes[str(i)] = CallingNode(str(i), "cl", role, 1, "", True, None, 0.0)
        return found

    head = CallingNode("h", "cl", NodeRole.HEAD, 1, "", True, None, 0.0)
    worker = CallingNode("w", "cl", NodeRole.WORKER, 1, "", True, None, 0.0)
    settings = world.settings
    assert interval_s(fleet(1, 3), head, settings) == settings.report_interval_s
    assert interval_s(fleet(1, 3), worker, settings) == settings.report_interval_s * WORKER_FACTOR
    many = fleet(300, 500)
    per_second = 300 / interval_s(many, head, settings) + 500 / interval_s(many, worker, settings)
    assert per_second == pytest.approx(MAX_REPORTS_PER_S, rel=0.02)
    assert interval_s(fleet(5000, 0), head, settings) == settings.silence_s / 4
