"""Messages to a service's workflow; a deploy starts it if it does not run."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from temporalio.client import Client
from temporalio.common import (
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)

from heliostat.models.common import Model
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.services import ProbeConfig, RolloutAction, RolloutConfig, Service
from runtime.messages.clusters import LeaseHolderHandle, NodeFact
from runtime.messages.common import Limits, TerminateRequest, _attributes


class GateTokens(Model):
    """The tokens that the proxies of a service require. ``hashes``: sha256 of each valid token, hex; of 256 random
    bits, so neither secret nor salted."""

    enabled: bool = True
    hashes: list[str] = []


class VersionSpec(Model):
    """One version as its service's workflow needs it; its whole config is in the records (``service_versions``)."""

    id: str
    name: str
    number: int
    """Counts the service's versions from 1."""
    compute_config: ComputeConfig
    """Resolved; of each of its clusters."""
    cluster_replicas: int = 1
    probes: dict[str, ProbeConfig] = {}
    """By application, with the path filled in; applications that HTTP does not reach have none."""
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
    """Signal ``deploy`` of a service, which also starts its workflow: the new versions."""

    id: str
    """Of this deploy: a repeat changes nothing."""
    actor: str
    versions: list[VersionSpec] = []
    """One, unless ``weights`` are given."""
    in_place: bool = False
    canary_percent: int | None = None
    max_surge_percent: int = 100
    weights: dict[str, int] = {}
    """Version id → percent, static; empty: a rollout to the one version."""
    back: bool = False
    """Made by the workflow itself, to roll back to the previous version."""
    gate: GateTokens | None = None
    """With every deploy, since it may start the workflow."""
    life: int | None = None
    """The records' revision when the service was created or started again last. Greater than that of the workflow that
    gets it: in the records that workflow is TERMINATED already, though it has not quite ended."""


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
    """Of the records, when a terminated service is started again: the workflow continues from it."""


class RolloutOrder(Model):
    """Update ``rollout`` of a service."""

    actor: str
    action: RolloutAction
    percent: int | None = None


class RollbackOrder(Model):
    """Update ``rollback`` of a service: aborts the rollout or, when none runs, returns to the previous version."""

    actor: str
    reason: str = ""


class GateOrder(Model):
    """Update ``set_gate`` of a service."""

    actor: str
    gate: GateTokens


class EndpointLost(Model):
    """Signal ``endpoint_lost`` of a service, by the monitor: its load balancer, or its backends, no longer exist. The
    workflow repairs it by setting the backends again, under a greater revision than before."""

    event_id: str
    reason: str


class EndpointTrouble(Model):
    """Signal ``endpoint_trouble`` of a service, by the monitor: an unrecoverable error of its load balancer, when it
    changes; "" once the load balancer has recovered."""

    event_id: str
    trouble: str


class ServiceHandle(LeaseHolderHandle):
    """A service's workflow. Workflow id = service id. Its deploys come by ``deploy_service``."""

    async def serve_fact(self, fact: NodeFact, *, timeout_s: float | None = None) -> None:
        await self._signal("serve_fact", fact, timeout_s)

    async def endpoint_lost(self, message: EndpointLost) -> None:
        await self._signal("endpoint_lost", message, None)

    async def endpoint_trouble(self, message: EndpointTrouble) -> None:
        await self._signal("endpoint_trouble", message, None)

    async def rollout(self, order: RolloutOrder, *, key: str | None = None, timeout_s: float | None = None) -> None:
        await self._update("rollout", order, None, key, timeout_s)

    async def rollback(self, order: RollbackOrder, *, key: str | None = None, timeout_s: float | None = None) -> None:
        await self._update("rollback", order, None, key, timeout_s)

    async def set_gate(self, order: GateOrder, *, key: str | None = None, timeout_s: float | None = None) -> None:
        await self._update("set_gate", order, None, key, timeout_s)

    async def terminate(
        self, request: TerminateRequest, *, key: str | None = None, timeout_s: float | None = None
    ) -> None:
        await self._update("terminate", request, None, key, timeout_s)

    async def status(self) -> Service:
        return await self._query("status", Service)

    async def owned(self) -> list[str]:
        """Ids of the clusters that it holds."""
        return await self._query("owned", list[str])


def service_attributes(arg: ServiceInput) -> TypedSearchAttributes:
    return _attributes("service", "STARTING", arg.project, arg.name)


async def deploy_service(client: Client, task_queue: str, arg: ServiceInput, deploy: DeployRequest) -> None:
    """Sends a deploy to ``ServiceWorkflow`` with id = service id, and starts it if it does not run: by a signal, so
    that no worker is needed. Repeatable while the workflow runs: it knows a deploy by its id. Raises RPCError when
    Temporal is away."""
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
