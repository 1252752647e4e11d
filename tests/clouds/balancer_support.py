"""What the tests of load balancers share."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import httpx

from clouds.contract.balancer import Backend, EndpointSpec, LoadBalancer
from clouds.fake.balancer import FakeBalancer
from clouds.local.balancer import supervisor as balancer_supervisor
from clouds.local.balancer.traefik import LocalBalancer
from clouds.local.machines import supervisor
from heliostat.errors import CloudError
from tests.clouds.support import OURS, ROOT, eventually

SERVICE = "svc_1"


def spec(service_id: str = SERVICE, **fields: object) -> EndpointSpec:
    given = {"service_id": service_id, "service_name": "one", "installation_id": OURS}
    return EndpointSpec.model_validate(given | fields)


@dataclass
class Process:
    """A backend as a process; its name is the cluster's id."""

    name: str

    def __post_init__(self) -> None:
        # Bound for all its life and never listening: the port is nobody else's while the process is dead.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self.port: int = self._held.getsockname()[1]
        self.start()

    def start(self) -> None:
        """On the same port as before."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.clouds.balancer_backend", self.name, str(self.port)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert int(self._process.stdout.readline()) == self.port

    def kill(self) -> None:
        """-9."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._held.close()

    def sicken(self, sick: bool) -> None:
        """Its health check fails from now on; it answers all else."""
        httpx.get(f"http://127.0.0.1:{self.port}/sicken?{int(sick)}").raise_for_status()

    def backend(self, version: str = "sv_1", weight: int = 100) -> Backend:
        return Backend(id=self.name, version_id=version, http=f"127.0.0.1:{self.port}", weight=weight)


@contextmanager
def processes(*names: str) -> Iterator[list[Process]]:
    started = [Process(name) for name in names]
    try:
        yield started
    finally:
        for one in started:
            one.close()


class World(Protocol):
    """A load balancer under test, with the backends ``cl_a``, ``cl_b`` and ``cl_c``."""

    balancer: LoadBalancer

    def backend(self, name: str, version: str = "sv_1", weight: int = 100) -> Backend: ...

    def request(self, headers: Mapping[str, str] | None = None, *, status: int = 200) -> tuple[int, str | None]:
        """One request, to which the backend answers ``status``; who did, or None."""
        ...

    def set_up(self, name: str, up: bool) -> None:
        """Returns when the load balancer knows it."""
        ...

    def break_down(self) -> None:
        """All that runs of the endpoint is killed."""
        ...

    def lose_backends(self) -> None:
        """What the endpoint has written down of its backends can't be read any more."""
        ...


@dataclass
class FakeWorld:
    balancer: FakeBalancer = field(default_factory=FakeBalancer)

    def backend(self, name: str, version: str = "sv_1", weight: int = 100) -> Backend:
        return Backend(id=name, version_id=version, http="10.0.0.1:8000", weight=weight)

    def request(self, headers: Mapping[str, str] | None = None, *, status: int = 200) -> tuple[int, str | None]:
        self.balancer.answer = lambda _backend, _headers: status
        answer = self.balancer.request(SERVICE, headers)
        return answer.status, answer.backend_id

    def set_up(self, name: str, up: bool) -> None:
        (self.balancer.down.discard if up else self.balancer.down.add)(name)

    def break_down(self) -> None:
        self.balancer.damage(SERVICE, "it does not run")

    def lose_backends(self) -> None:
        self.balancer.lose_backends(SERVICE)


@dataclass
class LocalWorld:
    balancer: LocalBalancer
    home: Path
    backends: dict[str, Process]
    client: httpx.Client

    @property
    def url(self) -> str:
        found = self.balancer.describe(SERVICE)
        assert found is not None
        return found.url

    @property
    def folder(self) -> Path:
        return self.home / "balancers" / SERVICE

    def backend(self, name: str, version: str = "sv_1", weight: int = 100) -> Backend:
        return self.backends[name].backend(version, weight)

    def request(self, headers: Mapping[str, str] | None = None, *, status: int = 200) -> tuple[int, str | None]:
        answer = self.client.get(f"{self.url}/status?{status}", headers=dict(headers or {}))
        return answer.status_code, answer.headers.get("x-backend")

    def set_up(self, name: str, up: bool) -> None:
        self.backends[name].sicken(not up)

        def known() -> bool:
            try:
                return {c.backend_id: c.up for c in self.balancer.counters(SERVICE)}[name] is up
            except CloudError:  # Traefik was given no processor for 2 s
                return False

        eventually(known)

    def break_down(self) -> None:
        self.kill("supervisor")
        self.kill("traefik")

    def lose_backends(self) -> None:
        (self.folder / "backends.json").unlink()

    def pids(self, role: str) -> list[int]:
        return sorted(process["pid"] for process in balancer_supervisor.found(self.folder, role))

    def kill(self, role: str) -> None:
        """-9; returns when it is gone."""
        killed = balancer_supervisor.found(self.folder, role)
        assert killed
        for process in killed:
            supervisor.kill(process)
        eventually(lambda: not any(supervisor.lives(process) for process in killed))


@contextmanager
def local_world(home: Path, backends: dict[str, Process]) -> Iterator[LocalWorld]:
    """Ends every load balancer of its home afterwards."""
    balancer = LocalBalancer(home)
    try:
        with httpx.Client(timeout=20) as client:
            yield LocalWorld(balancer, home, backends, client)
    finally:
        for folder in (home / "balancers").glob("svc_*"):
            balancer.remove(folder.name)
        for one in backends.values():
            one.sicken(False)
