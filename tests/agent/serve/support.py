"""Commands to the head of a service, and what its stand-in for Ray is to do."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tests.agent.conftest import AgentNode, until
from tests.agent.control_plane import ControlPlane

SECRET = "s3cr3t-value-of-the-user"
HASH = hashlib.sha256(b"a token of the service's").hexdigest()
GATE = {"enabled": True, "hashes": [HASH]}
QUICK = {"serve_poll_fast_s": 0.05, "serve_poll_slow_s": 0.05, "serve_traffic_s": 0.2, "serve_probe_pause_s": 0.01,
         "serve_quiet_s": 0.2, "serve_gate_s": 30.0, "serve_put_s": 30.0, "serve_away_s": 0.5}  # fmt: skip


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
        return None if said.startswith(("not probed yet", "no answer within")) else result

    return dict(until(answered, 60, "an answer to a probe"))


def drain(plane: ControlPlane, timeout_s: float) -> dict[str, Any]:
    return dict(plane.result(plane.command("serve_drain", timeout_s=timeout_s))["result"]) | {"seconds": 0}
