"""What the tests of clouds share."""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from clouds.contract.machines import Machine, Machines, MachineSpec, MachineState
from clouds.fake.machines import FakeMachines
from clouds.local.bucket.server import Served, create_app
from clouds.local.machines.processes import LocalMachines
from heliostat.models.clusters import NodeRole

ROOT = Path(__file__).resolve().parents[2]
MODES = ("namespace", "process")
OURS = "installation-of-this-test"


def eventually(what: Callable[[], Any], timeout_s: float = 60) -> Any:
    """Waits for a condition; gives its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := what()):
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)
    return value


@dataclass
class Cloud:
    """A cloud under test whose machines write a line to ``boots`` when they boot."""

    machines: Machines
    boots: Path
    keeps_the_ended: bool = True
    """Until they are pruned; a real cloud forgets by itself."""

    def spec(self, script: str = "exec sleep 1000", **fields: Any) -> MachineSpec:
        """A request whose machine notes its boot, then runs ``script``."""
        given: dict[str, Any] = {
            "token": str(uuid.uuid4()),
            "cluster_id": "clu_1",
            "node_id": "nod_1",
            "generation": 1,
            "role": NodeRole.HEAD,
            "installation_id": OURS,
            "user_data": f"#!/bin/sh\necho boot >> {self.boots}\necho hello from boot\n{script}\n",
        }
        return MachineSpec(**(given | fields))

    def boot_count(self) -> int:
        return self.boots.read_text().count("boot") if self.boots.exists() else 0

    def one(self, machine_id: str) -> Machine:
        (machine,) = self.machines.describe([machine_id])
        return machine

    def state(self, machine_id: str) -> MachineState:
        return self.one(machine_id).state

    def wait_for(self, machine_id: str, state: MachineState) -> Machine:
        eventually(lambda: self.state(machine_id) is state)
        return self.one(machine_id)

    def launch_and_boot(self, spec: MachineSpec) -> Machine:
        before = self.boot_count()
        machine = self.machines.launch(spec)
        eventually(lambda: self.boot_count() > before)
        return self.wait_for(machine.machine_id, MachineState.RUNNING)


def fake_cloud(folder: Path) -> Cloud:
    boots = folder / "boots"
    lock = threading.Lock()

    def boot(spec: MachineSpec, machine: Machine) -> None:
        with lock, boots.open("a") as f:
            f.write("boot\n")

    return Cloud(FakeMachines(boot=boot, console="hello from boot\n"), boots)


@contextmanager
def local_cloud(folder: Path, mode: str, **options: Any) -> Iterator[Cloud]:
    """Ends every machine of its home afterwards."""
    local = LocalMachines(folder / "home", mode, sys.executable, **options)
    try:
        yield Cloud(local, folder / "boots")
    finally:
        ids = [path.name for path in (folder / "home" / "machines").glob("local-*")]
        local.terminate(ids)
        eventually(lambda: all(m.state is MachineState.GONE for m in local.describe(ids)))


@contextmanager
def serving(bucket: Served) -> Iterator[str]:
    """The bucket's server on a free port of this machine; gives its URL."""
    server = uvicorn.Server(uvicorn.Config(create_app(bucket), port=0, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def bare_spec(**fields: Any) -> MachineSpec:
    given: dict[str, Any] = {
        "token": "t", "cluster_id": "cl_1", "node_id": "nd_1", "generation": 1, "role": NodeRole.HEAD,
        "installation_id": "inst-1", "user_data": "#!/bin/sh\n", "tags": {"a": "b"},
    }  # fmt: skip
    return MachineSpec(**(given | fields))
