"""kill -9 of everything that takes part in a job, in each of its phases: the job ends as it should, its entry point
is executed as often as it should, and no process is left."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import NewStack, new_home
from tests.e2e.support import ROOT, Stack, is_alive, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

CONTROL_PLANE = ("worker", "api", "temporal")
WITH_WORKER = {
    "head_node": {"resources": {"CPU": 0}},
    "worker_nodes": [{"name": "w", "resources": {"CPU": 1}, "min_nodes": 1, "max_nodes": 1}],
}


@pytest.fixture(scope="module")
def fragile() -> Iterator[Stack]:
    """One stack for all tests here: what is killed must heal, so that the next test can use it."""
    with new_home("kills") as home:
        stack = Stack(home)
        try:
            stack.up()
            yield stack
        finally:
            left = stack.dispose()
        assert not left, left


class Script:
    """An entry point that marks each execution and goes on when it is told to."""

    def __init__(self, folder: Path) -> None:
        self.marks, self.go = folder / "marks", folder / "go"
        self.line = (
            f"echo began; echo $HELIOSTAT_RUN_ID >> {self.marks}; "
            f"while ! test -e {self.go}; do echo tick; sleep 0.5; done; echo ended well"
        )

    @property
    def executed(self) -> list[str]:
        return self.marks.read_text().split() if self.marks.exists() else []


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def settle(stack: Stack, job_id: str, script: Script, executed: int = 1) -> dict[str, object]:
    """Lets the entry point end; the job is good, executed so often, its log is whole, its nodes are gone."""
    script.go.touch()
    job = stack.await_job(job_id, "SUCCEEDED", timeout=180)
    assert len(script.executed) == executed, (script.executed, stack.story(job_id))
    log = stack.log(job_id, "--run", str(len(job["runs"]))).splitlines()
    assert log.count("began") == 1, log
    assert log.count("ended well") == 1, log
    assert "tick" in log[log.index("began") : log.index("ended well")], log
    stack.await_cluster(job["cluster_id"], "TERMINATED", timeout=60)
    machines = [n["machine_id"] for n in stack.nodes(job["cluster_id"]) if n["machine_id"]]
    until("the cluster's processes to be gone", lambda: not any(map(stack.node_processes, machines)), 40)
    return job


@pytest.mark.long
@pytest.mark.parametrize("phase", ["RUNNING", "STARTING"])
def test_the_whole_control_plane_is_killed_part_by_part(fragile: Stack, script: Script, phase: str) -> None:
    job = fragile.submit(script.line)
    fragile.await_job(job, phase, "RUNNING")
    for part in CONTROL_PLANE:
        fragile.kill(part)
    until("the API to be ready", fragile.ready, 60)
    fragile.await_job(job, "RUNNING", timeout=120)
    until("the entry point to be executed", lambda: script.executed, 60)
    done = settle(fragile, job, script)
    assert [run["state"] for run in done["runs"]] == ["SUCCEEDED"], fragile.story(job)  # type: ignore[attr-defined]


@pytest.mark.long
@pytest.mark.parametrize("part", CONTROL_PLANE)
@pytest.mark.parametrize("after_s", [0.0, 0.5, 1.5, 4.0])
def test_one_part_is_killed_soon_after_the_job_is_accepted(
    fragile: Stack, script: Script, part: str, after_s: float
) -> None:
    """Accepted means durable, also when the part dies in the middle of making machines."""
    job = fragile.submit(script.line)
    time.sleep(after_s)  # the phases of a start are shorter than a look at them would be exact
    fragile.kill(part)
    until("the entry point to be executed", lambda: script.executed, 180)
    settle(fragile, job, script)


@pytest.mark.long
@pytest.mark.parametrize("part", CONTROL_PLANE)
def test_one_part_is_killed_while_the_run_ends(fragile: Stack, script: Script, part: str) -> None:
    job = fragile.submit(script.line)
    fragile.await_job(job, "RUNNING")
    script.go.touch()
    fragile.kill(part)
    settle(fragile, job, script)


def machine_of(stack: Stack, job_id: str, role: str) -> str:
    """The machine of the newest node of that role of the job's cluster, once it runs."""

    def find() -> str | None:
        cluster = stack.job(job_id)["cluster_id"]
        nodes = [n for n in stack.nodes(cluster) if n["role"] == role and n["state"] == "RUNNING"] if cluster else []
        return str(nodes[-1]["machine_id"]) if nodes else None

    found = until(f"a running {role}", find, 60)
    assert found is not None
    return found


