"""Machines of this host: what the contract leaves open."""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from clouds.contract.errors import BadConfig, NoCapacity
from clouds.contract.machines import MachineSpec, MachineState
from clouds.local.machines import host, slots, supervisor
from clouds.local.machines.processes import LocalMachines
from heliostat.errors import CloudError
from tests.clouds.support import MODES, OURS, Cloud, eventually, local_cloud


@pytest.fixture(params=MODES)
def cloud(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cloud]:
    with local_cloud(tmp_path, request.param) as found:
        yield found


def folder_of(cloud: Cloud, machine_id: str) -> Path:
    return cloud.boots.parent / "home" / "machines" / machine_id


def test_the_power_switch_ends_the_whole_tree(cloud: Cloud) -> None:
    """Also what made a session of its own, as Ray's job drivers do, and what hides its environment."""
    pids = cloud.boots.parent / "pids"
    script = f"""
setsid sh -c 'echo $$ >> {pids}; exec sleep 1000' &
(setsid env -i sh -c 'echo $$ >> {pids}; exec sleep 1000' &)
(trap "" TERM INT HUP; while :; do sleep 0.05; done) &
while [ "$(wc -l < {pids})" != 2 ]; do sleep 0.01; done
exec sleep 1000"""
    pids.touch()
    machine = cloud.launch_and_boot(cloud.spec(script))
    started = supervisor.read(folder_of(cloud, machine.machine_id) / "started")
    assert started is not None
    tree = eventually(lambda: found if len(found := below(started["pid"])) >= 5 else None)
    cloud.machines.terminate([machine.machine_id])
    cloud.wait_for(machine.machine_id, MachineState.GONE)
    assert not [process for process in tree if supervisor.lives(process)]
    assert not supervisor.lives({**started}) or eventually(lambda: not supervisor.lives(started))


