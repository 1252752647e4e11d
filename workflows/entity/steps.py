"""Background steps of an entity workflow: what takes time runs outside the main loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any

from temporalio import workflow
from temporalio.exceptions import FailureError

with workflow.unsafe.imports_passed_through():
    from heliostat.models.common import EventLevel
    from workflows.entity.alarm import Deadline, Wakeup
    from workflows.entity.commands import CommandAbandoned
    from workflows.entity.recorder import Recorder


class RetryLater(Exception):
    """A step failed and has recorded why; the main loop starts it again after its back-off."""


class Steps:
    """At most one step of a name runs at a time; its end wakes the main loop, which decides what comes next."""

    def __init__(
        self, recorder: Recorder, wake: Wakeup, *, retry_after: Callable[[int], timedelta] | None = None
    ) -> None:
        """``retry_after``: how long a step may not be started again after this many failures in a row. None: the main
        loop may start it again at once."""
        self._recorder = recorder
        self._wake = wake
        self._retry_after = retry_after
        self._running: dict[str, asyncio.Task[None]] = {}
        self._failed: dict[str, tuple[int, datetime]] = {}
        """Of a step that failed: how often in a row, and when it may be started again."""
        self._bug: Exception | None = None

    @property
    def running(self) -> set[str]:
        """Names."""
        return set(self._running)

    def start(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Does nothing while a step of this name runs, or waits after a failure. The wait is not a sleep in the step:
        continue-as-new is possible only while no step runs."""
        failures, not_before = self._failed.get(name, (0, workflow.now()))
        if name in self._running or workflow.now() < not_before:
            return
        self._running[name] = asyncio.create_task(self._guarded(name, work, failures))

    async def _guarded(self, name: str, work: Callable[[], Coroutine[Any, Any, None]], failures: int) -> None:
        try:
            await work()
            self._failed.pop(name, None)
        except CommandAbandoned:
            pass  # what it was for has ended; the main loop decides by the current state
        except (RetryLater, FailureError) as error:
            if isinstance(error, FailureError):  # also of a local activity: see policies.RECORD
                self._recorder.event("step_failed", f"{name}: {error.cause or error}", level=EventLevel.ERROR)
            if self._retry_after is not None:
                self._failed[name] = (failures + 1, workflow.now() + self._retry_after(failures))
        except Exception as error:  # noqa: BLE001
            self._bug = error  # see ``raise_bug``
        finally:
            self._running.pop(name, None)
            self._wake()

    def raise_bug(self) -> None:
        """For the main loop: an error that no step expects fails the workflow task. Temporal retries the task, and an
        operator sees the error."""
        if self._bug is not None:
            raise self._bug

    def deadlines(self) -> list[Deadline]:
        return [(at, f"{name} failed: try again") for name, (_, at) in self._failed.items()]