@pytest.mark.long
@pytest.mark.parametrize("what", ["machine", "agent"])
def test_the_head_is_killed_while_the_run_is_under_way(stack: Stack, script: Script, what: str) -> None:
    """All that ran there is gone: a new run on a healthy head, none of the user's retries used up. On the stack that
    all tests share, as a cluster's loss is nobody else's."""
    job = stack.submit(script.line, options=("--max-retries", "0"))
    until("the entry point to be executed", lambda: script.executed, 120)
    kill_node(stack, machine_of(stack, job, "head"), what)
    until("the second run to be executed", lambda: len(script.executed) == 2, 180)
    done = settle(stack, job, script, executed=2)
    assert [(run["state"], run["cause"]) for run in done["runs"]] == [  # type: ignore[attr-defined]
        ("FAILED", "infrastructure"),
        ("SUCCEEDED", None),
    ]


@pytest.mark.long
@pytest.mark.parametrize("what", ["machine", "agent"])
def test_the_head_is_killed_while_the_cluster_starts(fragile: Stack, script: Script, what: str) -> None:
    job = fragile.submit(script.line)
    machines = until("the head's machine to run", lambda: fragile.node_processes(), 60)
    assert machines
    cluster = until("the job's cluster", lambda: fragile.job(job)["cluster_id"], 20)
    machine = until("the machine's id", lambda: next((n["machine_id"] for n in fragile.nodes(cluster)), None), 20)
    kill_node(fragile, machine, what)
    until("the entry point to be executed", lambda: script.executed, 180)
    settle(fragile, job, script)


@pytest.mark.long
@pytest.mark.parametrize("what", ["machine", "agent"])
def test_a_worker_node_is_killed_and_replaced(fragile: Stack, script: Script, what: str) -> None:
    """The driver is on the head: the run goes on, the worker comes again."""
    job = fragile.submit(script.line, config=WITH_WORKER)
    until("the entry point to be executed", lambda: script.executed, 180)
    cluster = fragile.job(job)["cluster_id"]
    first = machine_of(fragile, job, "worker")
    kill_node(fragile, first, what)

    def replaced() -> bool:
        nodes = [n for n in fragile.nodes(cluster) if n["role"] == "worker" and n["state"] == "RUNNING"]
        return len(nodes) == 1 and nodes[0]["machine_id"] != first

    until("the worker to be replaced", replaced, 120)
    assert not fragile.node_processes(first)
    settle(fragile, job, script)


def kill_node(stack: Stack, machine_id: str, what: str) -> None:
    """``machine``: a power cut, its first process; ``agent``: our program on it, whose Ray must die with it."""
    if what == "agent":
        pid = until("the agent to run", lambda: stack.agent_pid(machine_id), 30)
    else:
        pid = stack.first_process(machine_id)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until("the node's processes to be gone", lambda: not stack.node_processes(machine_id), 20)
    assert not is_alive(pid)


@pytest.mark.long
def test_ctrl_c_and_up_with_newer_code_under_a_running_job(own_stack: NewStack, script: Script, tmp_path: Path) -> None:
    """The cluster goes on without its control plane; newer code finds it, also with another agent, and its log is
    whole. What is made afterwards has the new agent."""
    stack = own_stack()
    job = stack.submit(script.line)
    until("the entry point to be executed", lambda: script.executed, 120)
    stack.interrupt()
    assert stack.node_processes(), "the cluster goes on"
    stack.code = newer_code(tmp_path / "newer")
    script.go.touch()
    stack.up()
    assert stack.state["version"] == "0.1.1"
    done = settle(stack, job, script)
    assert [run["state"] for run in done["runs"]] == ["SUCCEEDED"]  # type: ignore[attr-defined]
    assert len(list((stack.home.path / "bundles").glob("*.zip"))) == 2


def newer_code(folder: Path) -> Path:
    """This checkout as a next release: another version, another agent."""
    names = ("agent", "api", "activities", "clouds", "embedded", "heliostat", "runtime", "store", "workflows")
    for name in names:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md"):
        shutil.copy(path, folder)
    version = folder / "pyproject.toml"
    version.write_text(version.read_text().replace('version = "0.1.0"', 'version = "0.1.1"'))
    with (folder / "agent" / "__init__.py").open("a") as file:
        file.write("# newer\n")
    return folder
