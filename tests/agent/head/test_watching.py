"""What the head makes of what Ray says: activity, members; and the dead-man switch."""

from __future__ import annotations

import signal
import subprocess
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from agent import processes
from agent.constants import Constants
from agent.facts import Facts
from agent.head.activity import Activity
from agent.head.members import Members
from agent.journal import Journal
from agent.node.deadman import DeadMan
from agent.ray_node.api import RayApi, RayAway
from agent.runs.runner import MAX_FAILED_LOOKS, Run, Runs
from tests.agent.conftest import until


class Ray(RayApi):
    """Ray's answers as a test sets them."""

    def __init__(self) -> None:
        self.driver = ""
        self.alive: list[dict[str, Any]] = []
        self.applications: list[str] = []
        self.members: list[dict[str, Any]] = []
        self.away = False

    def _there(self) -> None:
        if self.away:
            raise RayAway("away for a test")

    def driver_reason(self) -> str:
        self._there()
        return self.driver

    def actors(self) -> list[dict[str, Any]]:
        self._there()
        return self.alive

    def serve_applications(self) -> list[str]:
        self._there()
        return self.applications

    def nodes(self) -> list[dict[str, Any]]:
        self._there()
        return self.members


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    return Facts(Journal(tmp_path / "f"), "f" * 32, 100)


def told(facts: Facts, kind: str) -> list[dict[str, Any]]:
    return [f["data"] for f in facts.pending() if f["kind"] == kind]


SERVE = {"class_name": "ServeController", "ray_namespace": "serve", "name": "SERVE_CONTROLLER_ACTOR"}
JOB = {
    "class_name": "JobSupervisor",
    "ray_namespace": "SUPERVISOR_ACTOR_RAY_NAMESPACE",
    "name": "_ray_internal_job_actor_x",
}
STATS = {"class_name": "_StatsActor", "ray_namespace": "_dataset_stats_actor", "name": "datasets_stats_actor"}


def test_idle_needs_two_looks_busy_one_and_only_changes_are_told(facts: Facts) -> None:
    ray, own = Ray(), [""]
    activity = Activity(ray, facts, Constants(), lambda: own[0])
    assert activity.state == "unknown"
    activity.look()
    assert activity.state == "unknown"
    activity.look()
    activity.look()
    assert [f["activity"] for f in told(facts, "activity")] == ["idle"]
    own[0] = "run r"
    activity.look()
    activity.look()
    own[0] = ""
    activity.look()  # one idle look between two busy ones is no change
    own[0] = "run s"
    activity.look()
    assert [f["activity"] for f in told(facts, "activity")] == ["idle", "busy"]


@pytest.mark.parametrize(
    ("ray", "state", "word"),
    [
        ({"driver": "Number of active drivers: 1"}, "busy", "drivers"),
        ({"alive": [JOB]}, "busy", "Ray job x"),
        ({"alive": [SERVE], "applications": ["chat"]}, "busy", "chat"),
        ({"alive": [SERVE]}, "idle", ""),
        ({"alive": [STATS]}, "idle", ""),
        ({"away": True}, "unknown", "can't be asked"),
    ],
)
def test_what_counts_as_work(facts: Facts, ray: dict[str, Any], state: str, word: str) -> None:
    asked = Ray()
    for name, value in ray.items():
        setattr(asked, name, value)
    found, reason = Activity(asked, facts, Constants(), lambda: "").look()
    assert found == state
    assert word in reason


def test_a_question_without_answer_does_not_wake_an_idle_cluster_two_do(facts: Facts) -> None:
    ray = Ray()
    activity = Activity(ray, facts, Constants(), lambda: "")
    activity.look()
    activity.look()
    ray.away = True
    activity.look()
    assert activity.state == "idle"
    activity.look()
    assert activity.state == "unknown"
    ray.away = False
    activity.look()
    activity.look()
    assert [f["activity"] for f in told(facts, "activity")] == ["idle", "unknown", "idle"]


def test_a_busy_cluster_that_falls_silent_is_unknown(facts: Facts) -> None:
    ray = Ray()
    ray.driver = "1"
    activity = Activity(ray, facts, Constants(), lambda: "")
    activity.look()
    ray.away = True
    activity.look()
    activity.look()
    assert activity.state == "unknown"


def member(ray_id: str, name: str, state: str = "ALIVE", message: str | None = None) -> dict[str, Any]:
    return {"node_id": ray_id, "node_name": name, "is_head_node": name == "head", "state": state,
            "state_message": message, "resources_total": {"CPU": 2.0, "node:1.2.3.4": 1.0}}  # fmt: skip


