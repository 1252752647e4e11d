from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from temporalio import workflow
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.common import RetryPolicy
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import ActivityError, ApplicationError
from temporalio.worker import Worker

from activities.commands import CommandActivities, CommandRequest
from heliostat.models.agents import CommandKind
from heliostat.models.clusters import NodeRole
from heliostat.models.uploads import upload_key
from runtime.telemetry import COMMANDS_OPEN, REPORTS
from store.commands import close_commands, put_command
from store.encrypted_values import write_sealed
from store.tables import commands
from tests.api.agents.conftest import Agent, World


@workflow.defn(sandboxed=False)
class Asks:
    """A workflow that gives one command and awaits its result, as clusters and jobs do."""

    @workflow.run
    async def run(self, request: CommandRequest) -> dict[str, Any]:
        return await workflow.execute_activity_method(
            CommandActivities.run_command,
            request,
            start_to_close_timeout=timedelta(minutes=5),
            retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=50)),
        )


@pytest.fixture
async def head(world: World, http: httpx.AsyncClient) -> Agent:
    return await world.joined(await world.cluster(), NodeRole.HEAD, http)


@pytest.fixture
async def asking(world: World) -> AsyncIterator[str]:
    queue = uuid.uuid4().hex
    activities = CommandActivities(world.db)
    async with Worker(world.temporal, task_queue=queue, workflows=[Asks], activities=[activities.run_command]):
        yield queue


async def ask(world: World, queue: str, head: Agent, **args: Any) -> tuple[str, WorkflowHandle[Any, dict[str, Any]]]:
    request = CommandRequest(
        id=f"{head.node.cluster_id}/fence/{uuid.uuid4().hex[:6]}",
        cluster_id=head.node.cluster_id,
        node_id=head.node.id,
        kind=CommandKind.FENCE,
        args=args,
    )
    return request.id, await world.temporal.start_workflow(Asks.run, request, id=uuid.uuid4().hex, task_queue=queue)


async def give(world: World, head: Agent, **args: Any) -> str:
    """A command in the records, with nobody who waits for it."""
    command_id = f"{head.node.cluster_id}/{uuid.uuid4().hex[:6]}"
    kind = CommandKind.SUBMIT_RUN if "run_id" in args else CommandKind.FENCE
    await put_command(world.db, command_id, head.node.cluster_id, head.node.id, kind, args, b"nobody")
    return command_id


async def take(head: Agent, **params: Any) -> list[dict[str, Any]]:
    answer = await head.get("/commands", **params)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["commands"]
    return found


async def test_a_command_goes_to_the_head_and_its_result_to_the_workflow(
    world: World, asking: str, head: Agent
) -> None:
    waiting = asyncio.create_task(take(head, wait=25))
    command_id, handle = await ask(world, asking, head, a=1)
    (command,) = await waiting
    assert command == {"id": command_id, "kind": "fence", "args": {"a": 1}}
    answer = await head.post(f"/commands/{command_id}/result", {"ok": True, "result": {"activity": "idle"}})
    assert answer.status_code == 204
    assert await handle.result() == {"activity": "idle"}
    assert await take(head, wait=0) == []


async def test_a_waiting_head_gets_its_command_at_once(world: World, head: Agent) -> None:
    waits = []
    for _ in range(10):
        waiting = asyncio.create_task(take(head, wait=25))
        await asyncio.sleep(0.06)
        began = time.monotonic()
        command_id = await give(world, head)
        await waiting
        waits.append(time.monotonic() - began)
        await head.post(f"/commands/{command_id}/result", {"ok": True})
    assert sorted(waits)[5] < 2, waits  # of 25


async def test_a_known_command_does_not_end_the_long_poll(world: World, head: Agent) -> None:
    first, second = await give(world, head), await give(world, head)
    assert [c["id"] for c in await take(head, wait=5)] == [first, second]
    began = time.monotonic()
    assert [c["id"] for c in await take(head, wait=0.4, known=f"{first},{second}")] == [first, second]
    assert time.monotonic() - began >= 0.4
    assert [c["id"] for c in await take(head, wait=5, known=first)] == [first, second], "one of them is news"


async def test_only_its_own_head_is_given_a_command_and_may_answer_it(
    world: World, http: httpx.AsyncClient, head: Agent
) -> None:
    stranger = await world.joined(await world.cluster(), NodeRole.HEAD, http)
    command_id = await give(world, head)
    assert await take(stranger, wait=0) == []
    refused = await stranger.post(f"/commands/{command_id}/result", {"ok": True})
    assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
    cluster = await world.cluster()
    worker = await world.joined(cluster, NodeRole.WORKER, http)
    assert (await worker.get("/commands", wait=0)).status_code == 403
    assert (await worker.post(f"/commands/{command_id}/result", {"ok": True})).status_code == 403
    assert [c["id"] for c in await take(head, wait=0)] == [command_id]


