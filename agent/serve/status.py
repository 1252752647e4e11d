"""What Serve says of a deploy, in the words of ``ServeStatus`` (heliostat/models/agents.py)."""

from __future__ import annotations

import re
from typing import Any

from agent.runs.reasons import MAX_CHARS, short
from agent.serve.config import Deploy

MASK = "********"
WELL = ("HEALTHY", "UPSCALING", "DOWNSCALING")
"""A deployment's states in which it serves: autoscaling is no illness."""
_GENERAL = re.compile(r"Failed to update the deployments|The deployments \[.*\] are UNHEALTHY")
"""Serve's word on an application where the deployments' own say more."""
_MISSING = re.compile(r"Deployment '([^']+)' does not exist\. Available: \[([^\]]*)\]")


def masked(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    return text


def words(text: str, secrets: list[str]) -> str:
    """Serve's message in one line: how it begins, and the last line of its traceback."""
    text = masked(text.strip(), secrets)
    if re.search("runtime.?env", text, re.IGNORECASE) and "setup" in text:
        return short(text)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    first = re.sub(r"(This may be due to|See controller logs).*?\. ?", "", lines[0]).strip()
    # An exception's line begins at the margin; the frames above it and what it carries are indented.
    last = next((line.strip() for line in reversed(lines[1:]) if not line[0].isspace()), "")
    said = f"{first} {last}".strip() if last else first
    return said if len(said) <= MAX_CHARS else said[: MAX_CHARS - 1] + "…"


def not_there(deploy: Deploy, details: dict[str, Any]) -> dict[str, set[str]]:
    """By application: the deployments that we named for the surge and that the new code does not have any more. Serve
    refuses the application because of them, and says so only when it has loaded the code."""
    found: dict[str, set[str]] = {}
    for name, ours in deploy.surge.items():
        app = details["applications"].get(name) or {}
        said = _MISSING.search(str(app.get("message") or "")) if app.get("status") == "DEPLOY_FAILED" else None
        if said and said[1] in ours:
            found[name] = ours - set(re.findall(r"'([^']+)'", said[2]))
    return found


def read(deploy: Deploy, details: dict[str, Any], node_id: str, addresses: tuple[str, str]) -> dict[str, Any]:
    """A dumped ServeStatus. ``node_id``: ours, of this head (a proxy's ``node_ip`` holds the node's
    name in Ray 2.60); ``addresses``: of the proxy, HTTP and gRPC."""
    apps = {name: _application(deploy, name, details["applications"].get(name)) for name in deploy.applications}
    proxy: dict[str, Any] = next(
        (p for p in (details.get("proxies") or {}).values() if p.get("node_instance_id") == node_id), {}
    )
    why = [f"application {n} is {a['status']}" + (f": {a['message']}" if a["message"] else "")
           for n, a in apps.items() if not _well(a)]  # fmt: skip
    if proxy.get("status") != "HEALTHY":
        why.append(f"the proxy is {proxy.get('status') or 'not started yet'}")
    return {
        "version_id": deploy.version_id,
        "deploy": deploy.id,
        "healthy": not why,
        "failed": any(a["status"] == "DEPLOY_FAILED" for a in apps.values()),
        "message": "; ".join(why)[: 4 * MAX_CHARS],
        "applications": apps,
        "http": addresses[0],
        "grpc": addresses[1],
    }


def _well(app: dict[str, Any]) -> bool:
    deployments = app["deployments"].values()
    return app["status"] == "RUNNING" and bool(deployments) and all(d["status"] in WELL for d in deployments)


def _application(deploy: Deploy, name: str, said: dict[str, Any] | None) -> dict[str, Any]:
    if said is None:
        return {"status": "NOT_STARTED", "message": "Serve does not have it yet", "deployments": {}}
    if name in deploy.before and said.get("last_deployed_time_s") == deploy.before[name]:
        return {"status": "DEPLOYING", "message": "Serve has not begun with it", "deployments": {}}
    deployments = {
        str(n): {
            "status": str(d.get("status")),
            "message": words(str(d.get("message") or ""), deploy.secrets),
            "replicas": sum(r.get("state") == "RUNNING" for r in d.get("replicas") or []),
        }
        for n, d in (said.get("deployments") or {}).items()
    }
    message = words(str(said.get("message") or ""), deploy.secrets)
    if not message or _GENERAL.match(message):
        own = [f"deployment {n} is {d['status']}" + (f": {d['message']}" if d["message"] else "")
               for n, d in deployments.items() if d["status"] not in WELL]  # fmt: skip
        message = "; ".join(own) or message
    return {"status": str(said.get("status")), "message": message, "deployments": deployments}


def told_by(status: dict[str, Any]) -> Any:
    """What of a status matters: another value of this is told. Replica counts are not in it, autoscaling would tell
    them every second; nor are deployments' states while all is well."""
    apps = {n: a["status"] for n, a in status["applications"].items()}
    return [status[k] for k in ("version_id", "deploy", "healthy", "failed", "message")] + [apps]
