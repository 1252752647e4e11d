"""Shared by the lists and waits of all nouns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TypeVar

from heliostat.client.effects import Emit, Stream
from heliostat.client.transport import Api, path_of
from heliostat.models.common import Event, Page

T = TypeVar("T")
PAGE_SIZE = 50


def pages(api: Api, path: str, item: type[T], *, page_size: int = PAGE_SIZE, **filters: Any) -> Stream[T]:
    """Every item of a list; each page is fetched when the caller has used up the one before."""
    cursor: str | None = None
    while True:
        page: Page[T] = yield from api.call(
            "GET",
            path,
            Page[item],  # type: ignore[valid-type]
            params={"limit": page_size, "cursor": cursor, **filters},
        )
        for one in page.items:
            yield Emit(one)
        cursor = page.next_cursor
        if cursor is None:
            return


def tag_filter(tags: Mapping[str, str] | None) -> list[str] | None:
    return [f"{k}={v}" for k, v in tags.items()] if tags else None


def events(api: Api, noun: str, ref: str, project: str | None) -> Stream[Event]:
    return pages(api, path_of(noun, ref, "events"), Event, page_size=200, project=project)


class Pace:
    """The pause between two polls: short at first, when a change is near and a person watches, then a second. Counts
    the caller's limit, the only end of a wait."""

    def __init__(self, timeout: float | None = None) -> None:
        self.began = time.monotonic()
        self.timeout = timeout

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def expired(self) -> bool:
        return self.timeout is not None and self.elapsed >= self.timeout

    def next(self) -> float:
        wait = 0.2 if self.elapsed < 15 else 0.5 if self.elapsed < 60 else 1.0
        return wait if self.timeout is None else max(0.0, min(wait, self.timeout - self.elapsed))