async def test_a_failure_is_final_a_retryable_one_comes_again(world: World, asking: str, head: Agent) -> None:
    command_id, handle = await ask(world, asking, head)
    await take(head, wait=10)
    await head.post(f"/commands/{command_id}/result", {"ok": False, "error": "Ray starts", "retryable": True})
    (again,) = await take(head, wait=10)
    assert again["id"] == command_id
    await head.post(f"/commands/{command_id}/result", {"ok": False, "error": "no such run"})
    with pytest.raises(WorkflowFailureError) as failure:
        await handle.result()
    assert isinstance(failure.value.cause, ActivityError)
    cause = failure.value.cause.cause
    assert isinstance(cause, ApplicationError)
    assert (cause.type, cause.message, cause.non_retryable) == ("command_failed", "no such run", True)


async def test_a_second_result_changes_nothing(world: World, asking: str, head: Agent) -> None:
    command_id, handle = await ask(world, asking, head)
    await take(head, wait=10)
    for n in (1, 2):
        answer = await head.post(f"/commands/{command_id}/result", {"ok": True, "result": {"n": n}})
        assert answer.status_code == 204
    assert await handle.result() == {"n": 1}
    async with world.db.read() as conn:
        stored = await conn.scalar(select(commands.c.result).where(commands.c.id == command_id))
    assert stored["result"] == {"n": 1}


async def test_temporal_away_is_503_and_the_repeat_completes(world: World, asking: str, head: Agent) -> None:
    command_id, handle = await ask(world, asking, head)
    await take(head, wait=10)
    body = {"ok": True, "result": {"n": 1}}
    absent = await Client.connect("127.0.0.1:1", lazy=True, data_converter=pydantic_data_converter)
    async with world.api(temporal=absent) as cut_off:
        here, head.http = head.http, cut_off
        answer = await head.post(f"/commands/{command_id}/result", body)
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    head.http = here
    assert (await head.post(f"/commands/{command_id}/result", body)).status_code == 204
    assert await handle.result() == {"n": 1}


async def test_a_result_after_nobody_waits_any_more_is_taken(world: World, asking: str, head: Agent) -> None:
    command_id, handle = await ask(world, asking, head)
    await take(head, wait=10)
    await handle.terminate()
    assert (await head.post(f"/commands/{command_id}/result", {"ok": True})).status_code == 204
    await give(world, head)
    async with world.db.begin() as conn:
        await close_commands(conn, [head.node.id])
    assert await take(head, wait=0) == []


async def test_reports_and_open_commands_are_counted(world: World, head: Agent) -> None:
    reports, opened = REPORTS.labels(role="head")._value.get(), asyncio.create_task(take(head, wait=20))
    await head.report()
    command_id = await give(world, head)
    assert [c["id"] for c in await opened] == [command_id]
    assert REPORTS.labels(role="head")._value.get() > reports
    assert COMMANDS_OPEN._value.get() >= 1


async def test_references_are_opened_at_hand_over_and_stored_nowhere(world: World, head: Agent) -> None:
    code, module = (hashlib.sha256(x).hexdigest() for x in (b"code", b"module"))
    for digest in (code, module):
        world.bucket.put(upload_key("prj_1", digest), b"zip")
    async with world.db.begin() as conn:
        await write_sealed(conn, world.keys, "env_1", "prj_1", {"PASSWORD": "hunter2"})
    command_id = await give(
        world,
        head,
        run_id="job_x-1",
        env_ref="env_1",
        env_vars={"HELIOSTAT_JOB_ID": "job_x"},
        working_dir=f"upload:{code}",
        py_modules=[f"upload:{module}", "https://example.com/m.zip"],
        requirements=["numpy"],
    )
    for _ in range(2):  # handed over twice: a lost answer
        (command,) = await take(head, wait=0)
        assert command["args"] == {
            "run_id": "job_x-1",
            "env_vars": {"PASSWORD": "hunter2", "HELIOSTAT_JOB_ID": "job_x"},
            "working_dir": {"url": f"http://bucket/uploads/prj_1/{code}.zip?get&expires=3600", "sha256": code},
            "py_modules": [
                {"url": f"http://bucket/uploads/prj_1/{module}.zip?get&expires=3600", "sha256": module},
                {"remote": "https://example.com/m.zip"},
            ],
            "requirements": ["numpy"],
        }
    async with world.db.read() as conn:
        row = (await conn.execute(select(commands).where(commands.c.id == command_id))).one()
    assert "hunter2" not in str(row)
    assert "http://bucket" not in str(row)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({"env_ref": "env_gone"}, "env values have been deleted"),
        ({"working_dir": f"upload:{'0' * 64}"}, "package 000000000000… has been deleted"),
    ],
)
async def test_a_reference_that_leads_nowhere_fails_the_command(
    world: World, asking: str, head: Agent, args: dict[str, Any], error: str
) -> None:
    _, handle = await ask(world, asking, head, **args)
    told = asyncio.create_task(handle.result())
    while not told.done():
        assert await take(head, wait=0.2) == []
    with pytest.raises(WorkflowFailureError) as failure:
        await told
    assert isinstance(failure.value.cause, ActivityError)
    assert error in str(failure.value.cause.cause)


