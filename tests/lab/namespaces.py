"""The walls of the lab: its own network, mounts and processes, which the kernel takes away with its first process."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

INSIDE = "--inside"
ROOM = Path("/srv")
"""Where the lab keeps what is its own: a tmpfs that only it sees."""
HOSTS_FILE = ROOM / "hosts"
"""``/etc/hosts`` of the lab and of each of its hosts: what a VPC's resolver would know."""
REPORTS = "HELIOSTAT_LAB_REPORTS"
"""File descriptor of the pipe that reports of tests go to (``inside``)."""
TOOLS = ("unshare", "nsenter", "ip", "tc", "mount", "pivot_root")
_PDEATHSIG = 1


def inside() -> bool:
    return os.environ.get("HELIOSTAT_LAB") == "1"


@functools.cache
def missing() -> str:
    """Why there can be no lab on this machine; "" if there can."""
    if os.geteuid() != 0:
        return "it needs root (network, mount and PID namespaces)"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    for tool in TOOLS:
        if shutil.which(tool, path=path) is None:
            return f"there is no `{tool}` (on Debian: apt-get install iproute2 util-linux)"
    tried = "mount -t tmpfs t /srv && mkdir /srv/u /srv/w /srv/r && ip link add br0 type bridge && "
    tried += "mount -t overlay o -o lowerdir=/,upperdir=/srv/u,workdir=/srv/w /srv/r"
    done = subprocess.run(
        ["unshare", "-n", "-m", "-p", "-f", "--kill-child", "--mount-proc", "sh", "-c", tried],
        env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"root may not make namespaces, bridges and overlays here: {done.stderr.strip()}" if done.returncode else ""


def enter(command: list[str]) -> NoReturn:
    """Becomes the lab's outer end. Dies with the thread that started this process, and takes the lab along."""
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    os.environ["HELIOSTAT_LAB"] = "1"
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    walls = ["unshare", "-n", "-m", "-p", "-f", "--kill-child", "--mount-proc"]
    os.execvp("unshare", [*walls, sys.executable, "-m", "tests.lab", INSIDE, *command])


def first_process(command: list[str]) -> int:
    """PID 1 of the lab: makes its room, runs the command, takes in orphans. With its end the kernel ends all."""
    _sh("ip", "link", "set", "lo", "up")
    _sh("mount", "-t", "tmpfs", "-o", "mode=755", "lab", str(ROOM))
    HOSTS_FILE.write_text("127.0.0.1 localhost\n169.254.169.254 metadata.google.internal metadata\n")
    _sh("mount", "--bind", str(HOSTS_FILE), "/etc/hosts")
    if Path("/etc/resolv.conf").exists():
        _sh("mount", "--bind", os.devnull, "/etc/resolv.conf")  # else each look-up would take ten seconds
    pipe = os.environ.get(REPORTS)
    child = subprocess.Popen(command, pass_fds=[int(pipe)] if pipe else [])
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _frame: child.send_signal(n))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the command too
    while True:
        pid, status = os.wait()
        if pid == child.pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


_names = threading.Lock()


def name(address: str, *names: str) -> None:
    """Makes names known in the lab and in all its hosts."""
    with _names, HOSTS_FILE.open("a") as hosts:
        hosts.write(f"{address} {' '.join(names)}\n")


def _sh(*command: str) -> None:
    subprocess.run(command, check=True)
