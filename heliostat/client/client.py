"""The client of the Heliostat API, synchronous and asynchronous with the same method names.

    with Client() as client:
        job = client.jobs.submit(JobConfig(entrypoint="python main.py", working_dir="."))
        for text in client.jobs.logs(job.id, follow=True):
            print(text, end="")
        client.jobs.wait(job.id)

Host and token come from the arguments, the environment, ``heliostat login``, or the stack that runs on this machine,
in that order (``heliostat.client.config``). Every method raises the errors of ``heliostat.errors``; a failed call is
retried before it raises (``heliostat.client.transport``).
"""

from __future__ import annotations

from typing import Self

import httpx

from heliostat.client.config import resolve
from heliostat.client.effects import Async, Flow, Sync
from heliostat.client.groups import Group, M, one
from heliostat.client.resources.clouds import Clouds
from heliostat.client.resources.clusters import Clusters
from heliostat.client.resources.compute_configs import ComputeConfigs
from heliostat.client.resources.jobs import Jobs
from heliostat.client.resources.schedules import Schedules
from heliostat.client.resources.services import Services
from heliostat.client.resources.uploads import Uploads
from heliostat.client.resources.users import Projects, Tokens, Users
from heliostat.client.transport import NO_PROXY, TIMEOUT, Api, OnRetry, path_of
from heliostat.models.users import WhoAmI


class _Root(Group[M]):
    """The base of both clients: one group of methods per noun."""

    def __init__(self, driver: M, api: Api) -> None:
        super().__init__(driver, api)
        self.jobs: Jobs[M] = Jobs(driver, api)
        self.services: Services[M] = Services(driver, api)
        self.clusters: Clusters[M] = Clusters(driver, api)
        self.compute_configs: ComputeConfigs[M] = ComputeConfigs(driver, api)
        self.schedules: Schedules[M] = Schedules(driver, api)
        self.clouds: Clouds[M] = Clouds(driver, api)
        self.uploads: Uploads[M] = Uploads(driver, api)
        self.projects: Projects[M] = Projects(driver, api)
        self.users: Users[M] = Users(driver, api)
        self.tokens: Tokens[M] = Tokens(driver, api)

    @property
    def host(self) -> str:
        return self._api.target.host

    @one
    def whoami(self) -> Flow[WhoAmI]:
        """The user, organization and projects behind the token, and the server's version."""
        return (yield from self._api.call("GET", path_of("whoami"), WhoAmI))


class Client(_Root[Sync]):
    """Calls block. Safe to use from several threads.

    Args:
        host: URL of the API. Default: see ``heliostat.client.config``.
        token: API token. Default: the same.
        transport: an ``httpx.BaseTransport`` in place of the network, e.g. for tests.
        on_retry: called before each retry, with the error and the seconds until the retry.
    """

    def __init__(
        self,
        host: str | None = None,
        token: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
        on_retry: OnRetry | None = None,
    ) -> None:
        target = resolve(host, token)
        self._http = httpx.Client(transport=transport, timeout=TIMEOUT, mounts=None if transport else NO_PROXY)
        super().__init__(Sync(self._http), Api(target, on_retry))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncClient(_Root[Async]):
    """The methods of :class:`Client`, as coroutines; iterate those that list or follow with ``async for``. The same
    arguments; ``transport`` is an ``httpx.AsyncBaseTransport``."""

    def __init__(
        self,
        host: str | None = None,
        token: str | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        on_retry: OnRetry | None = None,
    ) -> None:
        target = resolve(host, token)
        self._http = httpx.AsyncClient(transport=transport, timeout=TIMEOUT, mounts=None if transport else NO_PROXY)
        super().__init__(Async(self._http), Api(target, on_retry))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
