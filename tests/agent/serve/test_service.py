"""The agent's Serve side against a stand-in for Ray: deploys, status, probes, the gate's file, drains, reports."""

from __future__ import annotations

import hashlib
import json
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agent import processes
from agent.boot import Ports
from agent.constants import Constants
from agent.serve.config import fixed, refusal
from agent.serve.probe import Prober
from agent.serve.status import words
from heliostat.models.agents import ServeStatus, ServeTraffic
from tests.agent.conftest import AgentNode, Nodes, until
from tests.agent.control_plane import ControlPlane

SECRET = "s3cr3t-value-of-the-user"
HASH = hashlib.sha256(b"a token of the service's").hexdigest()
GATE = {"enabled": True, "hashes": [HASH]}
QUICK = {"serve_look_fast_s": 0.05, "serve_look_slow_s": 0.05, "serve_traffic_s": 0.2, "serve_probe_pause_s": 0.01,
         "serve_quiet_s": 0.2, "serve_gate_s": 30.0, "serve_put_s": 30.0, "serve_away_s": 0.5}  # fmt: skip


@pytest.fixture
def start(nodes: Nodes, fake_python: list[str]) -> Callable[..., AgentNode]:
    def begin(**more: Any) -> AgentNode:
        constants = QUICK | more.pop("constants", {})
        return nodes.start("nd_head", python=fake_python, service_id="svc_1", constants=constants, **more)

    return begin


def ask(node: AgentNode, what: str) -> None:
    (node.folder / f"fake-{what}").touch()


def stop_asking(node: AgentNode, what: str) -> None:
    (node.folder / f"fake-{what}").unlink()


def app(name: str = "default", **args: Any) -> dict[str, Any]:
    return {"name": name, "route_prefix": "/", "import_path": "m:app", "args": args,
            "runtime_env": {"env_vars": {"A": SECRET}}}  # fmt: skip


def give(plane: ControlPlane, version: str, *apps: dict[str, Any], gate: Any = GATE, **more: Any) -> dict[str, Any]:
    config = {"applications": list(apps) or [app()]} | more.pop("config", {})
    return plane.do("serve_deploy", service_id="svc_1", version_id=version, deploy=more.pop("deploy", f"dp_{version}"),
                    target_capacity=more.pop("target_capacity", None), gate=gate, config=config, **more)  # fmt: skip


def gate(node: AgentNode) -> dict[str, Any]:
    return dict(json.loads((node.folder / "serve" / "gate.json").read_text()))


def puts(node: AgentNode) -> list[dict[str, Any]]:
    return list(json.loads((node.folder / "fake-serve-puts.json").read_text()))


def proxy_says(node: AgentNode, **counters: Any) -> None:
    (node.folder / "fake-proxy.new").write_text(json.dumps(counters))
    (node.folder / "fake-proxy.new").rename(node.folder / "fake-proxy.json")


def application_says(node: AgentNode, **how: Any) -> None:
    (node.folder / "fake-application.new").write_text(json.dumps(how))
    (node.folder / "fake-application.new").rename(node.folder / "fake-application.json")


def probe(url: str, version: str = "sv_1", give_up_s: float = 20.0, **how: Any) -> dict[str, Any]:
    one = {"application": "default", "path": "/hello", "method": "GET", "timeout_s": 5} | how
    return {"url": url, "cluster_id": "cl_1", "version_id": version, "give_up_s": give_up_s, "probes": [one]}


def refused(plane: ControlPlane, url: str, **how: Any) -> dict[str, Any]:
    """Of a probe that no answer makes healthy. One that a busy machine gave no time for an answer is sent again."""

    def answered() -> dict[str, Any] | None:
        result = plane.do("serve_probe", **probe(url, give_up_s=1, **how))["result"]
        assert result["healthy"] is False
        said = result["applications"]["default"]["message"]
        return None if said.startswith(("not asked yet", "no answer within")) else result

    return dict(until(answered, 60, "an answer to a probe"))


def drain(plane: ControlPlane, timeout_s: float) -> dict[str, Any]:
    return dict(plane.result(plane.command("serve_drain", timeout_s=timeout_s))["result"]) | {"seconds": 0}


