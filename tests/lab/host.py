"""A machine of the lab: own address, processes, disk, /tmp, /run, /dev/shm, host name and memory; it runs its
user-data. Nothing inside can write to the machine below: its disk is an overlay in memory."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab import cgroups, namespaces, network
from tests.lab.namespaces import ROOM

DISK_BYTES, SHM_BYTES = 2 * 2**30, 2**30
MEMORY_BYTES = 4 * 2**30
"""Of each host, whatever type it is: what Ray finds there."""
_HERE = Path(__file__).parent


@dataclass
class Identity:
    """What the vendor knows of it, and its metadata service tells it."""

    vendor: str
    """``aws`` or ``gcp``."""
    id: str
    ip: str
    zone: str
    machine_type: str
    user_data: bytes
    account: str = ""
    """AWS account or GCP project."""
    role: str = ""
    """Instance profile's name or service account."""
    spot: bool = False
    attributes: dict[str, str] = field(default_factory=dict)
    """Metadata items of GCE."""


@dataclass
class Notices:
    """What its metadata service announces; turned by the lab's calls."""

    action_at: float | None = None
    """EC2's spot interruption: when it will be ended."""
    rebalance_at: float | None = None
    """EC2's rebalance recommendation: since when."""
    preempted: bool = False
    """GCE's."""
    maintenance: str = "NONE"
    """GCE's ``maintenance-event``."""
    changed: threading.Condition = field(default_factory=threading.Condition)

    def set(self, **fields: object) -> None:
        with self.changed:
            for name, value in fields.items():
                setattr(self, name, value)
            self.changed.notify_all()


class Host:
    """Made is booted: returns once its user-data runs. ``on_end``: called when it ends by itself."""

    def __init__(self, identity: Identity, on_end: Callable[[Host], None], memory: int = MEMORY_BYTES) -> None:
        began = time.monotonic()
        self.identity, self.notices = identity, Notices()
        self.ip, self.name = identity.ip, "ip-" + identity.ip.replace(".", "-")
        self.cable = "v" + "".join(f"{int(part):02x}" for part in identity.ip.split("."))
        self.folder = ROOM / "machines" / identity.id
        (self.folder / "disk").mkdir(parents=True)
        self.console_file = self.folder / "console"
        self._ended = False
        (self.folder / "user-data").write_bytes(identity.user_data)
        shutil.copy(_HERE / "docker_shim.sh", self.folder / "docker")
        namespaces.name(self.ip, self.name)
        self.cgroup = cgroups.make(f"{os.urandom(4).hex()}-{self.name}", memory)
        self._process = self._started()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.init = int(children.read_text().split()[0])
        """Its PID 1, as the lab numbers it."""
        self._pids = os.readlink(f"/proc/{self.init}/ns/pid")
        network.plug(self.cable, self._process.pid, self.ip)
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()
        self.boot_s = time.monotonic() - began
        threading.Thread(target=self._watch, args=(on_end,), daemon=True).start()

    def _started(self) -> subprocess.Popen[bytes]:
        """The first process, ready but for its network."""
        needed = sorted({sys.prefix, sys.base_prefix})
        enter = f"echo 0 >{self.cgroup}/cgroup.procs; " if self.cgroup else ""
        shown, ready = os.pipe()
        os.set_inheritable(ready, True)
        # "$@" are the arguments of host_init.sh; 3 is where it says that it is ready.
        script = f'exec 3>&{ready} {ready}>&-; {enter}exec unshare -n -m -p -u -i -f --kill-child bash "$@"'
        arguments = [str(_HERE / "host_init.sh"), str(self.folder), self.name, str(DISK_BYTES), str(SHM_BYTES)]
        with self.console_file.open("wb") as console:
            process = subprocess.Popen(
                ["bash", "-c", script, "bash", *arguments, str(self.cgroup or ""), *needed],
                env={"PATH": _path(), "HOME": "/root", "LANG": "C.UTF-8"}, cwd="/", start_new_session=True,
                stdin=subprocess.PIPE, stdout=console, stderr=subprocess.STDOUT, pass_fds=[ready],
            )  # fmt: skip
        os.close(ready)
        with os.fdopen(shown, "rb") as said:
            if not select.select([said], [], [], 30)[0] or not said.readline():
                process.kill()
                raise RuntimeError(f"{self.name} did not start:\n{self.console()}")
        return process

    def _watch(self, on_end: Callable[[Host], None]) -> None:
        self._process.wait()
        if not self._ended:
            self.power_cut()
            on_end(self)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def power_cut(self) -> None:
        """All of its processes are dead, and nothing of it is left, when this returns."""
        self._ended = True
        self._process.kill()  # the kernel kills its PID namespace along
        self._process.wait()
        network.unplug(self.cable)
        if self.cgroup is not None:
            cgroups.remove(self.cgroup)
        self.notices.set()  # whoever waits for a change hears of the end

    def console(self) -> str:
        """What its first process and its user-data have printed."""
        return self.console_file.read_text(errors="replace") if self.console_file.exists() else ""

    def run(self, *command: str, timeout: float = 60, check: bool = True) -> str:
        """A command inside, as root; its output. Raises CalledProcessError."""
        enter = f"echo 0 >{self.cgroup}/cgroup.procs; " if self.cgroup else ""
        enter += f'exec nsenter -t {self.init} -n -m -u -p -i -r -w "$@"'
        done = subprocess.run(
            ["bash", "-c", enter, "bash", *command],
            env={"PATH": _path(), "HOME": "/root"}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout, check=check,
        )  # fmt: skip
        return done.stdout

    def processes(self) -> dict[int, str]:
        """What runs inside, by the lab's pid: command lines."""
        found = {}
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            try:
                if os.readlink(f"/proc/{pid}/ns/pid") == self._pids:
                    found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
        return found

    def kill(self, pids: Iterable[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def partition(self) -> None:
        """The cable is pulled: it lives on, alone."""
        network.connect(self.cable, False)

    def heal(self) -> None:
        """Cable and packets as at first."""
        network.connect(self.cable, True)
        network.impair(self.cable)

    def lose_packets(self, share: float) -> None:
        """Of those in and out; 0 to 1."""
        network.impair(self.cable, loss=share)

    def part_from(self, address: str) -> None:
        """It and that address do not reach each other; all else works."""
        network.impair(self.cable, without=address)

    def limit_memory(self, memory: int) -> None:
        """Bytes. What goes beyond is killed by the kernel, as on a machine that is out of memory."""
        if self.cgroup is None:
            raise RuntimeError("this machine has no cgroup for memory")
        cgroups.limit(self.cgroup, memory)


def _path() -> str:
    """As of an AMI with Ray: its Python comes first."""
    return f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
