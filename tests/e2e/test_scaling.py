"""Clusters that grow and shrink by demand, and end by themselves."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.e2e.support import Stack, seconds_between, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

DEMAND = """
import pathlib, sys, time, ray
ray.init()

@ray.remote(num_cpus=1)
def hold(flag, number):
    pathlib.Path(f"{flag}-{number}").touch()
    while not pathlib.Path(flag).exists():
        time.sleep(0.2)
    return ray.get_runtime_context().get_node_id()

nodes = set(ray.get([hold.remote(sys.argv[1], number) for number in range(2)]))
print("nodes", len(nodes), flush=True)
while not pathlib.Path(sys.argv[2]).exists():
    time.sleep(0.2)
"""


def workers(stack: Stack, cluster: str) -> list[str]:
    return [n["id"] for n in stack.nodes(cluster) if n["role"] == "worker" and n["state"] == "RUNNING"]


@pytest.mark.long
def test_workers_come_by_demand_and_go_without_it(stack: Stack, tmp_path: Path) -> None:
    config = {
        "head_node": {"resources": {"CPU": 0}},
        "worker_nodes": [{"name": "w", "resources": {"CPU": 1}, "min_nodes": 0, "max_nodes": 3}],
    }
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "main.py").write_text(DEMAND)
    free, end = tmp_path / "free", tmp_path / "end"
    job = stack.submit(
        *("python", "main.py", str(free), str(end)),
        options=("--working-dir", str(tmp_path / "code")),
        config=config,
    )
    stack.await_job(job, "RUNNING")
    cluster = stack.job(job)["cluster_id"]
    until("two workers, no more than are needed", lambda: len(workers(stack, cluster)) == 2, 180)
    # Else the first worker, freed, could take the second task too before the second one does.
    until("both tasks to run", lambda: all((tmp_path / f"free-{n}").exists() for n in range(2)), 60)
    free.touch()
    until("the workers to go, idle for a minute", lambda: not workers(stack, cluster), 180)
    assert stack.cluster(cluster)["state"] == "RUNNING"
    end.touch()
    stack.await_job(job, "SUCCEEDED")
    assert "nodes 2" in stack.log(job)
    assert len([n for n in stack.nodes(cluster) if n["role"] == "worker"]) == 2, "never more than were needed"
    stack.await_cluster(cluster, "TERMINATED")


@pytest.mark.long
def test_an_idle_cluster_ends_by_itself_and_a_busy_one_does_not(stack: Stack) -> None:
    config = {"head_node": {"resources": {"CPU": 1}}, "worker_nodes": [], "idle_termination_minutes": 0.1}
    made = stack.ask("cluster", "create", "-n", "lazy", "-f", stack.config_file(config))
    stack.await_cluster(made["id"], "RUNNING")
    job = stack.submit("sleep 12", options=("--cluster", "lazy"))
    done = stack.await_job(job, "SUCCEEDED")
    assert [run["state"] for run in done["runs"]] == ["SUCCEEDED"], "12 s of work outlive 6 s of idleness"
    ended = stack.await_cluster(made["id"], "TERMINATED", timeout=60)
    assert "idle" in ended["reason"]
    assert seconds_between(done["ended_at"], ended["ended_at"]) >= 6
    assert not [p for n in stack.nodes(made["id"]) for p in stack.node_processes(n["machine_id"])]


@pytest.mark.long
def test_maximum_uptime_ends_it_whatever_it_does(stack: Stack) -> None:
    config = {"head_node": {"resources": {"CPU": 1}}, "worker_nodes": [], "maximum_uptime_minutes": 1.5}
    made = stack.ask("cluster", "create", "-n", "short-lived", "-f", stack.config_file(config))
    began = time.monotonic()
    stack.await_cluster(made["id"], "RUNNING")
    job = stack.submit("sleep 600", options=("--cluster", "short-lived"))
    ended = stack.await_cluster(made["id"], "TERMINATED", timeout=120)
    assert "maximum uptime" in ended["reason"].lower().replace("_", " "), ended["reason"]
    assert time.monotonic() - began >= 85
    done = stack.await_job(job, "FAILED", timeout=60)
    assert "maximum" in done["reason"], done["reason"]
