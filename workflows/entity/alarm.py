"""When the main loop runs next: after a message or a step, or when a deadline is due."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import datetime, timedelta

from temporalio import workflow

Deadline = tuple[datetime, str]
"""When, and what is due then."""


def earliest(now: datetime, deadlines: Iterable[tuple[datetime | None, str]]) -> Deadline | None:
    """The next one that is set and still to come."""
    return min(((at, why) for at, why in deadlines if at is not None and at > now), default=None)


class Wakeup:
    """Tells the main loop that something changed."""

    def __init__(self) -> None:
        self._requested = False

    def __call__(self) -> None:
        self._requested = True

    def clear(self) -> None:
        self._requested = False

    async def wait(self) -> None:
        await workflow.wait_condition(lambda: self._requested)


class Alarm:
    """One timer for the nearest deadline. It is not moved when that deadline moves away: it then fires early, finds
    nothing to do and is set again, which is cheaper than two events for every message."""

    def __init__(self, wake: Wakeup) -> None:
        self._wake = wake
        self._at: datetime | None = None
        self._timer: asyncio.Task[None] | None = None

    def set(self, deadlines: Iterable[Deadline | None]) -> None:
        """Deadlines that have passed are ignored: the main loop has just handled them."""
        now = workflow.now()
        due = earliest(now, (deadline for deadline in deadlines if deadline is not None))
        if due is None:
            return
        at, why = due
        if self._at is not None and self._at <= at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._at = at
        self._timer = asyncio.create_task(self._ring(at - now, why))

    async def _ring(self, after: timedelta, why: str) -> None:
        await workflow.sleep(after, summary=why)
        self._at, self._timer = None, None
        self._wake()