def test_a_deploy_is_completed_given_to_serve_and_its_health_is_told(start: Any, plane: ControlPlane) -> None:
    head = start()
    data = b"not a zip, which nobody here opens"
    sha = hashlib.sha256(data).hexdigest()
    plane.bucket[f"uploads/{sha}"] = data
    package = {"url": f"{plane.url}/bucket/uploads/{sha}?signature=x", "sha256": sha}
    one = app("one") | {"runtime_env": {"working_dir": package, "env_vars": {"A": SECRET}}}
    two = app("two") | {"route_prefix": "/two", "runtime_env": {"working_dir": {"remote": "https://x/y.zip"},
                                                               "py_modules": [package]}}  # fmt: skip
    config = {"http_options": {"request_timeout_s": 7}, "logging_config": {"log_level": "DEBUG"},
              "grpc_options": {"grpc_servicer_functions": ["m:add"]}}  # fmt: skip
    answer = give(plane, "sv_1", one, two, target_capacity=50, config=config)
    base = json.loads((head.folder / "fake-environ.json").read_text())["HELIOSTAT_SERVE_PORTS"].split(",")
    addresses = {"http": f"{head.ip}:{base[0]}", "grpc": f"{head.ip}:{base[1]}"}
    assert answer == {"ok": True, "result": addresses, "error": "", "retryable": False}
    [given] = puts(head)
    uri = given["applications"][0]["runtime_env"]["working_dir"]
    assert uri.startswith(f"http://{head.ip}:")
    assert uri.endswith(f"/packages/{sha}.zip")
    assert given["applications"][0]["runtime_env"]["env_vars"] == {"A": SECRET}
    assert given["applications"][1]["runtime_env"] == {"working_dir": "https://x/y.zip", "py_modules": [uri]}
    assert plane.gets == [f"uploads/{sha}"]
    assert given["proxy_location"] == "HeadOnly"
    assert given["http_options"] == {"host": head.ip, "port": int(base[0]), "request_timeout_s": 7,
                                     "keep_alive_timeout_s": 90}  # fmt: skip
    assert given["grpc_options"] == {"port": int(base[1]), "request_timeout_s": None, "grpc_servicer_functions": [
        "heliostat_serve_gate.guard_grpc", "heliostat_grpc:m_add"]}  # fmt: skip
    module = (head.folder / "provider" / "heliostat_grpc.py").read_text()
    assert f"sys.path += ['{head.folder}/packages/{sha}.zip/pkg']" in module
    assert "m_add = import_attr('m:add')" in module
    assert given["target_capacity"] == 50
    assert given["logging_config"] == {"log_level": "DEBUG"}
    fact = plane.fact("serve", healthy=True)["data"]
    status = ServeStatus.model_validate(fact)
    assert status.model_dump(mode="json") == fact
    assert (status.version_id, status.deploy, status.failed, status.message) == ("sv_1", "dp_sv_1", False, "")
    assert (status.http, status.grpc) == (addresses["http"], addresses["grpc"])
    assert status.applications["two"].deployments["Model"].replicas == 1
    assert SECRET not in head.log()


