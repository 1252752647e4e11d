"""What stays right when whole parts of the world are gone, or are two."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from runtime.home import PARTS
from tests.e2e.conftest import NewStack
from tests.e2e.support import ONE_NODE, Stack, is_alive, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

NODE_PORTS = range(20_000, 32_768)
"""Where nodes of the local cloud listen (clouds.local.machines.slots)."""

DENY = f"""
import os, sys
def hook(event, args):
    port = args[1][1] if event == "socket.connect" and isinstance(args[1], tuple) else 0
    if {NODE_PORTS.start} <= port < {NODE_PORTS.stop}:
        with open(os.path.join(os.environ["HELIOSTAT_HOME"], "dialled"), "a") as file:
            print(sys.argv, args[1], file=file)
        raise OSError(101, "Network is unreachable")
sys.addaudithook(hook)
"""


@pytest.mark.long
def test_the_control_plane_never_dials_a_node(own_stack: NewStack, tmp_path: Path) -> None:
    """Its Python has no route to a node, and no socket of any of its processes is ever connected to one."""
    (tmp_path / "sitecustomize.py").write_text(DENY)
    stack = own_stack({"PYTHONPATH": str(tmp_path)})
    with Connections(stack) as seen:
        done = stack.cli("job", "submit", "--compute-config", stack.config_file(ONE_NODE), "--wait", "--", "echo hello")
    assert done.returncode == 0, done.stderr
    assert "hello" in done.stdout.splitlines()
    assert seen.looks > 30
    assert seen.owned > 0, "the look saw the control plane's own connections"
    assert seen.to_nodes == set()
    assert not (stack.home.path / "dialled").exists(), (stack.home.path / "dialled").read_text()


class Connections:
    """Samples the sockets of the control plane's processes; ``to_nodes``: those whose other end is a node's port."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.looks = self.owned = 0
        self.to_nodes: set[str] = set()

    def __enter__(self) -> Connections:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            inodes = self._inodes([self._stack.pid(part) for part in PARTS])
            lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            theirs = {fields[2] for fields in lines if fields[9] in inodes}  # "<address>:<port>" in hex
            self.looks += 1
            self.owned += len(theirs)
            self.to_nodes |= {address for address in theirs if int(address.partition(":")[2], 16) in NODE_PORTS}

    @staticmethod
    def _inodes(pids: list[int]) -> set[str]:
        found = set()
        for pid in pids:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                try:
                    target = os.readlink(f"/proc/{pid}/fd/{fd}")
                except FileNotFoundError:
                    continue
                if target.startswith("socket:["):
                    found.add(target[8:-1])
        return found


@pytest.mark.long
def test_nodes_end_themselves_when_the_control_plane_is_dead_for_good(own_stack: NewStack) -> None:
    stack = own_stack({"HELIOSTAT_DEADMAN_S": "8"})
    made = stack.ask("cluster", "create", "-n", "orphan", "-f", stack.config_file(ONE_NODE))
    stack.await_cluster(made["id"], "RUNNING")
    pids = [stack.home.stack_pid(), *(stack.pid(part) for part in PARTS)]
    for pid in filter(None, pids):
        os.kill(pid, signal.SIGKILL)  # the supervisor first: it would start the others again
    began = time.monotonic()
    until("the control plane to be dead", lambda: not any(is_alive(p) for p in pids if p), 10)
    assert stack.node_processes()
    until("the nodes to end themselves", lambda: not stack.node_processes(), 60)
    assert time.monotonic() - began >= 7
    assert stack.processes() == {}


@pytest.mark.long
def test_two_stacks_and_several_clusters_side_by_side(own_stack: NewStack) -> None:
    """Each knows its own only; the end of one leaves the other's alone."""
    one, two = own_stack(), own_stack()
    clusters = [
        (stack, stack.ask("cluster", "create", "-n", name, "-f", stack.config_file(ONE_NODE))["id"])
        for stack, name in ((one, "a"), (one, "b"), (two, "a"))
    ]
    for stack, cluster in clusters:
        stack.await_cluster(cluster, "RUNNING", timeout=180)
    jobs = [(stack, stack.submit(f"echo on {cluster}", options=("--cluster", cluster))) for stack, cluster in clusters]
    for (stack, job), (_, cluster) in zip(jobs, clusters, strict=True):
        stack.await_job(job, "SUCCEEDED")
        assert f"on {cluster}" in stack.log(job).splitlines()
    assert len(one.ask("cluster", "list")) == 2
    assert len(two.ask("cluster", "list")) == 1
    kept = two.node_processes()
    assert one.down().returncode == 0
    assert not one.processes()
    assert set(kept) <= set(two.node_processes()), "nothing of the other stack was ended"
    job = two.submit("echo still here", options=("--cluster", "a"))
    two.await_job(job, "SUCCEEDED")


@pytest.mark.long
def test_a_cluster_workflow_terminated_by_hand_leaves_no_machine(own_stack: NewStack) -> None:
    """The sweep ends what no workflow owns, the records say so, and the job goes on with another cluster."""
    stack = own_stack()
    made = stack.ask("cluster", "create", "-n", "victim", "-f", stack.config_file(ONE_NODE))
    job = stack.submit("sleep 5; echo done")
    stack.await_cluster(made["id"], "RUNNING")
    stack.temporal("workflow", "terminate", "-w", made["id"], "--reason", "by hand")
    machines = [n["machine_id"] for n in stack.nodes(made["id"])]
    until("the sweep to end its machine", lambda: not any(map(stack.node_processes, machines)), 120)
    ended = stack.await_cluster(made["id"], "TERMINATED", "FAILED", timeout=60)
    assert ended["reason"], ended
    assert stack.await_job(job, "SUCCEEDED")


@pytest.mark.long
def test_a_jobs_workflows_terminated_by_hand_leave_nothing(own_stack: NewStack) -> None:
    stack = own_stack()
    config = {**ONE_NODE, "idle_termination_minutes": 0.2}
    job = stack.submit("sleep 600", config=config)
    stack.await_job(job, "RUNNING")
    cluster = stack.job(job)["cluster_id"]
    stack.temporal("workflow", "terminate", "-w", job, "--reason", "by hand")
    until("the record to say so", lambda: stack.job(job)["state"] in ("TERMINATED", "FAILED"), 120)
    stack.await_cluster(cluster, "TERMINATED", "FAILED", timeout=180)
    stack.await_no_nodes()
