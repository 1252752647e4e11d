"""The lab: hosts, both vendors, their metadata services. One for each ``python -m tests.lab``."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from runtime.home import is_alive
from tests.e2e.support import parent
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
        deadline = time.monotonic() + 3  # the kernel takes a moment to clear a namespace away
        while (left := _left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        problems = self.fleet.problems + self.aws.balancers.problems + self.gcp.balancers.problems
        return left + [f"{type(e).__name__}: {e}" for e in problems]

    def hosts(self) -> list[Host]:
        """That are on."""
        return self.fleet.hosts()

    def host(self, machine_id: str, within_s: float = 30) -> Host:
        """Once it has booted."""
        return until(f"host {machine_id} to boot", lambda: self.fleet.get(machine_id), within_s)


def _left() -> list[str]:
    """Cables, and processes but for us and those that started us."""
    found = [f"cable {name}" for name in network.cables()]
    ours = [os.getpid()]
    while ours[-1] > 1:
        ours.append(parent(ours[-1]))
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):  # it has just ended
            if pid not in ours and is_alive(pid):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"pid {pid}: {command[:200]}")
    return found


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
