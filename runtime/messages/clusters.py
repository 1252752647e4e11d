"""Messages to a cluster's workflow, and how it is started."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field
from temporalio.client import Client

from heliostat.models.agents import FactKind
from heliostat.models.clusters import ClusterState
from heliostat.models.common import Model, Result
from heliostat.models.compute_configs import ComputeConfig
from runtime.messages.common import Limits, TerminateRequest, WorkflowHandle, _attributes, _start


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
    """The job that it is created for, which holds its first lease."""
    service_id: str | None = None
    """The service that it is created for, likewise."""
    limits: Limits = Limits()
    state: dict[str, Any] | None = None
    """The workflow's own state over continue-as-new; None at first start."""

    @property
    def made_for(self) -> str | None:
        """Workflow id of the job or service that it is created for."""
        return self.job_id or self.service_id


class NodeFact(Model):
    """A change that a node's agent observed. ``event_id`` = ``<node id>/<fact id>``: delivered at least once."""

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
    """A head has sent no report since ``since``, though the API could have received one."""

    event_id: str
    node_id: str
    since: datetime
    silent_s: float = 0
    """By the records' clock."""
    mass: bool = False
    """Many heads are silent at once, so the control plane's network may be the cause: only machines that are gone by
    their cloud's word count as lost."""


class LeaseRequest(Model):
    holder: str
    """Workflow id of the holder, which gets every change by the signal ``cluster_changed``."""


class LeaseAnswer(Result):
    """Given at once: ``ready`` now, or the holder gets ``cluster_changed`` when it is."""

    cluster_id: str
    state: ClusterState
    ready: bool
    head_node_id: str | None = None
    head_generation: int = 0
    reason: str = ""
    cause: str = ""
    """Error code behind ``reason``, e.g. ``bad_config`` or ``no_capacity``; empty when there is none."""
    notice: str = ""
    """An interruption that the cloud has announced for the head's machine; what runs there continues until then."""
    revision: int = 0
    """The cluster's, when this was sent: an answer and a notice may cross on their way; the smaller one is older."""


class ClusterNotice(LeaseAnswer):
    """Signal ``cluster_changed`` to every lease holder. A grown ``head_generation`` means: the old head and
    all that ran on it are gone."""

    event_id: str = ""


class Release(Model):
    """Signal ``release``: the holder no longer needs the cluster. ``end``: it was created for this holder; end it."""

    holder: str
    end: bool = False
    reason: str = ""


class LimitsUpdate(Model):
    """Update ``set_limits`` of a cluster: new bounds of one worker group."""

    actor: str
    group: str
    min_nodes: int | None = None
    max_nodes: int | None = None


class OwnedMachine(Model):
    """A node that a cluster's workflow owns."""

    node_id: str
    machine_id: str | None
    token: str


class ClusterHandle(WorkflowHandle):
    """A cluster's workflow. Workflow id = cluster id."""

    async def node_registered(self, message: NodeRegistered, *, timeout_s: float | None = None) -> None:
        await self._signal("node_registered", message, timeout_s)

    async def nodes_registered(self, messages: list[NodeRegistered], *, timeout_s: float | None = None) -> None:
        await self._signal("nodes_registered", messages, timeout_s)

    async def fact(self, fact: NodeFact, *, timeout_s: float | None = None) -> None:
        await self._signal("fact", fact, timeout_s)

    async def facts(self, facts: list[NodeFact], *, timeout_s: float | None = None) -> None:
        await self._signal("facts", facts, timeout_s)

    async def head_silent(self, message: HeadSilent) -> None:
        await self._signal("head_silent", message, None)

    async def release(self, message: Release) -> None:
        await self._signal("release", message, None)

    async def acquire(self, request: LeaseRequest, *, key: str | None = None) -> LeaseAnswer:
        return await self._update("acquire", request, LeaseAnswer, key, None)

    async def terminate(
        self, request: TerminateRequest, *, key: str | None = None, timeout_s: float | None = None
    ) -> None:
        await self._update("terminate", request, None, key, timeout_s)

    async def set_limits(
        self, request: LimitsUpdate, *, key: str | None = None, timeout_s: float | None = None
    ) -> None:
        await self._update("set_limits", request, None, key, timeout_s)

    async def owned(self) -> list[OwnedMachine]:
        return await self._query("owned", list[OwnedMachine])


class LeaseHolderHandle(WorkflowHandle):
    """The workflow of a job or a service, as the holder of a cluster's lease."""

    async def cluster_changed(self, notice: ClusterNotice) -> None:
        await self._signal("cluster_changed", notice, None)


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
