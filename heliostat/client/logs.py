"""Reading a job's log from the bucket.

The API lists where the pieces are (:class:`~heliostat.models.jobs.LogPage`), we read them by presigned URL. A chunk is
rewritten whole as it grows, so the only cursor is the byte position in each stream: what is already read
is never asked for again (HTTP Range), and what has grown since the list was made is taken along. A piece that is
not there yet (the one before it arrives later) is waited for; only when the log is complete can a hole be final,
and then it is said in the text, not skipped in silence.
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
"""Between two looks for more: agents ship once a second while somebody follows."""


class LogText(str):
    """A piece of log, as long as it happens to be. ``run_id`` tells which attempt wrote it."""

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
    """Reads what there is; with ``follow`` until a page says that it is complete. ``page_of(tries=…)`` lists."""
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
    """Where we are in each stream of one job's log; streams in the order in which the API first listed them."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.streams: dict[tuple[str | None, str], _Stream] = {}

    def read(self, page: LogPage, *, tries: float = TRIES) -> Stream[LogText]:
        """Everything that this page lists and that has not been read."""
        for chunk in _in_order(page):
            stream = self._stream(chunk)
            if chunk.offset + chunk.size <= stream.position:
                continue
            if chunk.offset > stream.position:
                if not page.complete:
                    continue  # the piece before it is on its way
                yield Emit(stream.text(b"", final=True))
                yield Emit(self._hole(stream, chunk.offset - stream.position))
                stream.position = chunk.offset
            data = yield from self._fetch(chunk, stream.position - chunk.offset, tries)
            stream.position += len(data)
            if text := stream.text(data):
                yield Emit(text)
            if page.complete and chunk.offset + chunk.size > stream.position:
                # The bucket gave less than it was said to hold: better an error than half a log taken for whole.
                raise Unavailable(
                    f"The log {chunk.stream} ends at byte {stream.position} of {chunk.offset + chunk.size}.",
                    remedy="Try again; if it stays so, see the bucket.",
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
        if response.status_code == 200:  # a bucket that does not honour Range
            return response.content[start:]
        if response.status_code == 416:
            return b""  # nothing beyond this position yet
        remedy = "Logs are kept for as long as the operator's retention says."
        if response.status_code == 403:
            remedy = "Its link may have expired: try again."
        raise Unavailable(
            f"The bucket answered {response.status_code} for the log {chunk.stream} from byte {chunk.offset} on.",
            remedy=remedy,
            resource=chunk.run_id,
        )

    def _hole(self, stream: _Stream, size: int) -> LogText:
        return LogText(f"\n[heliostat: {size} bytes of this log were lost]\n", stream.run_id, stream.name)


def _in_order(page: LogPage) -> list[LogChunk]:
    """Streams as the API orders them (run by run), pieces of each by position."""
    order: dict[tuple[str | None, str], int] = {}
    for chunk in page.chunks:
        order.setdefault((chunk.run_id, chunk.stream), len(order))
    return sorted(page.chunks, key=lambda c: (order[c.run_id, c.stream], c.offset))
