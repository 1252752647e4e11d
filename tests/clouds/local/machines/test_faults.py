"""kill -9 of everybody who takes part in a launch, at every step: a token boots once or never, nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clouds.contract.machines import MachineSpec, MachineState
from clouds.local.machines import supervisor
from clouds.local.machines.processes import LocalMachines
from heliostat.errors import CloudError
from tests.clouds.support import MODES, OURS, ROOT, Cloud, eventually, local_cloud

LAUNCHER_STEPS = ("request written", "request placed", "locked", "slot taken", "spawned supervisor")
SUPERVISOR_STEPS = ("forked", "started", "spawned", "powered", "down", "cleaned")

LAUNCHER = """
import os, signal, sys
from pathlib import Path
from clouds.contract.machines import MachineSpec
from clouds.local.machines import processes
home, mode, point = sys.argv[1:]
def step(name):
    if name == point:
        os.kill(os.getpid(), signal.SIGKILL)
processes.step = step
spec = MachineSpec.model_validate_json(sys.stdin.readline())
print(processes.LocalMachines(Path(home), mode, sys.executable).launch(spec).machine_id, flush=True)
sys.stdin.readline()
"""

SUPERVISOR = """
import os, signal, sys
sys.path.insert(0, {root!r})
from clouds.local.machines import supervisor
def step(name):
    if name == {point!r}:
        os.kill(os.getpid(), signal.SIGKILL)
supervisor.step = step
supervisor.main(sys.argv[1:])
"""


@pytest.fixture(params=MODES)
def cloud(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cloud]:
    with local_cloud(tmp_path, request.param) as found:
        yield found


def local(cloud: Cloud) -> LocalMachines:
    assert isinstance(cloud.machines, LocalMachines)
    return cloud.machines


def folder_of(cloud: Cloud, machine_id: str) -> Path:
    return cloud.boots.parent / "home" / "machines" / machine_id


def start_launcher(cloud: Cloud, spec: MachineSpec, point: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(cloud.boots.parent / "home"), local(cloud).isolation, point],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(spec.model_dump_json() + "\n")
    process.stdin.flush()
    return process


@pytest.mark.parametrize("point", LAUNCHER_STEPS)
def test_a_launcher_that_is_killed(cloud: Cloud, point: str) -> None:
    spec = cloud.spec()
    process = start_launcher(cloud, spec, point)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "it got as far as that step"
    machine = cloud.machines.launch(spec)
    running = cloud.wait_for(machine.machine_id, MachineState.RUNNING)
    eventually(lambda: cloud.boot_count() == 1)
    assert cloud.machines.launch(spec).machine_id == running.machine_id
    cloud.machines.terminate([machine.machine_id])
    cloud.wait_for(machine.machine_id, MachineState.GONE)
    assert cloud.boot_count() == 1


@pytest.mark.parametrize("point", LAUNCHER_STEPS)
def test_what_a_killed_launcher_began_can_be_ended(cloud: Cloud, point: str) -> None:
    """Nobody launches again: the sweep sees it, if there is anything, and its end is final."""
    spec = cloud.spec()
    start_launcher(cloud, spec, point).communicate(timeout=60)
    found = cloud.machines.find(spec.token)
    assert [m.machine_id for m in cloud.machines.list_owned(OURS)] == ([found.machine_id] if found else [])
    if found is None:
        assert point == "request written"
        return
    cloud.machines.terminate([found.machine_id])
    cloud.wait_for(found.machine_id, MachineState.GONE)
    before = cloud.boot_count()
    assert cloud.machines.launch(spec).state is MachineState.GONE
    assert cloud.boot_count() == before <= 1


@pytest.mark.parametrize("point", SUPERVISOR_STEPS)
def test_a_supervisor_that_is_killed(cloud: Cloud, point: str) -> None:
    """Before ``started`` the next launch boots; from then on the machine has had its only life. In both cases what
    ran of it is ended, down to a process that made itself a session of its own."""
    script = cloud.boots.parent / "supervisor.py"
    script.write_text(SUPERVISOR.format(root=str(ROOT), point=point))
    local(cloud).supervisor_script = script
    stray = cloud.boots.parent / "stray"
    rest = "sleep 0.2" if point in ("down", "cleaned") else "exec sleep 1000"
    spec = cloud.spec(f"setsid sh -c 'echo $$ > {stray}; exec sleep 1000' & \n{rest}")
    if point == "forked":
        with pytest.raises(CloudError, match="did not start"):
            cloud.machines.launch(spec)
        assert cloud.boot_count() == 0
        local(cloud).supervisor_script = Path(supervisor.__file__)
        machine = cloud.launch_and_boot(spec)
        assert cloud.boot_count() == 1
        return
    machine = cloud.machines.launch(spec)
    started = supervisor.read(folder_of(cloud, machine.machine_id) / "started")
    eventually(lambda: not supervisor.lives(started))
    cloud.machines.terminate([machine.machine_id])
    cloud.wait_for(machine.machine_id, MachineState.GONE)
    boots = cloud.boot_count()
    assert boots <= 1
    local(cloud).supervisor_script = Path(supervisor.__file__)
    assert cloud.machines.launch(spec).state is MachineState.GONE
    assert cloud.boot_count() == boots
    if stray.exists() and stray.read_text() and local(cloud).isolation == "process":
        pid = int(stray.read_text())  # of this PID namespace
        eventually(lambda: supervisor.start_time(pid) is None or not supervisor.strays(machine.machine_id))
    assert supervisor.strays(machine.machine_id) == []
    assert local(cloud).forget_ended(older_than_s=3600) == []
    assert not (folder_of(cloud, machine.machine_id) / "node").exists(), "what its supervisor left is cleaned"


def test_machines_outlive_their_launcher(cloud: Cloud) -> None:
    """Its terminal's Ctrl-C, its hang-up, the kill -9 of its whole process group."""
    spec = cloud.spec()
    process = start_launcher(cloud, spec)
    assert process.stdout is not None
    machine_id = process.stdout.readline().strip()
    eventually(lambda: cloud.boot_count() == 1)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGHUP)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert cloud.state(machine_id) is MachineState.RUNNING
    power = supervisor.read(folder_of(cloud, machine_id) / "power")
    assert supervisor.lives(power)
    assert cloud.machines.launch(spec).machine_id == machine_id
    assert cloud.boot_count() == 1


