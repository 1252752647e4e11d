"""The gate on a wire: uvicorn with httptools, as Serve runs it, and with h11, as where httptools is not installed."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from agent.gate import http as gate_http
from agent.gate.http import Gate
from agent.gate.policy import GateFile
from agent.gate.stats import Stats
from tests.agent.conftest import until
from tests.agent.gate.support import OLD, PROBE, TOKEN, GateWriter, sha256

WAIT_S = 20.0
AUTH = "Authorization: Bearer " + TOKEN.decode()


class Application:
    """What it does is in the path; ``go`` lets streams and requests that wait go on."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.go = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope["path"])
        if scope["type"] == "websocket":
            await self.echo(receive, send)
        else:
            await getattr(self, scope["path"].strip("/-").replace("/", "_") or "plain")(receive, send)

    async def echo(self, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] != "websocket.disconnect":
            await send({"type": "websocket.send", "text": message["text"]})

    async def plain(self, receive: Any, send: Any) -> None:
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        await self.answer(send, b"%d bytes" % len(body))

    healthz = plain

    async def answer(self, send: Any, *parts: bytes, status: int = 200, length: bool = True) -> None:
        headers = [(b"content-length", b"%d" % sum(map(len, parts)))] if length else []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def stream(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"last"})

    async def endless(self, receive: Any, send: Any) -> None:
        """As Serve does: it reads on, and is cancelled when its client goes."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.ensure_future(receive())
        while not gone.done() or gone.result()["type"] != "http.disconnect":
            if gone.done():
                gone = asyncio.ensure_future(receive())
            await send({"type": "http.response.body", "body": b"more", "more_body": True})
            await asyncio.sleep(0.01)

    async def bad(self, receive: Any, send: Any) -> None:
        await self.answer(send, b"bad ", b"gate", b"way", status=502, length=False)

    async def large_bad(self, receive: Any, send: Any) -> None:
        await self.answer(send, *[b"x" * 300_000] * 10, status=502, length=False)

    async def crash(self, receive: Any, send: Any) -> None:
        raise RuntimeError("application's own")

    async def crash_midway(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        raise RuntimeError("application's own")


class Service:
    def __init__(self, folder: Path, http: str) -> None:
        self.writer = GateWriter(folder / "gate.json")
        self.app = Application()
        self.stats = Stats()
        gate = Gate(self.app, GateFile(str(self.writer.path)), self.stats)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        # as ray.serve._private.http_util.start_asgi_http_server
        config = uvicorn.Config(
            lambda: gate, factory=True, http=http, lifespan="off", access_log=False, log_level=None, log_config=None,
            timeout_keep_alive=90,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        until(lambda: self._server.started, WAIT_S, "uvicorn does not start")

    def close(self) -> None:
        self.app.go.set()
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), WAIT_S)

    def change(self, **changes: Any) -> None:
        """Returns once the gate goes by it."""
        self.writer.write(**changes, revision=self.writer.content["revision"] + 1)
        until(lambda: self.statistics()["revision"] == self.writer.content["revision"], WAIT_S, "the gate is not told")

    def has_connections(self, count: int, why: str = "connections are not counted") -> None:
        """Waits: another test's client that looks for its server on a port thought free may knock here."""
        until(lambda: self.statistics()["connections"] == count, WAIT_S, why)

    def statistics(self) -> dict[str, Any]:
        with self.connect() as sock:
            answer = ask(sock, "/-/heliostat", "Authorization: Bearer " + PROBE.decode())
            return dict(json.loads(answer.content))


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {k.lower(): v for k, v in response.getheaders()}
        self.content = response.read()


