"""HTTP through the gate, message by message. ``test_wire.py`` has what goes over a wire, ``test_ray.py`` what Ray Serve
makes of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from agent import gate
from agent.gate.http import Gate
from agent.gate.policy import GateFile
from agent.gate.stats import Stats
from heliostat.models.agents import ServeTraffic
from heliostat.models.services import LATENCY_BOUNDS_MS, VERSION_HEADER
from tests.agent.gate.support import AS_PROBE, BEARER, Asked, GateWriter, Headers, answering


async def test_refusals(writer: GateWriter) -> None:
    asked = Asked(pytest.fail, writer)
    assert await asked() == 401
    assert asked.header("www-authenticate") == [b"Bearer"]
    assert asked.header("content-length") == [str(len(asked.body)).encode()]
    assert asked.header(VERSION_HEADER) == [b"sv_1"]
    assert json.loads(asked.body)["code"] == "unauthenticated"
    assert await asked(headers=[(b"authorization", b"Bearer wrong")]) == 403
    assert json.loads(asked.body)["code"] == "permission_denied"
    assert "wrong" not in json.loads(asked.body)["detail"]
    counted = asked.stats.snapshot()
    assert (counted["refused"], counted["requests"], counted["last_request_at"]) == (2, 0, None)


@pytest.mark.parametrize(
    ("path", "scope", "passes"),
    [
        ("/-/healthz", {}, True),
        ("/-/healthz", {"query_string": b"x"}, True),
        ("/-/healthz", {"method": "HEAD"}, True),
        ("/app/-/healthz", {"root_path": "/app"}, True),
        ("/app/-/healthz", {}, False),
        ("/-/healthz/", {}, False),
        ("//-/healthz", {}, False),
        ("/-/healthz/../../secret", {}, False),
        ("/-/Healthz", {}, False),
        ("/-/healthz\x00", {}, False),
        ("/%2d/healthz", {}, False),  # encoded twice; once is decoded by the server, and then it is Serve's own
        ("/-/healthz?x", {}, False),
        ("/-/routes", {}, False),
        ("/-/healthz", {"type": "websocket", "extensions": {"websocket.http.response": {}}}, False),
    ],
)
async def test_only_serves_health_check_needs_no_token(
    writer: GateWriter, path: str, scope: dict[str, Any], passes: bool
) -> None:
    asked = Asked(answering(), writer)
    assert await asked(path, **scope) == (200 if passes else 401)
    assert asked.stats.snapshot()["requests"] == 0
    assert asked.stats.snapshot()["refused"] == (0 if passes else 1)


async def test_what_reaches_the_application(writer: GateWriter) -> None:
    seen: list[Headers] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["headers"])
        await answering()(scope, receive, send)

    asked = Asked(app, writer)
    mine = (b"x-mine", b"1")
    assert await asked(headers=[mine, BEARER]) == 200
    assert await asked(headers=[mine, AS_PROBE]) == 200
    assert asked.scope["headers"] == [mine, AS_PROBE]  # the server's own scope is not touched
    assert await asked("/-/routes", headers=[BEARER]) == 200
    assert seen == [[mine, BEARER], [mine], [BEARER]]
    counted = asked.stats.snapshot()
    assert (counted["requests"], counted["probes"], sum(counted["buckets"])) == (1, 1, 1)
    writer.write(enabled=False)
    asked = Asked(app, writer)
    basic = (b"authorization", b"Basic eDp5")
    assert [await asked(headers=h) for h in ([], [basic], [BEARER, basic])] == [200, 200, 200]
    assert seen[3:] == [[], [basic], [BEARER, basic]]


async def test_every_answer_says_its_version_once(writer: GateWriter) -> None:
    app = answering(404, [[b"X-Heliostat-Version", b"sv_other"], [b"content-type", b"a/b"]])
    asked = Asked(app, writer)
    assert await asked(headers=[BEARER]) == 404
    assert asked.sent[0]["headers"] == [(b"content-type", b"a/b"), (b"x-heliostat-version", b"sv_1")]
    assert await asked("/-/healthz") == 404
    assert asked.header(VERSION_HEADER) == [b"sv_1"]


@pytest.mark.parametrize(("status", "errors"), [(200, 0), (404, 0), (499, 0), (408, 1), (500, 1), (502, 1), (503, 1)])
async def test_what_is_an_error(writer: GateWriter, status: int, errors: int) -> None:
    asked = Asked(answering(status), writer)
    assert await asked(headers=[BEARER]) == status
    assert asked.body == b"ok"
    counted = asked.stats.snapshot()
    assert (counted["requests"], counted["errors"], counted["window_errors"]) == (1, errors, errors)
    await asked(headers=[AS_PROBE])
    await asked("/-/healthz")
    assert asked.stats.snapshot()["requests"] == 1


async def _raises(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError("application's own")


async def _returns(scope: Any, receive: Any, send: Any) -> None:
    return


async def _raises_midway(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a", "more_body": True})
    raise RuntimeError("application's own")


async def _returns_midway(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def _raises_in_its_502(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 502, "headers": []})
    await send({"type": "http.response.body", "body": b"a", "more_body": True})
    raise RuntimeError("application's own")


async def _raises_afterwards(scope: Any, receive: Any, send: Any) -> None:
    await answering()(scope, receive, send)
    raise RuntimeError("application's own")


async def _reads_to_the_end(scope: Any, receive: Any, send: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _raises_at_the_clients_end(scope: Any, receive: Any, send: Any) -> None:
    await _returns_midway(scope, receive, send)
    await _reads_to_the_end(scope, receive, send)
    raise RuntimeError("the client is gone")


async def _answers_and_reads_on(scope: Any, receive: Any, send: Any) -> None:
    await answering()(scope, receive, send)
    await _reads_to_the_end(scope, receive, send)


GONE: list[dict[str, Any]] = [{"type": "http.disconnect"}]


@pytest.mark.parametrize(
    ("app", "incoming", "status", "raises", "errors"),
    [
        (_raises, None, 500, False, 1),
        (_returns, None, 500, False, 1),
        (_raises_in_its_502, None, 500, False, 1),
        (_raises_midway, None, 200, True, 1),
        (_returns_midway, None, 200, False, 1),
        (_raises_afterwards, None, 200, True, 0),
        (_reads_to_the_end, GONE, 0, False, 0),
        (_raises_at_the_clients_end, GONE, 200, True, 0),
        (_answers_and_reads_on, GONE, 200, False, 0),
    ],
)
async def test_answers_that_break_off(
    writer: GateWriter, app: Any, incoming: Any, status: int, raises: bool, errors: int
) -> None:
    asked = Asked(app, writer)
    try:
        await asked(headers=[BEARER], incoming=incoming)
    except RuntimeError:
        assert raises
    else:
        assert not raises
    assert (asked.sent[0]["status"] if asked.sent else 0) == status
    if status == 500:
        assert json.loads(asked.body)["code"] == "internal_error"
        assert asked.header(VERSION_HEADER) == [b"sv_1"]
    counted = asked.stats.snapshot()
    assert (counted["requests"], counted["errors"], counted["ongoing"], counted["oldest_s"]) == (1, errors, 0, 0)
    assert sum(counted["buckets"]) == 1


async def test_a_cancelled_application_leaves_nothing_ongoing(writer: GateWriter) -> None:
    async def hangs(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    asked = Asked(hangs, writer)
    task = asyncio.create_task(asked(headers=[BEARER]))
    await asyncio.sleep(0)
    assert asked.stats.snapshot()["ongoing"] == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asked.sent == []
    assert asked.stats.snapshot()["ongoing"] == 0


async def test_a_gate_within_a_gate_does_nothing(writer: GateWriter) -> None:
    stats = Stats()
    file = GateFile(str(writer.path))
    asked = Asked(Gate(answering(), file, stats), writer, stats)
    assert await asked(headers=[BEARER]) == 200
    assert await asked(headers=[AS_PROBE]) == 200
    assert await asked() == 401
    counted = stats.snapshot()
    assert (counted["requests"], counted["probes"], counted["refused"]) == (1, 1, 1)
    assert asked.header(VERSION_HEADER) == [b"sv_1"]


async def test_lifespan_passes(writer: GateWriter) -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await Gate(app, GateFile("/nowhere"))({"type": "lifespan"}, pytest.fail, pytest.fail)
    assert seen == ["lifespan"]


def test_serve_gets_a_list_of_middlewares() -> None:
    from starlette.middleware import Middleware

    (one,) = gate.middlewares()
    assert isinstance(one, Middleware)
    assert isinstance(one.cls(pytest.fail, *one.args, **one.kwargs), Gate)


async def test_the_statistics_are_for_the_agent(writer: GateWriter) -> None:
    asked = Asked(answering(500), writer)
    await asked(headers=[BEARER])
    for enabled in (True, False):
        writer.write(enabled=enabled, draining=True, revision=7)
        asked = Asked(answering(500), writer, asked.stats)
        assert await asked("/-/heliostat") == 401
        assert await asked("/-/heliostat", [BEARER]) == 403
        assert await asked("/-/heliostat", [AS_PROBE, AS_PROBE]) == 403
        assert await asked("/-/heliostat", [AS_PROBE], method="POST") == 405
        assert await asked("/-/heliostat", [AS_PROBE]) == 200
        told = json.loads(asked.body)
        assert told.keys() == ServeTraffic.model_fields.keys() - {"alive"} | {"revision"}
        traffic = ServeTraffic.model_validate(told)
        assert (traffic.version_id, traffic.requests, traffic.errors, traffic.draining) == ("sv_1", 1, 1, True)
        assert told["revision"] == 7
        assert traffic.last_request_at is not None
        assert traffic.last_request_at.tzinfo is not None
        assert len(traffic.buckets) == len(traffic.window_buckets) == len(LATENCY_BOUNDS_MS) + 1
    assert asked.stats.snapshot()["refused"] == 6
    assert asked.stats.snapshot()["probes"] == 0
