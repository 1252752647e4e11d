"""The monitor's check of the endpoints of living services: what of them does not run is repaired, what is lost is
reported to the service's workflow, and their counters are exported by this worker's metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

import structlog
from temporalio.client import Client
from temporalio.service import RPCError

from clouds.contract.balancer import BackendCounters, EndpointSpec, LoadBalancer
from clouds.contract.errors import BackendsLost, Gone
from heliostat.errors import CloudError
from heliostat.models.common import new_id
from heliostat.models.services import ServiceState
from runtime.messages.common import reached
from runtime.messages.services import EndpointLost, EndpointTrouble, ServiceHandle
from runtime.telemetry import forget_endpoint, set_endpoint_counters
from store.database import Database
from store.services import rows as services
from store.services.rows import ServiceNames

log = structlog.get_logger(__name__)

POLLS_AT_ONCE = 4
REPAIRS_AT_ONCE = 4
"""One whose load balancer does not come up takes half a minute of a thread; the others must not wait for it."""
LOST_AGAIN_S = 60.0
"""While an endpoint stays lost, its workflow is notified again after this."""


@dataclass(frozen=True)
class _Seen:
    state: str
    """``ready``, ``gone``, or the problem."""
    counters: list[BackendCounters] | None = None


class EndpointWatch:
    """Holds nothing that outlives this process: another worker's begins with nothing."""

    def __init__(
        self, db: Database, client: Client, balancers: Mapping[str, LoadBalancer], installation_id: str
    ) -> None:
        self._db = db
        self._client = client
        self._balancers = balancers
        self._installation_id = installation_id
        self._polls = asyncio.Semaphore(POLLS_AT_ONCE)
        self._slots = asyncio.Semaphore(REPAIRS_AT_ONCE)
        self._repairs: dict[str, asyncio.Task[None]] = {}
        self._counted: set[str] = set()
        """Ids of the services whose counters are exported."""
        self._problems: dict[str, str] = {}
        """The problem of a service's endpoint, as it was logged last."""
        self._reported_lost: dict[str, float] = {}

    async def poll(self) -> None:
        """Checks every living service's endpoint once; returns before its repairs have ended. Raises what the records
        raise; one endpoint's failure is logged, and the others are checked."""
        found = await services.names(self._db)
        await asyncio.gather(*(self._check(s, self._balancers[s.cloud_id]) for s in found if self._is_ours(s)))
        living = {s.id for s in found}
        for id in self._counted - living:
            self._forget(id)
        for known in (self._problems, self._reported_lost):
            for id in known.keys() - living:
                del known[id]

    async def wait_for_repairs(self) -> None:
        """Returns when no repair runs."""
        await asyncio.gather(*self._repairs.values())

    def close(self) -> None:
        """The next watcher exports the counters, and repairs: two workers must not both."""
        for task in self._repairs.values():
            task.cancel()
        for id in list(self._counted):
            self._forget(id)

    def _is_ours(self, service: ServiceNames) -> bool:
        return service.cloud_id in self._balancers

    def _forget(self, service_id: str) -> None:
        forget_endpoint(service_id)
        self._counted.discard(service_id)

    async def _check(self, service: ServiceNames, balancer: LoadBalancer) -> None:
        async with self._polls:
            try:
                seen = await asyncio.to_thread(_seen, balancer, service.id)
            except Exception:  # a bug of ours; the other services' endpoints must still be checked
                log.exception("endpoint can't be checked", service=service.id)
                return
        if seen.counters is not None:
            set_endpoint_counters(
                service.id,
                seen.counters,
                name=service.name,
                project=service.project,
                version_names=service.versions,
            )
            self._counted.add(service.id)
        else:
            self._forget(service.id)
        if not service.has_endpoint or service.id in self._repairs:
            return  # its workflow is about to create it, or has removed it
        if seen.state == "gone":
            await self._report_lost(service, "its load balancer no longer exists")
        elif seen.state == "ready":
            if self._problems.pop(service.id, ""):
                log.info("endpoint recovered", service=service.id)
            self._reported_lost.pop(service.id, None)
            if service.endpoint_trouble:
                await self._tell(service, EndpointTrouble(event_id=new_id("ev"), trouble=""))
        else:
            task = asyncio.create_task(self._repair(service, balancer, seen.state))
            self._repairs[service.id] = task
            task.add_done_callback(lambda _: self._repairs.pop(service.id, None))

    async def _repair(self, service: ServiceNames, balancer: LoadBalancer, state: str) -> None:
        if service.id not in self._problems:
            self._log_problem(service, state)
        spec = EndpointSpec(
            service_id=service.id,
            service_name=service.name,
            installation_id=self._installation_id,
            grpc=service.grpc,
        )
        try:
            async with self._slots:
                # It may be removed meanwhile, and must not be created again then: nobody would own it.
                await asyncio.to_thread(balancer.ensure, spec, make=False)
        except Gone:
            return  # the next poll asks the records whether there should be one
        except BackendsLost as error:
            await self._report_lost(service, str(error))
        except CloudError as error:
            self._log_problem(service, f"the repair failed, and is tried again: {error}")
            if service.endpoint_trouble != str(error):
                trouble = EndpointTrouble(event_id=new_id("ev"), trouble=str(error))
                await self._tell(service, trouble)
        except Exception:  # as in _check
            log.exception("endpoint can't be repaired", service=service.id)
        else:
            log.warning("endpoint repaired", service=service.id, was=state)
            self._problems.pop(service.id, None)

    def _log_problem(self, service: ServiceNames, problem: str) -> None:
        """When it changes, not at every poll."""
        if self._problems.get(service.id) != problem:
            self._problems[service.id] = problem
            log.error("endpoint has a problem", service=service.id, why=problem)

    async def _report_lost(self, service: ServiceNames, reason: str) -> None:
        """Its workflow alone knows the backends, and whether there should be an endpoint at all."""
        self._log_problem(service, reason)
        reported = self._reported_lost.get(service.id)
        if service.state == ServiceState.TERMINATING or (
            reported is not None and time.monotonic() - reported < LOST_AGAIN_S
        ):
            return
        if await self._tell(service, EndpointLost(event_id=new_id("ev"), reason=reason)):
            self._reported_lost[service.id] = time.monotonic()

    async def _tell(self, service: ServiceNames, message: EndpointLost | EndpointTrouble) -> bool:
        """False: Temporal is away, or the workflow does not run, which the sweep settles. The next poll repeats it."""
        handle = ServiceHandle(self._client, service.id)
        call = handle.endpoint_lost(message) if isinstance(message, EndpointLost) else handle.endpoint_trouble(message)
        try:
            return await reached(call)
        except RPCError as error:
            log.warning("a service's workflow was not notified about its endpoint", service=service.id, why=str(error))
            return False


def _seen(balancer: LoadBalancer, service_id: str) -> _Seen:
    """Two calls of the load balancer, on a thread."""
    try:
        endpoint = balancer.describe(service_id)
    except CloudError as error:
        return _Seen(str(error))  # its repair says the same, or more
    if endpoint is None:
        return _Seen("gone")
    try:
        return _Seen(endpoint.state, balancer.counters(service_id))
    except CloudError as error:
        if endpoint.state == "ready" and not isinstance(error, Gone):
            log.warning("endpoint without counters", service=service_id, why=str(error))
        return _Seen(endpoint.state)
