"""Jobs and their runs. Field names and defaults of :class:`JobConfig` follow Anyscale's; fields that are not supported
are errors that name them."""

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
"""Replaces env values in every answer, log and history."""


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
    """Why a run did not succeed; each cause is counted separately."""

    APPLICATION = "application"
    """The entry point failed; counts towards ``max_retries``."""
    TIMEOUT = "timeout"
    """``timeout_s`` ran out; counts towards ``max_retries``."""
    INFRASTRUCTURE = "infrastructure"
    """Head lost, preempted, launch failed; does not count towards ``max_retries``."""
    CONFIGURATION = "configuration"
    """The runtime environment can't be created (a requirement does not resolve, …); fails the job at once."""
    STOPPED = "stopped"
    """The job was terminated."""


class JobConfig(Model):
    name: Name | None = None
    """Name of the job. Several jobs can have the same name: it then selects the newest one. Default: generated."""
    entrypoint: str = Field(min_length=1, max_length=32_768)
    """Shell command to run on the head, e.g. ``python main.py``."""
    working_dir: str | None = None
    """Directory to upload (the client replaces it with ``upload:<sha256>``), or the URL of a zip."""
    excludes: list[str] = []
    """Patterns of files that are not uploaded, as in .gitignore."""
    py_modules: list[str] = []
    """Package directories or ``.py`` files to upload and make importable, or URLs of zips."""
    requirements: list[str] = []
    """Lines of a requirements file for pip. In YAML also the path of a file, which the client reads."""
    env_vars: dict[str, str] = {}
    """Environment variables. Values are secrets: encrypted at rest and masked in every answer."""
    compute_config: str | ComputeConfig | None = None
    """``name[:version]``, id, or the config itself. Default: the cloud's default."""
    cluster: str | None = None
    """Name or id of an existing cluster to run on. Default: the job creates its own."""
    cloud: str | None = None
    """Name or id of the cloud of the job's cluster. Default: the default cloud."""
    project: str | None = None
    """Project of the job. Default: yours, if you have only one."""
    max_retries: int = Field(default=DEFAULT_MAX_RETRIES, ge=0, le=100)
    """How many times a failed run is retried. Failures of the infrastructure do not count."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Time limit of each run, in seconds. Default: none."""
    tags: dict[str, str] = {}
    """Tags of the job, for filters."""

    @field_validator("requirements", mode="before")
    @classmethod
    def _no_path(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("the client reads requirements files; send the lines as a list")
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
    "image_uri": "a cloud's config sets the image; a local node runs the control plane's environment",
    "containerfile": "a cloud's config sets the image",
    "registry_login_secret": "a cloud's config sets the image",
    "ray_version": "the cloud's environment determines the Ray version",
    "py_executable": "not supported",
    "connections": "not supported",
    "priority": "job queues are not supported yet",
    "job_queue_config": "job queues are not supported yet",
}


class JobTerminate(Model):
    reason: str = Field(default="", max_length=500)


class Run(Result):
    """One run of a job. Its id is Ray's submission id, ``<job id>-<number from 1>``."""

    id: str
    number: int
    state: RunState
    reason: str = ""
    cause: RunCause | None = None
    exit_code: int | None = None
    cluster_id: str | None = None
    started_at: datetime
    """When the run began, before it waited for its cluster."""
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
    """``size`` bytes of one stream, from byte ``offset`` on, at a presigned ``url`` of the cloud's bucket. The last
    chunk of a growing stream grows in place: read it again from your position."""

    stream: str
    run_id: str | None = None
    offset: int
    size: int
    url: str


class LogPage(Result):
    """The chunks of a log. ``complete``: the job has ended and every chunk that its nodes could ship is listed."""

    chunks: list[LogChunk]
    complete: bool
