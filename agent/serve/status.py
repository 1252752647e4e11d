"""Serve's status of a deploy, as ``ServeStatus`` (heliostat/models/agents.py)."""

from __future__ import annotations

import re
from typing import Any

from agent.runs.reasons import MAX_CHARS, summarize
from agent.serve.config import Deploy

MASK = "********"
SERVING_STATES = ("HEALTHY", "UPSCALING", "DOWNSCALING")
"""States in which a deployment serves, autoscaling included."""
_GENERIC = re.compile(r"Failed to update the deployments|The deployments \[.*\] are UNHEALTHY")
"""Serve's message on an application whose deployments have better ones."""
_MISSING = re.compile(r"Deployment '([^']+)' does not exist\. Available: \[([^\]]*)\]")


def mask(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    return text


def summarize_message(text: str, secrets: list[str]) -> str:
    """Serve's message in one line: its beginning, and the last line of its traceback."""
    text = mask(text.strip(), secrets)
    if re.search("runtime.?env", text, re.IGNORECASE) and "setup" in text:
        return summarize(text)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    first = re.sub(r"(This may be due to|See controller logs).*?\. ?", "", lines[0]).strip()
    # An exception's line starts at the margin; the frames above and the details below are indented.
    last = next((line.strip() for line in reversed(lines[1:]) if not line[0].isspace()), "")
    line = f"{first} {last}".strip() if last else first
    return line if len(line) <= MAX_CHARS else line[: MAX_CHARS - 1] + "…"


def missing_deployments(deploy: Deploy, details: dict[str, Any]) -> dict[str, set[str]]:
    """By application: deployments that the config names for the surge and the new code no longer has. Serve refuses the
    application because of them, and only once it has loaded the code."""
    missing: dict[str, set[str]] = {}
    for name, surged in deploy.surge.items():
        app = details["applications"].get(name) or {}
        found = _MISSING.search(str(app.get("message") or "")) if app.get("status") == "DEPLOY_FAILED" else None
        if found and found[1] in surged:
            missing[name] = surged - set(re.findall(r"'([^']+)'", found[2]))
    return missing


def serve_status(deploy: Deploy, details: dict[str, Any], node_id: str, addresses: tuple[str, str]) -> dict[str, Any]:
    """A dumped ServeStatus. ``node_id``: of this head (Ray 2.60 has the node's name in a proxy's ``node_ip``);
    ``addresses``: of the proxy, HTTP and gRPC."""
    apps = {name: _application(deploy, name, details["applications"].get(name)) for name in deploy.applications}
    proxy: dict[str, Any] = next(
        (p for p in (details.get("proxies") or {}).values() if p.get("node_instance_id") == node_id), {}
    )
    problems = [f"application {n} is {a['status']}" + (f": {a['message']}" if a["message"] else "")
                for n, a in apps.items() if not _is_healthy(a)]  # fmt: skip
    if proxy.get("status") != "HEALTHY":
        problems.append(f"the proxy is {proxy.get('status') or 'not started yet'}")
    return {
        "version_id": deploy.version_id,
        "deploy": deploy.id,
        "healthy": not problems,
        "failed": any(a["status"] == "DEPLOY_FAILED" for a in apps.values()),
        "message": "; ".join(problems)[: 4 * MAX_CHARS],
        "applications": apps,
        "http": addresses[0],
        "grpc": addresses[1],
    }


def _is_healthy(app: dict[str, Any]) -> bool:
    deployments = app["deployments"].values()
    return app["status"] == "RUNNING" and bool(deployments) and all(d["status"] in SERVING_STATES for d in deployments)


def _application(deploy: Deploy, name: str, app: dict[str, Any] | None) -> dict[str, Any]:
    if app is None:
        return {"status": "NOT_STARTED", "message": "Serve does not have it yet", "deployments": {}}
    if name in deploy.before and app.get("last_deployed_time_s") == deploy.before[name]:
        return {"status": "DEPLOYING", "message": "Serve has not started with it", "deployments": {}}
    deployments = {
        str(n): {
            "status": str(d.get("status")),
            "message": summarize_message(str(d.get("message") or ""), deploy.secrets),
            "replicas": sum(r.get("state") == "RUNNING" for r in d.get("replicas") or []),
        }
        for n, d in (app.get("deployments") or {}).items()
    }
    message = summarize_message(str(app.get("message") or ""), deploy.secrets)
    if not message or _GENERIC.match(message):
        own = [f"deployment {n} is {d['status']}" + (f": {d['message']}" if d["message"] else "")
               for n, d in deployments.items() if d["status"] not in SERVING_STATES]  # fmt: skip
        message = "; ".join(own) or message
    return {"status": str(app.get("status")), "message": message, "deployments": deployments}


def significant(status: dict[str, Any]) -> Any:
    """The part of a status whose change is reported. Without replica counts, which autoscaling changes every second,
    and without the states of healthy deployments."""
    apps = {n: a["status"] for n, a in status["applications"].items()}
    return [status[k] for k in ("version_id", "deploy", "healthy", "failed", "message")] + [apps]
