"""What must work on each vendor's cloud, with real Ray on hosts that booted from user-data: a test class for each
vendor inherits it (``tests/e2e/test_lab_aws.py``, ``test_lab_gcp.py``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.e2e.services import Served, Traffic, nothing_lost
from tests.e2e.support import Stack, seconds_between, until
from tests.lab import network
from tests.lab.aws import Aws
from tests.lab.gcp import Gcp
from tests.lab.host import Host
from tests.lab.lab import Lab
from tests.lab.site import Site

DEMAND = """
import pathlib, time, ray
ray.init()

@ray.remote(num_cpus=1)
def hold():
    pathlib.Path("/tmp/holding").touch()
    while not pathlib.Path("/tmp/free").exists():
        time.sleep(0.2)
    return ray.get_runtime_context().get_node_id()

print("nodes", len(set(ray.get([hold.remote() for _ in range(2)]))), flush=True)
while not pathlib.Path("/tmp/end").exists():
    time.sleep(0.2)
"""

HOLD = """
import pathlib, socket, time, ray
ray.init()

@ray.remote(num_cpus=1)
def hold():
    pathlib.Path("/tmp/holding").touch()
    while not pathlib.Path("/tmp/free").exists():
        time.sleep(0.2)
    return socket.gethostname()

print("done on", ray.get(hold.remote()), flush=True)
"""

UNTIL_TOLD = "echo $HELIOSTAT_RUN_ID began; while ! test -e /tmp/go; do sleep 0.3; done; echo ended well"
"""An entry point that goes on when its host has the file."""


def one_node(**head: Any) -> dict[str, Any]:
    return {"head_node": {"resources": {"CPU": 1}, **head}, "worker_nodes": []}


class OnACloud:
    """``cloud``: the name it is registered by."""

    cloud: ClassVar[str]

    @pytest.fixture(autouse=True)
    def _set(self, site: Site, lab: Lab) -> Iterator[None]:
        self.site, self.lab, self.stack = site, lab, site.stack
        yield
        self.vendor.heal()
        self._end_all()
        assert not lab.fleet.problems, lab.fleet.problems

    def _end_all(self) -> None:
        """What a test that failed has left, so that the next one begins with nothing."""
        for job in self.stack.get("/v1/jobs", params={"limit": 100})["items"]:
            if job["state"] in ("STARTING", "RUNNING"):
                self.site.call("POST", f"/v1/jobs/{job['id']}/terminate", {})
        for cluster in self.stack.get("/v1/clusters", params={"limit": 100})["items"]:
            if cluster["state"] not in ("TERMINATED", "FAILED"):
                self.site.call("POST", f"/v1/clusters/{cluster['id']}/terminate", {})
        until("no host to be left", lambda: not self.lab.hosts(), 60)

    site: Site
    lab: Lab
    stack: Stack

    @property
    def vendor(self) -> Aws | Gcp:
        raise NotImplementedError

    # -- looks

    def submit(self, entrypoint: str, config: dict[str, Any] | None = None, options: tuple[str, ...] = ()) -> str:
        options = ("--cloud", self.cloud, *options)
        return self.stack.submit(entrypoint, options=options, config=config or one_node())

    def hosts_of(self, cluster_id: str, role: str = "head") -> list[Host]:
        """Of nodes that are up, newest last."""
        found = [n for n in self.stack.nodes(cluster_id) if n["role"] == role and n["state"] == "RUNNING"]
        hosts = [self.lab.fleet.get(n["machine_id"]) for n in sorted(found, key=lambda n: n["created_at"])]
        return [host for host in hosts if host is not None and host.alive]

    def began(self, job: str, run: int = 1) -> Host:
        """The head's host, once that run's entry point runs there."""

        def look() -> Host | None:
            found = self.stack.job(job)
            begun = next((r for r in found["runs"] if r["number"] == run and r["running_at"]), None)
            return None if begun is None else next(reversed(self.hosts_of(begun["cluster_id"])), None)

        return until(f"run {run} of {job} to have begun", look, 180, 0.5)

    def await_nothing(self, timeout: float = 60) -> None:
        """No machine at the vendor, no host, no cable."""
        until("no machine to be left", lambda: not self.vendor.living(), timeout)
        until("no host to be left", lambda: not self.lab.hosts() and not network.cables(), 10)

    def _task_on_a_worker(self, code: Path, **more: Any) -> tuple[str, Callable[..., Host | None]]:
        """A job with a task of ``HOLD`` on its only worker, and a look at who runs it (``but`` the one named)."""
        worker = {"name": "w", "resources": {"CPU": 1}, "min_nodes": 1, "max_nodes": 1, **more}
        (code / "main.py").write_text(HOLD)
        config = {"head_node": {"resources": {"CPU": 0}}, "worker_nodes": [worker]}
        job = self.submit("python main.py", config, ("--working-dir", str(code)))

        def holding(but: Host | None = None) -> Host | None:
            cluster = self.stack.job(job)["cluster_id"]
            hosts = self.hosts_of(cluster, "worker") if cluster else []
            return next((h for h in hosts if h is not but and "holding" in h.run("ls", "/tmp", check=False)), None)

        return job, holding

    # -- tests

    def test_verify_finds_nothing_wrong(self) -> None:
        found = self.site.verify(self.cloud)
        assert found["ok"], [c for c in found["checks"] if c["state"] == "failed"]

    def test_a_job_on_machines_that_booted_from_user_data(self) -> None:
        began = time.monotonic()
        job = self.submit("python -c \"import ray, socket; ray.init(); print('hello from', socket.gethostname())\"")
        done = self.stack.await_job(job, "SUCCEEDED", timeout=240)
        took = time.monotonic() - began
        assert "hello from ip-10-77-" in self.stack.log(job)
        assert [run["state"] for run in done["runs"]] == ["SUCCEEDED"]
        self.stack.await_cluster(done["cluster_id"], "TERMINATED")
        (node,) = self.stack.nodes(done["cluster_id"])
        up = seconds_between(node["created_at"], node["running_at"])
        print(f"\n{self.cloud}: head asked for to Ray up {up:.1f} s, submit to SUCCEEDED {took:.1f} s", flush=True)
        self.await_nothing()

    def test_workers_come_by_demand_and_go_without_it(self, tmp_path: Path) -> None:
        config = {
            "head_node": {"resources": {"CPU": 0}},
            "worker_nodes": [{"name": "w", "resources": {"CPU": 1}, "min_nodes": 0, "max_nodes": 3}],
        }
        (tmp_path / "main.py").write_text(DEMAND)
        job = self.submit("python main.py", config, ("--working-dir", str(tmp_path)))
        self.stack.await_job(job, "RUNNING", timeout=240)
        cluster = self.stack.job(job)["cluster_id"]
        workers = until("two workers", lambda: len(w := self.hosts_of(cluster, "worker")) == 2 and w, 240)
        for host in workers:  # else the first, freed, could take the second task too
            until("a task on each", lambda host=host: "holding" in host.run("ls", "/tmp"), 60)
        for host in workers:
            host.run("touch", "/tmp/free")
        until("the workers to go, idle for a minute", lambda: not self.hosts_of(cluster, "worker"), 240)
        until("their machines to be gone", lambda: len(self.vendor.living()) == 1, 60)
        (head,) = self.hosts_of(cluster)
        head.run("touch", "/tmp/end")
        self.stack.await_job(job, "SUCCEEDED", timeout=60)
        assert "nodes 2" in self.stack.log(job)
        self.await_nothing()

    def test_a_spot_worker_is_taken_back_under_a_job(self, tmp_path: Path) -> None:
        """Its work is done on its replacement, which was asked for before the machine went."""
        job, holding = self._task_on_a_worker(tmp_path, market_type="SPOT")
        first = until("the task to run", holding, 240)
        assert first.identity.spot
        before, noticed = set(self.vendor.living()), time.monotonic()
        self.vendor.take_back(first)
        until("its replacement to be asked for", lambda: set(self.vendor.living()) - before, 60)
        asked = time.monotonic() - noticed
        assert first.alive, "before the machine went"
        print(f"\n{self.cloud}: spot notice to replacement asked for {asked:.1f} s", flush=True)
        second = until("the task to run elsewhere", lambda: holding(but=first), 180)
        second.run("touch", "/tmp/free")
        done = self.stack.await_job(job, "SUCCEEDED", timeout=60)
        assert f"done on {second.name}" in self.stack.log(job)
        assert len(done["runs"]) == 1
        assert asked <= 15
        self.await_nothing()

    def test_a_worker_that_loses_its_power_is_replaced_under_a_job(self, tmp_path: Path) -> None:
        """No connection is closed, nobody is told: Ray's health checks find out, and the task begins again."""
        job, holding = self._task_on_a_worker(tmp_path)
        first = until("the task to run", holding, 240)
        time.sleep(90)  # a call that lasts, with nothing said in it but keep-alives
        assert holding() is first
        self.vendor.lose(first)
        cut = time.monotonic()
        second = until("the task to run elsewhere", lambda: holding(but=first), 180)
        print(f"\n{self.cloud}: power cut to the task on another machine {time.monotonic() - cut:.1f} s", flush=True)
        second.run("touch", "/tmp/free")
        done = self.stack.await_job(job, "SUCCEEDED", timeout=60)
        assert f"done on {second.name}" in self.stack.log(job)
        assert len(done["runs"]) == 1
        self.await_nothing()

    def test_a_head_whose_machine_is_taken_back_is_replaced(self) -> None:
        job = self.submit(UNTIL_TOLD)
        head = self.began(job)
        self.vendor.take_back(head, in_s=10)
        until("the job to hear of it", lambda: "head_notice" in self.stack.story(job), 10)
        until("the power cut", lambda: not head.alive, 15)
        cut = time.monotonic()
        until("its replacement to be asked for", lambda: set(self.vendor.living()) - {head.identity.id}, 60)
        asked = time.monotonic() - cut
        print(f"\n{self.cloud}: head's end to replacement asked for {asked:.1f} s", flush=True)
        self.began(job, 2).run("touch", "/tmp/go")
        done = self.stack.await_job(job, "SUCCEEDED", timeout=120)
        assert [run["cause"] for run in done["runs"]] == ["infrastructure", None]
        assert asked <= 15
        self.await_nothing()

    def test_a_head_that_is_lost_is_replaced(self) -> None:
        job = self.submit(UNTIL_TOLD)
        head = self.began(job)
        self.vendor.lose(head)
        self.began(job, 2).run("touch", "/tmp/go")
        done = self.stack.await_job(job, "SUCCEEDED", timeout=120)
        assert [run["cause"] for run in done["runs"]] == ["infrastructure", None]
        self.await_nothing()

    def test_a_head_that_is_cut_off_is_replaced_and_ended(self) -> None:
        job = self.submit(UNTIL_TOLD)
        head = self.began(job)
        head.partition()
        second = self.began(job, 2)
        assert not head.alive, "the head that can't be heard is ended before it is replaced"
        second.run("touch", "/tmp/go")
        done = self.stack.await_job(job, "SUCCEEDED", timeout=120)
        assert [run["cause"] for run in done["runs"]] == ["infrastructure", None]
        self.await_nothing()

    def test_an_idle_cluster_leaves_nothing(self) -> None:
        config = one_node() | {"idle_termination_minutes": 0.1, "cloud": self.cloud}
        made = self.stack.ask("cluster", "create", "-n", f"lazy-{self.cloud}", "-f", self.stack.config_file(config))
        self.stack.await_cluster(made["id"], "RUNNING", timeout=240)
        assert len(self.vendor.living()) == 1
        ended = self.stack.await_cluster(made["id"], "TERMINATED", timeout=120)
        assert "idle" in ended["reason"]
        self.await_nothing()

    def test_a_machine_that_is_not_to_be_had_is_waited_for(self) -> None:
        self.vendor.no_capacity(times=2)
        job = self.submit("echo had one")
        self.stack.await_job(job, "SUCCEEDED", timeout=300)
        assert "had one" in self.stack.log(job)
        self.await_nothing()

    def test_calls_that_are_throttled_or_lost_launch_one_machine(self) -> None:
        launch = self.vendor.LAUNCH
        self.vendor.throttle(launch, times=2)
        self.vendor.lose_answer(launch)
        job = self.submit("echo had one")
        most = 0

        def over() -> bool:
            nonlocal most
            most = max(most, len(self.vendor.living()))
            return self.stack.job(job)["state"] == "SUCCEEDED"

        until("the job to succeed", over, 300)
        assert most == 1
        self.await_nothing()

    def test_a_service_is_rolled_out_behind_the_vendors_load_balancer(self) -> None:
        served = Served(self.stack, f"echo-{self.cloud}")
        where = {"cloud": self.cloud}
        served.deploy("v1", more=where)
        assert served.ask("/echo?nonce=a").text.startswith("v1 a")
        assert served.ask(token="wrong").status_code == 403
        with Traffic(served) as traffic:
            traffic.await_text("v1")
            served.deploy("v2", more=where)
            traffic.await_seconds(3)
        nothing_lost(traffic, "v1", "v2")
        served.until_rests("v2")
        served.terminate()
        self.await_nothing()
        until("no load balancer to be left", lambda: not self.vendor.balancers.names(), 60)
