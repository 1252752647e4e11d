"""Machines of the ``local`` cloud: each is a directory, a process tree below a supervisor, and a slot."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clouds.contract.errors import BadConfig, NoCapacity
from clouds.contract.machines import CLUSTER_TAG, NODE_TAG, OWNER_TAG, Machine, MachineSpec, MachineState
from clouds.local.machines import host, slots, supervisor
from clouds.local.machines.supervisor import step
from heliostat.errors import CloudError
from heliostat.models.clouds import Capabilities, Market

INSTANCE_TYPE = "local"
SPAWN_TIMEOUT_S = 30
"""From spawn to the supervisor's first file; 0.1 s on an idle machine."""
CONSOLE_TAIL_BYTES = 16 * 1024


class LocalMachines:
    """Machines as process trees of this user on this host (``clouds.contract.machines.Machines``).

    Args:
        home: holds ``machines/<machine id>/``; two installations have two homes and share the host's slots.
        isolation: ``namespace`` (user and PID namespace), ``process``, or ``auto``: namespaces where the kernel
            lets this user make one. Raises BadConfig for a namespace that the kernel refuses.
        python: interpreter of the nodes; must have Ray. Its folder comes first in their PATH.
        max_machines: how many may live at once on this host.

    A machine runs user code as this user. Its environment is made of the host's locale, path, proxy, certificate
    and pip settings, and holds nothing of the control plane's.
    """

    supervisor_script = Path(supervisor.__file__)

    def __init__(self, home: Path, isolation: str, python: str, *, max_machines: int = slots.SLOTS) -> None:
        self._folder = home.resolve() / "machines"
        found = shutil.which(python)
        if found is None:
            raise BadConfig(
                f"The nodes' Python {python!r} does not exist or is not executable.",
                remedy="Name the interpreter that has Ray.",
            )
        self._python = str(Path(found).absolute())  # links stay: a virtual environment's python is one
        self._max_machines = max_machines
        self._pruning = threading.Lock()
        if isolation not in ("auto", "namespace", "process"):
            raise BadConfig(
                f"Local isolation {isolation!r} does not exist.", remedy="Set it to auto, namespace or process."
            )
        if isolation != "process" and not host.namespaces_work():
            if isolation == "namespace":
                raise BadConfig(
                    "This host does not let this user make a PID namespace (unshare failed).",
                    remedy="Allow unprivileged user namespaces, or set HELIOSTAT_LOCAL_ISOLATION=process.",
                )
            isolation = "process"
        self.isolation = "process" if isolation == "process" else "namespace"

    def capabilities(self) -> Capabilities:
        return Capabilities(
            markets=[Market.ON_DEMAND],
            zones=[],
            instance_types=[INSTANCE_TYPE],
            max_cpu_per_node=host.cpus(),
            max_memory_per_node=host.memory_bytes(),
            max_gpu_per_node=host.gpus(),
        )

    def launch(self, spec: MachineSpec) -> Machine:
        self._check(spec)
        try:
            return self._launch(spec)
        except OSError as e:
            raise CloudError(
                f"This host could not start a machine for node {spec.node_id}: {e}.",
                remedy="Free disk space, memory or processes; the launch is safe to repeat.",
                resource=spec.node_id,
            ) from e

    def _launch(self, spec: MachineSpec) -> Machine:
        machine_id = _machine_id(spec.token)
        folder = self._folder / machine_id
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        deadline = time.monotonic() + SPAWN_TIMEOUT_S
        spawned = 0
        while True:
            if not folder.exists():
                self._write_request(spec, folder)
            machine = self._read(machine_id)
            request = self._request(machine_id)
            if machine is None or request is None:
                continue  # pruned this moment
            if request["spec_sha256"] != spec.digest():
                raise BadConfig.same_token(machine_id, spec.node_id)
            if (folder / "started").exists() or (folder / "stop").exists():
                return machine
            if spawned == 2 or time.monotonic() > deadline:
                raise CloudError(
                    f"Machine {machine_id} did not start within {SPAWN_TIMEOUT_S} s. {self.console_output(machine_id)}",
                    remedy="The launch is safe to repeat.",
                    resource=spec.node_id,
                )
            # Whoever holds the lock boots it. The lock passes from us to the supervisor with its descriptor, so
            # there is no moment between us at which another launcher could take it.
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if not _try_lock(lock):
                    time.sleep(0.01)  # another launcher is at it: its machine is ours as soon as it has started
                elif not (folder / "started").exists():
                    step("locked")
                    spawned += 1
                    self._power_on(spec, machine_id, folder, lock, deadline)
            finally:
                os.close(lock)

    def describe(self, machine_ids: Iterable[str]) -> list[Machine]:
        return [machine for machine_id in machine_ids if (machine := self._read(machine_id)) is not None]

    def find(self, token: str) -> Machine | None:
        return next(iter(self.describe([_machine_id(token)])), None)

    def list_owned(self, installation_id: str) -> list[Machine]:
        return [
            machine
            for machine in self.describe(self._all())
            if machine.tags.get(OWNER_TAG) == installation_id and machine.state is not MachineState.GONE
        ]

    def terminate(self, machine_ids: Iterable[str]) -> None:
        for machine_id in machine_ids:
            folder = self._folder / machine_id
            request = self._request(machine_id)
            if request is None or OWNER_TAG not in request["tags"] or (folder / "ended").exists():
                continue
            if not (folder / "stop").exists():
                supervisor.write_once(folder / "stop", {"at": time.time(), "reason": "terminated"})
            supervisor.kill(supervisor.read(folder / "power"))
            started = supervisor.read(folder / "started")
            if started is None or supervisor.lives(started):
                continue  # the supervisor ends the rest, and what it has not begun it does not begin
            for process in supervisor.strays(machine_id):
                supervisor.kill(process)

    def attach_retained(self, cluster_id: str, machine_id: str | None) -> None:
        """Heads keep nothing here."""

    def delete_orphans(
        self, installation_id: str, older_than_s: float, lives: Callable[[str], bool] = lambda cluster_id: True
    ) -> list[str]:
        return []

    def console_output(self, machine_id: str) -> str:
        if self._request(machine_id) is None:
            return ""
        try:
            with (self._folder / machine_id / "console.log").open("rb") as f:
                f.seek(max(0, f.seek(0, os.SEEK_END) - CONSOLE_TAIL_BYTES))
                return f.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def forget_ended(self, older_than_s: float) -> list[str]:
        """Removes the machines that ended longer ago than that, and removes at once what the others among the
        ended leave (a supervisor that was killed could not). Gives the ids forgotten. A forgotten token would
        boot again: keep them longer than any launch is repeated, a day at least."""
        forgotten = []
        with self._pruning:
            for machine in self.describe(self._all()):
                if machine.state is not MachineState.GONE:
                    continue
                folder = self._folder / machine.machine_id
                supervisor.clean(folder)
                ended = supervisor.read(folder / "ended") or supervisor.read(folder / "stop")
                if ended is None:  # its supervisor was killed or the host restarted: it ages from now on
                    supervisor.write_once(
                        folder / "ended", {"at": time.time(), "exit_code": None, "reason": machine.reason}
                    )
                elif time.time() - ended["at"] > older_than_s:
                    trash = self._folder / f".trash-{machine.machine_id}"
                    folder.rename(trash)
                    shutil.rmtree(trash)
                    forgotten.append(machine.machine_id)
        return forgotten

    def _check(self, spec: MachineSpec) -> None:
        can = self.capabilities()
        refused = ""
        if spec.market is not Market.ON_DEMAND:
            refused = f"has no {spec.market} market; use ON_DEMAND"
        elif spec.zone is not None:
            refused = f"has no zones; leave {spec.zone!r} out"
        elif spec.instance_type not in (None, INSTANCE_TYPE):
            refused = f"has no instance type {spec.instance_type!r}; leave it out or use {INSTANCE_TYPE!r}"
        elif spec.accelerator or spec.cpu_architecture or spec.advanced:
            refused = "is fixed hardware; remove accelerator, cpu_architecture and advanced_instance_config"
        elif spec.keep is not None:
            refused = "has no disks or addresses to retain; remove retained_volume and fixed_address"
        elif spec.gpu > can.max_gpu_per_node:
            refused = f"has {can.max_gpu_per_node} GPUs, not {spec.gpu}"
        elif spec.cpu is not None and can.max_cpu_per_node is not None and spec.cpu > can.max_cpu_per_node:
            refused = f"has {can.max_cpu_per_node:g} CPUs, not {spec.cpu:g}"
        elif spec.memory is not None and can.max_memory_per_node is not None and spec.memory > can.max_memory_per_node:
            refused = f"has {can.max_memory_per_node} bytes of memory, not {spec.memory}"
        if refused:
            raise BadConfig(f"This host {refused}.", remedy="Change the compute config.", resource=spec.node_id)

    def _write_request(self, spec: MachineSpec, folder: Path) -> None:
        """The machine's directory, whole at once. Losing the race for it is fine: who won is looked at next."""
        request = {
            "spec_sha256": spec.digest(),
            "spec": spec.model_dump(mode="json", exclude={"user_data"}),
            "tags": spec.tags | {OWNER_TAG: spec.installation_id, CLUSTER_TAG: spec.cluster_id, NODE_TAG: spec.node_id},
            "launched_at": datetime.now(UTC).isoformat(),
        }
        part = Path(tempfile.mkdtemp(dir=self._folder, prefix=".part-"))  # 0700
        for name, text in (("machine.json", json.dumps(request)), ("user-data", spec.user_data)):
            with os.fdopen(os.open(part / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
        (part / "node").mkdir()
        step("request written")
        try:
            part.rename(folder)
        except OSError as e:
            shutil.rmtree(part)
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        supervisor.sync_folder(self._folder)
        step("request placed")

    def _power_on(self, spec: MachineSpec, machine_id: str, folder: Path, lock: int, deadline: float) -> None:
        slot = slots.take(
            int(hashlib.sha256(spec.token.encode()).hexdigest(), 16) % self._max_machines, self._max_machines
        )
        if slot is None:
            raise NoCapacity(
                f"All {self._max_machines} machine slots of this host are in use.",
                remedy="End clusters that you do not need, or wait.",
                resource=spec.node_id,
            )
        console = os.open(folder / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        place = {"slot": slot.number, "ip": slot.ip, "port_base": slot.port_base}
        try:
            with slot.guard:
                step("slot taken")
                process = subprocess.Popen(
                    [
                        *(sys.executable, "-I", "-S", str(self.supervisor_script)),
                        *(str(folder), str(lock), str(slot.guard.fileno()), self.isolation, json.dumps(place)),
                    ],
                    env=host.environment(self._python, slot)
                    | {
                        "HELIOSTAT_NODE_ID": spec.node_id,
                        "HELIOSTAT_NODE_DIR": str(folder / "node"),
                        "HELIOSTAT_MACHINE_ID": machine_id,  # by which strays are found
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    pass_fds=(lock, slot.guard.fileno()),
                    start_new_session=True,  # no Ctrl-C of our terminal, no signal to our group
                )
                step("spawned supervisor")
        finally:
            os.close(console)
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # it only waits for the supervisor, which keeps running
            process.wait()

    def _all(self) -> list[str]:
        return sorted(path.name for path in self._folder.glob("local-*"))

    def _request(self, machine_id: str) -> dict[str, Any] | None:
        if not re.fullmatch(r"local-[0-9a-f]{32}", machine_id):
            return None  # not ours; and no path that leads out
        return supervisor.read(self._folder / machine_id / "machine.json")

    def _read(self, machine_id: str) -> Machine | None:
        """None if it is not known."""
        if self._request(machine_id) is None:
            return None
        folder = self._folder / machine_id
        started = supervisor.read(folder / "started")
        alive = supervisor.lives(started)
        power = supervisor.read(folder / "power")
        stop = supervisor.read(folder / "stop")
        ended = supervisor.read(folder / "ended")
        request = self._request(machine_id)
        if request is None:  # forgotten while we read: what we saw may be half
            return None
        reason = ""
        if ended is not None:
            state, reason = MachineState.GONE, ended["reason"]
        elif started is None:
            state = MachineState.PENDING if stop is None else MachineState.GONE
            reason = "terminated before it started" if stop is not None else ""
        elif alive:
            running = MachineState.PENDING if power is None else MachineState.RUNNING
            state = running if stop is None else MachineState.STOPPING
        elif supervisor.lives(power) or supervisor.strays(machine_id):
            state, reason = MachineState.STOPPING, "its supervisor was killed"
        elif (ended := supervisor.read(folder / "ended")) is not None:  # since we looked
            state, reason = MachineState.GONE, ended["reason"]
        else:
            state = MachineState.GONE
            reason = stop["reason"] if stop else "its supervisor was killed, or this host restarted"
        return Machine(
            machine_id=machine_id,
            node_id=request["tags"][NODE_TAG],
            cluster_id=request["tags"][CLUSTER_TAG],
            state=state,
            ip=started["ip"] if started else None,
            launched_at=datetime.fromisoformat(request["launched_at"]),
            reason=reason,
            tags=request["tags"],
        )


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _machine_id(token: str) -> str:
    return f"local-{hashlib.sha256(token.encode()).hexdigest()[:32]}"
