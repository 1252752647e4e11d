"""The kinds of request that a load mixes, and what their answers must be, byte by byte.

Every answer is derived from the request's nonce and begins with the text by which the application calls its version:
the test application (``tests/e2e/service_app/app.py``) gives them so. A kind is a coroutine that returns
``(version id by the header, version text by the body)`` or raises; the text is empty where a body does not tell it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from urllib.parse import urlencode

from websockets.asyncio.client import connect

from benchmarks.load_http import Answer, Connection, Progress, Target
from heliostat.models.services import VERSION_HEADER

BODY_BYTES = 65_536
SLOW_S = 5.0
CHUNKS, STREAM_S = 20, 2.0
TRIPS, SESSION_S = 6, 3.0
KEPT = 8
"""Connections that are kept: at the usual rates each rests about a second between two requests, which is when one
that is closed carelessly would be."""
_BODIES = [os.urandom(BODY_BYTES) for _ in range(4)]


class WrongAnswer(Exception):
    """A whole answer, but not the right one."""


@dataclass
class Sender:
    """What requests are sent with; one for a whole load."""

    target: Target
    version_header: bool = True
    """Every answer must carry the id of its version."""
    tls: ssl.SSLContext | None = None
    kept: deque[Connection] = field(default_factory=deque)
    idle_closed: int = 0
    closes_said: int = 0

    async def fresh(self, progress: Progress, method: str, path: str, body: bytes = b"") -> Answer:
        connection = await Connection.open(self.target, self.tls)
        try:
            answer = await connection.exchange(progress, method, path, body=body, close=True)
        except BaseException:
            connection.abort()
            raise
        connection.close()
        return answer

    async def on_kept(
        self,
        progress: Progress,
        method: str,
        path: str,
        body: bytes = b"",
        headers: tuple[tuple[str, str], ...] = (),
    ) -> Answer:
        connection = await self._take()
        try:
            answer = await connection.exchange(progress, method, path, body=body, headers=headers)
        except BaseException:
            connection.abort()
            raise
        if connection.reusable:
            self.kept.append(connection)
        else:
            self.closes_said += 1
            connection.close()
        return answer

    async def fill(self) -> None:
        """Opens the kept connections. Raises OSError."""
        while len(self.kept) < KEPT:
            self.kept.append(await Connection.open(self.target, self.tls))

    async def _take(self) -> Connection:
        """The one that has rested longest. One that the server closed at rest is no failure: nothing was sent."""
        while self.kept:
            connection = self.kept.popleft()
            if not connection.ended:
                return connection
            self.idle_closed += 1
            connection.abort()
        return await Connection.open(self.target, self.tls)

    def close(self) -> None:
        while self.kept:
            self.kept.pop().abort()

    def version_of(self, headers: dict[str, str]) -> str:
        found = headers.get(VERSION_HEADER.lower(), "")
        if self.version_header and not found:
            raise WrongAnswer(f"no {VERSION_HEADER} in the answer")
        return found


Call = Callable[[Sender, str, Progress], Awaitable[tuple[str, str]]]


@dataclass(frozen=True)
class Kind:
    name: str
    per_s: float
    timeout_s: float
    """Until the whole answer is there."""
    idempotent: bool
    call: Call


def pad(nonce: str) -> str:
    """1 KiB that follows from the nonce alone."""
    return hashlib.sha256(nonce.encode()).hexdigest() * 16


def expect(answer: Answer, rest: str) -> str:
    """The version text of an answer that must be ``<version> <rest>``. Raises WrongAnswer."""
    if answer.status != 200:
        raise WrongAnswer(f"status {answer.status}: {answer.body[:200].decode(errors='replace')!r}")
    text, _, found = answer.body.decode(errors="replace").partition(" ")
    if found != rest:
        at = next((i for i, (a, b) in enumerate(zip(found, rest, strict=False)) if a != b), min(len(found), len(rest)))
        raise WrongAnswer(
            f"wrong body: {len(found)} characters, not {len(rest)}, other from {at} on: {found[at : at + 40]!r}"
        )
    return text


async def get_fresh(sender: Sender, nonce: str, progress: Progress) -> tuple[str, str]:
    answer = await sender.fresh(progress, "GET", f"/echo?nonce={nonce}")
    text = expect(answer, f"{nonce} {pad(nonce)}\n")
    return sender.version_of(answer.headers), text


async def get_kept(sender: Sender, nonce: str, progress: Progress) -> tuple[str, str]:
    answer = await sender.on_kept(progress, "GET", f"/echo?nonce={nonce}")
    text = expect(answer, f"{nonce} {pad(nonce)}\n")
    return sender.version_of(answer.headers), text


async def post(sender: Sender, nonce: str, progress: Progress) -> tuple[str, str]:
    """On a kept connection: no proxy sends a POST again, so whoever closes such a connection carelessly is seen."""
    body = nonce.encode() + _BODIES[hash(nonce) % len(_BODIES)][len(nonce) :]
    answer = await sender.on_kept(progress, "POST", f"/digest?nonce={nonce}", body)
    text = expect(answer, f"{nonce} {hashlib.sha256(body).hexdigest()} {len(body)}\n")
    return sender.version_of(answer.headers), text


async def slow(sender: Sender, nonce: str, progress: Progress) -> tuple[str, str]:
    answer = await sender.fresh(progress, "GET", f"/slow?{urlencode({'nonce': nonce, 'seconds': SLOW_S})}")
    text = expect(answer, f"{nonce} {pad(nonce)}\n")
    return sender.version_of(answer.headers), text


async def stream(sender: Sender, nonce: str, progress: Progress) -> tuple[str, str]:
    query = urlencode({"nonce": nonce, "chunks": CHUNKS, "seconds": STREAM_S})
    answer = await sender.fresh(progress, "GET", f"/stream?{query}")
    text = answer.body.decode(errors="replace").partition(" ")[0]
    whole = "".join(f"{text} {nonce} {number}/{CHUNKS}\n" for number in range(CHUNKS))
    expect(answer, whole.removeprefix(f"{text} "))
    if answer.body_s < STREAM_S / 4:
        raise WrongAnswer(f"the stream came at once, within {answer.body_s:.2f} s: somebody held it back")
    return sender.version_of(answer.headers), text


async def websocket(sender: Sender, nonce: str, progress: Progress) -> tuple[str, str]:
    """Some round trips, then a close that both sides say."""
    target = sender.target
    scheme = "ws" if sender.tls is None else "wss"
    async with connect(
        f"{scheme}://{target.netloc}{target.path}/ws",
        additional_headers=target.all_headers(),
        ssl=sender.tls,
        proxy=None,
        compression=None,
        open_timeout=None,  # the whole has one
        close_timeout=5,
    ) as socket:
        assert socket.response is not None
        progress.stage, progress.status = "body", socket.response.status_code
        progress.version_id = socket.response.headers.get(VERSION_HEADER, "")
        text = ""
        for number in range(TRIPS):
            await socket.send(f"{nonce} {number}")
            got = str(await socket.recv())
            text = text or got.partition(" ")[0]
            if got != f"{text} {nonce} {number}":
                progress.stage = "content"
                raise WrongAnswer(f"wrong echo: {got[:200]!r}")
            await asyncio.sleep(SESSION_S / TRIPS)
        await socket.close()
        progress.stage = "content"
        if socket.close_code != 1000:
            raise WrongAnswer(f"the close was {socket.close_code}, not 1000")
    return sender.version_of({VERSION_HEADER.lower(): progress.version_id}), text


KINDS = (
    Kind("get_fresh", 8, 15, True, get_fresh),
    Kind("get_kept", 8, 15, True, get_kept),
    Kind("post", 4, 15, False, post),
    Kind("slow", 1, 20, True, slow),
    Kind("stream", 1.5, 20, True, stream),
    Kind("websocket", 0.5, 20, False, websocket),
)
"""23 requests a second, which leaves most of two cores to what is measured."""


@dataclass(frozen=True)
class Plan:
    kinds: tuple[Kind, ...] = KINDS
    version_header: bool = True
    """Every answer must carry the id of its version. False: for servers that no gate of ours stands before."""
    one_text: bool = True
    """All answers of one version id call themselves the same. False: for updates in place, during which old and new
    replicas answer behind one gate."""

    def only(self, *names: str) -> Plan:
        unknown = set(names) - {kind.name for kind in self.kinds}
        if unknown:
            raise ValueError(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(k.name for k in self.kinds)}")
        return replace(self, kinds=tuple(k for k in self.kinds if k.name in names))

    def at(self, factor: float) -> Plan:
        """The same mix, so many times as often."""
        return replace(self, kinds=tuple(replace(k, per_s=k.per_s * factor) for k in self.kinds))

    def patient(self, timeout_s: float) -> Plan:
        """With one time limit for all kinds, on top of what their answers take by themselves."""
        return replace(self, kinds=tuple(replace(k, timeout_s=timeout_s) for k in self.kinds))