def request(path: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: x", *headers, "", "")).encode("latin-1")


def ask(sock: socket.socket, path: str, *headers: str, method: str = "GET", body: bytes = b"") -> Answer:
    if body:
        headers = (*headers, f"Content-Length: {len(body)}")
    sock.sendall(request(path, *headers, method=method) + body)
    return read(sock, method)


def read(sock: socket.socket, method: str = "GET") -> Answer:
    response = http.client.HTTPResponse(sock, method=method)
    response.begin()
    return Answer(response)


def to_the_end(sock: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    received = b""
    while data := sock.recv(65536):
        received += data
    return received


@pytest.fixture(params=["httptools", "h11"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path, request.param)
    yield service
    service.close()


def test_keep_alive_until_a_drain_begins(service: Service) -> None:
    with service.connect() as sock:
        for _ in range(3):
            answer = ask(sock, "/", AUTH)
            assert (answer.status, answer.headers.get("connection")) == (200, None)
            assert answer.headers["x-heliostat-version"] == "sv_1"
        service.change(draining=True)
        assert ask(sock, "/", AUTH).headers["connection"] == "close"
        assert sock.recv(1) == b""
    for path, header, status in (("/", AUTH, 200), ("/", "X: y", 401), ("/", "Authorization: Bearer x", 403),
                                 ("/-/healthz", "X: y", 200), ("/crash", AUTH, 500), ("/bad", AUTH, 502)):  # fmt: skip
        with service.connect() as sock:
            answer = ask(sock, path, header)
            assert (answer.status, answer.headers["connection"]) == (status, "close")
            assert sock.recv(1) == b""
    service.change(draining=False)
    with service.connect() as sock:
        assert ask(sock, "/", AUTH).headers.get("connection") is None
        assert ask(sock, "/", AUTH).status == 200


def test_a_streamed_answer_ends_whole_in_a_drain(service: Service) -> None:
    with service.connect() as early, service.connect() as late:
        early.sendall(request("/stream", AUTH))
        received = early.recv(65536)
        assert b"connection: close" not in received.lower()
        service.change(draining=True)
        late.sendall(request("/stream", AUTH))
        until(lambda: service.statistics()["ongoing"] == 2, WAIT_S, "the second stream has not begun")
        service.app.go.set()
        received = to_the_end(late)
        assert b"connection: close" in received.lower()
        assert received.endswith(b"4\r\nlast\r\n0\r\n\r\n")
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += early.recv(65536)
    assert service.statistics()["ongoing"] == 0


def test_pipelined_requests_are_judged_one_by_one(service: Service) -> None:
    with service.connect() as sock:
        sock.sendall(
            request("/", AUTH) + request("/secret") + request("/", AUTH) + request("/x", AUTH.replace("B", "x"))
        )
        file = sock.makefile("rb")
        statuses = []
        for _ in range(4):
            statuses.append(int(file.readline().split()[1]))
            length = 0
            while line := file.readline().strip().lower():
                if line.startswith(b"content-length:"):
                    length = int(line.split()[1])
            file.read(length)
        assert statuses == [200, 401, 200, 401]
    assert service.app.seen == ["/", "/"]


def test_pipelined_requests_after_the_last_answer_are_not_begun(service: Service) -> None:
    service.change(draining=True)
    with service.connect() as sock:
        sock.sendall(request("/", AUTH) * 3)
        assert to_the_end(sock).count(b"HTTP/1.1 200") == 1
    assert service.app.seen == ["/"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_502_is_sent_in_one_piece(service: Service, method: str) -> None:
    with service.connect() as sock:
        sock.sendall(request("/bad", AUTH, "Connection: close", method=method))
        received = to_the_end(sock).lower()
    assert received.startswith(b"http/1.1 502 ")
    assert b"transfer-encoding" not in received
    assert b"content-length: 11\r\n" in received
    assert received.endswith(b"\r\n\r\n" + (b"bad gateway" if method == "GET" else b""))
    assert service.statistics()["errors"] == 1


def test_a_502_that_is_too_large_is_cut(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with service.connect() as sock:
        answer = ask(sock, "/large/bad", AUTH)
        assert (answer.status, answer.content) == (502, b"x" * 2**20)
        assert ask(sock, "/", AUTH).status == 200
    assert "cut off" in caplog.text


def test_expect_continue_is_refused_at_once(service: Service) -> None:
    with service.connect() as sock:
        sock.sendall(request("/", "Expect: 100-continue", "Content-Length: 1000000000", method="POST"))
        received = to_the_end(sock)
    assert received.startswith(b"HTTP/1.1 401")
    assert b"connection: close" in received.lower()
    with service.connect() as sock:
        sock.sendall(request("/", AUTH, "Expect: 100-continue", "Content-Length: 3", method="POST"))
        assert sock.recv(65536).startswith(b"HTTP/1.1 100")
        sock.sendall(b"abc")
        assert read(sock).content == b"3 bytes"


def test_a_large_body_is_refused_and_the_connection_goes_on(service: Service) -> None:
    with service.connect() as sock:
        answer = ask(sock, "/", "X: y", method="POST", body=b"GET / HTTP/1.1\r\n" * 500_000)
        assert answer.status == 401
        assert ask(sock, "/", AUTH, method="POST", body=b"x" * 3_000_000).content == b"3000000 bytes"
    assert service.app.seen == ["/"]


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/-/healthz", 200),
        ("/-/healthz?x=y", 200),
        ("/%2d/healthz", 200),  # to Serve it is /-/healthz
        ("/-/healthz/", 401),
        ("//-/healthz", 401),
        ("/-/../plain", 401),
        ("/-/healthz%2f..%2f..%2fplain", 401),
        ("/%252d/healthz", 401),
        ("/-/healthz%00", 401),
        ("/plain#/-/healthz", 401),
        ("/plain?/-/healthz", 401),
    ],
)
def test_paths(service: Service, target: str, status: int) -> None:
    with service.connect() as sock:
        assert ask(sock, target).status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["authorization: bearer " + TOKEN.decode()], 200),
        (["AUTHORIZATION:Bearer " + OLD.decode()], 200),
        (["Authorization: Bearer \xff\xfe"], 403),
        (["Authorization: Bearer"], 401),
        ([AUTH, AUTH], 403),
        ([AUTH, "Authorization: Bearer x"], 403),
        (["Proxy-Authorization: Bearer " + TOKEN.decode()], 401),
        (["X-Authorization: Bearer " + TOKEN.decode()], 401),
    ],
)
def test_headers(service: Service, headers: list[str], status: int) -> None:
    with service.connect() as sock:
        assert ask(sock, "/", *headers).status == status


