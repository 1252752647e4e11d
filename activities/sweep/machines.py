"""The sweep of machines: none is leaked, ever. It takes no input and trusts no record of what was launched: it lists
what each cloud holds under our tag, *then* asks the owners, and ends what nobody owns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import timedelta

import structlog
from temporalio import activity
from temporalio.client import Client, WorkflowQueryFailedError
from temporalio.service import RPCError, RPCStatusCode

from activities.sweep.result import SweepResult
from clouds.contract.machines import Machine, Machines, MachineState
from heliostat.errors import CloudError
from heliostat.models.common import Event, EventLevel, new_id, utcnow
from runtime.messages.clusters import ClusterHandle
from runtime.messages.common import SYSTEM
from runtime.telemetry import SWEEP_FOUND
from store.database import Database
from store.revisions import add_events
from store.sweeps import insert_sweep

log = structlog.get_logger(__name__)

RUNS_S = 30.0
"""Temporal says within milliseconds whether a cluster's workflow runs; without an answer the sweep is tried again."""


class MachineSweepActivities:
    def __init__(
        self,
        db: Database,
        client: Client,
        machines: Mapping[str, Machines],
        installation_id: str,
        newborn_grace_s: float,
        cloud_names: Mapping[str, str] | None = None,
    ) -> None:
        self._db = db
        self._client = client
        self._machines = machines
        self._installation_id = installation_id
        self._newborn_grace_s = newborn_grace_s
        self._cloud_names = cloud_names or {}

    @activity.defn
    async def list_clouds(self) -> list[str]:
        return sorted(self._machines)

    @activity.defn
    async def sweep_cloud(self, cloud_id: str) -> SweepResult:
        """One cloud: list by tag first, ask the owners second, spare the newborn, end the rest, report them."""
        began = time.monotonic()
        # Off the event loop: a cloud that is newer than the worker's last refresh is opened now.
        cloud = await asyncio.to_thread(self._machines.get, cloud_id)
        if cloud is None:
            return SweepResult()  # deleted since it was listed; that is refused while anything lives there
        held = await asyncio.to_thread(cloud.list_owned, self._installation_id)
        orphans = await self._orphans(cloud, held)
        failed = await self._end(cloud, orphans) if orphans else None
        if failed is not None:  # one that somebody protects must not stop the rest of the sweep
            seen = await asyncio.to_thread(cloud.describe, [m.machine_id for m in orphans])
            lives_on = {m.machine_id for m in seen if m.state in (MachineState.PENDING, MachineState.RUNNING)}
            orphans = [m for m in orphans if m.machine_id not in lives_on]
        if orphans:
            SWEEP_FOUND.labels(cloud=self._cloud_names.get(cloud_id, cloud_id)).inc(len(orphans))
            await add_events(self._db, [_swept(m) for m in orphans if m.cluster_id])
        ended = [m.machine_id for m in orphans]
        await insert_sweep(self._db, cloud_id, len(held), ended, time.monotonic() - began)
        activity.heartbeat()
        orphaned_resources = await self._delete_orphaned_resources(cloud_id, cloud)
        if failed is not None:
            raise failed
        return SweepResult(machines=len(held), ended=ended, leftovers=orphaned_resources)

    async def _orphans(self, cloud: Machines, held: list[Machine]) -> list[Machine]:
        """Machines that nobody owns."""
        born_before = utcnow() - timedelta(seconds=self._newborn_grace_s)
        old = [m for m in held if m.launched_at < born_before and m.state != MachineState.GONE]
        owned: dict[str, set[str] | None] = {}
        for cluster_id in {m.cluster_id for m in old if m.cluster_id}:
            activity.heartbeat(cluster_id)
            owned[cluster_id] = await self._owned_nodes(cluster_id)
        orphans = [m for m in old if _is_orphan(m, owned)]
        if not orphans:
            return []
        # An owner may have ended its machine since the list was made, and owns it until it is gone.
        seen = await asyncio.to_thread(cloud.describe, [m.machine_id for m in orphans])
        there = {m.machine_id for m in seen if m.state != MachineState.GONE}
        return [m for m in orphans if m.machine_id in there]

    async def _owned_nodes(self, cluster_id: str) -> set[str] | None:
        """Node ids that the cluster's workflow owns; empty if it does not run; None if it could not be asked."""
        handle = ClusterHandle(self._client, cluster_id)
        try:
            if not await handle.runs():
                return set()
            return {machine.node_id for machine in await handle.owned()}
        except RPCError as error:
            return set() if error.status == RPCStatusCode.NOT_FOUND else None
        except WorkflowQueryFailedError:
            return None

    async def _end(self, cloud: Machines, orphans: list[Machine]) -> CloudError | None:
        """Why one of them could not be ended; the others were."""
        for machine in orphans:
            log.error("ending a machine that nobody owns", machine=machine.machine_id, cluster=machine.cluster_id)
        try:
            await asyncio.to_thread(cloud.terminate, [m.machine_id for m in orphans])
        except CloudError as error:
            return error
        return None

    async def _delete_orphaned_resources(self, cloud_id: str, cloud: Machines) -> list[str]:
        """Disks, addresses and the like whose machine and cluster are gone."""
        loop = asyncio.get_running_loop()

        def runs(cluster_id: str) -> bool:
            return asyncio.run_coroutine_threadsafe(self._runs(cluster_id), loop).result(RUNS_S)

        deleted = await asyncio.to_thread(cloud.delete_orphans, self._installation_id, self._newborn_grace_s, runs)
        if deleted:
            log.error("deleted resources that belong to no machine", cloud=cloud_id, resources=deleted)
        return deleted

    async def _runs(self, cluster_id: str) -> bool:
        """Also while the cluster has no node at all; unknown counts as running."""
        try:
            return bool(cluster_id) and await ClusterHandle(self._client, cluster_id).runs()
        except RPCError:
            return True


def _is_orphan(machine: Machine, owned: Mapping[str, set[str] | None]) -> bool:
    if machine.cluster_id is None:
        return True
    nodes = owned[machine.cluster_id]
    if nodes is None:
        return False  # its owner could not be asked: unknown counts as owned
    return machine.node_id not in nodes


def _swept(machine: Machine) -> Event:
    return Event(
        id=new_id("ev"),
        resource_id=str(machine.cluster_id),
        at=utcnow(),
        level=EventLevel.WARNING,
        kind="swept",
        actor=SYSTEM,
        message=f"machine {machine.machine_id} was owned by nobody and was ended",
    )
