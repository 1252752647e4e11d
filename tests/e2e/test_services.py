"""Services by the command line on a real stack: deployed, asked, upgraded under load, steered, ended."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load_kinds import pad
from tests.e2e.grpc_traffic import GrpcTraffic, code_of
from tests.e2e.services import HELD, QUICK, READY_S, Served, Traffic, nothing_lost
from tests.e2e.support import ROOT, Stack, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def echo(stack: Stack) -> Iterator[Served]:
    """One service for all tests here; each leaves one version of it, at rest."""
    served = Served(stack, "echo")
    served.deploy("v1")
    yield served
    served.terminate()
    assert not served.balancer_processes()


def primary(served: Served) -> str:
    service = served.now
    return next(str(v["name"]) for v in service["versions"] if v["id"] == service["primary_version"])


@pytest.fixture
def other(stack: Stack, request: pytest.FixtureRequest) -> Iterator[Served]:
    """A service of the test's own, ended with it."""
    served = Served(stack, request.node.name.replace("_", "-").split("[")[0][-40:].strip("-"))
    yield served
    if stack.cli("service", "status", served.name).returncode == 0:
        served.terminate()


def test_deployed_and_asked_with_curl(echo: Served) -> None:
    service = echo.stack.ask("service", "status", echo.name)
    assert {"id", "name", "state", "query_url", "query_auth_token", "versions"} <= set(service)
    assert service["state"] == "RUNNING"
    assert [(v["state"], v["weight"]) for v in service["versions"]] == [("RUNNING", 100)]
    checklist = {c["type"]: c["status"] for c in service["versions"][0]["checklist"]}
    assert checklist == {"Cluster": True, "Application": True, "Endpoint": True, "Weight": True}
    url, bearer = service["query_url"], f"Authorization: Bearer {service['query_auth_token']}"
    done = subprocess.run(
        ["curl", "-sS", "-i", "-H", bearer, f"{url}/echo?nonce=abc"],
        text=True, capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    head, _, body = done.stdout.replace("\r\n", "\n").partition("\n\n")
    assert head.startswith("HTTP/1.1 200"), done
    assert body == f"v1 abc {pad('abc')}\n"
    assert f"x-heliostat-version: {service['versions'][0]['id']}" in head.lower()
    assert echo.name in echo.cli("list").stdout
    assert "RUNNING" in echo.cli("status", echo.name).stdout
    shown = echo.stack.ask("service", "list")
    assert all(s["query_auth_token"] is None for s in shown), "no token in lists"


def test_requests_need_the_token(echo: Served) -> None:
    assert echo.ask(token=None).status_code == 401
    assert echo.ask(token="wrong").status_code == 403
    assert echo.ask().status_code == 200
    assert echo.ask("/-/healthz", token=None).status_code == 200


def test_a_rollout_under_load_loses_nothing(echo: Served) -> None:
    before = echo.now
    old = echo.version(primary(echo))
    with Traffic(echo) as traffic:
        traffic.await_text(old["name"])
        done = echo.deploy("v2", rollout=QUICK | {"steps": [10, 50, 100]})
        assert "v2" in done.stdout
        echo.until_rests("v2")
        traffic.await_seconds(6)  # the longest request takes 5 s
    nothing_lost(traffic, old["name"], "v2")
    assert echo.now["query_url"] == before["query_url"]
    assert echo.now["query_auth_token"] == before["query_auth_token"]
    assert old["clusters"], old
    for cluster in old["clusters"]:
        assert echo.stack.cluster(cluster["cluster_id"])["state"] == "TERMINATED"
    seen = echo.version("v2")["traffic"]
    assert seen["requests"] > 0, seen
    assert seen["errors"] == 0, seen


@pytest.mark.long
def test_a_version_that_answers_500_goes_back(echo: Served) -> None:
    """The canary's own requests are lost, nobody else's, and the old version is never touched."""
    good = primary(echo)
    with Traffic(echo, "--kinds", "get_fresh,get_kept,post", "--rate", "1.5") as traffic:
        done = echo.deploy(
            "bad",
            mode="fail",
            code=10,
            rollout={"steps": [20, 100], "hold_s": 30, "min_requests": 5, "keep_failed_s": 0},
        )
        echo.until_rests(good)
        traffic.await_seconds(3)
    assert "bad" in done.stderr
    report, bad = traffic.report, echo.version("bad")
    assert report.failures, "its share of the traffic did come to it"
    assert {(f.version_id, f.status) for f in report.failures} == {(bad["id"], 500)}, report.summary()
    assert report.failed <= 0.2 * sum(s.sent for s in report.timeline), report.summary()
    assert report.texts() == {good}
    assert "breach" in echo.story()
    assert bad["reason"]


@pytest.mark.long
def test_an_update_in_place_under_load_loses_nothing(echo: Served) -> None:
    old = echo.version(primary(echo))
    with Traffic(echo, "--in-place") as traffic:
        echo.deploy("v3", "--in-place")
        echo.until_rests("v3")
        traffic.await_seconds(6)
    nothing_lost(traffic, old["name"], "v3")
    new = echo.version("v3")
    assert [c["cluster_id"] for c in new["clusters"]] == [c["cluster_id"] for c in old["clusters"]]


@pytest.mark.long
def test_tokens_are_rotated_without_a_refusal(echo: Served) -> None:
    first = echo.now["query_auth_token"]
    second = echo.cli("token", "add", echo.name).stdout.strip()
    echo.until("both to be taken", lambda s: [t["active"] for t in s["query_auth_tokens"]] == [True, True])
    assert {echo.ask(token=t).status_code for t in (first, second)} == {200}
    echo.cli("token", "delete", echo.name)
    assert echo.ask(token=second).status_code == 200
    until("the first one to be refused", lambda: echo.ask(token=first).status_code == 403, 20)
    assert echo.now["query_auth_token"] == second


@pytest.mark.long
def test_an_import_path_that_does_not_exist(echo: Served) -> None:
    good = primary(echo)
    with Traffic(echo, "--kinds", "get_fresh,get_kept") as traffic:
        done = echo.deploy("typo", import_path="ap:build", code=10)
        echo.until_rests(good)
    assert "No module named 'ap'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert traffic.report.failed == 0, traffic.report.summary()
    assert traffic.report.texts() == {good}


def test_what_is_refused_changes_nothing(echo: Served, tmp_path: Path) -> None:
    before = echo.now["versions"]
    weights = json.dumps([{"name": "a", "traffic_percent": 60}, {"name": "b", "traffic_percent": 30}])
    done = echo.cli("deploy", "-n", echo.name, "--versions", weights, code=1)
    assert "90" in done.stderr
    done = echo.cli("deploy", "no-colon", "-n", "x", "--working-dir", str(tmp_path), code=1)
    assert "module.sub:app" in done.stderr
    done = echo.cli("deploy", "-f", echo.file("nope"), "--steps", "50,20,100", code=1)
    assert "rising" in done.stderr
    assert "nope" in echo.cli("status", "nope", code=1).stderr
    assert [v["id"] for v in echo.now["versions"]] == [v["id"] for v in before]


@pytest.mark.long
def test_delete_and_a_change_in_place_are_refused_while_rolling_out(echo: Served) -> None:
    good = primary(echo)
    echo.deploy("v4", wait=False, rollout=HELD)
    echo.until_at(20)
    done = echo.cli("delete", echo.name, code=1)
    assert "terminate" in done.stderr
    echo.deploy("v5", "--in-place", wait=False, code=1)
    echo.cli("rollout", "abort", echo.name)
    echo.until_rests(good)


@pytest.mark.long
def test_pause_resume_promote_and_abort_under_load(echo: Served) -> None:
    good = primary(echo)
    with Traffic(echo) as traffic:
        echo.deploy("p1", wait=False, rollout=HELD)
        echo.until_at(20)
        echo.cli("rollout", "abort", echo.name)
        echo.until_rests(good)
        echo.deploy("p2", wait=False, rollout=HELD)
        echo.until_at(20)
        echo.cli("rollout", "pause", echo.name)
        echo.until("the pause", lambda s: s["rollout"]["state"] == "paused")
        echo.cli("rollout", "resume", echo.name)
        echo.cli("rollout", "promote", echo.name, "--percent", "60")
        echo.until_at(60)
        echo.cli("rollout", "promote", echo.name)
        echo.until_rests("p2")
        traffic.await_seconds(6)
    nothing_lost(traffic, good, "p1", "p2")


@pytest.mark.long
def test_a_canary_stops_at_its_share(echo: Served) -> None:
    good = primary(echo)
    with Traffic(echo) as traffic:
        echo.deploy("c1", "--canary-percent", "30")
        assert echo.now["rollout"]["state"] == "paused"
        assert {v["name"]: v["weight"] for v in echo.now["versions"] if v["weight"]} == {good: 70, "c1": 30}
        traffic.await_seconds(15)
        c1 = echo.version("c1")["id"]
        counts = [s["versions"] for s in traffic.seconds()[-12:]]
        share = sum(c.get(c1, 0) for c in counts) / sum(sum(c.values()) for c in counts)
        assert 0.2 < share < 0.4, share
        echo.cli("rollout", "promote", echo.name)
        echo.until_rests("c1")
        traffic.await_seconds(6)
    nothing_lost(traffic, good, "c1")


@pytest.mark.long
def test_a_deploy_during_a_rollout_supersedes_it(echo: Served) -> None:
    good = primary(echo)
    with Traffic(echo) as traffic:
        first = echo.stack.start_cli("service", "deploy", "-f", echo.file("s1", rollout=HELD), "--wait")
        echo.until_at(20)
        echo.deploy("s2")
        _, said = first.communicate(timeout=60)
        assert first.returncode == 10
        assert "supersede" in said, said
        echo.until_rests("s2")
        traffic.await_seconds(6)
    nothing_lost(traffic, good, "s1", "s2")
    assert "superseded" in echo.story()


@pytest.mark.long
def test_two_deploys_at_the_same_moment(echo: Served) -> None:
    """Both are accepted; one of them wins, and says so of the other."""
    files = [echo.file("t1"), echo.file("t2")]
    both = [echo.stack.start_cli("service", "deploy", "-f", file, "--wait") for file in files]
    codes = []
    for child in both:
        child.communicate(timeout=READY_S)
        codes.append(child.returncode)
    assert sorted(codes) == [0, 10]
    winner = ("t1", "t2")[codes.index(0)]
    echo.until_rests(winner)


@pytest.mark.long
def test_a_broken_update_in_place_leaves_the_good_replicas(echo: Served) -> None:
    old = echo.version(primary(echo))
    with Traffic(echo, "--in-place") as traffic:
        done = echo.deploy("worse", "--in-place", mode="crash", code=10)
        assert "told to crash" in done.stderr, done.stderr
        echo.until_rests(old["name"])
        traffic.await_seconds(6)
    nothing_lost(traffic, old["name"])
    assert echo.version(old["name"])["clusters"][0]["cluster_id"] == old["clusters"][0]["cluster_id"]


@pytest.mark.long
def test_rollback_to_the_version_before(echo: Served) -> None:
    good = primary(echo)
    with Traffic(echo) as traffic:
        echo.deploy("r1")
        echo.until_rests("r1")
        echo.cli("rollback", echo.name)
        echo.until_rests(good)
        traffic.await_seconds(6)
    nothing_lost(traffic, good, "r1")


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "args"), [("hang", {}), ("slow", {"delay_s": 0.05}), ("crash", {})], ids=["hangs", "slow", "crashes"]
)
def test_other_broken_versions_go_back(echo: Served, mode: str, args: dict[str, Any]) -> None:
    good = primary(echo)
    with Traffic(echo, "--kinds", "get_fresh,get_kept,post", "--rate", "1.5") as traffic:
        rollout = {"steps": [20, 100], "hold_s": 30, "min_requests": 5, "keep_failed_s": 0, "drain_timeout_s": 5}
        echo.deploy(f"broken-{mode}", mode=mode, code=10, rollout=rollout, **args)
        echo.until_rests(good)
        traffic.await_seconds(3)
    report, bad = traffic.report, echo.version(f"broken-{mode}")
    if mode != "hang":  # slow is late, not lost, and what crashes at its start gets no request
        assert report.failed == 0, report.summary()
    assert all(f.version_id in ("", bad["id"]) for f in report.failures), report.summary()
    assert report.failed <= 0.2 * report.sent, report.summary()


