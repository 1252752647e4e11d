"""Machines: one side effect each. Sync, as the clouds' SDKs are; they run on the worker's threads."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.cloud_calls import FINAL, as_failure, part_of
from clouds.boot.user_data import NodeEnvironment, user_data
from clouds.contract.errors import Gone
from clouds.contract.machines import CLUSTER_TAG, NODE_TAG, OWNER_TAG, Machine, Machines, MachineSpec, MachineState
from clouds.contract.retained import RetainedResources
from heliostat.errors import CloudError
from heliostat.models.clouds import Market
from heliostat.models.clusters import NodeRole
from heliostat.models.common import Model
from heliostat.models.compute_configs import Architecture
from runtime.keys import Keys
from runtime.telemetry import LAUNCHES

POLL_S = 5.0
"""Between two polls of machines that are being ended, at most."""
CONSOLE_TAIL = 4096
"""Characters of a console that are kept: some sixty lines, of which the last ones show the reason."""


class BootFacts(Model):
    """What a node's first boot depends on beside its own ids. Fixed with the node, so that the request of one
    (slot, generation) is the same bytes after an upgrade of Heliostat."""

    api_url: str
    bundle_sha256: str
    ca_sha256: str = ""
    environment: NodeEnvironment | None = None


class LaunchNode(Model):
    cloud_id: str
    cluster_id: str
    node_id: str
    generation: int
    role: NodeRole
    token: str
    boot: BootFacts
    instance_type: str | None = None
    cpu: float | None = None
    memory: int | None = None
    gpu: int = 0
    zone: str | None = None
    market: Market = Market.ON_DEMAND
    tags: dict[str, str] = {}
    accelerator: str | None = None
    cpu_architecture: Architecture | None = None
    advanced: dict[str, Any] = {}
    keep: RetainedResources | None = None


class HandOver(Model):
    """See ``Machines.attach_retained``."""

    cloud_id: str
    cluster_id: str
    machine_id: str | None = None


class MachineRefs(Model):
    cloud_id: str
    machine_ids: list[str]


class EndNodes(Model):
    """``tokens`` name launches whose answer is not known: what they made, if anything, is ended too."""

    cloud_id: str
    machine_ids: list[str]
    tokens: list[str] = []


class NodeActivities:
    """Carries the clouds by id, and what user-data is made of."""

    def __init__(
        self,
        machines: Mapping[str, Machines],
        keys: Keys,
        installation_id: str,
        cloud_names: Mapping[str, str] | None = None,
    ) -> None:
        self._cloud_names = cloud_names or {}
        self._machines = machines
        self._keys = keys
        self._installation_id = installation_id

    @activity.defn
    def launch_node(self, node: LaunchNode) -> Machine:
        """Asks the cloud for the node's machine; repeatable by its token. The bootstrap token is made here,
        so that no history ever holds it."""
        spec = MachineSpec(
            token=node.token,
            cluster_id=node.cluster_id,
            node_id=node.node_id,
            generation=node.generation,
            role=node.role,
            installation_id=self._installation_id,
            instance_type=node.instance_type,
            cpu=node.cpu,
            memory=node.memory,
            gpu=node.gpu,
            zone=node.zone,
            market=node.market,
            user_data=user_data(
                api_url=node.boot.api_url,
                node_id=node.node_id,
                generation=node.generation,
                bootstrap_token=self._keys.bootstrap_token(node.node_id, node.generation),
                bundle_sha256=node.boot.bundle_sha256,
                environment=node.boot.environment,
                ca_sha256=node.boot.ca_sha256,
                volume_path=node.keep.mount_path if node.keep else "",
            ),
            tags={
                **node.tags,
                OWNER_TAG: self._installation_id,
                CLUSTER_TAG: node.cluster_id,
                NODE_TAG: node.node_id,
            },
            accelerator=node.accelerator,
            cpu_architecture=node.cpu_architecture,
            advanced=node.advanced,
            keep=node.keep,
        )
        cloud = self._cloud_names.get(node.cloud_id, node.cloud_id)
        try:
            machine = part_of(self._machines, node.cloud_id).launch(spec)
        except CloudError as error:
            LAUNCHES.labels(cloud=cloud, outcome=error.code).inc()
            raise as_failure(error) from error
        LAUNCHES.labels(cloud=cloud, outcome="launched").inc()
        return machine

    @activity.defn
    def hand_over(self, what: HandOver) -> None:
        """Gives what the cluster's heads keep to the machine of the new one; without a machine, deletes it. Tried again
        while it is too early."""
        try:
            part_of(self._machines, what.cloud_id).attach_retained(what.cluster_id, what.machine_id)
        except CloudError as error:
            final = what.machine_id is not None and isinstance(error, (*FINAL, Gone))  # what costs money is never left
            raise ApplicationError(str(error), type=error.code, non_retryable=final) from error

    @activity.defn
    def describe_machines(self, refs: MachineRefs) -> list[Machine]:
        try:
            return part_of(self._machines, refs.cloud_id).describe(refs.machine_ids)
        except CloudError as error:
            raise as_failure(error) from error

    @activity.defn
    def console_output(self, refs: MachineRefs) -> str:
        """Tail of the first machine's boot output, for the reason of a node that never registered."""
        try:
            return part_of(self._machines, refs.cloud_id).console_output(refs.machine_ids[0])[-CONSOLE_TAIL:]
        except CloudError as error:
            raise as_failure(error) from error

    @activity.defn
    def end_machines(self, refs: EndNodes) -> None:
        """Ends machines and returns only when the cloud says that they are gone. Already gone is done."""
        cloud = part_of(self._machines, refs.cloud_id)
        wanted = list(refs.machine_ids)
        try:
            for token in refs.tokens:
                found = cloud.find(token)
                if found is not None and found.machine_id not in wanted:
                    wanted.append(found.machine_id)
            if not wanted:
                return
            cloud.terminate(wanted)
            wait = 0.02  # a local machine is gone in milliseconds; a remote one in minutes
            while left := [m for m in cloud.describe(wanted) if m.state != MachineState.GONE]:
                activity.heartbeat([m.machine_id for m in left])
                if activity.is_worker_shutdown():
                    raise ApplicationError("the worker is shutting down", type="worker_shutdown")
                time.sleep(wait)
                wait = min(wait * 1.5, POLL_S)
                unknown = [m.machine_id for m in left if m.state in (MachineState.PENDING, MachineState.RUNNING)]
                if unknown and wait == POLL_S:  # the cloud did not know them yet when it was asked to end them
                    cloud.terminate(unknown)
        except CloudError as error:
            # Even "denied" is tried again: an operator may restore the right, and the machine costs money until then.
            raise ApplicationError(str(error), type=error.code) from error
