"""Keeps one service's Traefik running. A program of its own, standard library only, that belongs to no stack: it goes
on when the control plane ends, and Traefik goes on when it ends.

    python -S -m clouds.local.balancer.supervisor <folder> <traefik>

It opens the two sockets and hands them over as systemd does (``LISTEN_FDS``), so that they stay open between two
Traefiks. Who connects meanwhile waits: Traefik accepts connections before it has its routes and would answer 404, so
the socket is deaf until then, and the caller's kernel calls again after a second. Files in the folder:

    supervisor.lock   held by this process: there is one
    endpoint.json     host and ports; not ours to write
    status.json       who runs, and what is in the way
    output.log        what Traefik says beside its log
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clouds.local.machines import supervisor

MARK, ROLE = "HELIOSTAT_BALANCER", "HELIOSTAT_BALANCER_ROLE"
"""Environment of both processes: the folder, and ``supervisor`` or ``traefik``. By these they are found, whatever
happened to the files."""
OUTPUT_BYTES = 1024 * 1024
YOUNG_S = 5.0
"""One that lived longer is started again at once, as is the first that did not; then pauses double up to PAUSE_S."""
PAUSE_S = 5.0
LOOK_S = 0.5
"""Others take the lock for a moment, to see whether it is held."""
READY_S = 10.0
"""From Traefik's start until it has its routes; 0.3 s on an idle machine."""
BIND_S = 0.2
"""Pause between tries to open a socket that another program has."""
BACKLOG = 4096
ROUTES_PATH = "/-/heliostat-routes"
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27


def found(folder: Path, role: str) -> list[dict[str, Any]]:
    """Living processes of this folder's load balancer in that role, as ``supervisor.identity``; not ourselves."""
    wanted = {f"{MARK}={folder}".encode(), f"{ROLE}={role}".encode()}
    processes = []
    for name in os.listdir("/proc"):  # noqa: PTH208
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            environ = Path(f"/proc/{name}/environ").read_bytes()
        except OSError:
            continue  # ended, or another user's
        if wanted <= set(environ.split(b"\0")) and supervisor.start_time(int(name)) is not None:
            processes.append(supervisor.identity(int(name)))
    return processes


