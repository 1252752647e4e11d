"""The gate inside Ray Serve's proxies: asks for the token, counts, says which version answers, and lets a head drain.

The agent copies this one file to a folder of its own on Ray's PYTHONPATH, as ``heliostat_serve_gate``; it imports
nothing of ours (hence all of it in one module), and starlette and grpc only where a proxy has them already. Serve
loads it by two names:

- ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=heliostat_serve_gate:middlewares`` for HTTP and websockets;
- ``heliostat_serve_gate.guard_grpc`` as an entry of ``grpc_servicer_functions`` for gRPC.

It goes by a file that the agent replaces by rename (``HELIOSTAT_SERVE_GATE`` names it)::

    {"service_id", "version_id", "enabled": bool, "hashes": [sha256 hex], "probe_hash": sha256 hex, "draining": bool,
     "revision": int}

A change is seen within LOOK_S. Without that file, or with one that can't be understood, everything but Serve's health
check is answered 503. What a token may do: one of ``hashes`` lets a request through to the application; the one of
``probe_hash`` is the agent's own, lets it through as well, and marks it as a probe, which is not counted as traffic and
reaches the application without its token. ``GET /-/heliostat`` with it answers the statistics.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import hashlib
import hmac
import inspect
import ipaddress
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Address = tuple[str, int]

log = logging.getLogger("ray.serve.heliostat")
"""Below Serve's own logger: its lines are in Serve's proxy log."""

FILE = "HELIOSTAT_SERVE_GATE"
PORTS = "HELIOSTAT_SERVE_PORTS"
"""``8000,9000``: the ports of this head's proxies, HTTP and gRPC. Without it only HTTP's is known, from requests."""

LOOK_S = 0.1
"""Between looks at the file; one costs about 2 µs."""
FILE_MAX_BYTES = 2**20
SETTLED_NS = 1_000_000_000
"""A file that changed so recently is read again: within one tick of the clock its signature may not tell a change."""

LATENCY_BOUNDS_MS = (
    1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700,
    1000, 1500, 2000, 3000, 5000, 7000, 10000, 20000, 30000, 60000,
)  # fmt: skip
"""Upper bounds of the histogram's buckets; the last bucket holds what is slower."""
BUCKETS = len(LATENCY_BOUNDS_MS) + 1
WINDOW_S = 60
DRAIN_GRACE_S = 2.0
"""Idle connections are closed so long after a drain was seen to begin: until then a load balancer whose weights have
just changed may be sending a request on one of them."""

HEALTHZ = "/-/healthz"
"""Serve's own: load balancers ask it, without a token."""
ROUTES = "/-/routes"
"""Serve's own. Needs the token, and is no traffic of the application's."""
STATISTICS = "/-/heliostat"
VERSION_HEADER = b"x-heliostat-version"
MARK = "heliostat.gate"
"""In the scope: an outer gate has seen this request already."""

BAD_GATEWAY_MAX_BYTES = 2**20
"""An application's 502 is sent in one piece: Traefik's retry makes an empty 200 of a chunked one. So much is kept."""

REQUEST_TIMEOUT = 408
"""What Serve answers for an application that takes longer than ``request_timeout_s``: an error of the application's,
as DEADLINE_EXCEEDED is."""
GRPC_ERRORS = frozenset({2, 4, 13, 14, 15})
"""UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS."""
WEBSOCKET_ERRORS = frozenset({1011, 1012, 1013, 1014})
"""Close codes: internal error, restart, try again later, bad gateway."""
WEBSOCKET_REFUSED = 1008
GRPC_HEALTHZ = "/ray.serve.RayServeAPIService/Healthz"
GRPC_APPLICATIONS = "/ray.serve.RayServeAPIService/ListApplications"

ESTABLISHED, LISTEN = "01", "0A"
"""States in /proc/net/tcp."""


# ---------------------------------------------------------------- policy


