"""Checks what the local cloud needs of this host."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from clouds.contract.errors import BadConfig
from clouds.local.balancer.ports import is_free
from clouds.local.machines import host, slots
from heliostat.models.clouds import Check, CheckState

DISK_FREE = 5 * 2**30
"""Bytes: below that a few runtime environments and logs fill it."""


def checks(home: Path, balancer_host: str, balancer_ports: str) -> list[Check]:
    """Args: as ``clouds.local.balancer.traefik.LocalBalancer`` and the machines have them."""
    return [_home(home), _disk(home), _namespaces(), _slots(), _ports(balancer_host, balancer_ports)]


def _home(home: Path) -> Check:
    try:
        with tempfile.NamedTemporaryFile(dir=home) as f:
            f.write(b"verify")
            os.fsync(f.fileno())
    except OSError as e:
        remedy = f"Let this user write to {home}, and see that its disk has space."
        return _check("home", CheckState.FAILED, f"{home} cannot be written: {e.strerror}", remedy)
    return _check("home", CheckState.OK, f"{home} can be written")


def _disk(home: Path) -> Check:
    try:
        free = shutil.disk_usage(home).free
    except OSError as e:
        return _check(
            "disk", CheckState.FAILED, f"{home}: {e.strerror}", "Set HELIOSTAT_HOME to a folder of this host."
        )
    found = f"{free / 2**30:.1f} GiB free"
    if free < DISK_FREE:
        return _check("disk", CheckState.WARNING, found, f"Free {DISK_FREE / 2**30:.0f} GiB at least.")
    return _check("disk", CheckState.OK, found)


def _namespaces() -> Check:
    if host.namespaces_work():
        return _check("isolation", CheckState.OK, "each machine has a PID namespace of its own")
    return _check(
        "isolation",
        CheckState.WARNING,
        "this user cannot create a PID namespace on this host: machines are process trees under a watchdog",
        "Allow unprivileged user namespaces.",
    )


def _slots() -> Check:
    slot = slots.take(0)
    if slot is None:
        remedy = "End machines that are not needed, of other installations on this host too."
        return _check("machine ports", CheckState.FAILED, f"all {slots.SLOTS} blocks of ports are taken", remedy)
    slot.guard.close()
    last = slots.FIRST_PORT + slots.SLOTS * slots.PORTS_PER_SLOT - 1
    return _check("machine ports", CheckState.OK, f"there is a free block among {slots.FIRST_PORT}-{last}")


def _ports(balancer_host: str, ports: str) -> Check:
    first, _, last = ports.partition("-")
    try:
        if not ports:
            is_free(balancer_host, 0)
            return _check("service ports", CheckState.OK, f"any free one on {balancer_host}")
        free = sum(is_free(balancer_host, port) for port in range(int(first), int(last) + 1))
    except BadConfig as e:
        return _check("service ports", CheckState.FAILED, e.message, e.remedy)
    if not free:
        remedy = "End services that are not needed, or widen HELIOSTAT_BALANCER_PORTS."
        return _check("service ports", CheckState.WARNING, f"all of {ports} are taken", remedy)
    return _check("service ports", CheckState.OK, f"{free} of {ports} are free on {balancer_host}")


def _check(name: str, state: CheckState, detail: str, remedy: str = "") -> Check:
    return Check(name=name, state=state, detail=detail, remedy=remedy)
