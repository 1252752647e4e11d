"""What the cloud announces for a machine, from its metadata service to the control plane and to Ray."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agent.constants import Constants
from agent.node.interruptions import InterruptionWatcher, Notice
from tests.agent.conftest import AgentNode, Nodes, namespaces_work, until
from tests.agent.control_plane import ControlPlane
from tests.agent.metadata import Metadata

REBALANCE = {"noticeTime": "2026-11-26T08:00:00Z"}


def interruption(in_s: float = 120) -> dict[str, str]:
    """As AWS says it."""
    at = datetime.now(UTC) + timedelta(seconds=in_s)
    return {"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")}


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata()
    yield server
    server.close()


@pytest.fixture
def watching(metadata: Metadata) -> Iterator[Any]:
    """Begins to watch as that provider's machine; gives what is told."""
    stop = threading.Event()

    def begin(provider: str) -> list[Notice]:
        told: list[Notice] = []
        notices = InterruptionWatcher(provider, Constants(metadata_url=metadata.url, notice_poll_s=0.05), told.append)
        for source in notices.sources:
            threading.Thread(target=notices.watch, args=(source, stop), daemon=True).start()
        return told

    yield begin
    stop.set()


def test_aws_announces_a_rebalance_and_then_the_interruption_each_once(metadata: Metadata, watching: Any) -> None:
    told = watching("aws")
    until(lambda: len(metadata.asked) > 4, why="two looks")
    assert told == []
    metadata.aws["events/recommendations/rebalance"] = REBALANCE
    until(lambda: told)
    metadata.token = "t2"  # the old one is not taken any more
    metadata.aws["spot/instance-action"] = interruption()
    until(lambda: len(told) > 1)
    time.sleep(0.3)
    assert [n.kind for n in told] == ["rebalance", "interruption"]
    assert told[0].deadline is None
    assert 100 < (told[1].left_s() or 0) <= 120
    assert "AWS interrupts this spot machine (terminate)" in told[1].reason