def main(argv: list[str]) -> None:
    folder, traefik = Path(argv[0]), argv[1]
    if os.fork():
        os._exit(0)  # who started us waits for this process only
    os.setsid()
    lock = os.open(folder / "supervisor.lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOOK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                return  # there is one
            time.sleep(0.01)  # or one that only looks whether there is
    _Supervisor(folder, traefik).run()


class _Supervisor:
    def __init__(self, folder: Path, traefik: str) -> None:
        self._folder, self._traefik = folder, traefik
        self._sockets: list[socket.socket] = []
        self._problem = ""

    def run(self) -> None:
        running = self._adopted()
        pause = 0.0
        while True:
            if running is None and not self._sockets and not self._listen():
                time.sleep(BIND_S)
                running = self._adopted()  # it may be ours that has the port
                continue
            began = time.monotonic()
            if running is None:
                running = supervisor.identity(self._start())
                self._tell(running, self._problem)
                self._open_when_ready(running)
            else:
                self._tell(running, self._problem)
            _wait(running)
            running = None
            if self._sockets:
                _drop_packets(self._sockets[0])
            if time.monotonic() - began < YOUNG_S:
                self._problem = f"Traefik ends as soon as it starts; see {self._folder}/traefik.log and output.log"
                self._tell(None, self._problem)
                time.sleep(pause)
                pause = min(max(pause * 2, 0.1), PAUSE_S)
            else:
                self._problem, pause = "", 0.0

    def _adopted(self) -> dict[str, Any] | None:
        """The Traefik of a supervisor that was killed."""
        return next(iter(found(self._folder, "traefik")), None)

    def _listen(self) -> bool:
        """Opens both sockets, the first one deaf; false, and said so, if another program has one of them."""
        record = json.loads((self._folder / "endpoint.json").read_text())
        opened: list[socket.socket] = []
        for host, port in ((record["host"], record["port"]), ("127.0.0.1", record["metrics_port"])):
            one = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
            opened.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            try:
                one.bind((host, port))
                if one is opened[0]:
                    _drop_packets(one)
                one.listen(BACKLOG)
            except OSError as e:
                for each in opened:
                    each.close()
                self._tell(None, f"port {port} of {host} cannot be opened ({e.strerror})", port=port)
                return False
        self._sockets = opened
        return True

    def _open_when_ready(self, running: dict[str, Any]) -> None:
        """Lets callers in once Traefik has routes; after READY_S whatever it has, so that it can be asked."""
        port = self._sockets[1].getsockname()[1]
        deadline = time.monotonic() + READY_S
        while supervisor.lives(running) and time.monotonic() < deadline and not _has_routes(port):
            time.sleep(0.005)
        if supervisor.lives(running):
            _accept_packets(self._sockets[0])

    def _start(self) -> int:
        """Forks by hand: LISTEN_PID must be the pid of the one that execs."""
        output = os.open(self._folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if os.fstat(output).st_size > OUTPUT_BYTES:
            os.ftruncate(output, 0)
        pid = os.fork()
        if pid:
            os.close(output)
            return pid
        try:
            null = os.open(os.devnull, os.O_RDONLY)
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (null, output, *(s.fileno() for s in self._sockets))]
            for target, fd in zip((0, 1, 3, 4), high, strict=True):
                os.dup2(fd, target)
            os.dup2(1, 2)
            os.closerange(5, 1024)
            env = {
                "PATH": os.defpath,
                "HOME": str(self._folder),
                MARK: str(self._folder),
                ROLE: "traefik",
                "LISTEN_FDS": "2",
                "LISTEN_FDNAMES": "web:metrics",
                "LISTEN_PID": str(os.getpid()),
            }
            os.execve(self._traefik, [self._traefik, f"--configFile={self._folder}/traefik.yml"], env)  # noqa: S606
        except OSError as e:
            os.write(2, f"{self._traefik} cannot be started: {e}\n".encode())
        finally:
            os._exit(127)

    def _tell(self, running: dict[str, Any] | None, problem: str, **more: Any) -> None:
        status = {"supervisor": supervisor.identity(os.getpid()), "traefik": running, "problem": problem, **more}
        try:
            part = self._folder / ".status"
            part.write_text(json.dumps(status))
            part.rename(self._folder / "status.json")
        except OSError as e:  # a full disk must not stop the traffic
            sys.stderr.write(f"status.json cannot be written: {e}\n")
            sys.stderr.flush()


def _wait(running: dict[str, Any]) -> None:
    """Until that process has ended, a child of ours or not."""
    with _pidfd(running["pid"]) as fd:
        if fd is not None:
            # One whose first thread has ended counts as dead, but keeps its sockets until the last one has.
            select.select([fd], [], [], None if supervisor.lives(running) else 1.0)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(running["pid"], 0)


def _drop_packets(listener: socket.socket) -> None:
    """Attaches a filter that drops every packet for this socket, and lets go of those who have connected but were not
    accepted: they would get a 404. Where the kernel has no such filters, there are some 404 at a restart."""
    drop_all = struct.pack("HBBI", 0x06, 0, 0, 0)  # BPF_RET | BPF_K: keep 0 bytes
    program = ctypes.create_string_buffer(drop_all, len(drop_all))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))
    listener.setblocking(False)
    with contextlib.suppress(OSError):  # BlockingIOError when none is left; EINVAL before it listens
        while True:
            listener.accept()[0].close()


def _accept_packets(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # there is none
        listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def _has_routes(port: int) -> bool:
    """By its socket for metrics, where our routes answer 418 on this path."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as asked:
            asked.sendall(f"GET {ROUTES_PATH} HTTP/1.0\r\n\r\n".encode())
            return b" 418 " in asked.recv(64)
    except OSError:
        return False


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int | None]:
    """Readable when the process ends; None if it has."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


if __name__ == "__main__":
    main(sys.argv[1:])
