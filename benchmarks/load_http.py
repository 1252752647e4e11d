"""HTTP/1.1 exchanges that hide nothing: no retry, no redirect, no pooling but that which the caller does.

aiohttp sends an idempotent request a second time when a kept connection breaks, and httpx tells no difference
between an answer that has not begun and one that broke off; a count of failures can have neither.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11

READ = 65_536


@dataclass(frozen=True)
class Target:
    """Where the requests go. ``token``: sent as bearer, when not empty."""

    url: str
    token: str = field(default="", repr=False)
    cafile: str = ""
    """Certificates to trust at ``https://``; default: the system's."""
    headers: tuple[tuple[str, str], ...] = ()
    """Sent with every request."""

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise ValueError(f"{self.url!r} is no URL of a service")

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        parts = urlsplit(self.url)
        return parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def path(self) -> str:
        """What all paths begin with, without a slash at its end."""
        return urlsplit(self.url).path.rstrip("/")

    @property
    def netloc(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def tls(self) -> ssl.SSLContext | None:
        if urlsplit(self.url).scheme != "https":
            return None
        return ssl.create_default_context(cafile=self.cafile or None)

    def all_headers(self) -> list[tuple[str, str]]:
        bearer = [("Authorization", f"Bearer {self.token}")] if self.token else []
        return [*bearer, *self.headers]


@dataclass
class Progress:
    """How far an exchange got: what is known of it when it fails."""

    stage: str = "connect"
    """``connect``, ``send``, ``answer`` (until its first byte), ``body``, ``content`` (it was whole, and wrong)."""
    status: int = 0
    version_id: str = ""
    """As its header says; empty: none yet."""

    @property
    def began(self) -> bool:
        """Whether the answer had begun."""
        return self.stage in ("body", "content")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes
    first_byte_s: float
    """From the start of the exchange to the first byte of the body (to the end of the head when there is none)."""
    body_s: float
    """From the body's first byte to its last."""


class Broken(Exception):
    """The exchange did not end as HTTP says: the text tells how."""


class Connection:
    """One connection to the target; several exchanges, one after the other."""

    def __init__(self, target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._target, self._reader, self._writer = target, reader, writer
        self._http = h11.Connection(h11.CLIENT)

    @classmethod
    async def open(cls, target: Target, tls: ssl.SSLContext | None) -> Connection:
        """Raises OSError."""
        reader, writer = await asyncio.open_connection(target.host, target.port, ssl=tls)
        return cls(target, reader, writer)

    @property
    def reusable(self) -> bool:
        """Both sides are ready for another exchange, as far as they have said."""
        return self._http.our_state is h11.IDLE and self._http.their_state is h11.IDLE

    @property
    def ended(self) -> bool:
        """The server has closed it, or broken it off, while nothing was under way."""
        return self._reader.at_eof() or self._reader.exception() is not None

    def close(self) -> None:
        self._writer.close()

    def abort(self) -> None:
        self._writer.transport.abort()

    async def exchange(
        self,
        progress: Progress,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        headers: tuple[tuple[str, str], ...] = (),
        close: bool = False,
    ) -> Answer:
        """One request and its whole answer. ``close``: asks for the end of the connection after it.

        Raises:
            Broken: the connection ended, or what came is no HTTP.
            OSError: it was reset.
        """
        began = time.monotonic()
        head = [("Host", self._target.netloc), *self._target.all_headers(), *headers]
        if body or method not in ("GET", "HEAD"):
            head.append(("Content-Length", str(len(body))))
        if close:
            head.append(("Connection", "close"))
        progress.stage = "send"
        request = h11.Request(method=method, target=self._target.path + path, headers=head)
        self._writer.write(self._http.send(request) or b"")
        if body:
            self._writer.write(self._http.send(h11.Data(data=body)) or b"")
        self._http.send(h11.EndOfMessage())
        await self._writer.drain()
        progress.stage = "answer"
        status, found, pieces = 0, dict[str, str](), list[bytes]()
        head_at = first = last = 0.0
        while True:
            event = await self._next(progress)
            if isinstance(event, h11.Response):
                head_at = time.monotonic()
                status = progress.status = event.status_code
                found = {name.decode().lower(): value.decode(errors="replace") for name, value in event.headers}
                progress.stage, progress.version_id = "body", found.get("x-heliostat-version", "")
            elif isinstance(event, h11.Data):
                last = time.monotonic()
                first = first or last
                pieces.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                break
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        progress.stage = "content"
        return Answer(status, found, b"".join(pieces), (first or head_at) - began, last - first)

    async def _next(self, progress: Progress) -> h11.Event | type[h11.PAUSED]:
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                where = "before the answer began" if progress.stage == "answer" else "in the middle of the answer"
                raise Broken(f"{where}: {error}") from error
            if event is h11.NEED_DATA:
                data = await self._reader.read(READ)
                if not data and progress.stage == "answer":
                    raise Broken("the connection was closed before the answer began")
                self._http.receive_data(data)
            elif isinstance(event, h11.ConnectionClosed):
                raise Broken("the connection was closed before the answer began")
            else:
                return event  # type: ignore[return-value]