def below(pid: int) -> list[dict[str, Any]]:
    """Every process under ``pid``, each by its lasting identity."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return [supervisor.identity(p) for p in found - {pid} if supervisor.start_time(p) is not None]


@pytest.mark.parametrize(("script", "reason"), [("exit 3", "exit code 3"), ("kill -9 $$", "signal 9")])
def test_a_machine_that_ends_says_how(cloud: Cloud, script: str, reason: str) -> None:
    if cloud.machines.isolation == "namespace" and script.startswith("kill"):  # type: ignore[attr-defined]
        script = "sh -c 'kill -9 $$'; exit $?"  # the first process of a PID namespace can't kill itself
        reason = "exit code 137"
    machine = cloud.machines.launch(cloud.spec(script))
    gone = cloud.wait_for(machine.machine_id, MachineState.GONE)
    assert reason in gone.reason
    assert "hello from boot" in cloud.machines.console_output(machine.machine_id)
    assert cloud.machines.list_owned(OURS) == []


def test_its_environment_has_what_pip_needs_and_no_secret(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("HELIOSTAT_SECRET_KEY", "TEMPORAL_API_KEY", "AWS_SESSION_TOKEN", "PIP_TOKEN", "UV_PUBLISH_TOKEN", "X")
    for name in secrets:
        monkeypatch.setenv(name, "the-secret")
    monkeypatch.setenv("PIP_INDEX_URL", "https://example.invalid/simple")
    monkeypatch.setenv("SSL_CERT_FILE", "/some/ca.pem")
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    out = cloud.boots.parent / "env"
    machine = cloud.machines.launch(cloud.spec(f"env > {out}.part; mv {out}.part {out}; exec sleep 1000"))
    eventually(out.exists)
    env = dict(line.split("=", 1) for line in out.read_text().splitlines() if "=" in line)
    assert "the-secret" not in out.read_text()
    assert env["PIP_INDEX_URL"] == "https://example.invalid/simple"
    assert env["SSL_CERT_FILE"] == "/some/ca.pem"
    assert env["https_proxy"] == "http://proxy.invalid:3128"
    assert env["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert env["HELIOSTAT_PYTHON"] == sys.executable
    assert env["TMPDIR"] == "/tmp"
    assert env["HELIOSTAT_NODE_IP"] == cloud.one(machine.machine_id).ip
    assert env["HELIOSTAT_NODE_IP"] in env["NO_PROXY"].split(",")
    assert int(env["HELIOSTAT_PORT_BASE"]) % slots.PORTS_PER_SLOT == 0
    assert env["HELIOSTAT_NODE_DIR"] == env["PWD"] == str(folder_of(cloud, machine.machine_id) / "node")
    assert {name for name in env if name.startswith("HELIOSTAT_")} == {
        *("HELIOSTAT_PYTHON", "HELIOSTAT_NODE_IP", "HELIOSTAT_PORT_BASE"),
        *("HELIOSTAT_NODE_DIR", "HELIOSTAT_NODE_ID", "HELIOSTAT_MACHINE_ID"),
    }


def test_user_data_is_nobody_elses(cloud: Cloud) -> None:
    secret = "5ec7e7" * 8
    machine = cloud.launch_and_boot(cloud.spec(f": {secret}\nexec sleep 1000"))
    folder = folder_of(cloud, machine.machine_id)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("machine.json", "user-data", "console.log", "started", "power"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
    assert secret not in (folder / "machine.json").read_text()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            seen = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue  # ended, or a kernel thread
        assert secret.encode() not in seen


def test_an_ended_machine_leaves_its_story_only(cloud: Cloud) -> None:
    name = f"/tmp/hn-test-{os.getpid()}-{cloud.boots.parent.name}"
    stranger = Path(f"{name}-stranger")
    stranger.symlink_to(cloud.boots.parent)
    try:
        script = f'mkdir "$HELIOSTAT_NODE_DIR/ray"; ln -s "$HELIOSTAT_NODE_DIR/ray" {name}; exec sleep 1000'
        machine = cloud.machines.launch(cloud.spec(script))
        eventually(Path(name).is_symlink)
        cloud.machines.terminate([machine.machine_id])
        cloud.wait_for(machine.machine_id, MachineState.GONE)
        assert not Path(name).is_symlink(), "Ray's short name is removed"
        assert stranger.is_symlink(), "another's is not"
    finally:
        stranger.unlink()
    left = {path.name for path in folder_of(cloud, machine.machine_id).iterdir()}
    assert left == {"machine.json", "console.log", "started", "power", "stop", "ended", "lock"}


def test_prune_forgets_the_ended_after_their_time(cloud: Cloud) -> None:
    local = cloud.machines
    assert isinstance(local, LocalMachines)
    living = cloud.launch_and_boot(cloud.spec()).machine_id
    ended = cloud.launch_and_boot(cloud.spec()).machine_id
    local.terminate([ended])
    cloud.wait_for(ended, MachineState.GONE)
    assert local.forget_ended(older_than_s=3600) == []
    assert {m.machine_id for m in local.describe([living, ended])} == {living, ended}
    assert local.forget_ended(older_than_s=0) == [ended]
    assert [m.machine_id for m in local.describe([living, ended])] == [living]
    assert cloud.state(living) is MachineState.RUNNING


def test_a_slot_is_held_for_life_and_no_longer(cloud: Cloud) -> None:
    machine = cloud.launch_and_boot(cloud.spec("sleep 1000 & exec sleep 1000"))
    started = supervisor.read(folder_of(cloud, machine.machine_id) / "started")
    assert started is not None
    base = started["port_base"]

    def free() -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as guard:
            try:
                guard.bind(("127.0.0.1", base))
            except OSError:
                return False
            return True

    assert not free()
    cloud.machines.terminate([machine.machine_id])
    eventually(free)


def test_a_slot_whose_ports_somebody_has_is_skipped() -> None:
    first = slots.take(17)
    assert first is not None
    first.guard.close()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as taken:
        taken.bind(("127.0.0.1", first.port_base + 7))
        taken.listen()
        second = slots.take(first.number)
    assert second is not None
    second.guard.close()
    assert second.number != first.number
    assert first.ip != second.ip or first.ip == "127.0.0.1"


def test_two_homes_never_share_a_slot(tmp_path: Path) -> None:
    """Forty places only, so that they would meet by chance."""
    with ExitStack() as stack:
        clouds = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            clouds.append(stack.enter_context(local_cloud(tmp_path / name, "auto", max_machines=40)))
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda cloud: (cloud, cloud.machines.launch(cloud.spec())), clouds * 5))
        places = [supervisor.read(folder_of(cloud, machine.machine_id) / "started") for cloud, machine in made]
        bases = [place["port_base"] for place in places if place]
        assert len(set(bases)) == len(bases) == 10
        assert all(cloud.state(machine.machine_id) is not MachineState.GONE for cloud, machine in made)


def test_when_the_slots_run_out(tmp_path: Path) -> None:
    with local_cloud(tmp_path, "auto", max_machines=3) as cloud:  # others on this host may have some of the three
        made: list[str] = []
        spec = cloud.spec()
        refused = _refusal(cloud, spec)
        while not refused:
            made.append(cloud.machines.find(spec.token).machine_id)  # type: ignore[union-attr]
            spec = cloud.spec()
            refused = _refusal(cloud, spec)
        assert "3 machine slots" in refused
        assert len(made) <= 3
        if not made:
            pytest.skip("other machines of this host hold all three places")
        cloud.machines.terminate([made[0]])
        eventually(lambda: not _refusal(cloud, spec))
        eventually(lambda: cloud.boot_count() == len(made) + 1)


def _refusal(cloud: Cloud, spec: MachineSpec) -> str:
    try:
        cloud.machines.launch(spec)
    except NoCapacity as e:
        return str(e)
    return ""


def test_a_disk_that_takes_nothing_is_an_error_of_the_cloud(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "machines").write_text("in the way")
    with pytest.raises(CloudError, match="could not start a machine for node nod_1"):
        LocalMachines(tmp_path / "home", "process", sys.executable).launch(Cloud(None, tmp_path / "b").spec())  # type: ignore[arg-type]


def test_isolation_is_checked_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadConfig, match="'vm' does not exist"):
        LocalMachines(tmp_path, "vm", sys.executable)
    with pytest.raises(BadConfig, match="no-such-python"):
        LocalMachines(tmp_path, "process", "/no-such-python")
    monkeypatch.setattr(supervisor, "NAMESPACE", ["false"])
    assert not host.namespaces_work()
    assert LocalMachines(tmp_path, "auto", sys.executable).isolation == "process"
    with pytest.raises(BadConfig, match="PID namespace"):
        LocalMachines(tmp_path, "namespace", sys.executable)
