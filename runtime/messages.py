"""What is said to workflows: inputs, signals and updates, and how a workflow is started.

They stand here, below both sides, because the API and the activities start and message the same
workflows, and neither may import the other. Workflow id = resource id, so nothing starts twice.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field
from temporalio.client import Client
from temporalio.common import (
    SearchAttributeKey,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError

from heliostat.models.agents import FactKind
from heliostat.models.clusters import ClusterState
from heliostat.models.common import Model, Result
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.jobs import JobConfig
from heliostat.models.services import ProbeConfig, RolloutAction, RolloutConfig

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


class ClusterInput(Model):
    cluster_id: str
    name: str
    project_id: str
    project: str
    cloud_id: str
    cloud: str
    config: ComputeConfig
    created_by: str
    created_at: datetime
    tags: dict[str, str] = {}
    job_id: str | None = None
    """The job that it is made for, which holds its first lease."""
    service_id: str | None = None
    """The service that it is made for, likewise."""
    limits: Limits = Limits()
    state: dict[str, Any] | None = None
    """The workflow's own state over continue-as-new; None at first start."""

    @property
    def made_for(self) -> str | None:
        """Workflow id of the one that it is made for."""
        return self.job_id or self.service_id


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
    """Row of ``sealed`` that holds the env values."""
    compute_config: ComputeConfig
    """Resolved; of the job's own cluster."""
    cluster_id: str | None = None
    """Resolved; an existing cluster to run on."""
    created_by: str
    created_at: datetime
    schedule_id: str | None = None
    limits: Limits = Limits()
    state: dict[str, Any] | None = None


class GateTokens(Model):
    """What the proxies of a service ask for. ``hashes``: sha256 of each valid token, hex; of 256 random bits, so
    no secret and no salt."""

    enabled: bool = True
    hashes: list[str] = []


class VersionSpec(Model):
    """One version as its service's workflow needs it; its whole config stands in the records (``service_versions``)."""

    id: str
    name: str
    number: int
    """Counts the service's versions from 1."""
    compute_config: ComputeConfig
    """Resolved; of each of its clusters."""
    cluster_replicas: int = 1
    probes: dict[str, ProbeConfig] = {}
    """By application, with the path filled in; those that HTTP does not reach have none."""
    grpc: bool = False
    limits: Limits | None = None
    """Of its clusters, which may differ from version to version: the cloud's config and the settings change while the
    service lives. None: the service's first."""
    rollout: RolloutConfig = RolloutConfig()
    idle_termination_minutes: float | None = None
    created_by: str
    created_at: datetime
    tags: dict[str, str] = {}


class DeployRequest(Model):
    """Signal ``deploy`` of a service, which also starts its workflow: new versions to go to."""

    id: str
    """Of this deploy: the same again changes nothing."""
    actor: str
    versions: list[VersionSpec] = []
    """One, unless ``weights`` are given."""
    in_place: bool = False
    canary_percent: int | None = None
    max_surge_percent: int = 100
    weights: dict[str, int] = {}
    """Version id → percent, static; empty: a rollout to the one version."""
    back: bool = False
    """Made by the workflow itself: the version before comes back."""
    gate: GateTokens | None = None
    """With every deploy: it may be what starts the workflow."""
    life: int | None = None
    """The records' revision when the service was made or started again last. Above that of the workflow that hears it:
    the records call that one's life TERMINATED already, though it has not quite ended."""


class ServiceInput(Model):
    service_id: str
    name: str
    project_id: str
    project: str
    cloud_id: str
    cloud: str
    created_by: str
    created_at: datetime
    tags: dict[str, str] = {}
    limits: Limits = Limits()
    state: dict[str, Any] | None = None
    """The workflow's own state over continue-as-new; None at first start."""
    revision: int = 0
    """Of the records, when a terminated service is started again: the workflow goes on from it."""


class RolloutOrder(Model):
    """Update ``rollout`` of a service."""

    actor: str
    action: RolloutAction
    percent: int | None = None


class RollbackOrder(Model):
    """Update ``rollback`` of a service: the running rollout is abandoned or, when there is none, the version before
    comes
    back."""

    actor: str
    reason: str = ""


class GateOrder(Model):
    """Update ``set_gate`` of a service."""

    actor: str
    gate: GateTokens


class EndpointLost(Model):
    """Signal ``endpoint_lost`` of a service, by the monitor: its load balancer is not there any more, or no longer
    knows its backends. It becomes whole by being told those that are wanted now, under a greater revision than ever."""

    event_id: str
    reason: str


