"""Whole agent processes against the small control plane, with a stand-in for Ray: the protocol, runs, ends."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agent import processes
from tests.agent.conftest import AgentNode, Nodes, until
from tests.agent.control_plane import ControlPlane

SECRET = "s3cr3t-value-of-the-user"


@pytest.fixture
def start(nodes: Nodes, fake_python: list[str]) -> Any:
    def begin(node_id: str = "nd_head", **more: Any) -> AgentNode:
        return nodes.start(node_id, python=fake_python, **more)

    return begin


def ask(node: AgentNode, what: str) -> None:
    (node.folder / f"fake-{what}").touch()


def everything_gone(node: AgentNode) -> None:
    until(lambda: not node.marked(), why="nothing left")


@pytest.mark.parametrize("protocol", [0, 1])
def test_head_and_worker_come_up_and_a_run_succeeds(start: Any, plane: ControlPlane, protocol: int) -> None:
    plane.protocol = protocol
    head = start()
    ready = plane.fact("ray_ready")
    assert ready["node_id"] == "nd_head"
    assert ready["data"] == {"gcs_address": plane.nodes["nd_head"]["gcs_address"], "ray_version": "0.fake"}
    start("nd_w1", role="worker", group="w")
    assert plane.fact("ray_ready", node_id="nd_w1")["node_id"] == "nd_head"
    plane.wait(lambda: "nd_w1" in plane.nodes["nd_head"]["reports"][-1]["workers_alive"])
    answer = plane.do("submit_run", run_id="job_1-1", entrypoint="echo hello $HELIOSTAT_RUN_ID $HELIOSTAT_JOB_ID $A",
                      env_vars={"A": SECRET}, metadata={"k": "v"})  # fmt: skip
    assert answer == {"ok": True, "result": {"accepted": True}, "error": "", "retryable": False}
    ended = plane.fact("run_ended")
    assert ended["data"] == {"run_id": "job_1-1", "status": "SUCCEEDED", "exit_code": 0, "error": "",
                             "message": "Job finished successfully.", "timed_out": False}  # fmt: skip
    assert plane.fact("run_running")["data"] == {"run_id": "job_1-1"}
    # its log was in the bucket before its end was told
    assert plane.log("nd_head", "runs/job_1-1.log").endswith(f"hello job_1-1 job_1 {SECRET}\n".encode())
    assert plane.fact("activity", activity="idle")
    register = plane.nodes["nd_head"]["register"]
    assert register["protocol"] == 1
    assert register["ip"] == head.ip


def test_the_environment_is_scrubbed_and_no_secret_is_in_argv_or_logs(
    start: Any, plane: ControlPlane, fake_python: list[str]
) -> None:
    head = start()
    plane.fact("ray_ready")
    ray = json.loads((head.folder / "fake-environ.json").read_text())
    assert {k for k in ray if k.startswith("HELIOSTAT_")} == {
        "HELIOSTAT_NODE_ID",
        "HELIOSTAT_NODE_DIR",
        "HELIOSTAT_MACHINE_ID",
    }
    assert ray["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" not in ray
    assert ray["PATH"].split(":")[0] == str(Path(fake_python[0]).parent)
    assert ray["RAY_CLOUD_INSTANCE_ID"] == "nd_head"
    token = Path(ray["RAY_AUTH_TOKEN_PATH"])
    assert token.read_text() == "0" * 64
    assert oct(token.stat().st_mode & 0o777) == "0o600"
    node = plane.nodes["nd_head"]
    secrets = [node["bootstrap"], node["token"], "0" * 64, (head.folder / "provider-token").read_text(),
               "control-plane-secret"]  # fmt: skip
    commands = " ".join(processes.command(p) for p in head.pids())
    for secret in secrets:
        assert secret not in commands
        assert secret not in head.log()
        assert secret not in (head.folder / "console.txt").read_text()
        assert secret not in json.dumps(ray)


def test_a_run_fails_with_its_exit_code_and_its_secrets_masked(start: Any, plane: ControlPlane) -> None:
    start()
    plane.do("submit_run", run_id="j-1", entrypoint="echo my $A; exit 3", env_vars={"A": SECRET})
    ended = plane.fact("run_ended", run_id="j-1")["data"]
    assert (ended["status"], ended["exit_code"], ended["error"]) == ("FAILED", 3, "entrypoint")
    assert SECRET not in json.dumps(ended)
    assert "********" in ended["message"]
    plane.do("submit_run", run_id="j-2", entrypoint="true", requirements=["broken==0"], env_vars={"A": SECRET})
    ended = plane.fact("run_ended", run_id="j-2")["data"]
    assert (ended["status"], ended["exit_code"], ended["error"]) == ("FAILED", None, "runtime_env")
    assert SECRET not in json.dumps(ended)


def test_stop_kills_what_the_driver_left_behind_and_the_id_never_starts_again(start: Any, plane: ControlPlane) -> None:
    head = start()
    plane.do("submit_run", run_id="j-1", entrypoint="setsid sleep 4321 & sleep 4321")
    plane.fact("run_running", run_id="j-1")
    needle = "HELIOSTAT_RUN_ID=j-1"
    until(lambda: sum(processes.command(p) == "sleep 4321" for p in head.marked(needle)) == 2)
    assert plane.do("stop_run", run_id="j-1")["result"] == {"status": "STOPPED", "exit_code": None}
    assert not head.marked(needle)
    assert plane.fact("run_ended", run_id="j-1")["data"]["status"] == "STOPPED"
    assert plane.do("stop_run", run_id="j-1")["result"]["status"] == "STOPPED"
    again = plane.do("submit_run", run_id="j-1", entrypoint="true")
    assert (again["ok"], again["retryable"]) == (False, False)
    assert plane.do("stop_run", run_id="never-seen")["result"] == {"status": "UNKNOWN", "exit_code": None}
    assert plane.do("submit_run", run_id="never-seen", entrypoint="true")["ok"] is False
    assert len(json.loads((head.folder / "fake-submits.json").read_text())) == 1


def test_a_run_that_ignores_its_stop_is_killed(start: Any, plane: ControlPlane) -> None:
    head = start(constants={"stop_kill_s": 0.5})
    ask(head, "ignores-stops")
    plane.do("submit_run", run_id="j-1", entrypoint="trap '' TERM; while true; do sleep 0.1; done")
    plane.fact("run_running")
    assert plane.do("stop_run", run_id="j-1")["result"]["status"] == "STOPPED"
    assert not head.marked("HELIOSTAT_RUN_ID=j-1")


def test_the_timeout_holds_while_the_control_plane_is_away(start: Any, plane: ControlPlane) -> None:
    head = start()
    plane.result(plane.command("submit_run", run_id="j-1", entrypoint="sleep 4321", timeout_s=1.0))
    plane.fact("run_running")
    plane.down = True
    until(lambda: not head.marked("HELIOSTAT_RUN_ID=j-1"), why="the run's time is over")
    plane.down = False
    ended = plane.fact("run_ended")["data"]
    assert (ended["status"], ended["timed_out"], ended["error"]) == ("FAILED", True, "")
    assert "timeout_s of 1" in ended["message"]


def test_a_driver_that_ray_forgot_is_noticed(start: Any, plane: ControlPlane) -> None:
    head = start(constants={"driver_scan_s": 0.1})
    ask(head, "forgets-the-driver")
    plane.do("submit_run", run_id="j-1", entrypoint="sleep 0.5")
    ended = plane.fact("run_ended")["data"]
    assert (ended["status"], ended["error"]) == ("FAILED", "driver_lost")


def test_commands_are_carried_out_once_whatever_gets_lost(start: Any, plane: ControlPlane) -> None:
    head = start()
    plane.fact("ray_ready")
    ask(head, "loses-answers")  # Ray takes the run and its answer is lost
    plane.lose_answers = 2
    first = plane.command("submit_run", run_id="j-1", entrypoint="echo once")
    assert plane.result(first)["ok"]
    plane.fact("run_ended", run_id="j-1", status="SUCCEEDED")
    with plane.changed:  # the control plane gives it again, as after a restore
        plane.commands[first]["result"] = None
        plane.changed.notify_all()
    assert plane.result(first)["result"] == {"accepted": True}
    submits = json.loads((head.folder / "fake-submits.json").read_text())
    assert [s["submission_id"] for s in submits] == ["j-1"]
    assert plane.log("nd_head", "runs/j-1.log").count(b"once") == 1
    assert len([f for f in plane.facts if f["kind"] == "run_ended"]) == 1


def test_what_ray_refuses_is_told_and_not_tried_again(start: Any, plane: ControlPlane) -> None:
    head = start()
    ask(head, "refuses")
    answer = plane.do("submit_run", run_id="j-1", entrypoint="true", env_vars={"A": SECRET})
    assert (answer["ok"], answer["retryable"]) == (False, False)
    assert "bad spec" in answer["error"]
    assert plane.do("nonsense")["error"].startswith("this agent does not support the command 'nonsense'")
    assert plane.do("submit_run", entrypoint="no id")["ok"] is False


def test_fence_and_unfence(start: Any, plane: ControlPlane) -> None:
    head = start()
    assert plane.do("fence")["result"]["activity"] == "idle"
    refused = plane.do("submit_run", run_id="j-1", entrypoint="true")
    assert (refused["ok"], refused["error"], refused["retryable"]) == (False, "fenced", False)
    plane.do("unfence")
    assert plane.do("submit_run", run_id="j-2", entrypoint="sleep 4321")["ok"]
    assert plane.do("fence")["result"] == {"activity": "busy", "reason": "run j-2"}
    plane.do("stop_run", run_id="j-2")
    ask(head, "is-deaf")
    assert plane.do("fence")["result"]["activity"] == "unknown"


def package(plane: ControlPlane, name: str) -> dict[str, str]:
    data = f"zip of {name}".encode() * 1000
    plane.bucket[name] = data
    return {"url": f"{plane.url}/bucket/{name}?signature=hidden", "sha256": hashlib.sha256(data).hexdigest()}


def test_packages_are_fetched_once_checked_and_given_a_stable_url(start: Any, plane: ControlPlane) -> None:
    head = start()
    code, module = package(plane, "code"), package(plane, "module")
    for run in ("j-1", "j-2"):
        assert plane.do("submit_run", run_id=run, entrypoint="true", working_dir=code, requirements=["a==1"],
                        py_modules=[module, {"remote": "s3://b/m.zip"}])["ok"]  # fmt: skip
    assert plane.gets == ["code", "module"]
    spec = json.loads((head.folder / "fake-submits.json").read_text())
    port = int(plane.nodes["nd_head"]["gcs_address"].split(":")[1]) + 11
    env = spec[0]["runtime_env"]
    assert env["working_dir"] == f"http://{head.ip}:{port}/packages/{code['sha256']}.zip"
    assert env["py_modules"] == [f"http://{head.ip}:{port}/packages/{module['sha256']}.zip", "s3://b/m.zip"]
    assert env["pip"] == {"packages": ["a==1"], "pip_check": False}
    assert spec[1]["runtime_env"]["working_dir"] == env["working_dir"]
    plane.bucket["code2"] = b"something else"
    elsewhere = f"{plane.url}/bucket/code2?signature=hidden"
    wrong = plane.do("submit_run", run_id="j-3", entrypoint="true",
                     working_dir=package(plane, "x") | {"url": elsewhere})  # fmt: skip
    assert (wrong["ok"], wrong["retryable"]) == (False, False)
    assert "does not have the hash" in wrong["error"]
    nowhere = {"url": f"{plane.url}/bucket/none?signature=hidden", "sha256": "0" * 64}
    missing = plane.do("submit_run", run_id="j-4", entrypoint="true", working_dir=nowhere)  # fmt: skip
    assert (missing["ok"], missing["retryable"]) == (False, True)
    assert "hidden" not in missing["error"] + wrong["error"] + head.log()
    assert not list((head.folder / "packages").glob("*.part"))


def test_a_proxy_of_the_host_is_not_asked_for_what_is_on_this_machine(
    start: Any, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    head = start()
    code = package(plane, "code")
    assert plane.do("submit_run", run_id="j-1", entrypoint="true", working_dir=code)["ok"]
    ray = json.loads((head.folder / "fake-environ.json").read_text())
    assert ray["http_proxy"] == "http://127.0.0.1:9"
    assert {head.ip, "127.0.0.0/8"} <= set(ray["no_proxy"].split(","))


def test_an_api_that_goes_and_comes_loses_no_fact(start: Any, plane: ControlPlane) -> None:
    head = start()
    plane.do("submit_run", run_id="j-1", entrypoint="sleep 0.5; echo done")
    plane.fact("run_running")
    plane.down = True
    until(lambda: not head.marked("HELIOSTAT_RUN_ID=j-1"), why="the run ends unheard")
    plane.failing, plane.lose_answers, plane.down = 2, 1, False
    plane.fact("run_ended", run_id="j-1", status="SUCCEEDED")
    kinds = [f["kind"] for f in plane.facts]
    assert kinds.index("run_running") < kinds.index("run_ended")
    assert kinds.count("run_ended") == 1


def test_a_broken_bucket_does_not_hold_the_end_of_a_run(start: Any, plane: ControlPlane) -> None:
    start(constants={"run_log_flush_s": 0.5})
    plane.bucket_down = True
    plane.do("submit_run", run_id="j-1", entrypoint="echo late")
    plane.fact("run_ended", run_id="j-1", status="SUCCEEDED")
    assert plane.log("nd_head", "runs/j-1.log") == b""
    plane.bucket_down = False
    plane.wait(lambda: plane.log("nd_head", "runs/j-1.log").endswith(b"late\n"), 20)


def test_a_token_that_died_is_replaced_by_registering_again(start: Any, plane: ControlPlane) -> None:
    start()
    plane.fact("ray_ready")
    plane.nodes["nd_head"]["token"] = "records were restored"
    assert plane.do("submit_run", run_id="j-1", entrypoint="true", timeout_s=30)["ok"]


def test_410_ends_ray_and_the_machine_at_once(start: Any, plane: ControlPlane) -> None:
    head = start(constants={"ray_stop_s": 120.0})
    plane.do("submit_run", run_id="j-1", entrypoint="trap '' TERM; setsid sleep 4321 & sleep 4321")
    plane.fact("run_running")
    plane.nodes["nd_head"]["gone"] = True
    assert head.process.wait(30) == 0
    everything_gone(head)


def test_sigterm_ends_in_order_with_the_log_shipped(start: Any, plane: ControlPlane) -> None:
    head = start(constants={"final_flush_s": 30.0})
    plane.fact("ray_ready")
    assert head.end(60) == 0
    everything_gone(head)
    assert b"shutting down: ended by a signal" in plane.log("nd_head", "node/agent.log")
    assert plane.log("nd_head", "node/agent.log").count(b"fake ray starts") == 1
    assert plane.log("nd_head", "ray/raylet.out") == b"raylet says hello\n"


@pytest.mark.parametrize("isolate", [False, True])
def test_kill_9_of_the_agent_leaves_nothing(start: Any, plane: ControlPlane, isolate: bool) -> None:
    head = start(isolate=isolate)
    plane.do("submit_run", run_id="j-1", entrypoint="setsid sleep 4321 & sleep 4321")
    plane.fact("run_running")
    until(lambda: sum(processes.command(p) == "sleep 4321" for p in head.pids()) == 2)
    before = head.pids()
    os.kill(head.agent_pid(), signal.SIGKILL)
    head.process.wait(30)
    everything_gone(head)
    # One that just ends has no environment any more, by which the line above would have found it.
    until(lambda: not [p for p in before if processes.alive(p)], why="nothing left of those that there were")
    assert not (head.folder / "ray").exists()


def test_the_same_command_after_a_crash_of_the_agent_does_not_run_twice(
    start: Any, plane: ControlPlane, fake_python: list[str]
) -> None:
    """A second agent in the same node directory: the first one's Ray is gone, its runs are over."""
    head = start()
    plane.do("submit_run", run_id="j-1", entrypoint="sleep 4321")
    plane.fact("run_running")
    os.kill(head.agent_pid(), signal.SIGKILL)
    head.process.wait(30)
    plane.nodes["nd_head"] |= {"authenticated": False}
    import subprocess

    env = {"HELIOSTAT_NODE_IP": head.ip, "HELIOSTAT_PORT_BASE": plane.nodes["nd_head"]["gcs_address"].split(":")[1],
           "HELIOSTAT_NODE_DIR": str(head.folder), "PATH": os.environ["PATH"]}  # fmt: skip
    with (head.folder / "console.txt").open("ab") as out:
        head.process = subprocess.Popen([*fake_python, str(head.folder / "boot.json")], env=env, stdout=out, stderr=out,
                                        cwd=Path(__file__).parents[3])  # fmt: skip
    again = plane.do("submit_run", run_id="j-1", entrypoint="sleep 4321")
    assert (again["ok"], again["retryable"]) == (False, False)
    assert plane.do("stop_run", run_id="j-1")["result"]["status"] == "UNKNOWN"


