"""Questions about a cloud that a worker answers: only workers have the clouds' credentials."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

from temporalio.client import Client
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy

from heliostat.models.clouds import Check

Answer = TypeVar("Answer")


async def verify_cloud(client: Client, task_queue: str, cloud_id: str, name: str, timeout_s: float) -> list[Check]:
    """Every check of the cloud. Raises WorkflowFailureError, or RPCError when Temporal is away."""
    return await _ask(client, task_queue, "VerifyCloudWorkflow", cloud_id, name, list[Check], timeout_s)


async def held_by_cloud(client: Client, task_queue: str, cloud_id: str, name: str, timeout_s: float) -> list[str]:
    """The machines and endpoints of this installation that the cloud holds. Raises as ``verify_cloud``."""
    return await _ask(client, task_queue, "HeldByCloudWorkflow", cloud_id, name, list[str], timeout_s)


async def _ask(
    client: Client, task_queue: str, workflow: str, cloud_id: str, name: str, answer: type[Answer], timeout_s: float
) -> Answer:
    """Who asks the same while the question runs gets the same answer."""
    answered: Answer = await client.execute_workflow(
        workflow,
        cloud_id,
        id=f"{workflow}-{cloud_id}",
        task_queue=task_queue,
        result_type=answer,
        execution_timeout=timedelta(seconds=timeout_s),
        id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        static_summary=f"cloud {name}",
    )
    return answered