def test_the_gate_is_installed_before_ray_starts_and_its_file_is_private(start: Any, plane: ControlPlane) -> None:
    head = start()
    plane.fact("ray_ready")
    env = json.loads((head.folder / "fake-environ.json").read_text())
    assert env["PYTHONPATH"] == str(head.folder / "provider")
    assert env["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == "heliostat_serve_gate:middlewares"
    assert env["HELIOSTAT_SERVE_GATE"] == str(head.folder / "serve" / "gate.json")
    assert (head.folder / "provider" / "heliostat_serve_gate" / "__init__.py").exists()
    assert not (head.folder / "serve" / "gate.json").exists()
    give(plane, "sv_1")
    file = head.folder / "serve" / "gate.json"
    assert oct(file.stat().st_mode & 0o777) == "0o600"
    assert gate(head) | {"probe_hash": ""} == {
        "service_id": "svc_1", "version_id": "sv_1", "enabled": True, "hashes": [HASH], "probe_hash": "",
        "draining": False, "revision": 1,
    }  # fmt: skip
    probe_hash = gate(head)["probe_hash"]
    assert len(bytes.fromhex(probe_hash)) == 32
    assert plane.do("serve_gate", gate={"enabled": False, "hashes": []}, draining=False)["ok"]
    assert gate(head) == {"service_id": "svc_1", "version_id": "sv_1", "enabled": False, "hashes": [],
                          "probe_hash": probe_hash, "draining": False, "revision": 2}  # fmt: skip


def test_a_worker_of_a_service_gets_the_gate_too_and_other_clusters_get_nothing(
    nodes: Nodes, fake_python: list[str], plane: ControlPlane
) -> None:
    nodes.start("nd_head", python=fake_python, service_id="svc_1")
    worker = nodes.start("nd_w1", role="worker", group="w", python=fake_python, service_id="svc_1")
    plane.fact("ray_ready", node_id="nd_w1")
    env = json.loads((worker.folder / "fake-environ.json").read_text())
    assert (Path(env["PYTHONPATH"]) / "heliostat_serve_gate" / "__init__.py").exists()


def test_another_cluster_has_no_gate_and_no_serve_commands(
    nodes: Nodes, fake_python: list[str], plane: ControlPlane
) -> None:
    head = nodes.start("nd_head", python=fake_python)
    plane.fact("ray_ready")
    env = json.loads((head.folder / "fake-environ.json").read_text())
    assert not [k for k in env if k.startswith(("RAY_SERVE", "HELIOSTAT_SERVE", "PYTHONPATH"))]
    assert "knows no command" in plane.do("serve_gate", gate=GATE, draining=False)["error"]
    assert "serve" not in plane.nodes["nd_head"]["reports"][-1]


def test_ports_of_a_node_are_its_own() -> None:
    ports = Ports.of(20000)
    fixed_ones = [int(o.rpartition("=")[2]) for o in ports.options(head=True)]
    taken = [ports.gcs, ports.dashboard, ports.agent, *fixed_ones, *map(int, ports.environment().values())]
    assert {ports.serve_http, ports.serve_grpc}.isdisjoint(taken)
    assert {ports.serve_http, ports.serve_grpc} == {20012, 20013}
    assert (Ports.of(None).serve_http, Ports.of(None).serve_grpc) == (8000, 9000)


def test_an_update_in_place_surges_what_was_there_and_is_labelled_when_it_is_healthy(
    start: Any, plane: ControlPlane
) -> None:
    head = start()
    give(plane, "sv_1", app(deployments=["Model", "Front"]))
    plane.fact("serve", version_id="sv_1", healthy=True)
    two = app(deployments=["Model", "Front", "Fresh"], becomes="DEPLOYING") | {
        "deployments": [{"name": "Model", "num_replicas": 2}, {"name": "Fresh", "num_replicas": 1}]
    }
    assert give(plane, "sv_2", two)["ok"]
    assert puts(head)[-1]["applications"][0]["deployments"] == [
        {"name": "Model", "num_replicas": 2, "max_surge_percent": 100},
        {"name": "Fresh", "num_replicas": 1},
        {"name": "Front", "max_surge_percent": 100},
    ]
    fact = plane.fact("serve", version_id="sv_2")["data"]
    assert (fact["healthy"], fact["failed"]) == (False, False)
    assert gate(head)["version_id"] == "sv_1"
    # what people say themselves holds
    three = app(deployments=["Model", "Front"]) | {"deployments": [{"name": "Model", "max_surge_percent": 20}]}
    assert give(plane, "sv_3", three)["ok"]
    plane.fact("serve", version_id="sv_3", healthy=True)
    assert puts(head)[2]["applications"][0]["deployments"][0] == {"name": "Model", "max_surge_percent": 20}
    until(lambda: gate(head)["version_id"] == "sv_3")


def test_names_that_the_new_code_has_no_more_are_left_out_without_a_word(start: Any, plane: ControlPlane) -> None:
    head = start()
    give(plane, "sv_1", app(deployments=["Old", "Model", "Older"]))
    plane.fact("serve", version_id="sv_1", healthy=True)
    give(plane, "sv_2", app(deployments=["Model"]))
    plane.fact("serve", version_id="sv_2", healthy=True)
    assert not [f for f in plane.facts if f["kind"] == "serve" and f["data"]["failed"]]
    assert [[d["name"] for d in p["applications"][0].get("deployments", [])] for p in puts(head)] == [
        [], ["Model", "Old", "Older"], ["Model"]]  # fmt: skip
    # a name that the config itself has is its author's fault
    give(plane, "sv_3", app(deployments=["Model"]) | {"deployments": [{"name": "Nope"}]})
    fact = plane.fact("serve", version_id="sv_3", failed=True)["data"]
    assert "Deployment 'Nope' does not exist" in fact["message"]
    # the replicas of sv_2 are still there, though Serve shows none
    give(plane, "sv_4", app(deployments=["Model"]))
    assert puts(head)[-1]["applications"][0]["deployments"] == [{"name": "Model", "max_surge_percent": 100}]
    plane.fact("serve", version_id="sv_4", healthy=True)


def test_a_failed_deploy_says_why_without_its_secrets(start: Any, plane: ControlPlane) -> None:
    head = start()
    says = (
        "The deployment failed to start 3 times in a row. This may be due to a problem with its constructor or "
        "initial health check failing. See controller logs for details. Error:\nTraceback (most recent call last):\n"
        f'  File "m.py", line 1, in __init__\n    raise ValueError(x)\nValueError: wrong key {SECRET}\n'
    )
    give(plane, "sv_1", app(becomes="DEPLOY_FAILED", says=says))
    fact = plane.fact("serve", failed=True)["data"]
    assert fact["message"] == (
        "application default is DEPLOY_FAILED: deployment Model is DEPLOY_FAILED: The deployment failed to start 3 "
        "times in a row. Error: ValueError: wrong key ********"
    )
    assert SECRET not in json.dumps(plane.facts)
    assert SECRET not in head.log()
    ended = plane.do("serve_probe", **probe("http://127.0.0.1:1"))
    assert ended["result"]["healthy"] is False
    assert "Serve has given it up" in ended["result"]["message"]


def test_what_serve_refuses_is_final_and_named_without_its_secrets(start: Any, plane: ControlPlane) -> None:
    head = start()
    plane.fact("ray_ready")
    ask(head, "serve-refuses")
    answer = give(plane, "sv_1")
    assert (answer["ok"], answer["retryable"]) == (False, False)
    assert answer["error"] == ("Serve refuses the config. HTTP 400: applications.0.deployments.0.num_replicas: "
                               "Input should be a valid integer")  # fmt: skip
    assert SECRET not in head.log()
    stop_asking(head, "serve-refuses")
    assert give(plane, "sv_1")["ok"]
    other = give(plane, "sv_2", config={"http_options": {"request_timeout_s": 3}})
    assert (other["ok"], other["retryable"]) == (False, False)
    assert "can't change http_options.request_timeout_s" in other["error"]
    assert "no config of Serve's" in plane.do("serve_deploy", version_id="sv_3", gate=GATE, config={})["error"]


def test_serve_away_is_tried_again_then_retryable(start: Any, plane: ControlPlane) -> None:
    head = start(constants={"serve_put_s": 3.0})
    plane.fact("ray_ready")
    ask(head, "serve-fails")
    answer = give(plane, "sv_1")
    assert (answer["ok"], answer["retryable"]) == (False, True)
    assert len(puts(head)) >= 2


def test_serve_that_comes_back_in_time_is_given_what_it_did_not_take(start: Any, plane: ControlPlane) -> None:
    head = start()
    plane.fact("ray_ready")
    ask(head, "serve-fails")
    command = plane.command("serve_deploy", version_id="sv_1", deploy="dp_1", gate=GATE,
                            config={"applications": [app()]})  # fmt: skip
    until((head.folder / "fake-serve-puts.json").exists)
    stop_asking(head, "serve-fails")
    assert plane.result(command)["ok"]
    assert len(puts(head)) >= 2


def test_the_same_deploy_again_changes_nothing(start: Any, plane: ControlPlane) -> None:
    head = start()
    first = give(plane, "sv_1")
    again = give(plane, "sv_1", gate={"enabled": False, "hashes": []})
    assert again == first
    assert len(puts(head)) == 1
    assert gate(head)["enabled"] is False


def test_a_broken_dashboard_changes_nothing_but_the_message(start: Any, plane: ControlPlane) -> None:
    head = start()
    give(plane, "sv_1")
    plane.fact("serve", healthy=True)
    ask(head, "is-deaf")
    fact = plane.fact("serve", message="Ray's dashboard does not answer: this is how it was before")
    assert fact["data"]["healthy"] is True
    stop_asking(head, "is-deaf")
    plane.fact("serve", after=plane.facts.index(fact), healthy=True, message="")


def test_probes_go_through_the_url_to_this_head(start: Any, plane: ControlPlane) -> None:
    head = start()
    address = give(plane, "sv_1")["result"]["http"]
    answer = plane.do("serve_probe", **probe(f"http://{address}/"))
    assert answer["ok"]
    assert answer["result"]["healthy"] is True
    said = answer["result"]["applications"]["default"]
    assert (said["status"], said["message"]) == (200, "")
    assert said["ms"] > 0
    application_says(head, status=404)
    assert plane.do("serve_probe", **probe(f"http://{address}"))["result"]["healthy"] is True
    assert "HTTP 404 instead of 200" in refused(plane, f"http://{address}", expected_status=[200])["message"]
    application_says(head, status=500)
    assert refused(plane, f"http://{address}")["applications"]["default"]["status"] == 500
    application_says(head, version="sv_other")
    assert "came from version sv_other" in refused(plane, f"http://{address}")["message"]
    assert "the request failed: ConnectionRefusedError" in refused(plane, "http://127.0.0.1:9")["message"]


def test_what_an_application_answers_to_a_probe_is_told_without_its_secrets(start: Any, plane: ControlPlane) -> None:
    head = start()
    address = give(plane, "sv_1")["result"]["http"]
    application_says(head, status=500)
    echoed = f"/{'x' * 165}{SECRET}"  # the answer is cut within it
    for how in ({}, {"expected_status": [200]}):
        result = refused(plane, f"http://{address}", path=echoed, **how)
        assert "HTTP 500" in result["message"]
        assert "xxx***" in result["message"]
        assert SECRET[:4] not in json.dumps(result)
    assert SECRET not in head.log()


def test_a_probe_that_can_not_be_sent_is_a_failed_one(endpoint: Endpoint) -> None:
    for headers in ({"X-A": "1\n2"}, {"X-A": "\u20ac"}, {"X:A": "1"}):
        assert "the request failed: " in send_once(endpoint, headers=headers)
    assert "Error" in send_once(endpoint, path="/\u00e4")
    assert endpoint.seen == []


def test_a_newer_version_ends_the_probe_of_an_older_one(start: Any, plane: ControlPlane) -> None:
    start()
    give(plane, "sv_1", app(becomes="DEPLOYING"))
    old = plane.command("serve_probe", **probe("http://127.0.0.1:9", give_up_s=600))
    plane.fact("serve", version_id="sv_1")
    assert plane.commands[old]["result"] is None
    assert give(plane, "sv_2")["ok"]
    ended = plane.result(old)
    assert ended["ok"]
    assert ended["result"]["healthy"] is False
    assert "given version sv_2 meanwhile" in ended["result"]["message"]


def test_without_probes_serves_own_status_decides(start: Any, plane: ControlPlane) -> None:
    start()
    give(plane, "sv_1", config={"grpc_options": {"grpc_servicer_functions": ["m:add"]}})
    answer = plane.do("serve_probe", **(probe("http://127.0.0.1:9") | {"probes": []}))["result"]
    assert answer["healthy"] is True
    assert "Serve's status alone" in answer["message"]


def test_the_gate_is_waited_for_and_a_deaf_proxy_is_told(start: Any, plane: ControlPlane) -> None:
    head = start(constants={"serve_gate_s": 1.0, "serve_traffic_s": 10.0})
    plane.fact("ray_ready")
    assert plane.do("serve_gate", gate=GATE, draining=True) == {
        "ok": True, "result": {}, "error": "", "retryable": False}  # fmt: skip
    assert gate(head)["draining"] is True
    give(plane, "sv_1")
    assert gate(head)["draining"] is False
    ask(head, "proxy-is-deaf")
    answer = plane.do("serve_gate", gate=GATE, draining=False)
    assert (answer["ok"], answer["retryable"]) == (False, True)
    assert "the proxy does not answer" in answer["error"]
    stop_asking(head, "proxy-is-deaf")
    proxy_says(head, revision=1)
    assert "it follows revision 1 of" in plane.do("serve_gate", gate=GATE, draining=False)["error"]


def test_a_drain_waits_for_the_last_request_and_can_be_taken_back(start: Any, plane: ControlPlane) -> None:
    head = start(constants={"serve_traffic_s": 10.0})  # for so long the proxy may take to answer
    plane.fact("ray_ready")
    assert drain(plane, 0)["drained"] is True  # nothing was ever deployed
    give(plane, "sv_1")
    proxy_says(head, ongoing=1, connections=2)
    long = plane.command("serve_drain", timeout_s=600)
    until(lambda: gate(head)["draining"])
    assert drain(plane, 0.3) == {"drained": False, "ongoing": 1, "connections": 2, "seconds": 0}
    assert plane.commands[long]["result"] is None
    proxy_says(head, ongoing=0, connections=0)
    ended = plane.result(long)["result"]
    assert ended | {"seconds": 0} == {"drained": True, "ongoing": 0, "connections": 0, "seconds": 0}
    assert ended["seconds"] > 0.2
    proxy_says(head, ongoing=1, connections=1)
    revision = gate(head)["revision"]
    long = plane.command("serve_drain", timeout_s=600)
    until(lambda: gate(head)["revision"] > revision)
    assert plane.do("serve_gate", gate=GATE, draining=False)["ok"]
    assert plane.result(long)["result"]["drained"] is False


def test_a_command_that_newer_ones_have_overtaken_undoes_nothing_of_theirs(start: Any, plane: ControlPlane) -> None:
    """Each runs in a thread of its own: a deploy fetches packages for minutes before it writes the gate's file, and
    those that waited for an API that was away come all at once, in whatever order."""
    head = start()
    plane.fact("ray_ready")
    other = {"enabled": True, "hashes": [hashlib.sha256(b"the token in its place").hexdigest()]}
    assert give(plane, "sv_1", order=3)["ok"]
    assert plane.do("serve_gate", gate=other, draining=False, order=5)["ok"]
    assert give(plane, "sv_2", order=4)["ok"]
    plane.fact("serve", version_id="sv_2", healthy=True)
    assert gate(head) | {"revision": 0} == gate(head) | other | {"version_id": "sv_2", "revision": 0}
    late = give(plane, "sv_1", order=3, deploy="dp_late")
    assert (late["ok"], late["retryable"]) == (False, False)
    assert "superseded by a newer deploy" in late["error"]
    assert len(puts(head)) == 2
    proxy_says(head, ongoing=1, connections=1)
    assert plane.do("serve_gate", gate=other, draining=False, order=7)["ok"]
    ended = plane.result(plane.command("serve_drain", timeout_s=60, order=6))
    assert (ended["ok"], ended["result"]["drained"], gate(head)["draining"]) == (True, False, False)
    long = plane.command("serve_drain", timeout_s=60, order=9)
    until(lambda: gate(head)["draining"])
    assert plane.do("serve_gate", gate=GATE, draining=False, order=8)["ok"]
    assert gate(head)["draining"] is True
    assert plane.commands[long]["result"] is None
    proxy_says(head, ongoing=0, connections=0)
    assert plane.result(long)["result"]["drained"] is True


def test_reports_carry_the_proxys_counters_even_when_it_is_gone(start: Any, plane: ControlPlane) -> None:
    head = start()
    plane.fact("ray_ready")
    reports = plane.nodes["nd_head"]["reports"]
    assert all("serve" not in r for r in reports)
    give(plane, "sv_1")
    proxy_says(head, requests=5, errors=1)
    seen = plane.wait(
        lambda: next((s for r in reports if (s := r.get("serve")) and s["alive"] and s["requests"] == 5), None)
    )
    traffic = ServeTraffic.model_validate(seen)
    assert (traffic.version_id, traffic.errors) == ("sv_1", 1)
    assert "revision" not in seen
    ask(head, "proxy-is-deaf")
    gone = plane.wait(lambda: reports[-1]["serve"] if not reports[-1]["serve"]["alive"] else None)
    assert gone["requests"] == 5


def test_the_probe_token_is_on_no_disk_and_in_no_argument(start: Any, plane: ControlPlane) -> None:
    head = start()
    address = give(plane, "sv_1")["result"]["http"]
    plane.do("serve_probe", **probe(f"http://{address}"))
    wanted = gate(head)["probe_hash"]
    texts = [head.log(), json.dumps(plane.facts), json.dumps(plane.nodes["nd_head"]["reports"], default=str)]
    texts += [processes.command(p) for p in head.pids()]
    for text in texts:
        for word in text.replace('"', " ").split():
            assert hashlib.sha256(word.encode()).hexdigest() != wanted


# -- without an agent ---------------------------------------------------------------------------------------------


class Endpoint(ThreadingHTTPServer):
    """A load balancer with TLS and a certificate of its own that nobody vouches for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.seen: list[dict[str, str]] = []
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", folder / "key", "-out",
                        folder / "cert", "-days", "2", "-subj", "/CN=x"], check=True, capture_output=True)  # fmt: skip
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "cert", folder / "key")
        self.socket = context.wrap_socket(self.socket, server_side=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class _Answer(BaseHTTPRequestHandler):
    server: Endpoint
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append({k.lower(): v for k, v in self.headers.items()} | {"body": body.decode()})
        self.send_response(200)
        self.send_header("X-Heliostat-Version", "sv_1")
        if self.path == "/problem":
            self.send_header("Content-Type", "application/problem+json")
        if self.path == "/short":
            self.send_header("Content-Length", "1000")
            self.close_connection = True
        elif self.path != "/endless":
            self.send_header("Content-Length", "40")
        self.end_headers()
        self.wfile.write(b'{"type": "urn:heliostat:error:someth"}  ')
        if self.path == "/endless":
            self.wfile.flush()
            time.sleep(3)
            self.close_connection = True


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    endpoint = Endpoint(tmp_path)
    threading.Thread(target=endpoint.serve_forever, args=(0.05,), daemon=True).start()
    yield endpoint
    endpoint.shutdown()
    endpoint.server_close()


def send(endpoint: Endpoint, host: str = "127.0.0.1", **how: Any) -> dict[str, Any]:
    args = probe(f"https://{host}:{endpoint.server_address[1]}", method="POST", body="ping", **how)
    constants = Constants(serve_probe_pause_s=0.01, serve_probes_good=2)
    return Prober(args, "the token", constants, lambda: ("sv_1", True, False, ""), list).run()


def send_once(endpoint: Endpoint, host: str = "127.0.0.1", **how: Any) -> str:
    """What is said of the only request, which fails: at the second look Serve has given it up."""
    args = probe(f"https://{host}:{endpoint.server_address[1]}", method="POST", body="ping", **how)
    given_up = iter([False, True])
    prober = Prober(args, "the token", Constants(), lambda: ("sv_1", True, next(given_up), ""), list)
    result = prober.run()
    assert result["healthy"] is False
    return str(result["applications"]["default"]["message"])


def test_a_probe_over_tls_takes_an_addresses_own_certificate_and_checks_a_names(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert send(endpoint, headers={"X-A": "1", "Authorization": "Basic x"})["healthy"] is True
    assert len(endpoint.seen) == 2
    seen = endpoint.seen[0]
    assert (seen["x-heliostat-backend"], seen["authorization"], seen["x-a"], seen["body"]) == (
        "cl_1", "Bearer the token", "1", "ping")  # fmt: skip
    monkeypatch.setattr("socket.getaddrinfo", lambda host, port, *a, **k: [(2, 1, 6, "", ("127.0.0.1", port))])
    assert "CERTIFICATE_VERIFY_FAILED" in send_once(endpoint, host="service.example.org")


@pytest.mark.long
def test_a_probe_counts_whole_answers_endless_ones_and_no_gates_refusal(endpoint: Endpoint) -> None:
    assert send(endpoint, path="/endless")["healthy"] is True
    assert "IncompleteRead" in send_once(endpoint, path="/short")
    assert "a gate that is not this head's" in send_once(endpoint, path="/problem")


def test_serves_words_in_one_line() -> None:
    traceback = "Traceback (most recent call last):\n  File x\n    import y\nModuleNotFoundError: No module named 'y'\n"
    said = words(f"Deploying app 'd' failed with exception:\n{traceback}", [])
    assert said == "Deploying app 'd' failed with exception: ModuleNotFoundError: No module named 'y'"
    assert words("", []) == ""
    assert words(f"a {SECRET}!", [SECRET]) == "a ********!"
    assert len(words("x" * 5000, [])) == 500


def test_pydantics_words_without_what_was_given() -> None:
    text = ("2 validation errors for ServeDeploySchema\napplications.0.import_path\n  Field required [type=missing, "
            f"input_value={{'env_vars': {{'A': '{SECRET}'}}}}, input_type=dict]\n    For further information visit x\n"
            "applications\n  Value error, twice [type=value_error, input_value=[], input_type=list]\n")  # fmt: skip
    assert refusal(text) == "applications.0.import_path: Field required; applications: Value error, twice"
    assert refusal("Traceback\n  File\nValueError: no\n") == "ValueError: no"


def test_options_of_a_running_proxy_that_would_change_are_named() -> None:
    running = {"http_options": {"host": "h", "request_timeout_s": None, "root_path": ""}, "grpc_options": None}
    wanted = {"http_options": {"host": "h", "request_timeout_s": 3}, "grpc_options": {"port": 1}}
    assert fixed(running, wanted) == ["http_options.request_timeout_s"]
    assert fixed({}, wanted) == []
