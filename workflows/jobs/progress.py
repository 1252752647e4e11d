"""What every phase of a job does to its state so that others see it, and how it waits."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from heliostat.models.common import EventLevel
    from heliostat.models.jobs import JobState, Run, RunState
    from runtime.messages.common import TerminateRequest
    from workflows.entity.recorder import Recorder
    from workflows.jobs.state import JobData, Outcome


class JobProgress:
    def __init__(self, state: JobData, recorder: Recorder) -> None:
        self._s = state
        self._recorder = recorder

    def enter(self, state: JobState, reason: str) -> None:
        if state != self._s.state:
            self._s.state, self._s.state_since = state, workflow.now()
            actor = self._s.terminate.actor if state == JobState.TERMINATED and self._s.terminate else ""
            level = EventLevel.ERROR if state == JobState.FAILED else EventLevel.INFO
            self._recorder.event("state", f"{state}: {reason}", level=level, actor=actor)
        self._s.reason = reason
        self._s.waits_for = ""

    def enter_terminated(self) -> None:
        assert self._s.terminate is not None
        why = f": {self._s.terminate.reason}" if self._s.terminate.reason else ""
        self.enter(JobState.TERMINATED, f"terminated by {self._s.terminate.actor}{why}")

    def terminate(self, request: TerminateRequest) -> None:
        """The job ends; the first request counts."""
        if self._s.terminate is None:
            self._s.terminate = request

    def close_run(self, run: Run, outcome: Outcome) -> None:
        run.state, run.cause, run.reason = outcome.state, outcome.cause, outcome.reason
        run.exit_code, run.ended_at = outcome.exit_code, workflow.now()
        level = EventLevel.INFO if outcome.state == RunState.SUCCEEDED else EventLevel.WARNING
        why = f" ({outcome.cause}: {outcome.reason})" if outcome.cause else ""
        self._recorder.event("run_ended", f"run {run.number} {outcome.state}{why}", level=level)
        self._s.waits_for = ""

    def set_waiting_on(self, waits_for: str) -> None:
        self._s.waits_for = waits_for

    async def wait(self, done: Callable[[], bool], timeout: timedelta | None, why: str) -> bool:
        """Until ``done``, or the job is to end; False when ``timeout`` passed first."""
        try:
            await workflow.wait_condition(
                lambda: done() or self._s.terminate is not None, timeout=timeout, timeout_summary=why
            )
        except TimeoutError:
            return False
        return True
