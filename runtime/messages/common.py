"""What is said to workflows: inputs, signals and updates, and how a workflow is started.

They stand here, below both sides, because the API and the activities start and message the same
workflows, and neither may import the other. Workflow id = resource id, so nothing starts twice.
"""

from __future__ import annotations

from temporalio.client import Client
from temporalio.common import (
    SearchAttributeKey,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError

from heliostat.models.common import Model

KIND = SearchAttributeKey.for_keyword("HeliostatKind")
STATE = SearchAttributeKey.for_keyword("HeliostatState")
PROJECT = SearchAttributeKey.for_keyword("HeliostatProject")
NAME = SearchAttributeKey.for_keyword("HeliostatName")
SEARCH_ATTRIBUTES = (KIND, STATE, PROJECT, NAME)
MONITOR_ID = "monitor"
SWEEP_SCHEDULE_ID = "sweep"


class Limits(Model):
    """The settings that a workflow works by, fixed when it starts: a replay must see the same ones."""

    head_start_timeout_s: float = 300
    worker_start_timeout_s: float = 300
    register_timeout_s: float | None = None
    """Of a machine, from its launch to its agent's first call; None: as long as its node's start."""
    capacity_timeout_s: float = 900
    infrastructure_retry_s: float = 3600


class TerminateRequest(Model):
    actor: str
    reason: str = ""


def _attributes(kind: str, state: str, project: str, name: str) -> TypedSearchAttributes:
    return TypedSearchAttributes(
        [
            SearchAttributePair(KIND, kind),
            SearchAttributePair(STATE, state),
            SearchAttributePair(PROJECT, project),
            SearchAttributePair(NAME, name),
        ]
    )


async def _start(
    client: Client, workflow: str, arg: Model, id: str, queue: str, summary: str, attributes: TypedSearchAttributes
) -> None:
    """Starts it unless it runs or ran: both are success, for the id is the resource's."""
    try:
        await client.start_workflow(
            workflow,
            arg,
            id=id,
            task_queue=queue,
            id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            search_attributes=attributes,
            static_summary=summary,
        )
    except WorkflowAlreadyStartedError:
        pass  # it has run to its end already
