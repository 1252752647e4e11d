"""A job on a cron schedule: a Temporal Schedule underneath."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from zoneinfo import ZoneInfo, available_timezones

from pydantic import Field, field_validator

from heliostat.models.common import Model, Result
from heliostat.models.jobs import JobConfig


class OverlapPolicy(StrEnum):
    """What to do when it is time and the last job still runs (Temporal's names)."""

    SKIP = "SKIP"
    BUFFER_ONE = "BUFFER_ONE"
    BUFFER_ALL = "BUFFER_ALL"
    CANCEL_OTHER = "CANCEL_OTHER"
    ALLOW_ALL = "ALLOW_ALL"


class ScheduleState(StrEnum):
    ENABLED = "ENABLED"
    DISABLED = "DISABLED"


class ScheduleConfig(Model):
    """The schedule's name is ``job_config.name``; ``apply`` updates the schedule of that name."""

    job_config: JobConfig
    cron_expression: str = Field(min_length=1, max_length=200)
    """Five fields, or six with seconds first is refused; ``@hourly`` and the like are accepted."""
    timezone: str = "UTC"
    overlap_policy: OverlapPolicy = OverlapPolicy.SKIP
    catchup_window_s: float = Field(default=600, ge=10)
    """Runs missed for longer than this while we were down are not made up for."""

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