def test_a_ray_that_dies_fails_the_node(start: Any, plane: ControlPlane) -> None:
    head = start()
    plane.fact("ray_ready")
    ask(head, "dies")
    failed = plane.fact("node_failed")
    assert "exit code 7" in failed["data"]["reason"]
    assert "SomeError" in failed["data"]["reason"]
    assert head.process.wait(30) == 1
    everything_gone(head)


def test_a_worker_whose_raylet_ended_waits_for_its_end_and_then_goes(start: Any, plane: ControlPlane) -> None:
    start()
    worker = start("nd_w1", role="worker", group="w", constants={"idle_drain_grace_s": 1.0})
    plane.fact("ray_ready", node_id="nd_w1")
    raylet = until(
        lambda: next((p for p in worker.pids() if processes.command(p).endswith("raylet --node_id=abc123")), None)
    )
    plane.wait(lambda: any(report["ray_up"] for report in plane.nodes["nd_w1"]["reports"]))
    os.kill(raylet, signal.SIGTERM)
    stopping = plane.fact("stopping")
    assert stopping["node_id"] == "nd_w1"
    assert "drained" in stopping["data"]["reason"]
    assert worker.process.wait(30) == 0


def test_no_ray_in_the_image_is_told_in_words(start: Any, plane: ControlPlane, fake_python: list[str]) -> None:
    ray = Path(fake_python[0]).with_name("ray")
    hidden = ray.rename(ray.with_name("ray-hidden"))
    path = os.environ["PATH"]
    os.environ["PATH"] = "/usr/bin:/bin"
    try:
        head = start()
        assert "HELIOSTAT_PYTHON" in plane.fact("node_failed")["data"]["reason"]
        assert head.process.wait(30) == 1
    finally:
        hidden.rename(ray)
        os.environ["PATH"] = path


