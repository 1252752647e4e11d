"""Jobs and their runs. Field names and defaults of :class:`JobConfig` follow Anyscale's
(research/anyscale.md §2); what we do not carry out is refused by name."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import Field, field_validator

from heliostat.models.common import Model, Name, Result
from heliostat.models.compute_configs import ComputeConfig

DEFAULT_MAX_RETRIES = 1
DEFAULT_EXCLUDES = [".git", ".venv", "venv", "__pycache__"]

MASK = "********"
"""What an env value reads as in every answer, log and history."""


class JobState(StrEnum):
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    TERMINATED = "TERMINATED"

    @property
    def settled(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.TERMINATED)


class RunState(StrEnum):
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"


class RunCause(StrEnum):
    """Why a run ended otherwise than by success; each is counted apart."""

    APPLICATION = "application"
    """The entry point failed: uses up ``max_retries``."""
    TIMEOUT = "timeout"
    """``timeout_s`` ran out: counts as the application's failure."""
    INFRASTRUCTURE = "infrastructure"
    """Head lost, preempted, launch failed: never uses up ``max_retries``."""
    CONFIGURATION = "configuration"
    """The runtime environment can't be made (requirement does not resolve, …): fails the job at once."""
    STOPPED = "stopped"
    """Somebody terminated the job."""


class JobConfig(Model):
    name: Name | None = None
    entrypoint: str = Field(min_length=1, max_length=32_768)
    working_dir: str | None = None
    """A directory (the client uploads it and puts ``upload:<sha256>`` here) or the URL of a zip."""
    excludes: list[str] = []
    py_modules: list[str] = []
    requirements: list[str] = []
    """pip requirement lines; a file's path in YAML is read by the client."""
    env_vars: dict[str, str] = {}
    """Values are secrets: encrypted at rest and masked in every answer."""
    compute_config: str | ComputeConfig | None = None
    cluster: str | None = None
    """Name or id of an existing cluster to run on; default: one of the job's own."""
    cloud: str | None = None
    project: str | None = None
    max_retries: int = Field(default=DEFAULT_MAX_RETRIES, ge=0, le=100)
    timeout_s: float | None = Field(default=None, gt=0)
    """Of each run, seconds; None = no limit."""
    tags: dict[str, str] = {}

    @field_validator("requirements", mode="before")
    @classmethod
    def _no_path(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("a requirements file is read by the client; send its lines as a list")
        return [] if value is None else value

    @field_validator("max_retries", mode="before")
    @classmethod
    def _default_retries(cls, value: Any) -> Any:
        return DEFAULT_MAX_RETRIES if value is None else value

    @field_validator("excludes", "py_modules", mode="before")
    @classmethod
    def _none_is_empty_list(cls, value: Any) -> Any:
        return [] if value is None else value

    @field_validator("env_vars", "tags", mode="before")
    @classmethod
    def _none_is_empty_dict(cls, value: Any) -> Any:
        return {} if value is None else value

    def masked(self) -> JobConfig:
        return self.model_copy(update={"env_vars": dict.fromkeys(self.env_vars, MASK)})

    def __repr__(self) -> str:
        return f"JobConfig(name={self.name!r}, entrypoint={self.entrypoint!r}, …)"

    __str__ = __repr__


NOT_SUPPORTED_JOB = {
    "image_uri": "images come with the AWS and GCP clouds; a local node runs the control plane's own environment",
    "containerfile": "images come with the AWS and GCP clouds",
    "registry_login_secret": "images come with the AWS and GCP clouds",
    "ray_version": "the cloud's environment decides the Ray version",
    "py_executable": "not supported",
    "connections": "not supported",
    "priority": "job queues are not supported yet",
    "job_queue_config": "job queues are not supported yet",
}


class JobTerminate(Model):
    reason: str = Field(default="", max_length=500)


class Run(Result):
    """One attempt at a job. Its id is Ray's submission id, ``<job id>-<number from 1>``."""

    id: str
    number: int
    state: RunState
    reason: str = ""
    cause: RunCause | None = None
    exit_code: int | None = None
    cluster_id: str | None = None
    started_at: datetime
    """When the attempt began (waiting for its cluster included)."""
    running_at: datetime | None = None
    """When its entry point started."""
    ended_at: datetime | None = None


class Job(Result):
    id: str
    name: str
    project: str
    state: JobState
    reason: str = ""
    waits_for: str = ""
    config: JobConfig
    runs: list[Run] = []
    cluster_id: str | None = None
    created_by: str
    created_at: datetime
    state_since: datetime
    ended_at: datetime | None = None
    schedule_id: str | None = None
    tags: dict[str, str] = {}
    revision: int = 0


class LogChunk(Result):
    """``size`` bytes of one stream, from byte ``offset`` on, at a presigned ``url`` of the cloud's bucket.
    The last chunk of a stream that goes on grows in place: read it again from where you are."""

    stream: str
    run_id: str | None = None
    offset: int
    size: int
    url: str


class LogPage(Result):
    """Where to read a job's log. ``complete``: the job is settled and everything that its nodes could
    ship is listed."""

    chunks: list[LogChunk]
    complete: bool
