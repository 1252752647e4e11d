"""Messages to a job's workflow, and how it is started."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from temporalio.client import Client
from temporalio.common import (
    TypedSearchAttributes,
)

from heliostat.models.common import Model
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.jobs import JobConfig
from runtime.messages.clusters import LeaseHolderHandle, NodeFact
from runtime.messages.common import Limits, TerminateRequest, _attributes, _start


class JobInput(Model):
    job_id: str
    name: str
    project_id: str
    project: str
    cloud_id: str
    cloud: str
    config: JobConfig
    """Env values masked."""
    env_ref: str | None = None
    """Row of the table ``sealed`` that holds the encrypted env values."""
    compute_config: ComputeConfig
    """Resolved; of the job's own cluster."""
    cluster_id: str | None = None
    """Resolved; an existing cluster to run on."""
    created_by: str
    created_at: datetime
    schedule_id: str | None = None
    limits: Limits = Limits()
    state: dict[str, Any] | None = None


class ScheduledRunInput(Model):
    schedule_id: str


class JobHandle(LeaseHolderHandle):
    """A job's workflow. Workflow id = job id."""

    async def run_fact(self, fact: NodeFact, *, timeout_s: float | None = None) -> None:
        await self._signal("run_fact", fact, timeout_s)

    async def terminate(
        self, request: TerminateRequest, *, key: str | None = None, timeout_s: float | None = None
    ) -> None:
        await self._update("terminate", request, None, key, timeout_s)


def job_attributes(arg: JobInput) -> TypedSearchAttributes:
    return _attributes("job", "STARTING", arg.project, arg.name)


def job_summary(arg: JobInput) -> str:
    where = f"cluster {arg.cluster_id}" if arg.cluster_id else "a cluster of its own"
    return f"job {arg.name} on {where} ({arg.cloud})"


async def start_job(client: Client, task_queue: str, arg: JobInput) -> None:
    """Starts ``JobWorkflow`` with id = job id. Repeatable. Raises RPCError when Temporal is away."""
    await _start(client, "JobWorkflow", arg, arg.job_id, task_queue, job_summary(arg), job_attributes(arg))
