"""The clouds that a process serves, by id: its own machine's, and those that are registered, which come and go while
it runs. No concrete cloud is named here."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import structlog

from clouds.contract.balancer import LoadBalancer
from clouds.contract.bucket import Bucket
from clouds.contract.machines import Machines
from heliostat.errors import CloudError, HeliostatError, Unavailable
from heliostat.models.clouds import AwsConfig, Capabilities, Check, Cloud, CloudSetup, GcpConfig, SetupFiles, Trust

log = structlog.get_logger(__name__)

REFRESH_S = 5.0
"""A cloud that another process has deleted is served for so long at most; one that is new is looked up when it is
asked for."""
LOOK_UP_S = 10.0
"""A thread waits so long for the records, when it asks for a cloud that this process does not know."""

T = TypeVar("T")
Verify = Callable[[], list[Check]]


@dataclass(frozen=True)
class OpenCloud:
    name: str
    machines: Machines
    bucket: Bucket
    balancer: LoadBalancer
    verify: Verify
    """Looks at everything that the cloud needs; blocks for seconds."""


@dataclass(frozen=True)
class Registered:
    """A cloud as the records have it."""

    id: str
    name: str
    organization_id: str
    cloud: Cloud | None
    """None: its row cannot be read, ``why`` says what is wrong with it."""
    why: str = ""


class Vendors(Protocol):
    """What the API asks of concrete clouds, which it does not know. All methods block; ``trust`` and ``setup`` may ask
    a vendor who we are."""

    def trust(self, organization_id: str) -> Trust: ...

    def setup(self, organization_id: str, request: CloudSetup) -> SetupFiles: ...

    def capabilities(self, config: AwsConfig | GcpConfig) -> Capabilities:
        """Of what is about to be registered: from its config and the vendor's catalogue alone."""
        ...

    def openid_configuration(self) -> dict[str, Any]:
        """Of our own OpenID issuer, which workload identity federation trusts."""
        ...

    def jwks(self) -> dict[str, Any]: ...


class Clouds:
    """The live mappings. ``refresh`` once before use.

    A thread that asks for an id that is not known has the records read anew, so that a cloud is usable as soon as it is
    registered; on the event loop nothing may wait, so there it is a KeyError.

    Args:
        load: reads what is registered.
        open: makes a cloud of it, on a thread; calls no vendor. If it raises, the cloud is served all the same, and
            whatever is asked of it raises CloudError with its name and the reason.
        own: clouds of the control plane's own machine, by id. Another server's own are not served here.
    """

    def __init__(
        self,
        load: Callable[[], Awaitable[list[Registered]]],
        open: Callable[[Registered], OpenCloud],
        own: Mapping[str, OpenCloud],
    ) -> None:
        self._load, self._opener, self._own = load, open, dict(own)
        self._open: dict[str, OpenCloud] = dict(own)
        self._seen: dict[str, Registered] = {}
        """What each was opened from; none of those that did not open, which are tried again."""
        self._broken: dict[str, str] = {}
        self._refreshing = asyncio.Lock()
        # Of its own: the loop's may all be waiting for a refresh.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="open-cloud")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self.machines: Mapping[str, Machines] = _View(self, lambda cloud: cloud.machines)
        self.buckets: Mapping[str, Bucket] = _View(self, lambda cloud: cloud.bucket)
        self.balancers: Mapping[str, LoadBalancer] = _View(self, lambda cloud: cloud.balancer)
        self.verifies: Mapping[str, Verify] = _View(self, lambda cloud: cloud.verify)
        self.names: Mapping[str, str] = _View(self, lambda cloud: cloud.name)
        """For metrics: people know a cloud by its name."""

    async def refresh(self) -> None:
        """Opens what is new or changed, forgets what was deleted. Raises what ``load`` raises."""
        self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
        async with self._refreshing:
            found = {r.id: r for r in await self._load() if r.id not in self._own and not _of_another_machine(r)}
            ready = dict(self._own)
            for registered in found.values():
                known = self._open.get(registered.id)
                if known is not None and self._seen.get(registered.id) == registered:
                    ready[registered.id] = known
                else:
                    ready[registered.id] = await self._opened(registered)
            self._seen = {id: r for id, r in found.items() if id not in self._broken}
            self._open = ready

    @asynccontextmanager
    async def kept_fresh(self) -> AsyncIterator[None]:
        """Refreshes now and then until the block ends."""
        task = asyncio.create_task(self._keep_fresh())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self._thread.shutdown(wait=False)

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self.refresh()
            except HeliostatError as e:  # the records are away: what is known goes on
                log.warning("clouds not refreshed", why=str(e))
            except Exception:  # the next one may do better, and without any the process would never learn of a cloud
                log.exception("clouds not refreshed")

    async def _opened(self, registered: Registered) -> OpenCloud:
        try:
            if registered.cloud is None:
                raise CloudError(registered.why)
            cloud = await asyncio.get_running_loop().run_in_executor(self._thread, self._opener, registered)
        except Exception as e:
            why = str(e) or type(e).__name__
            if self._broken.get(registered.id) != why:
                log.exception("a cloud cannot be used", cloud=registered.name, id=registered.id)
            self._broken[registered.id] = why
            return _broken(registered, why)
        self._broken.pop(registered.id, None)
        log.info("cloud opened", cloud=registered.name, id=registered.id)
        return cloud

    def look_up(self, cloud_id: str) -> OpenCloud:
        """Raises KeyError; on another thread than the event loop's Unavailable too."""
        found = self._open.get(cloud_id)
        if found is None and self._loop is not None and threading.get_ident() != self._loop_thread:
            try:
                asyncio.run_coroutine_threadsafe(self.refresh(), self._loop).result(LOOK_UP_S)
            except TimeoutError as e:
                raise Unavailable(f"Cloud {cloud_id} was not found in time.", remedy="Try again.") from e
            found = self._open.get(cloud_id)
        if found is None:
            raise KeyError(cloud_id)
        return found

    def ids(self) -> list[str]:
        return list(self._open)


def _of_another_machine(registered: Registered) -> bool:
    return registered.cloud is not None and registered.cloud.config is None


class _View(Mapping[str, T], Generic[T]):
    """One part of each cloud, by the cloud's id."""

    def __init__(self, clouds: Clouds, part: Callable[[OpenCloud], T]) -> None:
        self._clouds, self._part = clouds, part

    def __getitem__(self, cloud_id: str) -> T:
        return self._part(self._clouds.look_up(cloud_id))

    def __iter__(self) -> Iterator[str]:
        return iter(self._clouds.ids())

    def __len__(self) -> int:
        return len(self._clouds.ids())


class _Refusing:
    """Any part of a cloud that cannot be used: whatever is asked of it is refused."""

    def __init__(self, registered: Registered, why: str) -> None:
        self._registered, self._why = registered, why

    def refuse(self, *_: Any, **__: Any) -> Any:
        raise CloudError(
            f"Cloud {self._registered.name} cannot be used: {self._why}",
            remedy="See the logs of the worker and the API; correct its config, or register the cloud again.",
            resource=self._registered.id,
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.refuse


def _broken(registered: Registered, why: str) -> OpenCloud:
    part = _Refusing(registered, why)
    refusing = cast(Any, part)
    return OpenCloud(registered.name, refusing, refusing, refusing, part.refuse)