@dataclass(frozen=True)
class Policy:
    """One reading of the gate file."""

    service_id: str
    version_id: str
    enabled: bool
    """False: no token is asked for."""
    hashes: tuple[bytes, ...]
    probe_hash: bytes
    """Empty: nothing is taken for a probe."""
    draining: bool
    revision: int

    @classmethod
    def parse(cls, data: bytes) -> Policy:
        """Raises ValueError: what is wrong, without repeating the content."""
        try:
            raw = json.loads(data)
        except ValueError:
            raise ValueError("it is not JSON") from None
        if not isinstance(raw, dict):
            raise ValueError("it is no object")
        for name, kind in (("service_id", str), ("version_id", str), ("enabled", bool), ("hashes", list),
                           ("probe_hash", str), ("draining", bool), ("revision", int)):  # fmt: skip
            if type(raw.get(name)) is not kind:
                raise ValueError(f"{name!r} is missing or no {kind.__name__}")
        if not (raw["version_id"].isascii() and raw["version_id"].isprintable()):
            raise ValueError("'version_id' can't stand in a header")
        return cls(
            service_id=raw["service_id"], version_id=raw["version_id"], enabled=raw["enabled"],
            hashes=tuple(_digest(h) for h in raw["hashes"]),
            probe_hash=_digest(raw["probe_hash"]) if raw["probe_hash"] else b"",
            draining=raw["draining"], revision=raw["revision"],
        )  # fmt: skip


def _digest(text: object) -> bytes:
    try:
        digest = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise ValueError("a hash is no sha256 in hex")
    return digest


class GateFile:
    """The policy of now. Not for use by several threads."""

    def __init__(self, path: str | None = None) -> None:
        """``path`` None: the environment's, asked when it is first needed."""
        self._path = path
        self._look_at = float("-inf")
        self._signature: tuple[int, ...] | None = None
        self._policy: Policy | None = None
        self.why = ""
        """Why there is none."""
        self.draining_since: float | None = None

    def policy(self) -> Policy | None:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look()
        return self._policy

    def _look(self) -> None:
        path = self._path if self._path is not None else os.environ.get(FILE, "")
        if not path:
            self._close(f"{FILE} names no file")
            return
        try:
            found = os.stat(path)  # noqa: PTH116 - Path costs more than the call itself
            signature = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
            if signature == self._signature:
                return
            with Path(path).open("rb") as f:
                data = f.read(FILE_MAX_BYTES + 1)
            if len(data) > FILE_MAX_BYTES:
                raise ValueError("it is larger than a gate file can be")
            policy = Policy.parse(data)
        except OSError as e:
            self._close(f"the gate file can't be read ({e.strerror})")
        except ValueError as e:
            self._close(f"the gate file is garbled: {e}")
        else:
            settled = time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > SETTLED_NS
            self._signature = signature if settled else None
            if policy != self._policy:
                log.info("gate: revision %d, token %s, draining %s", policy.revision,
                         "asked for" if policy.enabled else "not asked for", policy.draining)  # fmt: skip
            self._policy, self.why = policy, ""
            if not policy.draining:
                self.draining_since = None
            elif self.draining_since is None:
                self.draining_since = time.monotonic()

    def _close(self, why: str) -> None:
        if self._policy is not None or self.why != why:
            log.error("gate: everything is answered 503: %s", why)
        self._policy, self._signature, self.why, self.draining_since = None, None, why, None


class Verdict(Enum):
    PASS = "pass"
    PROBE = "probe"
    ABSENT = "absent"
    """No bearer token: none at all, an empty one, or another scheme."""
    WRONG = "wrong"
    """A bearer token that is not valid, or several ``Authorization`` headers: nobody knows which one counts."""
    NOT_THE_AGENT = "not_the_agent"
    """Asked for the statistics with any other token than the agent's."""


def judge(policy: Policy, authorization: Sequence[bytes]) -> Verdict:
    """``authorization``: the values of all headers of that name. Takes as long for a right token as for a wrong one."""
    if len(authorization) > 1:
        return Verdict.WRONG if policy.enabled else Verdict.PASS
    scheme, _, token = authorization[0].strip().partition(b" ") if authorization else (b"", b"", b"")
    token = token.strip()
    if scheme.lower() != b"bearer" or not token:
        return Verdict.ABSENT if policy.enabled else Verdict.PASS
    digest = hashlib.sha256(token).digest()
    if hmac.compare_digest(digest, policy.probe_hash):
        return Verdict.PROBE
    valid = False
    for known in policy.hashes:
        valid |= hmac.compare_digest(digest, known)
    return Verdict.PASS if valid or not policy.enabled else Verdict.WRONG


