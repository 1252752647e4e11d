"""The state of one job, and what the end of a run means. Pure."""

from __future__ import annotations

from datetime import datetime

from heliostat.models.common import Model
from heliostat.models.jobs import JobState, Run, RunCause, RunState
from runtime.messages.clusters import NodeFact
from runtime.messages.common import TerminateRequest


class Outcome(Model):
    """How one run ended."""

    state: RunState
    cause: RunCause | None = None
    reason: str = ""
    exit_code: int | None = None
    final: bool = False
    """No other run could end differently."""


class JobData(Model):
    state: JobState = JobState.STARTING
    reason: str = ""
    waits_for: str = ""
    state_since: datetime
    revision: int = 0
    runs: list[Run] = []
    clusters: int = 0
    """Clusters made for this job so far."""
    failures: int = 0
    """Runs that the application failed."""
    infrastructure_since: datetime | None = None
    """Since when the infrastructure fails every run early."""
    terminate: TerminateRequest | None = None
    cancelled: bool = False
    """The API cancelled the request before anything was created."""


def infrastructure(reason: str) -> Outcome:
    return Outcome(state=RunState.FAILED, cause=RunCause.INFRASTRUCTURE, reason=reason)


def timed_out(timeout_s: float, exit_code: int | None = None) -> Outcome:
    reason = f"ran longer than {timeout_s:g} s"
    return Outcome(state=RunState.FAILED, cause=RunCause.TIMEOUT, reason=reason, exit_code=exit_code)


def stopped(reason: str, exit_code: int | None = None) -> Outcome:
    return Outcome(state=RunState.STOPPED, cause=RunCause.STOPPED, reason=reason, exit_code=exit_code)


def outcome_of(fact: NodeFact, timeout_s: float | None) -> Outcome:
    """Whose failure a run's end is. The error words are those of ``heliostat.models.agents.FactKind.RUN_ENDED``."""
    status, error = str(fact.data.get("status")), str(fact.data.get("error") or "")
    message = str(fact.data.get("message") or "")
    code = fact.data.get("exit_code")
    exit_code = int(code) if isinstance(code, int) else None
    if status == "SUCCEEDED":
        return Outcome(state=RunState.SUCCEEDED, exit_code=exit_code if exit_code is not None else 0)
    if fact.data.get("timed_out"):
        return timed_out(timeout_s or 0, exit_code)
    if status == "STOPPED":
        return stopped(message or "stopped on the cluster", exit_code)
    cause = {
        "runtime_env": RunCause.CONFIGURATION,
        "supervisor": RunCause.INFRASTRUCTURE,
        "driver_lost": RunCause.INFRASTRUCTURE,
    }.get(error, RunCause.APPLICATION)
    reason = message or (f"exit code {exit_code}" if exit_code is not None else "failed without a message")
    return Outcome(state=RunState.FAILED, cause=cause, reason=reason, exit_code=exit_code)
