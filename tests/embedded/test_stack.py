"""The embedded stack as real processes, on the fake cloud: what it says, and what it survives."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from runtime.home import is_alive
from tests.embedded.conftest import StackUnderTest, eventually

PARTS = ("temporal", "bucket", "api", "worker")
Make = Callable[..., StackUnderTest]


def test_stack_json_tells_where_everything_is(running: StackUnderTest) -> None:
    state = running.state
    assert set(state["pids"]) == {"stack", *PARTS}
    assert all(is_alive(pid) for pid in state["pids"].values())
    assert stat.S_IMODE(running.home.stack_json.stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(state["token_file"]).stat().st_mode) == 0o600
    assert httpx.get(f"{state['api_url']}/docs", trust_env=False, timeout=30).is_success
    assert httpx.get(state["ui_url"], trust_env=False, follow_redirects=True, timeout=30).is_success
    assert running.api("GET", "/v1/clusters").json()["items"] == []
    assert running.api("GET", "/v1/clusters", headers={"Authorization": "Bearer wrong"}).status_code == 401


def test_metrics_of_every_process(running: StackUnderTest) -> None:
    urls = running.state["metrics_urls"]
    for name, line in (
        ("api", 'heliostat_api_request_seconds_count{method="GET",route="/readyz",status="200"}'),
        ("worker", 'heliostat_clusters{state="RUNNING"} 0.0'),  # of the monitor's first look
        ("worker_sdk", "temporal_worker_task_slots_available"),
    ):
        eventually(lambda name=name, line=line: line in httpx.get(urls[name], trust_env=False, timeout=30).text)


def test_metrics_name_clouds_as_people_do(running: StackUnderTest) -> None:
    running.api("POST", "/v1/clusters", json={"name": "counted"}).raise_for_status()

    def counted() -> str:
        text = httpx.get(running.state["metrics_urls"]["worker"], trust_env=False, timeout=30).text
        return next((line for line in text.splitlines() if line.startswith("heliostat_launches_total")), "")

    assert 'cloud="fake",outcome="launched"' in eventually(counted)
    running.api("POST", "/v1/clusters/counted/terminate").raise_for_status()


def test_secrets_are_in_no_command_line_and_no_log(running: StackUnderTest) -> None:
    running.api("GET", "/v1/clusters")
    secrets = [running.token, running.home.secret_key.read_text().strip()]
    seen = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in running.pids.values()]
    seen += [path.read_text(errors="replace") for path in running.home.logs.iterdir()]
    assert not [text[:80] for text in seen for secret in secrets if secret in text]


@pytest.mark.long
def test_a_second_up_says_that_it_runs(running: StackUnderTest) -> None:
    before = running.pids
    for command in (["up"], ["up", "--detach"]):
        assert "is running already" in running.run(*command).stderr
    assert running.pids == before
    assert json.loads(running.run("status").stdout)["state"] == "running"


@pytest.mark.long
def test_restore_refuses_a_running_stack(running: StackUnderTest, tmp_path: Path) -> None:
    saved = running.run("backup", str(tmp_path / "b.tar.gz")).stdout.strip()
    refused = running.run("restore", saved, check=False)
    assert refused.returncode == 1
    assert "runs" in refused.stderr
    assert running.is_ready()


@pytest.mark.parametrize("part", [pytest.param(p, marks=[] if p == "api" else pytest.mark.long) for p in PARTS])
def test_kill_9_of_a_part_heals(running: StackUnderTest, part: str) -> None:
    others = {name: pid for name, pid in running.pids.items() if name != part}
    pid = running.pids[part]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: running.pids.get(part, pid) != pid)
    eventually(running.is_ready)
    eventually(lambda: _answers(running.state["metrics_urls"]["worker"]))
    assert {name: pid for name, pid in running.pids.items() if name != part} == others
    assert running.api("GET", "/v1/clusters").is_success


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


@pytest.mark.long
def test_kill_9_of_everything_then_up_again(make_stack: Make) -> None:
    stack = make_stack().up()
    accepted = stack.api("POST", "/v1/clusters", json={"name": "kept"}, headers={"Idempotency-Key": "k"}).json()
    before = stack.state
    stack.kill_everything()
    assert json.loads(stack.run("status", check=False).stdout)["state"] == "stopped"
    stack.up()
    assert stack.state["ports"] == before["ports"], "nodes that live would not find us"
    assert stack.api("GET", f"/v1/clusters/{accepted['id']}").json()["name"] == "kept"
    again = stack.api("POST", "/v1/clusters", json={"name": "kept"}, headers={"Idempotency-Key": "k"})
    assert again.json()["id"] == accepted["id"]


@pytest.mark.long
def test_what_a_killed_supervisor_left_is_ended_first(make_stack: Make) -> None:
    stack = make_stack().up()
    orphans = {part: pid for part, pid in stack.pids.items() if part != "stack"}
    os.kill(stack.pids["stack"], signal.SIGKILL)
    eventually(lambda: stack.home.stack_pid() is None)
    assert stack.is_ready(), "the parts go on without their supervisor"
    assert "processes of an earlier stack" in stack.run("up", "--detach").stderr
    assert not [part for part, pid in orphans.items() if is_alive(pid)]
    assert stack.is_ready()
    stack.stop()
    assert stack.home.processes() == {}
    assert stack.state["pids"] == {}


@pytest.mark.long
def test_two_stacks_side_by_side(make_stack: Make) -> None:
    one, two = make_stack("one").up(), make_stack("two").up()
    assert not set(one.state["ports"].values()) & set(two.state["ports"].values())
    one.api("POST", "/v1/clusters", json={"name": "mine"})
    assert [c["name"] for c in one.api("GET", "/v1/clusters").json()["items"]] == ["mine"]
    assert two.api("GET", "/v1/clusters").json()["items"] == []
    assert two.api("GET", "/v1/clusters", headers={"Authorization": f"Bearer {one.token}"}).status_code == 401
    one.stop()
    assert two.is_ready()


@pytest.mark.long
def test_backup_and_restore(make_stack: Make) -> None:
    stack = make_stack().up()
    stack.api("POST", "/v1/compute-configs", json={"name": "before", "config": {"head_node": {}}}).raise_for_status()
    archive = Path(stack.run("backup").stdout.strip())
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    stack.api("POST", "/v1/compute-configs", json={"name": "after", "config": {"head_node": {}}}).raise_for_status()
    stack.stop()
    ports = stack.state["ports"]
    stack.run("restore", str(archive))
    stack.up()
    names = {c["name"] for c in stack.api("GET", "/v1/compute-configs").json()["items"]}
    assert "before" in names
    assert "after" not in names
    assert stack.state["ports"] == ports
    assert list(stack.home.backups.glob("replaced-*/records.db")), "what stood there is kept"


def test_a_taken_port_is_named(make_stack: Make) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused = make_stack(HELIOSTAT_API_PORT=str(port)).run("up", check=False)
    assert refused.returncode == 1
    assert f"port {port} is taken" in refused.stderr
    assert "HELIOSTAT_API_PORT" in refused.stderr


@pytest.mark.long
def test_a_part_that_can_not_start_fails_the_start(make_stack: Make) -> None:
    stack = make_stack(HELIOSTAT_FAKE_CLOUD="", HELIOSTAT_LOCAL_ISOLATION="nonsense")
    failed = stack.run("up", "--detach", check=False)
    assert failed.returncode == 2
    assert "'nonsense' does not exist" in failed.stderr, "it says what the part wrote"
    assert stack.home.processes() == {}
    assert stack.home.stack_pid() is None


def test_down_of_nothing(make_stack: Make) -> None:
    stack = make_stack()
    assert stack.run("down").returncode == 0
    assert stack.run("down").returncode == 0