def test_the_dead_man_switch_ends_an_idle_node_and_spares_a_busy_one(start: Any, plane: ControlPlane) -> None:
    quick = {"run_log_flush_s": 0.2, "final_flush_s": 0.2}
    idle = start("nd_idle", deadman_s=1.5, constants=quick)
    plane.fact("activity", activity="idle")
    plane.down = True
    assert idle.process.wait(30) == 0
    everything_gone(idle)
    plane.down = False
    busy = start("nd_busy", deadman_s=1.5, constants=quick)
    enough = busy.folder / "enough"
    plane.do("submit_run", run_id="j-1", entrypoint=f"while [ ! -e {enough} ]; do sleep 0.1; done")
    plane.fact("run_running")
    plane.down = True
    time.sleep(3)  # twice the limit: time has to pass for nothing to happen
    assert busy.process.poll() is None
    enough.touch()
    assert busy.process.wait(30) == 0  # once the run is over


def test_maximum_uptime_ends_a_busy_node_and_is_told(start: Any, plane: ControlPlane) -> None:
    head = start(maximum_uptime_at=(datetime.now(UTC) + timedelta(hours=1)).isoformat())
    plane.do("submit_run", run_id="j-1", entrypoint="sleep 4321")
    plane.fact("run_running")
    plane.nodes["nd_head"]["config"]["maximum_uptime_at"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    assert "maximum uptime" in plane.fact("stopping")["data"]["reason"]
    assert head.process.wait(20) == 0
    everything_gone(head)


def test_a_wrong_bootstrap_token_ends_the_machine(start: Any, plane: ControlPlane) -> None:
    plane.failing = 1000  # first the API is not even there
    head = start()
    plane.nodes["nd_head"]["bootstrap"] = "another"
    until(lambda: plane.failing < 998, why="it asks again")
    plane.failing = 0
    until(lambda: head.process.poll() is not None)
    assert "registration refused" in head.log()


def test_a_lost_answer_to_register_is_repeated(start: Any, plane: ControlPlane) -> None:
    plane.lose_answers = 1
    start()
    plane.fact("ray_ready")


def test_a_boot_file_that_is_broken_is_told_without_its_token(nodes: Nodes, tmp_path: Path) -> None:
    import subprocess

    boot = tmp_path / "boot.json"
    for text, word in (("{}", "api_url"), ("{", "can't be used"), ('{"api_url": "x", "node_id": "n", "generation": 1, '
                       '"bootstrap_token": "hush", "constants": {"nonsense": 1}}', "nonsense")):  # fmt: skip
        boot.write_text(text)
        done = subprocess.run([sys.executable, "-m", "agent", str(boot)], cwd=Path(__file__).parents[3],
                              env={**os.environ, "HELIOSTAT_NODE_DIR": str(tmp_path)}, capture_output=True, text=True,
                              check=False)  # fmt: skip
        assert done.returncode == 2
        assert word in done.stderr
        assert "hush" not in done.stderr


@pytest.mark.long
def test_the_agent_is_light(start: Any, plane: ControlPlane) -> None:
    head = start()
    plane.fact("activity", activity="idle")
    pid = head.agent_pid()

    def ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return int(fields[11]) + int(fields[12])

    began, at = ticks(), time.monotonic()
    time.sleep(5)
    share = (ticks() - began) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - at)
    rss = int(next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS")).split()[1])
    assert share < 0.05  # the test's control plane asks for a report twice a second; 1-2 % at one each 2 s
    assert rss < 40 * 1024