# ---------------------------------------------------------------- statistics


class Second:
    """What happened within one second of the window."""

    __slots__ = ("at", "buckets", "errors", "requests")

    def __init__(self, at: int) -> None:
        self.at, self.requests, self.errors = at, 0, 0
        self.buckets = [0] * BUCKETS


class Stats:
    """Of one proxy, HTTP and gRPC together, from its start on. Used from the proxy's one event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._since = clock()
        self.requests = self.errors = self.refused = self.probes = self.ongoing = 0
        self.buckets = [0] * BUCKETS
        self.last_request_at: float | None = None
        self.waiting: dict[Ticket, None] = {}
        """Requests without a byte of an answer; the oldest first."""
        self._ring = [Second(-1) for _ in range(WINDOW_S)]

    def second(self, now: float) -> Second:
        """Where to count what happens now."""
        at = int(now)
        found = self._ring[at % WINDOW_S]
        if found.at != at:
            found = self._ring[at % WINDOW_S] = Second(at)
        return found

    def begin(self) -> Ticket:
        return Ticket(self)

    def snapshot(self) -> dict[str, Any]:
        """The counting fields of ``heliostat.models.agents.ServeTraffic``."""
        now = self.clock()
        window = [s for s in self._ring if now - WINDOW_S < s.at <= now]
        oldest = next(iter(self.waiting), None)
        last = self.last_request_at
        return {
            "requests": self.requests, "errors": self.errors, "refused": self.refused, "probes": self.probes,
            "buckets": list(self.buckets), "ongoing": self.ongoing,
            "oldest_s": round(now - oldest.began, 3) if oldest else 0.0,
            "last_request_at": None if last is None else datetime.fromtimestamp(last, UTC).isoformat(),
            "window_s": round(min(now - self._since, WINDOW_S), 3),
            "window_requests": sum(s.requests for s in window), "window_errors": sum(s.errors for s in window),
            "window_buckets": [sum(counts) for counts in zip([0] * BUCKETS, *(s.buckets for s in window), strict=True)],
        }  # fmt: skip


class Ticket:
    """One request, from its begin to the end of its answer."""

    __slots__ = ("_open", "_stats", "_waits", "began")

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self.began = stats.clock()
        self._open = self._waits = True
        stats.ongoing += 1
        stats.waiting[self] = None
        stats.last_request_at = time.time()

    def answered(self) -> None:
        """The answer begins."""
        if self._waits:
            self._waits = False
            stats = self._stats
            del stats.waiting[self]
            now = stats.clock()
            bucket = bisect.bisect_left(LATENCY_BOUNDS_MS, (now - self.began) * 1000)
            stats.buckets[bucket] += 1
            stats.second(now).buckets[bucket] += 1

    def end(self, error: bool) -> None:
        """Only the first call counts. A request that ends without an answer has waited until now: were it left out of
        the latencies, an application that hangs would look fast as soon as its clients give up."""
        if self._open:
            self._open = False
            self.answered()
            stats = self._stats
            stats.ongoing -= 1
            second = stats.second(stats.clock())
            stats.requests += 1
            second.requests += 1
            if error:
                stats.errors += 1
                second.errors += 1
            stats.last_request_at = time.time()


# ---------------------------------------------------------------- connections


def connections(ports: Iterable[int], except_from: Address | None = None) -> int:
    """Established TCP connections to these ports of this process; ``except_from``: the remote end of one that does not
    count. Several nodes may share a machine and a port, each on its own address: of a port on which this process
    listens on certain addresses only, others' connections do not count."""
    suffixes = {f":{port:04X}": port for port in ports}
    rows = [row for row in _tcp_rows() if row[1][-5:] in suffixes and row[3] in (ESTABLISHED, LISTEN)]
    own = _own_sockets()
    listening: dict[int, set[str]] = {}
    for row in rows:
        if row[3] == LISTEN and row[9] in own:
            host, port = _address(row[1])
            listening.setdefault(port, set()).add(host)
    found = set()  # by both ends: /proc/net/tcp is read in pieces, and a socket may come twice when others open between
    for row in rows:
        if row[3] == ESTABLISHED:
            host, port = _address(row[1])
            hosts = listening.get(port)
            if (not hosts or host in hosts or hosts & {"0.0.0.0", "::"}) and _address(row[2]) != except_from:  # noqa: S104
                found.add((row[1], row[2]))
    return len(found)


