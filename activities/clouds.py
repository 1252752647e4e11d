"""Questions to a cloud as a whole, which only a worker can ask: whether it is set up, and what of ours it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.cloud_calls import as_failure
from clouds.contract.balancer import LoadBalancer
from clouds.contract.machines import Machines
from clouds.registry import Verify
from heliostat.errors import CloudError
from heliostat.models.clouds import Check, CheckState
from store.clouds import on_other_clouds
from store.database import Database


class CloudActivities:
    """Carries the clouds' parts by cloud id."""

    def __init__(
        self,
        db: Database,
        verifies: Mapping[str, Verify],
        machines: Mapping[str, Machines],
        balancers: Mapping[str, LoadBalancer],
        installation_id: str,
    ) -> None:
        self._db, self._verifies, self._machines, self._balancers = db, verifies, machines, balancers
        self._installation_id = installation_id

    @activity.defn
    def verify_cloud(self, cloud_id: str) -> list[Check]:
        """A cloud that can't be inspected at all is one failed check."""
        verify = self._verifies.get(cloud_id)
        if verify is None:
            raise _unknown(cloud_id)
        try:
            return verify()
        except CloudError as e:
            return [Check(name="cloud", state=CheckState.FAILED, detail=e.message, remedy=e.remedy)]

    @activity.defn
    async def held_by_cloud(self, cloud_id: str) -> list[str]:
        """Ids of machines, and of services with an endpoint, that exist under our tag. Those of another cloud in the
        same account do not count; those that nobody owns do: the sweep ends them while the cloud is registered."""
        machines = await asyncio.to_thread(self._machines.get, cloud_id)
        balancer = await asyncio.to_thread(self._balancers.get, cloud_id)
        if machines is None or balancer is None:
            raise _unknown(cloud_id)
        try:
            held = await asyncio.to_thread(machines.list_owned, self._installation_id)
            endpoints = await asyncio.to_thread(balancer.list_owned, self._installation_id)
        except CloudError as e:
            raise as_failure(e) from e
        others = await on_other_clouds(self._db, "cluster", (m.cluster_id for m in held if m.cluster_id), cloud_id)
        found = [m.machine_id for m in held if m.cluster_id not in others]
        return found + sorted({*endpoints} - await on_other_clouds(self._db, "service", endpoints, cloud_id))


def _unknown(cloud_id: str) -> ApplicationError:
    return ApplicationError(
        f"There is no cloud {cloud_id} here: it was deleted, or it belongs to another server.",
        type="gone",
        non_retryable=True,
    )