class EndpointTrouble(Model):
    """Signal ``endpoint_trouble`` of a service, by the monitor: what of its load balancer can't be mended, when that
    changes; "" once it is well again."""

    event_id: str
    trouble: str


class NodeFact(Model):
    """A change that a node's agent saw. ``event_id`` = ``<node id>/<fact id>``: delivered at least once."""

    event_id: str
    cluster_id: str
    node_id: str
    kind: FactKind
    at: datetime
    data: dict[str, Any] = Field(default_factory=dict)


class NodeRegistered(Model):
    event_id: str
    node_id: str
    generation: int
    ip: str


class HeadSilent(Model):
    """The monitor has not heard a head since ``since``, though it could have."""

    event_id: str
    node_id: str
    since: datetime
    silent_s: float = 0
    """By the records' clock."""
    mass: bool = False
    """Many heads are silent at once, so our ears may be at fault: only what the cloud says is gone counts."""


class LeaseRequest(Model):
    holder: str
    """Workflow id of the holder, told of every change by the signal ``cluster_changed``."""


class LeaseAnswer(Result):
    """Given at once: ``ready`` now, else the holder is told by ``cluster_changed``."""

    cluster_id: str
    state: ClusterState
    ready: bool
    head_node_id: str | None = None
    head_generation: int = 0
    reason: str = ""
    cause: str = ""
    """Error code behind ``reason``, e.g. ``bad_config`` or ``no_capacity``; empty when there is none."""
    notice: str = ""
    """What the cloud has announced for the head's machine; what runs there goes on until it is taken."""
    revision: int = 0
    """The cluster's, when this was said: an answer and a notice may cross on their way, the smaller one is older."""


class ClusterNotice(LeaseAnswer):
    """Signal ``cluster_changed`` to every lease holder. A grown ``head_generation`` means: the old head and
    all that ran on it are gone."""

    event_id: str = ""


class Release(Model):
    """Signal ``release``: the holder needs the cluster no more. ``end``: it was made for this holder, end it."""

    holder: str
    end: bool = False
    reason: str = ""


class TerminateRequest(Model):
    actor: str
    reason: str = ""


class LimitsUpdate(Model):
    """Update ``set_limits`` of a cluster: new bounds of one worker group."""

    actor: str
    group: str
    min_nodes: int | None = None
    max_nodes: int | None = None


class ScheduledRunInput(Model):
    schedule_id: str


def job_attributes(arg: JobInput) -> TypedSearchAttributes:
    return _attributes("job", "STARTING", arg.project, arg.name)


def job_summary(arg: JobInput) -> str:
    where = f"cluster {arg.cluster_id}" if arg.cluster_id else "a cluster of its own"
    return f"job {arg.name} on {where} ({arg.cloud})"


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


def service_attributes(arg: ServiceInput) -> TypedSearchAttributes:
    return _attributes("service", "STARTING", arg.project, arg.name)


async def deploy_service(client: Client, task_queue: str, arg: ServiceInput, deploy: DeployRequest) -> None:
    """Gives a deploy to ``ServiceWorkflow`` with id = service id, which is started if it does not run: a signal, so no
    worker need be there. Repeatable while the workflow runs: it knows a deploy by its id. Raises RPCError when Temporal
    is away."""
    await client.start_workflow(
        "ServiceWorkflow",
        arg,
        id=arg.service_id,
        task_queue=task_queue,
        id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        search_attributes=service_attributes(arg),
        static_summary=f"service {arg.name} on {arg.cloud}",
        start_signal="deploy",
        start_signal_args=[deploy],
    )


async def start_cluster(client: Client, task_queue: str, arg: ClusterInput) -> None:
    """Starts ``ClusterWorkflow`` with id = cluster id. Repeatable. Raises RPCError when Temporal is away."""
    made_for = f" for job {arg.job_id}" if arg.job_id else f" for service {arg.service_id}" if arg.service_id else ""
    await _start(
        client,
        "ClusterWorkflow",
        arg,
        arg.cluster_id,
        task_queue,
        f"cluster {arg.name} on {arg.cloud}{made_for}",
        _attributes("cluster", "STARTING", arg.project, arg.name),
    )


async def start_job(client: Client, task_queue: str, arg: JobInput) -> None:
    """Starts ``JobWorkflow`` with id = job id. Repeatable. Raises RPCError when Temporal is away."""
    await _start(client, "JobWorkflow", arg, arg.job_id, task_queue, job_summary(arg), job_attributes(arg))
