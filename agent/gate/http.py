"""HTTP behind the gate, and the entry point by which Serve's proxy loads it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from typing import Any

from . import websocket
from .policy import GATE_FILE, GateFile, Policy, Verdict, judge
from .problems import BROKEN, ONLY_GET, REFUSALS, Problem, closed
from .sockets import connections, peer
from .stats import STATS, Stats, Ticket
from .wire import App, Message, Receive, Scope, Send, with_version

log = logging.getLogger("ray.serve.heliostat")

PORTS = "HELIOSTAT_SERVE_PORTS"
"""``8000,9000``: the ports of this head's proxies, HTTP and gRPC. Without it the gate knows only the port of
HTTP, from requests."""
DRAIN_GRACE_S = 2.0
"""A drain closes idle connections after this time: until then a load balancer whose weights have just changed may be
sending a request on one of them."""

HEALTHZ = "/-/healthz"
"""Serve's own health check, for load balancers: needs no token."""
ROUTES = "/-/routes"
"""Serve's own. Needs a token, and does not count as traffic."""
STATISTICS = "/-/heliostat"
MARK = "heliostat.gate"
"""In the scope: an outer gate has handled this request already."""

BAD_GATEWAY_MAX_BYTES = 2**20
"""A 502 of the application goes out in one piece, for Traefik's retry makes an empty 200 of a chunked one. Its body is
cut off here."""

REQUEST_TIMEOUT = 408
"""Serve answers it for an application that exceeds ``request_timeout_s``. It counts as an error, like
DEADLINE_EXCEEDED."""


def middlewares() -> list[Any]:
    """Serve's proxy calls it at its start: ``[starlette.middleware.Middleware]``."""
    from starlette.middleware import Middleware

    return [Middleware(Gate)]


class Gate:
    """Pure ASGI. Serve makes it the outermost layer, so it sees exactly what goes out."""

    def __init__(self, app: App, file: GateFile | None = None, stats: Stats | None = None) -> None:
        self._app = app
        self._file = file or GATE_FILE
        self._stats = stats or STATS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or MARK in scope:
            await self._app(scope, receive, send)
            return
        policy = self._file.policy()
        http = scope["type"] == "http"
        authorization = [value for name, value in scope["headers"] if name == b"authorization"]
        # split as Serve does: only what Serve itself answers may pass as its health check
        path = scope["path"][len(scope.get("root_path", "")) :]
        scope = {**scope, MARK: True}
        if http and path == HEALTHZ:
            await Exchange(self._file, None, scope, receive, send).run(self._app)
            return
        if policy is None:
            await self._refuse(scope, receive, send, closed(self._file.closed_reason))
            return
        verdict = judge(policy, authorization)
        if http and path == STATISTICS:  # for the agent only, also when requests need no token
            if verdict is Verdict.PROBE:
                await self._statistics(policy, scope, receive, send)
                return
            verdict = Verdict.NOT_THE_AGENT if authorization else Verdict.ABSENT
        ticket = None
        if verdict is Verdict.PASS:
            if path != ROUTES:
                ticket = self._stats.start()
        elif verdict is Verdict.PROBE:
            self._stats.probes += 1
            scope["headers"] = [h for h in scope["headers"] if h[0] != b"authorization"]
        else:
            self._stats.refused += 1
            await self._refuse(scope, receive, send, REFUSALS[verdict])
            return
        await (Exchange if http else websocket.Socket)(self._file, ticket, scope, receive, send).run(self._app)

    async def _statistics(self, policy: Policy, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "GET":
            await self._refuse(scope, receive, send, ONLY_GET)
            return
        since = self._file.draining_since
        if since is not None and time.monotonic() - since > DRAIN_GRACE_S:
            close_idle(send)
        ports = {int(p) for p in os.environ.get(PORTS, "").split(",") if p.strip()}
        if not ports and scope.get("server") and scope["server"][1]:
            ports = {scope["server"][1]}
        counted = self._stats.snapshot()
        counted |= {
            "version_id": policy.version_id, "draining": policy.draining, "revision": policy.revision,
            # in a thread: thousands of connections take milliseconds to list
            "connections": await asyncio.to_thread(connections, ports, peer(scope.get("client"))),
        }  # fmt: skip
        body = json.dumps(counted).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await Exchange(self._file, None, scope, receive, send).answer(200, headers, body)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, problem: Problem) -> None:
        if scope["type"] == "websocket":
            await websocket.refuse(self._file, scope, receive, send, problem)
            return
        body, headers = problem.start()
        if any(name == b"expect" for name, _ in scope["headers"]):
            # The client may or may not send the body now, so where the next request begins is unknown.
            headers.append((b"connection", b"close"))
        await Exchange(self._file, None, scope, receive, send).answer(problem.status, headers, body)