def test_google_is_asked_to_hold_the_question_until_there_is_news(metadata: Metadata, watching: Any) -> None:
    told = watching("gcp")
    until(lambda: len([p for p in metadata.asked if "wait_for_change" in p]) == 2, why="both wait")
    asked = len([p for p in metadata.asked if p.startswith("/computeMetadata/")])
    time.sleep(0.3)
    assert len([p for p in metadata.asked if p.startswith("/computeMetadata/")]) == asked, "nobody asks again and again"
    metadata.say("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")  # which the machine survives
    before = datetime.now(UTC)
    metadata.say("preempted", "TRUE")
    until(lambda: told)  # sooner than the 60 s for which the question is held
    after = datetime.now(UTC)
    metadata.say("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    until(lambda: len(told) > 1)
    assert [n.kind for n in told] == ["interruption", "maintenance"]
    deadline = datetime.fromisoformat(told[0].deadline or "")  # in whole seconds
    assert before + timedelta(seconds=29) <= deadline <= after + timedelta(seconds=30)


def test_a_service_that_is_away_or_answers_nonsense_is_asked_again(metadata: Metadata, watching: Any) -> None:
    metadata.aws["spot/instance-action"] = {"action": "terminate", "time": "at noon"}
    told = watching("aws")
    until(lambda: len(metadata.asked) > 3)
    metadata.aws["spot/instance-action"] = interruption()
    until(lambda: told)


def spot(start: Any, metadata: Metadata, **more: Any) -> AgentNode:
    constants = {"metadata_url": metadata.url, "notice_poll_s": 0.1, "idle_drain_grace_s": 0.5}
    return start(told={"environment": {"provider": "aws"}}, constants=constants, **more)


@pytest.fixture
def start(nodes: Nodes, fake_python: list[str]) -> Any:
    def begin(node_id: str = "nd_head", **more: Any) -> AgentNode:
        return nodes.start(node_id, python=fake_python, **more)

    return begin


@pytest.mark.long
def test_a_workers_interruption_is_told_and_ray_drains_it(start: Any, plane: ControlPlane, metadata: Metadata) -> None:
    start()
    worker = spot(start, metadata, node_id="nd_w", role="worker", group="w")
    plane.fact("ray_ready", node_id="nd_w")
    until(lambda: "fake ray starts" in worker.log())
    time.sleep(1.2)  # a look at its raylet
    metadata.aws["spot/instance-action"] = said = interruption()
    fact = plane.fact("spot_notice")
    assert (fact["node_id"], fact["data"]["kind"]) == ("nd_w", "interruption")
    assert datetime.fromisoformat(fact["data"]["deadline"]) == datetime.fromisoformat(said["time"])
    drained = worker.folder / "fake-drained.json"
    until(drained.exists)
    options = until(lambda: json.loads(drained.read_text() or "null"))
    assert options["node-id"] == "abc123"
    assert options["address"] == plane.nodes["nd_head"]["gcs_address"]
    assert options["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert 90 < int(options["deadline-remaining-seconds"]) <= 120
    # Its work is done: Ray ends its raylet, the agent the machine, and says why.
    os.kill(next(p for p in worker.pids() if "--node_id=abc123" in _command(p)), signal.SIGKILL)
    assert "AWS interrupts this spot machine" in plane.fact("stopping")["data"]["reason"]
    assert worker.process.wait(20) == 0


@pytest.mark.long
def test_a_worker_that_is_still_busy_leaves_before_its_power_goes(
    start: Any, plane: ControlPlane, metadata: Metadata
) -> None:
    start()
    worker = spot(start, metadata, node_id="nd_w", role="worker", group="w")
    plane.fact("ray_ready", node_id="nd_w")
    until(lambda: "fake ray starts" in worker.log())
    metadata.aws["spot/instance-action"] = interruption(in_s=15)
    taken_at = time.monotonic() + 15
    plane.fact("spot_notice")
    time.sleep(1)
    assert worker.process.poll() is None, "it uses the time that it has"
    assert "AWS interrupts this spot machine" in plane.fact("stopping", 15)["data"]["reason"]
    assert worker.process.wait(20) == 0
    assert time.monotonic() < taken_at


def test_a_heads_interruption_is_told_and_its_end_when_the_system_goes_down(
    start: Any, plane: ControlPlane, metadata: Metadata
) -> None:
    head = spot(start, metadata)
    plane.fact("ray_ready")
    metadata.aws["spot/instance-action"] = interruption()
    plane.fact("spot_notice", kind="interruption")
    time.sleep(0.3)
    assert not (head.folder / "fake-drained.json").exists(), "what runs on a head goes on"
    head.terminate()
    assert "AWS interrupts this spot machine" in plane.fact("node_lost")["data"]["reason"]
    assert head.process.wait(20) == 0


def test_a_notice_that_comes_with_the_signal_is_not_missed(start: Any, plane: ControlPlane, metadata: Metadata) -> None:
    head = start(told={"environment": {"provider": "gcp"}}, constants={"metadata_url": metadata.url})
    plane.fact("ray_ready")
    metadata.gcp["preempted"] = "TRUE"  # told to nobody who waits
    head.terminate()
    assert "preempts" in plane.fact("node_lost")["data"]["reason"]


def test_another_ray_than_the_control_planes_is_why_the_node_ends(start: Any, plane: ControlPlane) -> None:
    told = {"environment": {"provider": "aws", "ray_version": "1.13.0"}}
    start(told=told, constants={"metadata_url": plane.url}, files={"startup.log": "$ docker pull\n"})
    reason = plane.fact("node_failed")["data"]["reason"]
    assert "the control plane requires Ray 1.13.0" in reason
    assert "container_image" in reason
    plane.wait(lambda: plane.log("nd_head", "node/startup.log") == b"$ docker pull\n", why="the start-up log")


def _command(pid: int) -> str:
    from agent import processes

    return processes.command(pid)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(240)
def test_real_ray_gives_a_drained_worker_no_new_work_and_lets_the_old_end(
    nodes: Nodes, plane: ControlPlane, metadata: Metadata
) -> None:
    groups = [{"name": "w", "resources": {"CPU": 1}, "labels": {}, "min_nodes": 2, "max_nodes": 3}]
    plane.desired, plane.groups = {"w": 2}, groups
    isolate = namespaces_work()
    nodes.start("nd_head", isolate=isolate, groups=groups, desired={"w": 2})
    for name in ("nd_w1", "nd_w2"):
        more = {"told": {"environment": {"provider": "aws"}}, "constants": {"metadata_url": metadata.url}}
        told = more if name == "nd_w1" else {}
        nodes.start(name, "worker", "w", isolate=isolate, **told)  # type: ignore[arg-type]
    for name in ("nd_w1", "nd_w2"):
        plane.fact("ray_ready", 120, node_id=name)
    program = (
        "import os, ray, time\n"
        "ray.init()\n"
        "@ray.remote(num_cpus=1)\n"
        "def where(s):\n"
        "    time.sleep(s)\n"
        "    return os.environ['HELIOSTAT_NODE_ID']\n"
        "long = [where.remote(20) for _ in range(2)]\n"  # one on each
        "time.sleep(3)\n"
        "open(os.environ['MARK'], 'w').close()\n"
        "time.sleep(8)\n"
        "after = ray.get([where.remote(0.1) for _ in range(6)])\n"
        "print('LONG', sorted(ray.get(long)), 'AFTER', sorted(set(after)), flush=True)\n"
    )
    mark = nodes.folder / "mark"
    script = nodes.folder / "p.py"
    script.write_text(program)
    plane.do("submit_run", 120, run_id="job_1-1", entrypoint=f"python {script}", env_vars={"MARK": str(mark)})
    until(mark.exists, 90, "both long tasks to run")
    metadata.aws["spot/instance-action"] = interruption()
    plane.fact("spot_notice")
    assert plane.fact("run_ended", 120)["data"]["status"] == "SUCCEEDED"
    said = plane.log("nd_head", "runs/job_1-1.log").decode()
    assert "LONG ['nd_w1', 'nd_w2'] AFTER ['nd_w2']" in said, said