async def test_a_worker_waits_for_its_heads_address(world: World, http: httpx.AsyncClient) -> None:
    cluster = await world.cluster()
    old = await world.joined(cluster, NodeRole.HEAD, http)
    worker = await world.joined(cluster, NodeRole.WORKER, http)
    none_yet = await worker.get("/head", wait=0)
    assert (none_yet.status_code, none_yet.json()["code"]) == (404, "not_found")
    waiting = asyncio.create_task(worker.get("/head", wait=20))
    await asyncio.sleep(0.1)
    await old.report(gcs_address="127.0.9.1:6379")  # long before Ray answers there
    answer = await waiting
    assert answer.json() == {"generation": 1, "gcs_address": "127.0.9.1:6379"}
    # A new head is asked for: the old address is given to nobody, though the old one has not ended yet.
    new = world.agent(await world.node(cluster, NodeRole.HEAD, generation=2), http)
    assert (await worker.get("/head", wait=0)).status_code == 404
    await new.register()
    await new.report({"id": "1", "kind": "ray_ready", "at": "2026-01-01T00:00:00Z", "data": {"gcs_address": "h2:1"}})
    assert (await worker.get("/head", wait=0)).json() == {"generation": 2, "gcs_address": "h2:1"}
    other = await world.joined(await world.cluster(), NodeRole.WORKER, http)
    assert (await other.get("/head", wait=0)).status_code == 404


async def test_logs_are_signed_below_the_nodes_own_prefix(world: World, http: httpx.AsyncClient, head: Agent) -> None:
    cluster_id, node_id = head.node.cluster_id, head.node.id
    run_id = "job_00000000000000000000-2"
    await give(world, head, run_id=run_id)
    items = [{"stream": f"runs/{run_id}.log", "offset": 2**20}, {"stream": "ray/raylet.out", "offset": 0}]
    answer = await head.post("/logs/sign", {"items": items})
    assert answer.json()["urls"] == [
        f"http://bucket/logs/{cluster_id}/{node_id}/runs/{run_id}.log/00000000000001048576?put&expires=900",
        f"http://bucket/logs/{cluster_id}/{node_id}/ray/raylet.out/{0:020d}?put&expires=900",
    ]
    assert (await head.post("/logs/sign", {"items": items})).status_code == 200
    stranger = await world.joined(await world.cluster(), NodeRole.HEAD, http)
    refused = await stranger.post("/logs/sign", {"items": items})
    assert (refused.status_code, refused.json()["code"]) == (403, "permission_denied")


@pytest.mark.parametrize("stream", ["../x", "runs/../../x", "/etc/x", "a//b", "a/./b", "", "a/b/c/d/e", "a b"])
async def test_a_stream_never_leaves_the_prefix(head: Agent, stream: str) -> None:
    answer = await head.post("/logs/sign", {"items": [{"stream": stream, "offset": 0}]})
    assert answer.status_code == 422


async def test_nothing_is_asked_while_nobody_waits(world: World, http: httpx.AsyncClient, head: Agent) -> None:
    polls = http.app.state.agents.polls  # type: ignore[attr-defined]
    await take(head, wait=0)
    async with asyncio.timeout(20):
        while polls._somebody.is_set():
            await asyncio.sleep(0.02)


async def test_the_poller_rests_when_nothing_has_come_for_long(
    world: World, head: Agent, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls = http.app.state.agents.polls  # type: ignore[attr-defined]
    looks: list[float] = []
    look = polls._poll

    async def counted() -> None:
        looks.append(time.monotonic())
        await look()

    monkeypatch.setattr(polls, "_poll", counted)
    polls._found_at = time.monotonic() - 61
    assert await take(head, wait=1.5) == []
    between = (looks[-1] - looks[0]) / max(len(looks) - 1, 1)
    assert between == 0 or between > 0.15, "every 0.2 s, not every 0.04 s"
    waiting = asyncio.create_task(take(head, wait=10))
    command_id = await give(world, head)
    assert [c["id"] for c in await waiting] == [command_id]
    assert time.monotonic() - polls._found_at < 10
