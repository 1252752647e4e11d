"""Real Ray under real agents: one head and its workers for all tests here, in the order in which they stand."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import processes
from tests.agent.conftest import AgentNode, Nodes, namespaces_work, until
from tests.agent.control_plane import ControlPlane

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

SECRET = "s3cr3t-value-of-the-user"
GROUPS = [{"name": "w", "resources": {"CPU": 1, "gold": 1}, "labels": {"tier": "gold"}, "min_nodes": 1, "max_nodes": 3}]


class Cluster:
    """A head and a control plane that launches and ends workers as the head's DESIRED facts say."""

    def __init__(self, plane: ControlPlane, nodes: Nodes) -> None:
        self.plane, self.nodes = plane, nodes
        self.isolate = namespaces_work()
        self.workers: dict[str, AgentNode] = {}
        self.count = 0
        plane.desired = {"w": 1}
        plane.on_fact = self._fact
        self.began = time.monotonic()
        self.head = nodes.start(
            "nd_head", isolate=self.isolate, groups=GROUPS, desired={"w": 1}, constants={"idle_timeout_minutes": 0.15}
        )
        self.launch()

    def launch(self) -> str:
        self.count += 1
        node_id = f"nd_w{self.count}"
        node = self.nodes.start(
            node_id, "worker", "w", isolate=self.isolate, resources={"CPU": 1, "gold": 1}, labels={"tier": "gold"}
        )
        self.workers[node_id] = node
        return node_id

    def _fact(self, fact: dict[str, Any]) -> None:
        if fact["kind"] == "desired":
            for node_id in fact["data"]["remove"]:
                self.plane.listed.pop(node_id, None)
                self.plane.nodes[node_id]["gone"] = True
            self.plane.desired = fact["data"]["desired"]
            while len(self.plane.listed) < self.plane.desired["w"]:
                self.launch()

    def run(self, run_id: str, entrypoint: str, timeout_s: float = 120, **args: Any) -> dict[str, Any]:
        answer = self.plane.do("submit_run", run_id=run_id, entrypoint=entrypoint, **args)
        assert answer["ok"], answer
        return dict(self.plane.fact("run_ended", timeout_s, run_id=run_id)["data"])

    def marked(self, *entries: str) -> list[int]:
        """Living processes of all nodes that carry ``entries`` in their environment."""
        return [p for node in (self.head, *self.workers.values()) for p in node.marked(*entries)]

    def log(self, run_id: str) -> str:
        return self.plane.log("nd_head", f"runs/{run_id}.log").decode()

    def package(self, files: dict[str, str]) -> dict[str, str]:
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as z:
            for name, text in files.items():
                z.writestr(f"pkg/{name}", text)
        sha256 = hashlib.sha256(data.getvalue()).hexdigest()
        self.plane.bucket[f"uploads/{sha256}"] = data.getvalue()
        return {"url": f"{self.plane.url}/bucket/uploads/{sha256}?signature=x", "sha256": sha256}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    plane = ControlPlane()
    with tempfile.TemporaryDirectory(prefix="agent-ray-", ignore_cleanup_errors=True) as folder:
        nodes = Nodes(plane, Path(folder))
        try:
            yield Cluster(plane, nodes)
        finally:
            plane.on_fact = lambda fact: None
            nodes.close()
            plane.close()


def test_head_and_worker_come_up(cluster: Cluster) -> None:
    head = cluster.plane.fact("ray_ready", 120)
    worker = cluster.plane.fact("ray_ready", 120, node_id="nd_w1")
    print(f"head {head['seen'] - cluster.began:.2f} s, worker {worker['seen'] - cluster.began:.2f} s")
    assert cluster.plane.fact("activity", 30)["data"]["activity"] == "idle"
    report = cluster.plane.wait(
        lambda: next((r for r in cluster.plane.nodes["nd_head"]["reports"] if r["workers_alive"] == ["nd_w1"]), None)
    )
    assert report["resources"]["total"]["gold"] == 1


PROGRAM = """
import os, ray, greeting
ray.init()
@ray.remote(num_cpus=1, label_selector={"tier": "gold"})
def where():
    import greeting, helper
    return greeting.text, helper.VALUE, os.environ["A"], os.environ["HELIOSTAT_RUN_ID"]
print("RESULT", ray.get(where.remote()), open("data.txt").read())
"""


def test_code_modules_and_environment_reach_driver_and_workers(cluster: Cluster) -> None:
    code = cluster.package({"main.py": PROGRAM, "helper.py": "VALUE = 7", "data.txt": "the data", "empty/x": ""})
    module = cluster.package({"greeting/__init__.py": "text = 'hello'"})
    ended = cluster.run("j-1", "python main.py", working_dir=code, py_modules=[module], env_vars={"A": SECRET})
    assert ended["status"] == "SUCCEEDED", (ended, cluster.log("j-1"))
    line = next(x for x in cluster.log("j-1").splitlines() if x.startswith("RESULT"))
    assert f"('hello', 7, '{SECRET}'" in line
    assert "'j-1') the data" in line
    assert cluster.plane.gets.count(f"uploads/{code['sha256']}") == 1