def test_workers_that_come_and_go_are_told_once(facts: Facts) -> None:
    ray = Ray()
    members = Members(ray, facts, None, Constants(idle_drain_grace_s=0.0))
    ray.members = [member("h", "head")]
    members.look()
    assert facts.pending() == []
    ray.members.append(member("a", "w1"))
    members.look()
    members.look()
    assert told(facts, "ray_ready") == [{"node_id": "w1", "ray_node_id": "a"}]
    assert members.workers_alive == ["w1"]
    assert members.resources == {"total": {"CPU": 4.0}, "nodes_alive": 2}
    ray.members[1] = member("a", "w1", "DEAD", "Unexpected termination: health check failed")
    members.look()
    members.look()
    assert [f["node_id"] for f in told(facts, "node_lost")] == ["w1"]
    assert members.workers_alive == []
    ray.members.append(member("b", "w1"))  # the same node again, another life
    members.look()
    assert len(told(facts, "ray_ready")) == 2


def test_a_drained_worker_is_not_lost_until_its_grace_is_over(facts: Facts) -> None:
    ray = Ray()
    members = Members(ray, facts, None, Constants(idle_drain_grace_s=1000.0))
    ray.members = [member("a", "w1")]
    members.look()
    ray.members = [member("a", "w1", "DEAD", "Terminated due to idle (no Ray activity).")]
    members.look()
    assert told(facts, "node_lost") == []
    hasty = Members(ray, facts, None, Constants(idle_drain_grace_s=-1.0))
    hasty.look()
    assert [f["node_id"] for f in told(facts, "node_lost")] == ["w1"]


class Clock:
    at = 0.0

    def __call__(self) -> float:
        return self.at


def test_silence_alone_ends_nothing_while_there_is_work() -> None:
    clock = Clock()
    switch = DeadMan(100, clock)
    for clock.at in range(0, 1000, 10):
        assert switch.check(last_contact=0, activity="busy") == ""
    for clock.at in range(1000, 1080, 10):
        assert switch.check(last_contact=0, activity="idle") == ""
    clock.at = 1091
    assert "no work for 101 s" in switch.check(last_contact=0, activity="idle")
    assert switch.check(last_contact=1000, activity="idle") == ""


def test_work_that_cannot_be_seen_keeps_a_silent_machine_for_a_while() -> None:
    clock = Clock()
    switch = DeadMan(100, clock)
    switch.check(0, "idle")
    clock.at = 199
    assert switch.check(0, "unknown") == ""
    clock.at = 200
    assert "did not answer" in switch.check(0, "unknown")


def test_maximum_uptime_ends_it_whatever_it_does() -> None:
    switch = DeadMan(100)
    switch.maximum_uptime_at = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert switch.check(1e12, "busy") == ""
    switch.maximum_uptime_at = (datetime.now(UTC) - timedelta(seconds=1)).isoformat().replace("+00:00", "Z")
    assert "maximum uptime" in switch.check(1e12, "busy")


def test_the_end_of_a_run_waits_for_what_dies_late(
    facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL ends a process when it is next given a processor."""
    unused = cast(Any, None)
    runs = Runs(Ray(), facts, unused, unused, Journal(tmp_path / "r"), Constants(), tmp_path, f"MARK={tmp_path}")
    kill, late = processes.kill, threading.Event()
    threading.Timer(0.8, late.set).start()
    monkeypatch.setattr(processes, "kill", lambda victims: kill(victims) if late.is_set() else None)
    with subprocess.Popen(["sleep", "1000"], env={"MARK": str(tmp_path), "HELIOSTAT_RUN_ID": "j-1"}) as left:
        try:
            until(lambda: processes.command(left.pid) == "sleep 1000")
            runs._kill_leftovers("j-1")
            assert late.is_set(), "it went on while the process lived"
            assert left.wait(30) == -signal.SIGKILL
        finally:
            left.kill()


def test_a_run_that_can_never_be_looked_at_ends_the_node_and_not_at_once(
    facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = replace(Constants(), run_poll_old_s=0.001)
    unused = cast(Any, None)
    runs = Runs(Ray(), facts, unused, unused, Journal(tmp_path / "r"), constants, tmp_path, "mark")
    sick, well = Run("j-1", None, [], given=True), Run("j-2", None, [], given=True)
    runs._active = {run.id: run for run in (sick, well)}
    looks: list[str] = []

    def look(run: Run) -> None:
        looks.append(run.id)
        run.next_look = 0
        if run is sick:
            raise KeyError("status")

    monkeypatch.setattr(runs, "_look", look)
    with pytest.raises(KeyError):
        runs.watch(threading.Event())
    assert looks.count("j-1") == MAX_FAILED_LOOKS
    assert looks.count("j-2") >= MAX_FAILED_LOOKS - 1, "the others are looked after meanwhile"
