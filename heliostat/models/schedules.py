"""Scheduled jobs. A schedule is a Temporal Schedule."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from zoneinfo import ZoneInfo, available_timezones

from pydantic import Field, field_validator

from heliostat.models.common import Model, Result
from heliostat.models.jobs import JobConfig


class OverlapPolicy(StrEnum):
    """What to do when the previous job still runs (Temporal's names)."""

    SKIP = "SKIP"
    """Skip this start."""
    BUFFER_ONE = "BUFFER_ONE"
    """Start when the previous job has ended; at most one start waits."""
    BUFFER_ALL = "BUFFER_ALL"
    """Start when the previous job has ended; every start waits."""
    CANCEL_OTHER = "CANCEL_OTHER"
    """Terminate the previous job, then start."""
    ALLOW_ALL = "ALLOW_ALL"
    """Start in any case; jobs run in parallel."""


class ScheduleState(StrEnum):
    ENABLED = "ENABLED"
    DISABLED = "DISABLED"


class ScheduleConfig(Model):
    """The schedule's name is ``job_config.name``; ``apply`` updates the schedule of that name."""

    job_config: JobConfig
    """Config of each job. Its ``name`` is required: it is the name of the schedule."""
    cron_expression: str = Field(min_length=1, max_length=200)
    """Cron expression of five fields (minute hour day month weekday), or ``@hourly`` and the like."""
    timezone: str = "UTC"
    """IANA time zone of the cron expression, e.g. ``Europe/Berlin``. In YAML also ``local``: that of the client."""
    overlap_policy: OverlapPolicy = OverlapPolicy.SKIP
    """What to do when the previous job still runs."""
    catchup_window_s: float = Field(default=600, ge=10)
    """Seconds. A start that was missed during an outage is skipped when it is later than this."""

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        if value not in available_timezones():
            raise ValueError(f"{value!r} is not an IANA time zone, e.g. 'Europe/Berlin'")
        ZoneInfo(value)
        return value


class Schedule(Result):
    id: str
    name: str
    project: str
    config: ScheduleConfig
    state: ScheduleState
    next_trigger_at: datetime | None = None
    last_jobs: list[str] = []
    """Ids of the newest jobs that it started, newest first."""
    created_by: str
    created_at: datetime
    updated_at: datetime
