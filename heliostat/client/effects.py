"""How one body of client code serves ``Client`` and ``AsyncClient``.

Everything that the client does is written once, as a generator (a *flow*) that yields *effects*: send this
request, sleep, run this blocking function, hand this item to the caller. A driver runs the effects and sends the
results back in: :class:`Sync` on the caller's thread, :class:`Async` on the event loop. So retries, paging, following
a log and waiting exist in one copy, without threads and without a loop hidden in a synchronous call.

``heliostat.client.groups`` turns a flow into a method.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import httpx

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
BLOCK = 1024 * 1024
"""Bytes read at a time when a file is sent."""


@dataclass(frozen=True)
class Send:
    """One HTTP exchange; the answer is an ``httpx.Response`` that has been read. ``file`` is streamed from disk."""

    method: str
    url: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    content: bytes | None = field(default=None, repr=False)
    file: Path | None = None


@dataclass(frozen=True)
class Sleep:
    seconds: float


@dataclass(frozen=True)
class Blocking:
    """Work on disk or CPU that would hold up an event loop."""

    work: Callable[[], Any]


@dataclass(frozen=True)
class Emit(Generic[T_co]):
    """One item for the caller of a ``many`` method."""

    item: T_co


Effect = Send | Sleep | Blocking
Flow = Generator[Effect, Any, T]
Stream = Generator[Effect | Emit[T], Any, None]


class Sync:
    """Carries flows out on the caller's thread."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def perform(self, effect: Effect) -> Any:
        match effect:
            case Sleep(seconds):
                return time.sleep(seconds)
            case Blocking(work):
                return work()
            case Send(method, url, headers, content, None):
                return self.http.request(method, url, headers=headers, content=content)
            case Send(method, url, headers, _, Path() as path):
                with path.open("rb") as body:
                    return self.http.request(method, url, headers=headers, content=body)
        raise TypeError(effect)

    def run(self, flow: Flow[T]) -> T:
        step = functools.partial(next, flow)
        try:
            while True:
                try:
                    effect = step()
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                try:
                    step = functools.partial(flow.send, self.perform(effect))
                except Exception as error:  # noqa: BLE001 - not handled here: thrown into the flow, which decides
                    step = functools.partial(flow.throw, error)
        finally:
            flow.close()  # a Ctrl-C or a cancelled task: what the flow made is undone now, not some day

    def iterate(self, stream: Stream[T]) -> Iterator[T]:
        step: Callable[[], Effect | Emit[T]] = functools.partial(next, stream)
        try:
            while True:
                try:
                    effect = step()
                except StopIteration:
                    return
                if isinstance(effect, Emit):
                    yield effect.item
                    step = functools.partial(next, stream)
                    continue
                try:
                    step = functools.partial(stream.send, self.perform(effect))
                except Exception as error:  # noqa: BLE001 - as above
                    step = functools.partial(stream.throw, error)
        finally:
            stream.close()


class Async:
    """Carries flows out on the running event loop."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def perform(self, effect: Effect) -> Any:
        match effect:
            case Sleep(seconds):
                return await asyncio.sleep(seconds)
            case Blocking(work):
                return await asyncio.to_thread(work)
            case Send(method, url, headers, content, None):
                return await self.http.request(method, url, headers=headers, content=content)
            case Send(method, url, headers, _, Path() as path):
                # Content-Length is in the headers: a presigned PUT refuses a chunked body.
                return await self.http.request(method, url, headers=headers, content=_blocks(path))
        raise TypeError(effect)

    async def run(self, flow: Flow[T]) -> T:
        step = functools.partial(next, flow)
        try:
            while True:
                try:
                    effect = step()
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                try:
                    step = functools.partial(flow.send, await self.perform(effect))
                except Exception as error:  # noqa: BLE001 - not handled here: thrown into the flow, which decides
                    step = functools.partial(flow.throw, error)
        finally:
            flow.close()

    async def iterate(self, stream: Stream[T]) -> AsyncIterator[T]:
        step: Callable[[], Effect | Emit[T]] = functools.partial(next, stream)
        try:
            while True:
                try:
                    effect = step()
                except StopIteration:
                    return
                if isinstance(effect, Emit):
                    yield effect.item
                    step = functools.partial(next, stream)
                    continue
                try:
                    step = functools.partial(stream.send, await self.perform(effect))
                except Exception as error:  # noqa: BLE001 - as above
                    step = functools.partial(stream.throw, error)
        finally:
            stream.close()


async def _blocks(path: Path) -> AsyncIterator[bytes]:
    with await asyncio.to_thread(path.open, "rb") as body:
        while block := await asyncio.to_thread(body.read, BLOCK):
            yield block
