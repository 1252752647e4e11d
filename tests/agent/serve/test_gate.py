"""The gate of a service's head against a stand-in for Ray: its file, changes of tokens, drains."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from agent import processes
from tests.agent.conftest import Nodes, until
from tests.agent.control_plane import ControlPlane
from tests.agent.serve.support import (
    GATE,
    HASH,
    ask,
    drain,
    gate,
    give,
    probe,
    proxy_says,
    puts,
    stop_asking,
)


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
    assert "does not support the command" in plane.do("serve_gate", gate=GATE, draining=False)["error"]
    assert "serve" not in plane.nodes["nd_head"]["reports"][-1]


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