@pytest.mark.long
def test_static_weights_of_three_versions(other: Served) -> None:
    files = [other.file(name) for name in ("a", "b", "c")]
    weights = [("a", 60), ("b", 30), ("c", 10)]
    said = json.dumps([{"name": n, "traffic_percent": w} for n, w in weights])
    other.cli("deploy", *(w for f in files for w in ("-f", f)), "--versions", said, "--wait", timeout=READY_S)
    with Traffic(other, "--kinds", "get_fresh,get_kept,post", "--rate", "2") as traffic:
        traffic.await_seconds(10)
        ids = {v["id"]: v["name"] for v in other.now["versions"]}
    nothing_lost(traffic, "a", "b", "c")
    report = traffic.report
    shares = {ids[v.version_id]: 100 * v.ok / report.ok for v in report.versions.values()}
    assert all(abs(shares[name] - weight) < 10 for name, weight in weights), shares
    said = json.dumps([{"name": "a", "traffic_percent": 100}, {"name": "b", "traffic_percent": 0}])
    other.cli("deploy", "-n", other.name, "--versions", said, "--wait", timeout=READY_S)
    other.until_rests("a")


@pytest.mark.long
def test_grpc_goes_the_same_way_and_no_call_fails_in_a_rollout(other: Served) -> None:
    grpc = {"grpc_options": {"grpc_servicer_functions": ["grpc_app.add_echo"]}}

    def application(version: str) -> dict[str, Any]:
        args = {"version": version}
        return grpc | {"applications": [{"import_path": "grpc_app:build", "probe": None, "args": args}]}

    other.deploy("g1", more=application("g1"))
    url, token = other.now["query_url"], other.now["query_auth_token"]
    assert code_of(url, None) == "UNAUTHENTICATED"
    assert code_of(url, "wrong") == "PERMISSION_DENIED"
    assert code_of(url, token) == "OK"
    with GrpcTraffic(url, token) as traffic:
        other.deploy("g2", more=application("g2"))
        other.until_rests("g2")
        time.sleep(3)  # a stream lasts 2 s
    assert not traffic.failures, traffic.failures[:5]
    assert set(traffic.answers) == {"g1", "g2"}
    assert other.version("g2")["traffic"]["requests"] > 0