def test_applications_that_raise(service: Service) -> None:
    with service.connect() as sock:
        answer = ask(sock, "/crash", AUTH)
        assert (answer.status, json.loads(answer.content)["code"]) == (500, "internal_error")
        assert ask(sock, "/", AUTH).status == 200  # a crash does not cost the connection
        sock.sendall(request("/crash/midway", AUTH))
        received = to_the_end(sock)
    assert b"first" in received
    assert not received.endswith(b"0\r\n\r\n")  # broken off, so that no client takes it for whole
    counted = service.statistics()
    assert (counted["requests"], counted["errors"]) == (3, 2)


def test_a_client_that_leaves_is_no_error(service: Service) -> None:
    with service.connect() as sock:
        sock.sendall(request("/endless", AUTH))
        assert sock.recv(100)
        assert service.statistics()["ongoing"] == 1
    until(lambda: service.statistics()["ongoing"] == 0, WAIT_S, "the gate does not see its client leave")
    counted = service.statistics()
    assert (counted["requests"], counted["errors"]) == (1, 0)


def test_tokens_change_while_requests_go_on(service: Service) -> None:
    """A token that is valid before and after is never refused; one that is taken away is, for good."""
    stop = threading.Event()
    new = b"token-that-is-new"
    statuses: dict[bytes, list[int]] = {OLD: [], TOKEN: [], new: []}

    def load(token: bytes) -> None:
        with service.connect() as sock:
            while not stop.is_set():
                statuses[token].append(ask(sock, "/", "Authorization: Bearer " + token.decode()).status)

    threads = [threading.Thread(target=load, args=(t,)) for t in statuses]
    for thread in threads:
        thread.start()
    for tokens in ([TOKEN, OLD, new], [OLD, new], [OLD], [OLD, new]):
        service.change(hashes=[sha256(t) for t in tokens])
        seen = {t: len(s) for t, s in statuses.items()}
        until(lambda seen=seen: all(len(statuses[t]) > n + 2 for t, n in seen.items()), WAIT_S, "requests stand still")
        for token, found in statuses.items():
            assert set(found[seen[token] + 1 :]) == {200 if token in tokens else 403}
    stop.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert set(statuses[OLD]) == {200}


def websocket(service: Service, token: bytes = b"") -> Any:
    headers = {"Authorization": "Bearer " + token.decode()} if token else {}
    return connect(f"ws://127.0.0.1:{service.port}/chat", additional_headers=headers, open_timeout=WAIT_S, proxy=None)


def test_websockets(service: Service) -> None:
    for token, status in ((b"", 401), (b"x", 403)):
        with pytest.raises(InvalidStatus) as refused:
            websocket(service, token)
        assert refused.value.response.status_code == status
        assert json.loads(refused.value.response.body)["status"] == status
        assert refused.value.response.headers["x-heliostat-version"] == "sv_1"
    with websocket(service, TOKEN) as open_one:
        assert open_one.response.headers["x-heliostat-version"] == "sv_1"
        open_one.send("a")
        assert open_one.recv(WAIT_S) == "a"
        assert service.statistics()["ongoing"] == 1
        service.change(draining=True)
        open_one.send("b")
        assert open_one.recv(WAIT_S) == "b"
        with websocket(service, TOKEN) as another:  # nobody is turned away
            another.send("c")
            assert another.recv(WAIT_S) == "c"
    until(lambda: service.statistics()["ongoing"] == 0, WAIT_S, "the websocket is still counted")
    assert service.statistics()["errors"] == 0
    assert service.statistics()["requests"] == 2


def test_connections_are_counted_and_idle_ones_closed_in_a_drain(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(service.connect()) for _ in range(3)]
        assert [ask(sock, "/", AUTH).status for sock in idle[:2]] == [200, 200]  # the third has asked nothing
        busy, silent = stack.enter_context(service.connect()), stack.enter_context(service.connect())
        busy.sendall(request("/stream", AUTH))
        assert busy.recv(100)
        silent.sendall(request("/", AUTH)[:20])
        chat = stack.enter_context(websocket(service, TOKEN))
        service.has_connections(6)
        monkeypatch.setattr(gate_http, "DRAIN_GRACE_S", 3600.0)
        service.change(draining=True)
        service.has_connections(6)
        monkeypatch.setattr(gate_http, "DRAIN_GRACE_S", 0.0)
        service.has_connections(2, "idle connections are kept")
        assert [sock.recv(1) for sock in idle] == [b"", b"", b""]
        chat.send("a")
        assert chat.recv(WAIT_S) == "a"
        service.app.go.set()
        assert to_the_end(busy).endswith(b"0\r\n\r\n")
        chat.close()
        service.has_connections(0, "connections are counted that are closed")
    assert service.statistics()["errors"] == 0


def test_an_idle_connection_is_not_closed_without_a_drain(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_http, "DRAIN_GRACE_S", 0.0)
    service.change(draining=True)
    service.change(draining=False)
    with service.connect() as sock:
        assert ask(sock, "/", AUTH).status == 200
        service.has_connections(1)
        assert ask(sock, "/", AUTH).status == 200
