"""Nodes for the agent's tests: real agent processes against the small control plane, ended by pid."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent import processes
from agent.events import Events
from agent.journal import Journal
from tests.agent.control_plane import ControlPlane

ROOT = Path(__file__).parents[2]
UNSHARE = ["unshare", "-U", "--map-current-user", "-p", "-f", "--kill-child", "--mount-proc"]
FAST = {"backoff_base_s": 0.05, "backoff_cap_s": 0.5, "activity_s": 0.5, "ray_stop_s": 6.0}


def namespaces_work() -> bool:
    return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0


def free_block(size: int = 20) -> int:
    """First of ``size`` ports that are all free on every address, outside the system's own range."""
    first = 20000 + (os.getpid() * 40 + next(_blocks) * size) % 10000
    for base in itertools.chain(range(first, 32000, size), range(20000, first, size)):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(base, base + size):
                    sock = stack.enter_context(socket.socket())
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sock.bind(("", port))
            except OSError:
                continue
            return base
    raise AssertionError("no free block of ports")


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A free port for a gRPC server of this user, which shares it (SO_REUSEPORT): between its choice and the server's
    start no other test process is given it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("", 0))
        yield held.getsockname()[1]


_blocks = itertools.count()
_hosts = itertools.count(2)


@dataclass
class AgentNode:
    node_id: str
    ip: str
    folder: Path
    process: subprocess.Popen[bytes]

    def pids(self) -> list[int]:
        """All living processes of this node, as seen from here."""
        return [self.process.pid, *processes.descendants(self.process.pid)]

    def marked(self, *entries: str) -> list[int]:
        """Living processes that carry this node's mark and ``entries``."""
        found = processes.with_environ(f"HELIOSTAT_NODE_DIR={self.folder}", *entries)
        return [p for p in found if processes.alive(p)]

    def init_pid(self) -> int:
        """Below ``unshare``, which blocks SIGTERM, where there is one."""
        pid = self.process.pid
        if processes.command(pid).startswith("unshare"):
            return next(p for p in processes.descendants(pid) if self.parent(p) == pid)
        return pid

    def agent_pid(self) -> int:
        """The agent proper: the child of init."""
        init = self.init_pid()
        children = [p for p in processes.descendants(init) if self.parent(p) == init]
        return next(p for p in children if "-m agent" in processes.command(p))

    @staticmethod
    def parent(pid: int) -> int:
        text = Path(f"/proc/{pid}/stat").read_text()
        return int(text[text.rindex(")") + 2 :].split()[1])

    def log(self) -> str:
        return (self.folder / "agent.log").read_text(errors="replace")

    def kill(self) -> None:
        """Power cut."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def end(self, timeout_s: float = 20) -> int:
        self.terminate()
        return self.process.wait(timeout_s)

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError, StopIteration):
            os.kill(self.init_pid(), signal.SIGTERM)


class Nodes:
    def __init__(self, plane: ControlPlane, folder: Path) -> None:
        self.plane = plane
        self.folder = folder
        self.started: list[AgentNode] = []
        self.host = f"127.{os.getpid() % 200 + 10}.{next(_hosts)}"
        self._node = itertools.count(2)

    def start(
        self, node_id: str, role: str = "head", group: str = "head", isolate: bool = False,
        constants: dict[str, Any] | None = None, python: list[str] | None = None, told: dict[str, Any] | None = None,
        files: dict[str, str] | None = None, **config: Any,
    ) -> AgentNode:  # fmt: skip
        """``told``: in the boot file beside what is always there. ``files``: what stands in the node's directory before
        the agent starts. ``config``: of the node's registration."""
        ip = f"{self.host}.{next(self._node)}"
        bootstrap = self.plane.add_node(node_id, role, group, **config)
        if role == "worker":
            self.plane.listed[node_id] = {"id": node_id, "group": group, "state": "REGISTERED", "ip": ip}
        folder = self.folder / node_id
        folder.mkdir(parents=True)
        for name, text in (files or {}).items():
            (folder / name).write_text(text)
        boot = {"api_url": self.plane.url, "node_id": node_id, "generation": 1, "bootstrap_token": bootstrap,
                "constants": FAST | (constants or {}), **(told or {})}  # fmt: skip
        (folder / "boot.json").write_text(json.dumps(boot))
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HELIOSTAT_", "RAY_"))}
        env |= {"HELIOSTAT_NODE_IP": ip, "HELIOSTAT_PORT_BASE": str(free_block()), "HELIOSTAT_NODE_DIR": str(folder),
                "HELIOSTAT_SECRET_KEY": "control-plane-secret", "HELIOSTAT_MACHINE_ID": f"local-{node_id}"}  # fmt: skip
        prefix = UNSHARE if isolate else []
        # exec: unshare's child must be the agent's init itself, PID 1
        command = [*prefix, *(python or [sys.executable, "-m", "agent"]), str(folder / "boot.json")]
        with (folder / "console.txt").open("ab") as console:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=console, stderr=console
            )
        node = AgentNode(node_id, ip, folder, process)
        self.started.append(node)
        return node

    def close(self) -> None:
        for node in self.started:
            if node.process.poll() is None:
                node.terminate()
        for node in self.started:
            try:
                node.process.wait(15)
            except subprocess.TimeoutExpired:
                left = node.pids()
                node.kill()
                processes.kill(left)
        for node in self.started:
            processes.kill(node.marked())


def until(what: Any, timeout_s: float = 30.0, why: str = "") -> Any:
    """For conditions on processes and files, which nobody announces."""
    deadline = time.monotonic() + timeout_s
    while not (value := what()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {why}"
        time.sleep(0.01)
    return value


@pytest.fixture(scope="session")
def fake_python(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that starts the agent with ``fake_ray.py`` as its ``ray``: an interpreter's folder of its own."""
    folder = tmp_path_factory.mktemp("fake") / "bin"
    folder.mkdir()
    (folder / "python3").symlink_to(Path(sys.executable).resolve())
    shutil.copyfile(Path(__file__).with_name("fake_ray.py"), folder / "ray")
    (folder / "ray").chmod(0o755)
    return [str(folder / "python3"), "-m", "agent"]


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    plane = ControlPlane()
    yield plane
    plane.close()


@pytest.fixture
def nodes(plane: ControlPlane) -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="agent-", ignore_cleanup_errors=True) as folder:
        nodes = Nodes(plane, Path(folder))
        yield nodes
        nodes.close()


@pytest.fixture
def events(tmp_path: Path) -> Events:
    return Events(Journal(tmp_path / "f"), "f" * 32, 100)