HOLD = """
import ray, time
ray.init()
@ray.remote(num_cpus=1)
def f():
    time.sleep(4321)
ray.get(f.remote())
"""


def test_exit_code_and_stop_and_timeout(cluster: Cluster) -> None:
    ended = cluster.run("j-2", "echo about to fail; exit 3", env_vars={"A": SECRET})
    assert (ended["status"], ended["exit_code"], ended["error"]) == ("FAILED", 3, "entrypoint")
    lines = [
        "import ray, time",
        "ray.init()",
        "@ray.remote(num_cpus=1)",
        "def f(): time.sleep(4321)",
        "ray.get(f.remote())",
    ]
    code = cluster.package({"hold.py": "\n".join(lines)})
    program = "python hold.py"
    cluster.plane.do("submit_run", run_id="j-3", entrypoint=f"setsid sleep 4321 & {program}", working_dir=code)
    needle = "HELIOSTAT_RUN_ID=j-3"
    until(lambda: [p for p in cluster.marked(needle) if processes.command(p).startswith("ray::f")], 30)
    cluster.plane.fact("run_running", run_id="j-3")
    fenced = cluster.plane.do("fence")["result"]
    assert fenced["activity"] == "busy"
    assert cluster.plane.do("submit_run", run_id="j-4", entrypoint="true")["error"] == "fenced"
    cluster.plane.do("unfence")
    assert cluster.plane.do("stop_run", run_id="j-3")["result"] == {"status": "STOPPED", "exit_code": None}
    left = [processes.command(p) for p in cluster.marked("HELIOSTAT_RUN_ID=j-3")]
    assert not [c for c in left if not c.startswith("ray::")], left
    # Ray's own workers of the job, on whatever node, are Ray's to end
    until(lambda: not [p for p in cluster.marked("HELIOSTAT_RUN_ID=j-3") if processes.alive(p)], 20)
    command = cluster.plane.command("submit_run", run_id="j-5", entrypoint="sleep 4321", timeout_s=1)
    assert cluster.plane.result(command)["ok"]
    ended = cluster.plane.fact("run_ended", 60, run_id="j-5")["data"]
    assert (ended["status"], ended["timed_out"]) == ("FAILED", True)


@pytest.mark.long
def test_a_requirement_that_does_not_resolve(cluster: Cluster) -> None:
    began = time.monotonic()
    ended = cluster.run("j-6", "true", 200, requirements=["no-such-distribution-anywhere==99"], env_vars={"A": SECRET})
    print(f"{time.monotonic() - began:.1f} s", ended["message"])
    assert (ended["status"], ended["error"]) == ("FAILED", "runtime_env")
    assert "no-such-distribution" in ended["message"]


def test_a_driver_whose_supervisor_dies_is_over(cluster: Cluster) -> None:
    cluster.plane.do("submit_run", run_id="j-7", entrypoint="sleep 4321")
    cluster.plane.fact("run_running", run_id="j-7")
    needle = "HELIOSTAT_RUN_ID=j-7"
    supervisor = until(
        lambda: next((p for p in cluster.marked(needle) if "JobSupervisor" in processes.command(p)), None)
    )
    os.kill(supervisor, signal.SIGKILL)
    ended = cluster.plane.fact("run_ended", 60, run_id="j-7")["data"]
    assert (ended["status"], ended["error"]) == ("FAILED", "supervisor")
    assert not [p for p in cluster.marked(needle) if processes.alive(p)]


SCALE = """
import ray, time
ray.init()
@ray.remote(num_cpus=1)
def work():
    time.sleep(3)
    return ray.get_runtime_context().get_node_id()
print("NODES", len(set(ray.get([work.remote() for _ in range(3)]))))
"""


@pytest.mark.long
def test_the_cluster_grows_by_demand_and_shrinks_when_idle(cluster: Cluster) -> None:
    mark = len(cluster.plane.facts)
    began = time.monotonic()
    program = cluster.package({"scale.py": SCALE})
    ended = cluster.run("j-8", "python scale.py", 150, working_dir=program)
    assert ended["status"] == "SUCCEEDED", (ended, cluster.log("j-8"))
    asked = [f for f in cluster.plane.facts[mark:] if f["kind"] == "desired"]
    print("asked", [(round(f["seen"] - began, 1), f["data"]) for f in asked])
    assert asked[-1]["data"]["desired"] == {"w": 3}
    cluster.plane.wait(lambda: cluster.plane.desired == {"w": 1} and len(cluster.plane.listed) == 1, 90, "idle end")
    removed = [i for f in cluster.plane.facts[mark:] if f["kind"] == "desired" for i in f["data"]["remove"]]
    assert len(removed) == 2
    for node_id in removed:
        assert cluster.workers[node_id].process.wait(30) == 0
    kinds = [f["kind"] for f in cluster.plane.facts[mark:]]
    assert "node_lost" not in kinds  # what was let go is not lost
    assert "node_failed" not in kinds


