"""Workers that die: before or after what an activity does, so that its answer is lost, with all that they remember."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import temporalio.client
import temporalio.worker
from temporalio import activity


class Crash(Exception):
    """The worker died here; Temporal gives the same activity again, here or to another worker."""


class Crashes(temporalio.client.Interceptor, temporalio.worker.Interceptor):
    """Counts activities as they are begun, from 0, over all workers that use it; ``plan`` names the steps at which
    the worker dies: ``before`` or ``after`` the activity has done its work."""

    def __init__(self, plan: dict[int, str]) -> None:
        self.plan = plan
        self.step = 0
        self.names: list[str] = []
        self.crashed: list[str] = []
        self.on_step: Callable[[int], None] | None = None
        """Called with the number of each activity, before it begins."""
        self.under_way = 0
        self.restart: Callable[[], Any] | None = None
        """What brings up the next worker; None: the same worker goes on."""
        self._restarting: asyncio.Task[None] | None = None

    def intercept_activity(
        self, next: temporalio.worker.ActivityInboundInterceptor
    ) -> temporalio.worker.ActivityInboundInterceptor:
        return _Crashing(next, self)

    def crash(self, name: str, mode: str) -> Crash:
        self.crashed.append(f"{mode} {name}")
        if self.restart is not None and (self._restarting is None or self._restarting.done()):
            self._restarting = asyncio.ensure_future(self.restart())
        return Crash(f"the worker died {mode} {name}")

    async def settled(self) -> None:
        if self._restarting is not None:
            await self._restarting


class _Crashing(temporalio.worker.ActivityInboundInterceptor):
    def __init__(self, next: temporalio.worker.ActivityInboundInterceptor, crashes: Crashes) -> None:
        super().__init__(next)
        self._crashes = crashes

    async def execute_activity(self, input: temporalio.worker.ExecuteActivityInput) -> Any:
        c, name = self._crashes, activity.info().activity_type
        mode = c.plan.get(c.step)
        c.step += 1
        c.names.append(name)
        if c.on_step is not None:
            c.on_step(c.step - 1)
        if mode == "before":
            raise c.crash(name, mode)
        c.under_way += 1
        try:
            result = await super().execute_activity(input)
        except BaseException:
            if mode == "after":
                raise c.crash(name, mode) from None
            raise
        finally:
            c.under_way -= 1
        if mode == "after":
            raise c.crash(name, mode)
        return result
