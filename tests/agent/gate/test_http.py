"""The gate alone: its policy, its judgement, its counting, message by message. What goes over a wire is tested in
``test_serve_gate_wire.py``, what Ray Serve makes of it in ``test_serve_gate_ray.py``."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agent import constants, serve_gate
from agent.serve_gate import Gate, GateFile, Policy, Stats, Verdict, connections, judge
from heliostat.models.agents import ServeTraffic
from heliostat.models.services import LATENCY_BOUNDS_MS, VERSION_HEADER
from tests.agent.conftest import until
from tests.agent.gate.support import OLD, PROBE, TOKEN, GateWriter

Headers = list[tuple[bytes, bytes]]
BEARER = (b"authorization", b"Bearer " + TOKEN)
AS_PROBE = (b"authorization", b"Bearer " + PROBE)


@pytest.fixture
def writer(tmp_path: Path) -> GateWriter:
    return GateWriter(tmp_path / "gate.json")


class Asked:
    """One request, driven through a gate by hand. ``incoming``: what ``receive`` gives, the last one for ever."""

    def __init__(self, app: Any, writer: GateWriter, stats: Stats | None = None) -> None:
        self.stats = stats or Stats()
        self.gate = Gate(app, GateFile(str(writer.path)), self.stats)
        self.sent: list[dict[str, Any]] = []
        self.scope: dict[str, Any] = {}

    async def __call__(
        self,
        path: str = "/",
        headers: Headers | None = None,
        method: str = "GET",
        incoming: list[dict[str, Any]] | None = None,
        **scope: Any,
    ) -> int:
        """The status; 0 if none was sent."""
        self.scope = {"type": "http", "method": method, "path": path, "headers": headers or [], "root_path": ""} | scope
        if self.scope["type"] == "http":
            messages = incoming or [{"type": "http.request", "body": b"", "more_body": False}]
        else:
            messages = [{"type": "websocket.connect"}, *(incoming or [{"type": "websocket.disconnect", "code": 1005}])]
        self.sent = []
        rest = iter(messages)

        async def receive() -> Any:
            await asyncio.sleep(0)
            return next(rest, messages[-1])

        async def send(message: Any) -> None:
            self.sent.append(message)

        await self.gate(self.scope, receive, send)
        return int(self.sent[0].get("status", 0)) if self.sent else 0

    def header(self, name: str) -> list[bytes]:
        return [v for n, v in self.sent[0]["headers"] if n == name.lower().encode()]

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent[1:])


def answering(status: int = 200, headers: Any = (), body: bytes = b"ok") -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body[:1], "more_body": True})
        await send({"type": "http.response.body", "body": body[1:]})

    return app


# ---------------------------------------------------------------- policy


def test_bounds_are_everywhere_the_same() -> None:
    assert serve_gate.LATENCY_BOUNDS_MS == constants.LATENCY_BOUNDS_MS == LATENCY_BOUNDS_MS
    assert VERSION_HEADER.lower().encode() == serve_gate.VERSION_HEADER


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hashes": ["xyz"]}, "a hash is no sha256"),
        ({"hashes": ["ab"]}, "a hash is no sha256"),
        ({"hashes": [7]}, "a hash is no sha256"),
        ({"hashes": None}, "'hashes' is missing or no list"),
        ({"enabled": "false"}, "'enabled' is missing or no bool"),
        ({"enabled": None}, "'enabled' is missing"),
        ({"draining": 0}, "'draining' is missing or no bool"),
        ({"revision": True}, "'revision' is missing or no int"),
        ({"version_id": "a\r\nb"}, "can't stand in a header"),
    ],
)
async def test_a_garbled_file_closes_the_gate(writer: GateWriter, change: dict[str, Any], why: str) -> None:
    writer.write(**change)
    asked = Asked(answering(), writer)
    assert await asked(headers=[BEARER]) == 503
    problem = json.loads(asked.body)
    assert problem.keys() == {"type", "title", "status", "code", "detail", "remedy"}
    assert problem["code"] == "unavailable"
    assert why in problem["detail"]
    assert asked.header("content-type") == [b"application/problem+json"]
    assert await asked("/-/healthz") == 200
    assert await asked("/-/heliostat", [AS_PROBE]) == 503
    assert asked.stats.snapshot()["requests"] == 0


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b" " * (2**20 + 1)])
async def test_no_file_or_no_json_closes_the_gate(writer: GateWriter, content: bytes | None) -> None:
    writer.path.unlink()
    if content is not None:
        writer.path.write_bytes(content)
    asked = Asked(answering(), writer)
    assert await asked(headers=[BEARER]) == 503
    assert await asked(headers=[BEARER], type="websocket", extensions={"websocket.http.response": {}}) == 503
    assert await asked("/-/healthz") == 200
    assert not asked.header(VERSION_HEADER)


async def test_environment_that_names_no_file(monkeypatch: pytest.MonkeyPatch, writer: GateWriter) -> None:
    monkeypatch.delenv("HELIOSTAT_SERVE_GATE", raising=False)
    assert GateFile().policy() is None
    monkeypatch.setenv("HELIOSTAT_SERVE_GATE", str(writer.path))
    found = GateFile().policy()
    assert found is not None
    assert found.version_id == "sv_1"


def test_changes_are_seen_soon_and_an_unchanged_file_is_not_read_again(
    writer: GateWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = GateFile(str(writer.path))
    for revision in range(2, 30):
        writer.write(revision=revision)
        until(lambda want=revision: (p := file.policy()) is not None and p.revision == want, 10, "a revision is missed")
        if revision == 4:
            monkeypatch.setattr(serve_gate, "LOOK_S", 0.0)
    writer.path.rename(writer.path.with_suffix(".away"))
    assert file.policy() is None
    assert "No such file" in file.why
    writer.write(revision=30)
    monkeypatch.setattr(serve_gate, "SETTLED_NS", -(10**12))
    assert (first := file.policy()) is not None
    monkeypatch.setattr(Policy, "parse", lambda data: pytest.fail("it was read again"))
    assert file.policy() is first


def test_the_look_is_not_taken_at_every_request(writer: GateWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    stat = os.stat

    def look(path: Any, *args: Any, **kw: Any) -> os.stat_result:
        if path == str(writer.path):  # threads of others look at files of their own
            looks.append(1)
        return stat(path, *args, **kw)

    monkeypatch.setattr(os, "stat", look)
    monkeypatch.setattr(serve_gate, "LOOK_S", 3600.0)
    file = GateFile(str(writer.path))
    assert all(file.policy() is not None for _ in range(100))
    assert len(looks) == 1


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([], Verdict.ABSENT),
        ([b""], Verdict.ABSENT),
        ([b"Bearer"], Verdict.ABSENT),
        ([b"Bearer  "], Verdict.ABSENT),
        ([b"Basic dXNlcjpwYXNz"], Verdict.ABSENT),
        ([TOKEN], Verdict.ABSENT),
        ([b"Bearer " + TOKEN], Verdict.PASS),
        ([b"bearer " + TOKEN], Verdict.PASS),
        ([b"BEARER   " + TOKEN + b" "], Verdict.PASS),
        ([b"Bearer " + OLD], Verdict.PASS),
        ([b"Bearer " + PROBE], Verdict.PROBE),
        ([b"Bearer " + TOKEN + b"x"], Verdict.WRONG),
        ([b"Bearer " + TOKEN.upper()], Verdict.WRONG),
        ([b"Bearer " + TOKEN + b", Bearer " + TOKEN], Verdict.WRONG),
        ([b"Bearer \xff\xfe\x00"], Verdict.WRONG),
        ([b"Bearer " + b"a" * 60_000], Verdict.WRONG),
        ([b"Bearer " + TOKEN, b"Bearer " + TOKEN], Verdict.WRONG),
        ([b"Bearer x", b"Bearer " + TOKEN], Verdict.WRONG),
        ([b"Bearer " + PROBE, b"Bearer " + PROBE], Verdict.WRONG),
    ],
)
def test_judgement(writer: GateWriter, values: list[bytes], verdict: Verdict) -> None:
    assert judge(Policy.parse(writer.path.read_bytes()), values) == verdict
    writer.write(enabled=False)
    asked_for_none = verdict if verdict == Verdict.PROBE else Verdict.PASS
    assert judge(Policy.parse(writer.path.read_bytes()), values) == asked_for_none


def test_without_a_probe_hash_nothing_is_a_probe(writer: GateWriter) -> None:
    writer.write(probe_hash="", hashes=[])
    policy = Policy.parse(writer.path.read_bytes())
    assert judge(policy, [b"Bearer " + PROBE]) == Verdict.WRONG


# ---------------------------------------------------------------- HTTP


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

    (one,) = serve_gate.middlewares()
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


# ---------------------------------------------------------------- websockets

EXTENSION = {"websocket.http.response": {}}


async def test_websockets_are_refused(writer: GateWriter) -> None:
    asked = Asked(pytest.fail, writer)
    assert await asked(type="websocket", extensions=EXTENSION) == 401
    assert asked.sent[0]["type"] == "websocket.http.response.start"
    assert json.loads(asked.body)["code"] == "unauthenticated"
    wrong = [(b"authorization", b"Bearer x")]
    assert await asked(headers=wrong, type="websocket", extensions=EXTENSION) == 403
    await asked(headers=wrong, type="websocket")
    assert [(m["type"], m["code"]) for m in asked.sent] == [("websocket.close", 1008)]
    assert asked.stats.snapshot()["refused"] == 3


WsApp = Callable[[Any, Any, Any], Awaitable[None]]


def _socket(*messages: dict[str, Any], wait: bool = False, fail: bool = False) -> WsApp:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        for message in messages:
            await send(message)
        if wait:
            await receive()
        if fail:
            raise RuntimeError("application's own")

    return app


ACCEPT = {"type": "websocket.accept", "headers": [(b"x-a", b"b")]}
CLOSE: dict[str, Any] = {"type": "websocket.close"}


@pytest.mark.parametrize(
    ("app", "errors"),
    [
        (_socket(ACCEPT, CLOSE), 0),
        (_socket(ACCEPT), 0),
        (_socket(ACCEPT, wait=True), 0),
        (_socket(ACCEPT, wait=True, fail=True), 0),
        (_socket(CLOSE), 0),
        (_socket(ACCEPT, CLOSE | {"code": 1011}), 1),
        (_socket(ACCEPT, fail=True), 1),
        (_socket(fail=True), 1),
        (_socket(), 1),
        (_socket({"type": "websocket.http.response.start", "status": 404, "headers": []}), 0),
        (_socket({"type": "websocket.http.response.start", "status": 503, "headers": []}), 1),
    ],
)
async def test_websockets_are_counted(writer: GateWriter, app: WsApp, errors: int) -> None:
    asked = Asked(app, writer)
    try:
        await asked(headers=[BEARER], type="websocket", extensions=EXTENSION)
    except RuntimeError:
        pass
    counted = asked.stats.snapshot()
    assert (counted["requests"], counted["errors"], counted["ongoing"]) == (1, errors, 0)
    assert sum(counted["buckets"]) == 1
    if asked.sent and asked.sent[0]["type"] == "websocket.accept":
        assert asked.sent[0]["headers"] == [(b"x-a", b"b"), (b"x-heliostat-version", b"sv_1")]


# ---------------------------------------------------------------- statistics


def test_latency_window_and_oldest() -> None:
    now = [1000.0]
    stats = Stats(lambda: now[0])
    fast, slow, hangs = stats.begin(), stats.begin(), stats.begin()
    now[0] += 0.0005
    fast.answered()
    fast.answered()
    now[0] += 0.0045
    fast.end(error=False)
    fast.end(error=True)
    now[0] += 69.995
    slow.answered()
    counted = stats.snapshot()
    assert counted["buckets"][0] == 1
    assert counted["buckets"][-1] == 1  # slower than the last bound
    assert sum(counted["buckets"]) == 2
    assert (counted["requests"], counted["errors"], counted["ongoing"]) == (1, 0, 2)
    assert counted["oldest_s"] == pytest.approx(70, abs=0.01)
    assert counted["window_s"] == 60
    assert (counted["window_requests"], sum(counted["window_buckets"])) == (0, 1)
    slow.end(error=True)
    hangs.end(error=False)
    counted = stats.snapshot()
    assert (counted["ongoing"], counted["oldest_s"], counted["window_requests"], counted["window_errors"]) == (
        0, 0, 2, 1,
    )  # fmt: skip
    assert counted["buckets"][-1] == 2
    now[0] += 61
    counted = stats.snapshot()
    assert (counted["requests"], counted["window_requests"], sum(counted["window_buckets"])) == (3, 0, 0)
    assert len(counted["window_buckets"]) == len(counted["buckets"])


@pytest.mark.parametrize(("ms", "bucket"), [(0.9, 0), (1.1, 1), (9.9, 5), (10.1, 6), (59_999, 26), (60_001, 27)])
def test_buckets_are_bounded_from_above(ms: float, bucket: int) -> None:
    now = [0.0]
    stats = Stats(lambda: now[0])
    ticket = stats.begin()
    now[0] = ms / 1000
    ticket.answered()
    assert stats.snapshot()["buckets"].index(1) == bucket


# ---------------------------------------------------------------- connections


def _listening(host: str, port: int = 0) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.listen()
    return sock


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
def test_open_connections_are_counted(host: str) -> None:
    try:
        listener = _listening(host)
    except OSError:
        pytest.skip("no IPv6 here")
    port = listener.getsockname()[1]
    # Another test's client that waits for its server on a port thought free may knock here: each count is waited for.
    until(lambda: connections([port]) == 0, why="an idle port counts")
    clients = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(3)]
    until(lambda: connections([port]) == 3, why="those that were not accepted yet do not count")
    ours = {sock.getsockname()[1] for sock in clients}
    served = []
    while len(served) < len(clients):
        sock, peer = listener.accept()
        if peer[1] in ours:
            served.append(sock)
        else:
            sock.close()
    until(lambda: connections([port, 1]) == 3, why="accepted connections do not count")
    until(lambda: connections([port], clients[0].getsockname()[:2]) == 2, why="the one that asks counts")
    assert connections([1]) == 0
    closed = next(sock for sock in served if sock.getpeername()[1] == clients[0].getsockname()[1])
    clients[0].close()
    closed.close()
    until(lambda: connections([port]) == 2, why="a closed connection counts")
    for sock in (*clients, *served, listener):
        sock.close()


def test_another_node_on_the_same_machine_and_port_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    own = _listening("127.0.0.1")
    port = own.getsockname()[1]
    other = _listening("127.0.0.2", port)
    sockets = serve_gate._own_sockets() - {str(os.fstat(other.fileno()).st_ino)}
    monkeypatch.setattr(serve_gate, "_own_sockets", lambda: sockets)
    clients = [socket.create_connection((host, port), 5) for host in ("127.0.0.1", "127.0.0.2", "127.0.0.2")]
    until(lambda: connections([port]) == 1, why="those of the other node count")
    for sock in (*clients, own, other):
        sock.close()