def test_a_short_name_that_another_machine_removes_meanwhile_stops_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster's machines end together, and each looks at all names in /tmp."""
    others = Path(f"/tmp/hn-test-{os.getpid()}-others")
    others.symlink_to(tmp_path)
    is_symlink = Path.is_symlink

    def looked_at(path: Path) -> bool:
        found = is_symlink(path)
        if path == others:
            path.unlink()
        return found

    monkeypatch.setattr(Path, "is_symlink", looked_at)
    (tmp_path / "node").mkdir()
    (tmp_path / "user-data").touch()
    supervisor.clean(tmp_path)
    assert list(tmp_path.iterdir()) == []


def zombies() -> set[str]:
    """Of this process."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid() and fields[0] == "Z":
            found.add(stat.parent.name)
    return found


def test_no_zombie_is_left_with_the_launcher(cloud: Cloud) -> None:
    before = zombies()  # of whatever other tests this process ran
    machine = cloud.launch_and_boot(cloud.spec())
    cloud.machines.terminate([machine.machine_id])
    cloud.wait_for(machine.machine_id, MachineState.GONE)
    assert zombies() <= before


@pytest.mark.parametrize("change", [{"start": 1}, {"boot": "another boot of this host"}])
def test_a_pid_that_is_anothers_now_is_spared(cloud: Cloud, change: dict[str, Any]) -> None:
    machine = cloud.launch_and_boot(cloud.spec())
    folder = folder_of(cloud, machine.machine_id)
    started = supervisor.read(folder / "started")
    supervisor.kill(started)
    eventually(lambda: not supervisor.lives(started))
    cloud.machines.terminate([machine.machine_id])
    cloud.wait_for(machine.machine_id, MachineState.GONE)
    innocent = subprocess.Popen(["sleep", "1000"])
    try:
        for name in ("started", "power"):
            record = supervisor.read(folder / name)
            assert record is not None
            supervisor.write_once(folder / name, record | supervisor.identity(innocent.pid) | change)
        assert cloud.state(machine.machine_id) is MachineState.GONE
        cloud.machines.terminate([machine.machine_id])
        supervisor.kill(supervisor.read(folder / "power"))
        assert innocent.poll() is None
        supervisor.kill(supervisor.identity(innocent.pid))
        assert innocent.wait(10) == -signal.SIGKILL, "the right identity is killed"
    finally:
        innocent.kill()
        innocent.wait()


def test_a_stray_that_is_given_another_program_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of execve it has no environment: a quarter of all looks missed one that did nothing else."""
    shown, looks = supervisor._environ, 0
    with subprocess.Popen(["sleep", "1000"], env={"HELIOSTAT_MACHINE_ID": "local-x"}) as stray:

        def environ(pid: int) -> bytes:
            nonlocal looks
            looks += pid == stray.pid
            return b"" if pid == stray.pid and looks < 3 else shown(pid)

        monkeypatch.setattr(supervisor, "_environ", environ)
        try:
            assert supervisor.strays("local-x") == [supervisor.identity(stray.pid)]
        finally:
            stray.kill()


def test_terminate_races_with_the_boot(cloud: Cloud) -> None:
    """``stop`` is written at a random moment of the launch: the machine is gone in the end, whoever was first."""
    for delay in range(0, 60, 15):
        spec = cloud.spec()
        process = start_launcher(cloud, spec)
        found = eventually(lambda spec=spec: cloud.machines.find(spec.token))
        time.sleep(delay / 1000)  # the race itself
        cloud.machines.terminate([found.machine_id])
        cloud.wait_for(found.machine_id, MachineState.GONE)
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
        cloud.wait_for(found.machine_id, MachineState.GONE)
        # Its lock may be free before the kernel has taken the last of its killed processes away.
        assert eventually(lambda found=found: not supervisor.strays(found.machine_id))
    assert cloud.machines.list_owned(OURS) == []
