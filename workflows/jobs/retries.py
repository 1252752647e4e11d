"""After a run: retry, or end. ``max_retries`` limits the application's failures, time those of the infrastructure."""

from __future__ import annotations

from datetime import timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from heliostat.models.jobs import JobState, Run, RunCause, RunState
    from runtime.messages.jobs import JobInput
    from workflows import policies
    from workflows.jobs.progress import JobProgress
    from workflows.jobs.state import JobData, Outcome

LONG_RUN = timedelta(minutes=10)
"""A run of this length shows that the infrastructure works: its failures are counted from zero again."""


class Retries:
    def __init__(self, request: JobInput, state: JobData, progress: JobProgress) -> None:
        self._input = request
        self._s = state
        self._progress = progress

    def decide(self, run: Run, outcome: Outcome) -> None:
        """Ends the job, or leaves it as it is for the next run."""
        if outcome.state == RunState.SUCCEEDED:
            self._progress.enter(JobState.SUCCEEDED, f"run {run.number} succeeded")
        elif self._s.terminate is not None:
            self._progress.enter_terminated()
        elif outcome.final:
            self._progress.enter(JobState.FAILED, outcome.reason)
        elif outcome.cause == RunCause.INFRASTRUCTURE:
            self._infrastructure_failed(run, outcome)
        elif outcome.cause in (RunCause.APPLICATION, RunCause.TIMEOUT):
            self._s.infrastructure_since = None  # it carried a run to its end
            self._s.failures += 1
            if self._s.failures > self._input.config.max_retries:
                text = f"run {run.number} failed, no retries left: {outcome.reason}"
                self._progress.enter(JobState.FAILED, text)
        else:
            self._progress.enter(JobState.FAILED, outcome.reason)

    def _infrastructure_failed(self, run: Run, outcome: Outcome) -> None:
        now = workflow.now()
        if run.running_at is not None and now - run.running_at >= LONG_RUN:
            self._s.infrastructure_since = None
        self._s.infrastructure_since = self._s.infrastructure_since or now
        limit = timedelta(seconds=self._input.limits.infrastructure_retry_s)
        if now - self._s.infrastructure_since >= limit:
            self._progress.enter(JobState.FAILED, f"the infrastructure failed for {limit}: {outcome.reason}")

    def back_off(self, outcome: Outcome) -> timedelta:
        """Before the next run: the application's retry starts at once, the infrastructure gets time to recover."""
        if outcome.cause != RunCause.INFRASTRUCTURE:
            return timedelta(0)
        in_a_row = 0
        for run in reversed(self._s.runs):
            if run.cause != RunCause.INFRASTRUCTURE:
                break
            in_a_row += 1
        return policies.backoff(in_a_row - 1)