def close_idle(send: Send) -> None:
    """Closes keep-alive connections without a request. A load balancer would keep them open for minutes, and a drain
    would wait for them. ASGI can't do that, so this calls uvicorn as its own graceful shutdown does: ``send`` is a
    bound method of uvicorn's, since the gate is the outermost layer. With another server nothing happens."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    own = transport.get_protocol() if transport is not None else None
    for protocol in list(getattr(own, "connections", ())):
        if protocol is not own and hasattr(protocol, "cycle"):  # a websocket has none; it stays open
            protocol.shutdown()


class Exchange:
    """One HTTP request and its answer. ``ticket`` None: it does not count."""

    __slots__ = ("_complete", "_file", "_gone", "_head", "_held", "_receive", "_scope", "_send", "_started",
                 "_status", "_ticket")  # fmt: skip

    def __init__(self, file: GateFile, ticket: Ticket | None, scope: Scope, receive: Receive, send: Send) -> None:
        self._file, self._ticket = file, ticket
        self._scope, self._receive, self._send = scope, receive, send
        self._status = 0
        self._started = False
        """A byte of the answer went out."""
        self._complete = False
        self._gone = False
        """The client disconnected first."""
        self._head: Message = {}
        self._held: bytearray | None = None
        """Body so far of a 502 that waits for its end."""

    async def run(self, app: App) -> None:
        try:
            await app(self._scope, self.receive, self.send)
        except Exception:
            # once the answer has begun, the server closes the connection; before, the gate answers
            if self._started or self._gone:
                raise
            log.exception("gate: the application ended a request without an answer")
        finally:
            broken = not self._complete and not self._gone
            if self._ticket is not None:
                self._ticket.end(broken or self._failed)
        if not self._started and not self._gone:
            self._held = None
            body, headers = BROKEN.start()
            await self.answer(BROKEN.status, headers, body)

    async def answer(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        await self._send(self._start_of({"type": "http.response.start", "status": status, "headers": headers}))
        await self._send({"type": "http.response.body", "body": body})

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._complete:
            self._gone = True
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.body":
            more = message.get("more_body", False)
            if self._held is None:
                await self._send(message)
            else:
                await self._hold(self._held, message.get("body", b""), more)
            if not more:
                self._complete = True
                if self._ticket is not None:
                    self._ticket.end(self._failed)
            return
        if kind == "http.response.start" and self._held is None:
            self._status = message["status"]
            if self._ticket is not None:
                self._ticket.answered()
            if self._status == 502:
                self._head, self._held = message, bytearray()
                return
            message = self._start_of(message)
        await self._send(message)

    def _start_of(self, message: Message) -> Message:
        """The start of the answer as it goes out."""
        policy = self._file.policy()
        headers = with_version(message.get("headers", ()), policy)
        if policy is not None and policy.draining:
            headers = [h for h in headers if h[0].lower() != b"connection"]
            headers.append((b"connection", b"close"))
        self._started = True
        return {**message, "headers": headers}

    async def _hold(self, held: bytearray, body: bytes, more: bool) -> None:
        held += body[: BAD_GATEWAY_MAX_BYTES + 1 - len(held)]
        if more:
            return
        if len(held) > BAD_GATEWAY_MAX_BYTES:
            log.warning("gate: an application's 502 was cut off after %d bytes", BAD_GATEWAY_MAX_BYTES)
        await self._release(bytes(held[:BAD_GATEWAY_MAX_BYTES]))

    async def _release(self, body: bytes) -> None:
        """Sends the held 502 in one piece."""
        dropped = {b"transfer-encoding"}
        if self._scope["method"] != "HEAD":
            dropped.add(b"content-length")
        headers = [(h[0], h[1]) for h in self._head.get("headers", ()) if h[0].lower() not in dropped]
        if not any(name.lower() == b"content-length" for name, _ in headers):
            headers.append((b"content-length", b"%d" % len(body)))
        await self.answer(502, headers, body)

    @property
    def _failed(self) -> bool:
        return self._status >= 500 or self._status == REQUEST_TIMEOUT
