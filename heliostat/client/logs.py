"""Reading a job's log from the bucket.

The API lists the chunks (:class:`~heliostat.models.jobs.LogPage`); the client reads them by presigned URL. A chunk is
rewritten whole as it grows, so the only cursor is the byte position in each stream: the client never reads a byte twice
(HTTP Range), and it also reads what has grown since the list. It waits for a chunk that is missing, because chunks can
arrive out of order. Only in a complete log is a gap final; then the text says so.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from heliostat.client.effects import Emit, Flow, Sleep, Stream
from heliostat.client.transport import PATIENT, TRIES, Api
from heliostat.errors import Unavailable
from heliostat.models.jobs import LogChunk, LogPage

FOLLOW_S = 0.5
"""Between two polls: agents ship once a second while a client follows."""


class LogText(str):
    """A piece of a log, of any length. ``run_id`` is the run that wrote it."""

    run_id: str | None
    stream: str

    def __new__(cls, text: str, run_id: str | None, stream: str) -> LogText:
        self = super().__new__(cls, text)
        self.run_id = run_id
        self.stream = stream
        return self


@dataclass
class _Stream:
    """``position``: bytes read. The decoder keeps the half of a character at which a piece may end."""

    run_id: str | None
    name: str
    position: int = 0
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def text(self, data: bytes, *, final: bool = False) -> LogText:
        return LogText(self.decoder.decode(data, final), self.run_id, self.name)


def follow_pages(api: Api, page_of: Callable[..., Flow[LogPage]], follow: bool, tail: int | None) -> Stream[LogText]:
    """Reads the log; with ``follow``, until a page is complete. ``page_of(tries=…)`` lists."""
    reader = LogReader(api)
    tries: float = TRIES
    began = True
    while True:
        page = yield from page_of(tries=tries)
        if began and tail is not None:
            yield from reader.skip_to_tail(page, tail)
        began = False
        yield from reader.read(page, tries=tries)
        if page.complete or not follow:
            return
        tries = PATIENT
        yield Sleep(FOLLOW_S)


class LogReader:
    """The position in each stream of a log; streams in the order in which the API first listed them."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.streams: dict[tuple[str | None, str], _Stream] = {}

    def read(self, page: LogPage, *, tries: float = TRIES) -> Stream[LogText]:
        """Everything on this page that has not been read."""
        for chunk in _in_order(page):
            stream = self._stream(chunk)
            if chunk.offset + chunk.size <= stream.position:
                continue
            if chunk.offset > stream.position:
                if not page.complete:
                    continue  # the chunk before it has not arrived yet
                yield Emit(stream.text(b"", final=True))
                yield Emit(self._hole(stream, chunk.offset - stream.position))
                stream.position = chunk.offset
            data = yield from self._fetch(chunk, stream.position - chunk.offset, tries)
            stream.position += len(data)
            if text := stream.text(data):
                yield Emit(text)
            if page.complete and chunk.offset + chunk.size > stream.position:
                # The bucket has less than the API listed: an error, or half a log would look complete.
                raise Unavailable(
                    f"The log {chunk.stream} ends at byte {stream.position} of {chunk.offset + chunk.size}.",
                    remedy="Try again. If it happens again, check the bucket.",
                    resource=chunk.run_id,
                )
        if page.complete:
            for stream in self.streams.values():
                if text := stream.text(b"", final=True):
                    yield Emit(text)

    def skip_to_tail(self, page: LogPage, lines: int) -> Flow[None]:
        """Moves the position to where the last ``lines`` lines of all that is listed begin."""
        missing = lines
        ended = True  # the very last newline ends a line, it does not begin one
        for chunk in reversed(_in_order(page)):
            stream = self._stream(chunk)
            if missing <= 0:
                stream.position = max(stream.position, chunk.offset + chunk.size)
                continue
            data = (yield from self._fetch(chunk, 0, TRIES))[: chunk.size]
            at = len(data)
            if ended and data.endswith(b"\n"):
                at -= 1
            ended = False
            while (at := data.rfind(b"\n", 0, at)) >= 0:
                missing -= 1
                if missing == 0:
                    stream.position = max(stream.position, chunk.offset + at + 1)
                    break

    def _stream(self, chunk: LogChunk) -> _Stream:
        return self.streams.setdefault((chunk.run_id, chunk.stream), _Stream(chunk.run_id, chunk.stream))

    def _fetch(self, chunk: LogChunk, start: int, tries: float) -> Flow[bytes]:
        headers = {"Range": f"bytes={start}-"} if start else {}
        response: httpx.Response = yield from self.api.fetch(chunk.url, headers, tries=tries)
        if response.status_code == 206:
            return response.content
        if response.status_code == 200:  # a bucket that does not support Range
            return response.content[start:]
        if response.status_code == 416:
            return b""  # nothing beyond this position yet
        remedy = "The retention policy may have deleted it."
        if response.status_code == 403:
            remedy = "Its URL may have expired. Try again."
        raise Unavailable(
            f"The bucket answered {response.status_code} for the log {chunk.stream} from byte {chunk.offset} on.",
            remedy=remedy,
            resource=chunk.run_id,
        )

    def _hole(self, stream: _Stream, size: int) -> LogText:
        return LogText(f"\n[heliostat: {size} bytes of this log were lost]\n", stream.run_id, stream.name)


def _in_order(page: LogPage) -> list[LogChunk]:
    """Streams in the API's order (run by run), the chunks of each by position."""
    order: dict[tuple[str | None, str], int] = {}
    for chunk in page.chunks:
        order.setdefault((chunk.run_id, chunk.stream), len(order))
    return sorted(page.chunks, key=lambda c: (order[c.run_id, c.stream], c.offset))
