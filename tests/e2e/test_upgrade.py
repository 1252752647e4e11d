"""An upgrade under load, from the commit before the modules moved to their present folders.

Machines and load balancers outlive the control plane, and were started by the old code under module names that do not
exist any more. The new code must recognise, use and end them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.services import Served, Traffic, nothing_lost
from tests.e2e.support import ROOT, Stack, clean_environment, until

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(1200)]

OLD = "60510e972009a276ce06ab50fc9b43d428c16544"
"""The last commit with the old module names: ``runtime.stack``, ``serve.py``, ``clouds.local.balancer_supervisor``."""
SMALL = {"head_node": {"resources": {"CPU": 1}}, "worker_nodes": [], "idle_termination_minutes": 0}
IDLE_MINUTES = 1


def git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def old_code() -> Iterator[Path]:
    """A checkout of the old commit with an environment of its own, made from its own lock."""
    if git("cat-file", "-e", f"{OLD}^{{commit}}").returncode:
        pytest.skip(
            f"THE UPGRADE IS NOT TESTED: COMMIT {OLD[:7]} IS NOT IN THIS REPOSITORY (A SHALLOW CLONE?). "
            "RUN `git fetch --unshallow` AND TRY AGAIN."
        )
    with tempfile.TemporaryDirectory(prefix="e2e-old-") as folder:
        code = Path(folder) / "code"
        made = git("worktree", "add", "--detach", str(code), OLD)
        assert made.returncode == 0, made.stderr
        try:
            if (ROOT / ".uv").exists():  # the same version; spares a download
                (code / ".uv").symlink_to(ROOT / ".uv")
            setup = subprocess.run(
                ["make", "setup"],
                cwd=code, env=clean_environment(), capture_output=True, text=True, timeout=900, check=False,
            )  # fmt: skip
            assert setup.returncode == 0, f"{setup.stdout}\n{setup.stderr}"
            yield code
        finally:
            git("worktree", "remove", "--force", str(code))


Both = tuple[Stack, Stack]


@pytest.fixture
def stacks(old_code: Path) -> Iterator[Both]:
    """The old code's stack, which runs, and the new code's of the same home. ``down`` of the new code ends it all."""
    with tempfile.TemporaryDirectory(prefix="e2e-up-", ignore_cleanup_errors=True) as folder:
        home = Path(folder) / "home"
        old = Stack(home, code=old_code, commands=old_code / ".venv" / "bin", module="runtime.stack")
        new = Stack(home)
        try:
            old.up()
            yield old, new
        finally:
            left = new.dispose()
        assert not left, left


def interrupt(old: Stack) -> None:
    old.interrupt()


def kill(old: Stack) -> None:
    """The supervisor alone: the parts that it started stay behind and run."""
    stack = old.pid("stack")
    os.kill(stack, signal.SIGKILL)
    until("the old supervisor to end", lambda: old.home.stack_pid() is None)
    assert set(old.home.processes().values()) == {"temporal", "bucket", "api", "worker"}


def living(stack: Stack, *clusters: str) -> dict[str, list[tuple[str, str, str]]]:
    """The nodes of clusters: node, machine, state."""
    return {c: sorted((n["id"], n["machine_id"], n["state"]) for n in stack.nodes(c)) for c in clusters}


@pytest.mark.parametrize("stop", [interrupt, kill])
def test_what_the_old_code_runs_goes_on_under_the_new_code(
    stacks: Both, tmp_path: Path, stop: Callable[[Stack], None]
) -> None:
    old, new = stacks
    idle = old.config_file(SMALL | {"idle_termination_minutes": IDLE_MINUTES})
    clusters = [
        str(old.ask("cluster", "create", "-n", name, "-f", file)["id"])
        for name, file in (("steady", old.config_file(SMALL)), ("idle", idle))
    ]
    steady, idle_id = clusters
    for cluster in clusters:
        old.await_cluster(cluster, "RUNNING")
    go = tmp_path / "go"
    job = old.submit(f"echo began; while ! test -e {go}; do sleep 0.5; done; echo ended", options=("--cluster", "idle"))
    old.await_job(job, "RUNNING")
    Served(old, "echo").deploy("v1")
    served = Served(new, "echo")
    nodes = living(old, *clusters)
    assert {state for found in nodes.values() for *_, state in found} == {"RUNNING"}
    first_cluster = served.version("v1")["clusters"][0]["cluster_id"]
    balancer = served.balancer()
    processes = {role: served.balancer_pids(role, balancer) for role in ("supervisor", "traefik")}
    assert all(len(pids) == 1 for pids in processes.values()), processes

    with Traffic(served, "--rate", "0.3") as traffic:
        stop(old)
        traffic.await_seconds(3)
        new.up()
        assert living(new, *clusters) == nodes
        assert new.cluster(steady)["state"] == "RUNNING"
        # The agents of the old bundle take commands of the new code.
        new.await_job(new.submit("echo hello", options=("--cluster", "steady")), "SUCCEEDED")
        assert new.job(job)["state"] == "RUNNING", new.story(job)
        go.touch()
        done = new.await_job(job, "SUCCEEDED")
        assert [run["state"] for run in done["runs"]] == ["SUCCEEDED"], new.story(job)
        assert new.log(job).split()[-1] == "ended"
        served.deploy("v2")
        served.until_rests("v2")
    nothing_lost(traffic, "v1", "v2")
    assert {role: served.balancer_pids(role, balancer) for role in processes} == processes
    new.await_cluster(first_cluster, "TERMINATED")
    assert living(new, steady)[steady] == nodes[steady]

    new.await_cluster(idle_id, "TERMINATED", timeout=IDLE_MINUTES * 60 + 60)
    assert "idle" in new.cluster(idle_id)["reason"]
    new.ask("cluster", "terminate", "steady")
    new.await_cluster(steady, "TERMINATED")
    for _, machine, _ in nodes[steady] + nodes[idle_id]:
        until(f"no process of {machine}", lambda machine=machine: not new.node_processes(machine))  # type: ignore[misc]
    assert served.now["state"] == "RUNNING"
    down = new.down()
    assert down.returncode == 0, f"{down.stdout}\n{down.stderr}"
    assert not any(served.balancer_pids(role, balancer) for role in processes)
    assert not new.processes()


def test_the_new_code_recognises_and_ends_an_old_stack_that_runs(stacks: Both) -> None:
    old, new = stacks
    cluster = str(old.ask("cluster", "create", "-n", "c", "-f", old.config_file(SMALL))["id"])
    old.await_cluster(cluster, "RUNNING")
    status = new.command("status")
    assert status.returncode == 0, status.stderr
    pids = dict(old.state["pids"])
    assert all(f'"{part}": {pid}' in status.stdout for part, pid in pids.items()), (pids, status.stdout)
    again = new.command("up", "--detach")
    assert again.returncode == 0, again.stderr
    assert f"running already (pid {pids['stack']})" in again.stderr + again.stdout
    down = new.down()
    assert down.returncode == 0, f"{down.stdout}\n{down.stderr}"
    assert not new.processes()
    assert new.home.stack_pid() is None