def test_new_bounds_reach_the_running_autoscaler(cluster: Cluster) -> None:
    mark, count = len(cluster.plane.facts), cluster.count
    cluster.plane.groups = [{**GROUPS[0], "min_nodes": "many"}]
    cluster.plane.wait(lambda: "the old ones stay" in cluster.head.log(), 30, "the refusal in the agent's log")
    cluster.plane.groups = [{**GROUPS[0], "min_nodes": 2}]
    cluster.plane.fact("desired", 60, after=mark, desired={"w": 2}, remove=[])
    cluster.plane.wait(lambda: cluster.count > count, why="the launch, which follows the fact")
    new = f"nd_w{cluster.count}"
    cluster.plane.fact("ray_ready", 120, after=mark, node_id=new)


@pytest.mark.long
def test_a_replacement_beside_one_that_its_cloud_takes_back_is_kept(cluster: Cluster) -> None:
    """Ray's autoscaler ends what is more than its maximum, the newest first."""

    def most() -> int:
        config = json.loads((cluster.head.folder / "autoscaling.yaml").read_text())
        return int(config["available_node_types"]["w"]["max_workers"])

    mark, listed = len(cluster.plane.facts), cluster.plane.listed
    cluster.plane.groups = [{**GROUPS[0], "min_nodes": 2, "max_nodes": 2}]
    until(lambda: most() == 2)
    assert len(listed) == 2
    leaving = next(iter(listed.values()))
    leaving["leaving"] = True
    listed["nd_new"] = {"id": "nd_new", "group": "w", "state": "REQUESTED", "ip": ""}
    until(lambda: most() == 3)
    time.sleep(5)  # some rounds of the autoscaler
    told = [f["data"] for f in cluster.plane.facts[mark:] if f["kind"] == "desired"]
    assert [t for t in told if "nd_new" in t["remove"]] == []
    del listed["nd_new"], leaving["leaving"]
    cluster.plane.groups = [{**GROUPS[0], "min_nodes": 2}]


def test_a_worker_without_power_is_lost_within_seconds(cluster: Cluster) -> None:
    victim = f"nd_w{cluster.count}"
    mark, began = len(cluster.plane.facts), time.monotonic()
    cluster.workers[victim].kill()
    lost = cluster.plane.fact("node_lost", 30, after=mark, node_id=victim)
    print(f"seen after {lost['seen'] - began:.1f} s: {lost['data']['reason']}")
    assert lost["seen"] - began < 15


def test_no_secret_is_in_any_shipped_log_but_the_programs_own(cluster: Cluster) -> None:
    cluster.head.process.send_signal(0)
    secrets = {SECRET, "0" * 64, cluster.plane.nodes["nd_head"]["token"], cluster.plane.nodes["nd_head"]["bootstrap"]}
    objects = cluster.plane.objects()
    streams = {"/".join(k.split("/")[3:-1]) for k in objects if k.startswith("logs/cl_1/nd_head/")}
    assert {"node/agent.log", "ray/raylet.out", "ray/monitor.log", "ray/dashboard.log"} <= streams
    for key, data in objects.items():
        if key.startswith("logs/") and "/runs/" not in key:
            for secret in secrets:
                assert secret.encode() not in data, key
    assert SECRET not in json.dumps(cluster.plane.facts)


def test_kill_9_of_the_heads_agent_leaves_nothing(cluster: Cluster) -> None:
    cluster.plane.do("submit_run", run_id="j-9", entrypoint="setsid sleep 4321 & sleep 4321")
    cluster.plane.fact("run_running", run_id="j-9")
    pids = cluster.head.pids()
    assert len(pids) > 20
    os.kill(cluster.head.agent_pid(), signal.SIGKILL)
    cluster.head.process.wait(30)
    until(lambda: not [p for p in pids if processes.alive(p)], why="everything is dead")
    assert not cluster.head.marked()


@pytest.mark.long
def test_without_namespaces_kill_9_leaves_nothing_either(nodes: Nodes, plane: ControlPlane) -> None:
    head = nodes.start("nd_plain")
    plane.fact("ray_ready", 120)
    plane.do("submit_run", run_id="p-1", entrypoint="setsid sleep 4321 & sleep 4321")
    plane.fact("run_running", 60, run_id="p-1")
    pids = head.pids()
    assert len(pids) > 20
    os.kill(head.agent_pid(), signal.SIGKILL)
    head.process.wait(15)
    until(lambda: not [p for p in pids if processes.alive(p)], why="everything is dead")
    assert not head.marked()