def _tcp_rows() -> list[list[str]]:
    """``sl local remote state queues timer retransmits uid timeout inode …`` of every TCP socket of the machine."""
    rows = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6 has no tcp6
            rows += [line.split() for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return rows


def _own_sockets() -> set[str]:
    """Inodes of this process's sockets."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are all that is needed
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile; one of them is the listing's own
            target = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def _address(text: str) -> Address:
    """``0100007F:1F90`` is 127.0.0.1:8000: words of 32 bits in the machine's byte order. An IPv4 address that is mapped
    into IPv6 is given as IPv4."""
    host, _, port = text.partition(":")
    packed = bytes.fromhex(host)
    if sys.byteorder == "little":
        packed = b"".join(packed[i : i + 4][::-1] for i in range(0, len(packed), 4))
    return _plain(ipaddress.ip_address(packed)), int(port, 16)


def _plain(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped or ip)


def _peer(given: Any) -> Address | None:
    """``scope["client"]`` in the form of ``_address``; None where there is none, as on a Unix socket."""
    try:
        return _plain(ipaddress.ip_address(given[0])), int(given[1])
    except (TypeError, ValueError, IndexError):
        return None


# ---------------------------------------------------------------- answers of the gate's own


@dataclass(frozen=True)
class Problem:
    """An answer of the gate's own, in the shape of our API's errors (RFC 9457)."""

    status: int
    code: str
    detail: str
    remedy: str
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def body(self) -> bytes:
        return json.dumps({
            "type": f"urn:heliostat:error:{self.code}", "title": self.code.replace("_", " ").capitalize(),
            "status": self.status, "code": self.code, "detail": self.detail, "remedy": self.remedy,
        }).encode()  # fmt: skip

    def start(self) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """Body and headers."""
        body = self.body()
        length = (b"content-length", b"%d" % len(body))
        return body, [(b"content-type", b"application/problem+json"), length, *self.headers]


ABSENT = Problem(
    401, "unauthenticated", "This service asks for a token and the request carries none.",
    "Send 'Authorization: Bearer <token>'; `heliostat service status` shows the service's token.",
    ((b"www-authenticate", b"Bearer"),),
)  # fmt: skip
WRONG = Problem(
    403, "permission_denied", "The token is not, or no longer, one of this service's.",
    "Send one valid token in one 'Authorization: Bearer <token>' header; `heliostat service status` shows it.",
)  # fmt: skip
NOT_THE_AGENT = Problem(
    403, "permission_denied", "The gate's statistics are for the node's agent alone.",
    "Use `heliostat service status`, which shows them.",
)  # fmt: skip
ONLY_GET = Problem(
    405, "invalid_request", "The gate's statistics are read with GET.", "Send GET.", ((b"allow", b"GET"),)
)
BROKEN = Problem(
    500, "internal_error", "The application ended without an answer.",
    "The version's own logs have the reason: `heliostat service logs`.",
)  # fmt: skip
REFUSALS = {Verdict.ABSENT: ABSENT, Verdict.WRONG: WRONG, Verdict.NOT_THE_AGENT: NOT_THE_AGENT}


def closed(why: str) -> Problem:
    return Problem(
        503, "unavailable", f"This head's gate does not know whom to let through: {why}.",
        "Try again: the agent of the node writes the file anew. If it lasts, look at node/agent.log of the head.",
        ((b"retry-after", b"1"),),
    )  # fmt: skip


# ---------------------------------------------------------------- HTTP and websockets


FILE_OF_PROCESS = GateFile()
STATS = Stats()
"""Of this process."""


def middlewares() -> list[Any]:
    """What Serve's proxy calls when it starts: ``[starlette.middleware.Middleware]``."""
    from starlette.middleware import Middleware

    return [Middleware(Gate)]


class Gate:
    """Pure ASGI. Serve puts it around all else, so it sees exactly what goes out."""

    def __init__(self, app: App, file: GateFile | None = None, stats: Stats | None = None) -> None:
        self._app = app
        self._file = file or FILE_OF_PROCESS
        self._stats = stats or STATS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or MARK in scope:
            await self._app(scope, receive, send)
            return
        policy = self._file.policy()
        http = scope["type"] == "http"
        authorization = [value for name, value in scope["headers"] if name == b"authorization"]
        # as Serve takes it apart, so that nothing passes for its health check that Serve does not answer itself
        path = scope["path"][len(scope.get("root_path", "")) :]
        scope = {**scope, MARK: True}
        if http and path == HEALTHZ:
            await Exchange(self._file, None, scope, receive, send).run(self._app)
            return
        if policy is None:
            await self._refuse(scope, receive, send, closed(self._file.why))
            return
        verdict = judge(policy, authorization)
        if http and path == STATISTICS:  # the agent's alone, also where no token is asked for
            if verdict is Verdict.PROBE:
                await self._statistics(policy, scope, receive, send)
                return
            verdict = Verdict.NOT_THE_AGENT if authorization else Verdict.ABSENT
        ticket = None
        if verdict is Verdict.PASS:
            if path != ROUTES:
                ticket = self._stats.begin()
        elif verdict is Verdict.PROBE:
            self._stats.probes += 1
            scope["headers"] = [h for h in scope["headers"] if h[0] != b"authorization"]
        else:
            self._stats.refused += 1
            await self._refuse(scope, receive, send, REFUSALS[verdict])
            return
        await (Exchange if http else Socket)(self._file, ticket, scope, receive, send).run(self._app)

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
            "connections": await asyncio.to_thread(connections, ports, _peer(scope.get("client"))),
        }  # fmt: skip
        body = json.dumps(counted).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await Exchange(self._file, None, scope, receive, send).answer(200, headers, body)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, problem: Problem) -> None:
        if scope["type"] == "websocket":
            await self._refuse_websocket(scope, receive, send, problem)
            return
        body, headers = problem.start()
        if any(name == b"expect" for name, _ in scope["headers"]):
            # The client now leaves the body out, or not: where the next request begins is unknown.
            headers.append((b"connection", b"close"))
        await Exchange(self._file, None, scope, receive, send).answer(problem.status, headers, body)

    async def _refuse_websocket(self, scope: Scope, receive: Receive, send: Send, problem: Problem) -> None:
        await receive()  # websocket.connect
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": WEBSOCKET_REFUSED, "reason": problem.code})
            return
        body, headers = problem.start()
        headers = with_version(headers, self._file.policy())
        await send({"type": "websocket.http.response.start", "status": problem.status, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": body})


def with_version(headers: Iterable[Sequence[bytes]], policy: Policy | None) -> list[tuple[bytes, bytes]]:
    """An application's header of that name is replaced."""
    kept = [(h[0], h[1]) for h in headers if h[0].lower() != VERSION_HEADER]
    if policy is not None:
        kept.append((VERSION_HEADER, policy.version_id.encode()))
    return kept


def close_idle(send: Send) -> None:
    """Closes the keep-alive connections on which no request is under way; a load balancer would keep them for minutes,
    and a drain would wait for them. ASGI has no word for it, so uvicorn is asked as its own graceful shutdown asks:
    ``send`` is its bound method, since the gate stands outermost. With another server nothing happens."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    own = transport.get_protocol() if transport is not None else None
    for protocol in list(getattr(own, "connections", ())):
        if protocol is not own and hasattr(protocol, "cycle"):  # a websocket's has none; it goes on until its end
            protocol.shutdown()


class Exchange:
    """One HTTP request and its answer. ``ticket`` None: it is not counted."""

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
        """The client went away first."""
        self._head: Message = {}
        self._held: bytearray | None = None
        """Body so far of a 502 that waits for its end."""

    async def run(self, app: App) -> None:
        try:
            await app(self._scope, self.receive, self.send)
        except Exception:
            # once it has begun, the server breaks the connection off; before, an answer is ours to give
            if self._started or self._gone:
                raise
            log.exception("gate: the application ended without an answer")
        finally:
            broken = not self._complete and not self._gone
            if self._ticket is not None:
                self._ticket.end(broken or self._failed)
        if not self._started and not self._gone:
            self._held = None
            body, headers = BROKEN.start()
            await self.answer(BROKEN.status, headers, body)

    async def answer(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        await self._send(self._begun({"type": "http.response.start", "status": status, "headers": headers}))
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
            message = self._begun(message)
        await self._send(message)

    def _begun(self, message: Message) -> Message:
        """The answer's begin as it goes out."""
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
        """Sends the 502 that was held back, in one piece."""
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


class Socket:
    """One websocket, counted like a request that is answered by its acceptance and ends with it."""

    __slots__ = ("_answered", "_failed", "_file", "_gone", "_receive", "_scope", "_send", "_ticket")

    def __init__(self, file: GateFile, ticket: Ticket | None, scope: Scope, receive: Receive, send: Send) -> None:
        self._file, self._ticket = file, ticket
        self._scope, self._receive, self._send = scope, receive, send
        self._answered = self._failed = self._gone = False

    async def run(self, app: App) -> None:
        returned = False
        try:
            await app(self._scope, self.receive, self.send)
            returned = True
        finally:
            # To return after the acceptance is an application's way to close; before it, the server has to answer 500.
            broken = not self._gone and not (returned and self._answered)
            if self._ticket is not None:
                self._ticket.end(broken or self._failed)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "websocket.disconnect":
            self._gone = True
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.close":
            self._failed = message.get("code", 1000) in WEBSOCKET_ERRORS
        elif kind == "websocket.http.response.start":
            self._failed = message["status"] >= 500
        if kind in ("websocket.accept", "websocket.http.response.start"):
            message = {**message, "headers": with_version(message.get("headers") or (), self._file.policy())}
        if not self._answered:
            self._answered = True
            if self._ticket is not None:
                self._ticket.answered()
        await self._send(message)


# ---------------------------------------------------------------- gRPC


def guard_grpc(servicer: object, server: Any) -> None:
    """Called by Serve's gRPC proxy like the function that adds a service to ``server``, a ``gRPCGenericServer``: from
    then on every method asks for the token, those that were added before and Serve's own included; only ``Healthz``
    needs none. Raises what breaks Serve's start of the proxy if the server is not as we know it: better none than one
    without a guard."""
    if getattr(server, "heliostat_guarded", False):
        return
    server.heliostat_guarded = True
    factory = server.service_handler_factory

    def guarded_factory(service_method: str, streaming_type: Any) -> Callable[..., Any]:
        handler = factory(service_method=service_method, streaming_type=streaming_type)
        return guarded(service_method, handler)

    server.service_handler_factory = guarded_factory
    for (handlers,) in list(server.generic_rpc_handlers):
        methods = dict(handlers._method_handlers)
        handlers._method_handlers = {m: server._override_method_handler(m, h) for m, h in methods.items()}
        for path, method in methods.items():
            _, service, name = path.split("/")
            server.add_registered_method_handlers(service, {name: method})
    _guard_passthrough(server)


def _guard_passthrough(server: Any) -> None:
    """Reflection, which Serve adds past its factory."""
    add_generic, add_registered = server.add_generic_rpc_handlers, server.add_registered_method_handlers

    def generic(handlers: Sequence[Any]) -> None:
        add_generic(handlers)
        for handler in handlers:
            methods = handler._method_handlers
            handler._method_handlers = {
                path: _guarded_method(path, m) if _passes(server, path) else m for path, m in methods.items()
            }

    def registered(service: str, methods: dict[str, Any]) -> None:
        if service in server._passthrough_service_names:
            methods = {name: _guarded_method(f"/{service}/{name}", m) for name, m in methods.items()}
        add_registered(service, methods)

    server.add_generic_rpc_handlers, server.add_registered_method_handlers = generic, registered


def _passes(server: Any, path: str) -> bool:
    return path.split("/")[1] in server._passthrough_service_names


def _guarded_method(path: str, method: Any) -> Any:
    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    own = {k: guarded(path, h, counted=False) for k in kinds if (h := getattr(method, k)) is not None}
    return method._replace(**own)


def guarded(path: str, handler: Callable[..., Any], counted: bool = True) -> Callable[..., Any]:
    """``handler`` of grpc.aio behind the gate. Raises TypeError for one that is not async."""
    counted = counted and path not in (GRPC_HEALTHZ, GRPC_APPLICATIONS)

    async def unary(request: Any, context: Any) -> Any:
        call = await Call.begin(path, context, counted)
        with call:
            return await handler(request, call.context)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        call = await Call.begin(path, context, counted)
        with call:
            async with contextlib.aclosing(handler(request, call.context)) as responses:
                async for response in responses:
                    call.answered()
                    yield response

    if inspect.isasyncgenfunction(handler):
        return stream
    if inspect.iscoroutinefunction(handler):
        return unary
    raise TypeError(f"{path}: the gate can't stand before a handler that is not async")


class Call:
    """One gRPC call that was let through."""

    def __init__(self, context: Any, ticket: Ticket | None) -> None:
        self.context = context
        self._ticket = ticket

    @classmethod
    async def begin(cls, path: str, context: Any, counted: bool) -> Call:
        """Raises grpc.aio.AbortError for a call that is refused."""
        from grpc import StatusCode  # type: ignore[import-untyped]

        policy = FILE_OF_PROCESS.policy()
        _tell_version(context)
        if path == GRPC_HEALTHZ:
            return cls(context, None)
        if policy is None:
            await context.abort(StatusCode.UNAVAILABLE, _words(closed(FILE_OF_PROCESS.why)))
            raise AssertionError("abort raises")
        given = [_bytes(value) for name, value in context.invocation_metadata() or () if name == "authorization"]
        verdict = judge(policy, given)
        if verdict in REFUSALS:
            STATS.refused += 1
            code = StatusCode.UNAUTHENTICATED if verdict == Verdict.ABSENT else StatusCode.PERMISSION_DENIED
            await context.abort(code, _words(REFUSALS[verdict]))
        if verdict == Verdict.PROBE:
            STATS.probes += 1
            return cls(ProbeContext(context), None)
        return cls(context, STATS.begin() if counted else None)

    def answered(self) -> None:
        if self._ticket is not None:
            self._ticket.answered()

    def __enter__(self) -> Call:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """A call that its client ended shows here as CancelledError, or as GeneratorExit between two responses."""
        if kind is None:
            _tell_version(self.context)
        if self._ticket is not None:
            code = self.context.code()
            number = code.value[0] if isinstance(code, Enum) else code
            self._ticket.end(issubclass(kind, Exception) if kind is not None else number in GRPC_ERRORS)


class ProbeContext:
    """A call's context without the agent's token in its metadata."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def invocation_metadata(self) -> tuple[Any, ...]:
        return tuple(pair for pair in self._context.invocation_metadata() or () if pair[0] != "authorization")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _tell_version(context: Any) -> None:
    """In the trailing metadata, beside what the application put there. Once before the call, for one that is refused or
    breaks off, and once after it, for the application's own replaces what was there."""
    policy = FILE_OF_PROCESS.policy()
    name = VERSION_HEADER.decode()
    kept = [pair for pair in context.trailing_metadata() or () if pair[0] != name]
    if policy is not None:
        kept.append((name, policy.version_id))
    context.set_trailing_metadata(tuple(kept))


def _words(problem: Problem) -> str:
    return f"{problem.detail} {problem.remedy}"


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
