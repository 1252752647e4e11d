"""The look after the endpoints of living services, part of the monitor: what of them does not run is started, what is
lost is told to the service's workflow, and what they have counted is served to whoever scrapes this worker."""

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

LOOKS_AT_ONCE = 4
MENDS_AT_ONCE = 4
"""One whose load balancer does not come up takes half a minute of a thread; the others' turn must come meanwhile."""
LOST_AGAIN_S = 60.0
"""A workflow that was told that its endpoint is lost is told again after this, when it is lost still."""


@dataclass(frozen=True)
class _Seen:
    state: str
    """``ready``, ``gone``, or what is wrong."""
    counters: list[BackendCounters] | None = None


class EndpointWatch:
    """All that it holds is about this process: another worker's begins with nothing."""

    def __init__(
        self, db: Database, client: Client, balancers: Mapping[str, LoadBalancer], installation_id: str
    ) -> None:
        self._db = db
        self._client = client
        self._balancers = balancers
        self._installation_id = installation_id
        self._looks = asyncio.Semaphore(LOOKS_AT_ONCE)
        self._slots = asyncio.Semaphore(MENDS_AT_ONCE)
        self._mending: dict[str, asyncio.Task[None]] = {}
        self._counted: set[str] = set()
        """Ids of the services whose counters are served."""
        self._troubles: dict[str, str] = {}
        """What is wrong with a service's endpoint, as it was logged last."""
        self._told_lost: dict[str, float] = {}

    async def look(self) -> None:
        """Once at every living service's endpoint; returns before what was found broken is mended. Raises what the
        records raise; one endpoint's failure is logged, and the others are looked at."""
        found = await services.names(self._db)
        await asyncio.gather(*(self._look_at(s, self._balancers[s.cloud_id]) for s in found if self._is_ours(s)))
        living = {s.id for s in found}
        for id in self._counted - living:
            self._forget(id)
        for known in (self._troubles, self._told_lost):
            for id in known.keys() - living:
                del known[id]

    async def mended(self) -> None:
        """Returns when nothing is being mended."""
        await asyncio.gather(*self._mending.values())

    def close(self) -> None:
        """Whoever watches next serves the counters, and mends: two workers must not both."""
        for task in self._mending.values():
            task.cancel()
        for id in list(self._counted):
            self._forget(id)

    def _is_ours(self, service: ServiceNames) -> bool:
        return service.cloud_id in self._balancers

    def _forget(self, service_id: str) -> None:
        forget_endpoint(service_id)
        self._counted.discard(service_id)

    async def _look_at(self, service: ServiceNames, balancer: LoadBalancer) -> None:
        async with self._looks:
            try:
                seen = await asyncio.to_thread(_seen, balancer, service.id)
            except Exception:  # of our own making; the other services' endpoints must not wait for its mending
                log.exception("endpoint can't be looked at", service=service.id)
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
        if not service.has_endpoint or service.id in self._mending:
            return  # its workflow is about to make it, or has removed it
        if seen.state == "gone":
            await self._tell_lost(service, "its load balancer is gone")
        elif seen.state == "ready":
            if self._troubles.pop(service.id, ""):
                log.info("endpoint is well again", service=service.id)
            self._told_lost.pop(service.id, None)
            if service.endpoint_trouble:
                await self._tell(service, EndpointTrouble(event_id=new_id("ev"), trouble=""))
        else:
            task = asyncio.create_task(self._mend(service, balancer, seen.state))
            self._mending[service.id] = task
            task.add_done_callback(lambda _: self._mending.pop(service.id, None))

    async def _mend(self, service: ServiceNames, balancer: LoadBalancer, state: str) -> None:
        if service.id not in self._troubles:
            self._say(service, state)
        spec = EndpointSpec(
            service_id=service.id,
            service_name=service.name,
            installation_id=self._installation_id,
            grpc=service.grpc,
        )
        try:
            async with self._slots:
                # It may be removed meanwhile, and must not come to be again then: nobody would own it.
                await asyncio.to_thread(balancer.ensure, spec, make=False)
        except Gone:
            return  # the next look asks the records whether there should be one
        except BackendsLost as error:
            await self._tell_lost(service, str(error))
        except CloudError as error:
            self._say(service, f"can't be mended, and is tried again: {error}")
            if service.endpoint_trouble != str(error):
                trouble = EndpointTrouble(event_id=new_id("ev"), trouble=str(error))
                await self._tell(service, trouble)
        except Exception:  # as in _look_at
            log.exception("endpoint can't be mended", service=service.id)
        else:
            log.warning("endpoint mended", service=service.id, was=state)
            self._troubles.pop(service.id, None)

    def _say(self, service: ServiceNames, trouble: str) -> None:
        """Logged when it changes, not at every look."""
        if self._troubles.get(service.id) != trouble:
            self._troubles[service.id] = trouble
            log.error("endpoint is not well", service=service.id, why=trouble)

    async def _tell_lost(self, service: ServiceNames, reason: str) -> None:
        """Its workflow alone knows the backends, and whether there should be an endpoint at all."""
        self._say(service, reason)
        told = self._told_lost.get(service.id)
        if service.state == ServiceState.TERMINATING or (told is not None and time.monotonic() - told < LOST_AGAIN_S):
            return
        if await self._tell(service, EndpointLost(event_id=new_id("ev"), reason=reason)):
            self._told_lost[service.id] = time.monotonic()

    async def _tell(self, service: ServiceNames, message: EndpointLost | EndpointTrouble) -> bool:
        """False: Temporal is away, or it does not run, which the sweep settles; the next look tells it again."""
        handle = ServiceHandle(self._client, service.id)
        call = handle.endpoint_lost(message) if isinstance(message, EndpointLost) else handle.endpoint_trouble(message)
        try:
            return await reached(call)
        except RPCError as error:
            log.warning("service not told of its endpoint", service=service.id, why=str(error))
            return False


def _seen(balancer: LoadBalancer, service_id: str) -> _Seen:
    """Two questions to the load balancer, on a thread."""
    try:
        endpoint = balancer.describe(service_id)
    except CloudError as error:
        return _Seen(str(error))  # its mending says the same, or more
    if endpoint is None:
        return _Seen("gone")
    try:
        return _Seen(endpoint.state, balancer.counters(service_id))
    except CloudError as error:
        if endpoint.state == "ready" and not isinstance(error, Gone):
            log.warning("endpoint not counted", service=service_id, why=str(error))
        return _Seen(endpoint.state)
