"""The contents of ``HELIOSTAT_HOME``: where the embedded stack is, which of its processes live, which ports it keeps.

A part of a stack is known by its environment (``HELIOSTAT_PART`` and ``HELIOSTAT_HOME``), read from ``/proc``,
and by leading its own session: a pid in a file may be somebody else's by now, a process that carries our
home's name is ours whatever happened to the files.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import IO, Any

from heliostat.errors import Conflict

PARTS = ("temporal", "bucket", "api", "worker")
_KEPT = ("api", "bucket")
"""Ports that living clusters call: they must stay the same for a home."""


class Home:
    """Paths of one home. Making the object makes nothing on disk; ``create`` does."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        self.stack_json = self.path / "stack.json"
        self.lock_file = self.path / "stack.lock"
        self.logs = self.path / "logs"
        self.backups = self.path / "backups"
        self.temporal_db = self.path / "temporal.db"
        self.records_db = self.path / "records.db"
        self.secret_key = self.path / "secret.key"
        self.token_file = self.path / "admin.token"

    def create(self) -> None:
        """0700 throughout: it holds the secret key, and users' logs."""
        for path in (self.path, self.logs, self.backups):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def state(self) -> dict[str, Any]:
        """``stack.json`` as last written, {} before the first start."""
        try:
            found: dict[str, Any] = json.loads(self.stack_json.read_text())
        except FileNotFoundError:
            return {}
        return found

    def write_state(self, state: dict[str, Any]) -> None:
        """Atomic and 0600: a reader sees the old file or the new one, whole."""
        write_private(self.stack_json, json.dumps(state, indent=2) + "\n")

    def try_lock(self) -> IO[str] | None:
        """The right to be this home's stack, as an open file that holds it until it is closed or its process
        ends, however it ends; None: another process has it."""
        self.create()
        handle = self.lock_file.open("a")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            return None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        return handle

    def stack_pid(self) -> int | None:
        """The process that supervises this home now."""
        try:
            handle = self.lock_file.open()
        except FileNotFoundError:
            return None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(handle.read() or 0) or None
        return None

    def processes(self) -> dict[int, str]:
        """Living parts of this home, pid → part."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            pid = int(entry.name)
            try:
                if os.getsid(pid) != pid or _is_zombie(pid):
                    continue
                pairs = (item.partition(b"=") for item in (entry / "environ").read_bytes().split(b"\0"))
                env = {key: value for key, _, value in pairs}
            except OSError:  # gone in between, or another user's
                continue
            part = env.get(b"HELIOSTAT_PART", b"").decode()
            if part in PARTS and env.get(b"HELIOSTAT_HOME", b"").decode() == str(self.path):
                found[pid] = part
        return found

    def ports(self, wanted: dict[str, int], asked_for: Collection[str]) -> dict[str, int]:
        """A free port for each name.

        Args:
            wanted: the settings. 0: what this home had before, else any free one.
            asked_for: those that the operator has set. The others' defaults are for a home's first start only:
                nodes that live call the ports that it had.

        Raises:
            Conflict: a port that was requested, or that living nodes call, is taken.
        """
        before: dict[str, int] = self.state().get("ports", {})
        chosen: dict[str, int] = {}
        for name, port in wanted.items():
            fixed = port if name in asked_for else 0
            kept = fixed or before.get(name, 0) or port
            if kept and port_is_free(kept) and kept not in chosen.values():
                chosen[name] = kept
            elif kept and (name in _KEPT or name not in before or fixed):
                why = "nodes that live call it" if kept == before.get(name) else "it is the setting"
                raise Conflict(
                    f"port {kept} is taken by another program; it should be the {name}'s of {self.path} ({why}).",
                    remedy=f"End that program (`ss -ltnp 'sport = :{kept}'` names it), "
                    f"or set HELIOSTAT_{name.upper()}_PORT to another one (0: any free one).",
                    resource=str(self.path),
                )
            else:
                chosen[name] = free_port(chosen.values())
        return chosen


def write_private(path: Path, text: str) -> None:
    """Writes a 0600 file whole or not at all."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # made 0600
    try:
        with os.fdopen(fd, "w") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def hold_port(port: int) -> socket.socket | None:
    """A UDP socket bound to the number, which says to all who ask so that the TCP port is somebody's; None if another
    one holds it. The kernel lets one process hold it, over all users, homes and installations of this host, and frees
    it when the last holder ends, however it ends. A lock file would be per user, and gone when something cleans /tmp.
    """
    guard = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        guard.bind(("127.0.0.1", port))
    except OSError:
        guard.close()
        return None
    return guard


RESERVED_S = 60.0
"""This long a port that was given is kept from all other callers: by then its part listens there."""
_reserved: list[tuple[float, socket.socket]] = []
_reserving = threading.Lock()


def free_port(taken: Iterable[int] = ()) -> int:
    """Any free one above those that outgoing connections draw from (32768-60999 on Linux): a port that waits for
    its part to start again must not be borrowed by a client in the meantime. Nodes have theirs below.

    Two homes may ask at the same moment, and their parts listen seconds later: so this process holds the port's number
    by a UDP socket, as machines hold theirs (clouds/local/machines/slots.py). All parts speak TCP."""
    taken = set(taken)
    with _reserving:
        while _reserved and _reserved[0][0] < time.monotonic():
            _reserved.pop(0)[1].close()
        while True:
            port = random.randint(61_000, 65_500)
            guard = hold_port(port)
            if guard is None:
                continue
            if port not in taken and port_is_free(port):
                _reserved.append((time.monotonic() + RESERVED_S, guard))
                return port
            guard.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")


def end_processes(pids: Iterable[int], *, grace_s: float) -> None:
    """SIGTERM, and SIGKILL to what is left after ``grace_s`` seconds; returns when all have ended."""
    left = list(pids)
    for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        for pid in left:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
        deadline = time.monotonic() + patience
        while (left := [pid for pid in left if is_alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not left:
            return
    raise RuntimeError(f"processes {left} do not end even by SIGKILL")
