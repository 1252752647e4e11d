"""The lab: hosts, both vendors, their metadata services. One for each ``python -m tests.lab``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tests.lab import cgroups, namespaces, network
from tests.lab.aws import Aws
from tests.lab.fleet import Fleet
from tests.lab.gcp import Gcp
from tests.lab.host import Host
from tests.lab.imds import Metadata

T = TypeVar("T")


class Lab:
    def __init__(self) -> None:
        assert namespaces.inside(), "run me by `python -m tests.lab`"
        network.build()
        cgroups.sweep()
        self.fleet = Fleet()
        self.metadata = Metadata(self.fleet.by_ip)
        self.aws = Aws(self.fleet)
        self.gcp = Gcp(self.fleet)

    def close(self) -> list[str]:
        """Ends all; tells what was left behind or went wrong in the lab itself."""
        self.aws.close()
        self.gcp.close()
        self.fleet.close()
        self.metadata.close()
        time.sleep(0.1)
        left = [f"cable {name}" for name in network.cables()]
        problems = self.fleet.problems + self.aws.balancers.problems + self.gcp.balancers.problems
        return left + [f"{type(e).__name__}: {e}" for e in problems]

    def hosts(self) -> list[Host]:
        """That are on."""
        return self.fleet.hosts()

    def host(self, machine_id: str, within_s: float = 30) -> Host:
        """Once it has booted."""
        return until(f"host {machine_id} to boot", lambda: self.fleet.get(machine_id), within_s)


def until(what: str, ask: Callable[[], T | None], within_s: float = 60, every_s: float = 0.05) -> T:
    """The first answer that is true."""
    deadline = time.monotonic() + within_s
    while True:
        answer = ask()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {within_s:.0f} s; last seen: {answer!r}")
        time.sleep(every_s)