@pytest.mark.long
def test_terminated_while_it_starts_leaves_nothing(other: Served) -> None:
    other.deploy("v1", wait=False)
    clusters = other.until(
        "its cluster", lambda s: [c for v in s["versions"] for c in v["clusters"] if c["cluster_id"]]
    )
    other.terminate()
    assert other.now["state"] == "TERMINATED"
    for cluster in clusters:
        other.stack.await_cluster(cluster["cluster_id"], "TERMINATED", "FAILED")
        for node in other.stack.nodes(cluster["cluster_id"]):
            assert not node["machine_id"] or not other.stack.node_processes(node["machine_id"])
    assert not other.balancer_processes()
    name, id = other.name, other.now["id"]
    other.cli("delete", name)
    assert name not in other.cli("list").stdout
    assert not (other.stack.home.path / "balancers" / id).exists()


@pytest.mark.long
def test_a_quiet_service_ends_when_asked_to_and_one_with_traffic_does_not(other: Served) -> None:
    other.deploy("v1", more={"idle_termination_minutes": 0.5})
    began = time.monotonic()
    while time.monotonic() - began < 60:
        assert other.ask().status_code == 200
        time.sleep(5)
    assert other.now["state"] == "RUNNING", "a request every 5 s is traffic"
    other.until("its end", lambda s: s["state"] == "TERMINATED")
    assert "request" in other.now["reason"] or "idle" in other.now["reason"], other.now["reason"]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_rollouts_in_a_row_lose_nothing(echo: Served) -> None:
    good = primary(echo)
    with Traffic(echo) as traffic:
        for number in range(20):
            echo.deploy(f"n{number}", rollout={"steps": [5, 10, 20, 30, 50, 75, 100], "hold_s": 1})
            echo.until_rests(f"n{number}")
            assert traffic.failed == 0, f"after rollout {number + 1}"
        traffic.await_seconds(6)
    nothing_lost(traffic, good, *(f"n{number}" for number in range(20)))


@pytest.mark.long
def test_the_shipped_examples_work(stack: Stack) -> None:
    for folder in ("serve_model", "serve_pipeline"):
        file = ROOT / "examples" / folder / "service.yaml"
        name = f"example-{folder.removeprefix('serve_')}"
        done = stack.cli("service", "deploy", "-f", str(file), "-n", name, "--wait", timeout=READY_S, cwd=file.parent)
        assert done.returncode == 0, done.stderr
        served = Served(stack, name)
        if folder == "serve_model":
            with Traffic(served, "--example") as traffic:
                traffic.await_seconds(5)
            assert traffic.report.failed == 0, traffic.report.summary()
        else:
            assert served.ask().status_code < 500
        served.terminate()
