#!/usr/bin/env python3
"""Stands in for ``ray start --block`` where a test is about the agent and not about Ray: the same command line, the
same HTTP API as far as the agent uses it, real processes for jobs in sessions of their own, a child called
``raylet``. Behaviours are asked for by files in the node's directory (``fake-<what>``)."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

OPTIONS = {a[2:].partition("=")[0]: a.partition("=")[2] for a in sys.argv[1:] if a.startswith("--")}
if sys.argv[1] == "drain-node":
    Path(os.environ["HELIOSTAT_NODE_DIR"], "fake-drained.json").write_text(json.dumps(OPTIONS))
    sys.exit()
HERE = Path(OPTIONS["temp-dir"]).resolve().parent
TOKEN = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
LOGS = Path(OPTIONS["temp-dir"]) / "session_1" / "logs"
NODES: dict[str, dict] = {}
JOBS: dict[str, dict] = {}
PROCESSES: dict[str, subprocess.Popen] = {}
SUBMITS: list[dict] = []
SERVE: dict[str, dict] = {"applications": {}, "proxies": {}}
PUTS: list[dict] = []


def asked(what: str) -> bool:
    return (HERE / f"fake-{what}").exists()


def run_job(spec: dict) -> None:
    job = JOBS[spec["submission_id"]]
    log = LOGS / f"job-driver-{spec['submission_id']}.log"
    log.write_text("Runtime env is setting up.\n")
    time.sleep(0.1)
    if "broken==0" in spec["runtime_env"].get("pip", {}).get("packages", []):
        job |= {"status": "FAILED", "error_type": "RUNTIME_ENV_SETUP_FAILURE", "message": "runtime_env setup failed: "
                f"no matching distribution {spec['runtime_env']['env_vars']}"}  # fmt: skip
        return
    with log.open("ab") as out:
        process = PROCESSES[spec["submission_id"]] = subprocess.Popen(
            spec["entrypoint"], shell=True, stdout=out, stderr=out, start_new_session=True,
            env={**os.environ, **spec["runtime_env"].get("env_vars", {})},
        )  # fmt: skip
    job["status"] = "RUNNING"
    code = process.wait()
    if asked("forgets-the-driver"):
        return
    if job.get("stopping"):
        job |= {"status": "STOPPED", "message": "Job was intentionally stopped."}
    elif code == 0:
        job |= {"status": "SUCCEEDED", "driver_exit_code": 0, "message": "Job finished successfully."}
    else:
        job |= {"status": "FAILED", "driver_exit_code": code, "error_type": "JOB_ENTRYPOINT_COMMAND_ERROR",
                "message": f"failed with exit code {code}: " + log.read_text()[-500:]}  # fmt: skip


def serve_application(app: dict) -> dict:
    """Its code is what ``args`` says: ``deployments`` that it has, and after which time it turns out to be how."""
    says = app.get("args") or {}
    names = says.get("deployments", ["Model"])
    found = {"status": "DEPLOYING", "message": "", "last_deployed_time_s": time.time(), "deployed_app_config": app}
    missing = [d["name"] for d in app.get("deployments", []) if d["name"] not in names]
    if missing:
        return found | {"status": "DEPLOY_FAILED", "deployments": {}, "message": f"Unexpected error occurred while "
                        f"applying config for application '{app['name']}': \nTraceback (most recent call last):\n"
                        f"  File x\nValueError: Deployment '{missing[0]}' does not exist. Available: {names}\n"
                        }  # fmt: skip
    status, message = says.get("becomes", "RUNNING"), says.get("says", "")
    well = "HEALTHY" if status == "RUNNING" else "UPDATING" if status == "DEPLOYING" else status
    one = {"status": well, "message": message, "replicas": [{"state": "RUNNING"}] if status == "RUNNING" else []}
    general = f"Failed to update the deployments {names}." if status == "DEPLOY_FAILED" else ""
    return found | {"status": status, "message": general, "deployments": dict.fromkeys(names, one)}


class Proxy(BaseHTTPRequestHandler):
    """Serve's, with the gate's statistics; every other path is the application's."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if asked("proxy-is-deaf"):
            self.close_connection = True
            return None
        gate = json.loads(Path(os.environ["HELIOSTAT_SERVE_GATE"]).read_text())
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if hashlib.sha256(token.encode()).hexdigest() != gate["probe_hash"]:
            return self.answer(
                403,
                b'{"type": "urn:heliostat:error:permission_denied"}',
                Content_Type="application/problem+json",
                X_Heliostat_Version=gate["version_id"],
            )
        if self.path == "/-/heliostat":
            told = HERE / "fake-proxy.json"
            said = {"requests": 0, "ongoing": 0, "connections": 0} | (
                json.loads(told.read_text()) if told.exists() else {}
            )
            said = {k: gate[k] for k in ("version_id", "draining", "revision")} | said
            return self.answer(200, json.dumps(said).encode())
        app = HERE / "fake-application.json"
        says = json.loads(app.read_text()) if app.exists() else {}
        seen = {"path": self.path, "backend": self.headers.get("X-Heliostat-Backend")}
        return self.answer(
            says.get("status", 200),
            json.dumps(seen).encode(),
            X_Heliostat_Version=says.get("version", gate["version_id"]),
        )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body):
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def serve(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        path = urlsplit(self.path).path
        if path == "/join":
            NODES[body["node_id"]] = body
            return self.answer(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, "no token")
        if asked("is-deaf"):
            return self.answer(503, "deaf")
        if path == "/api/version":
            return self.answer(200, {"ray_version": "0.fake"})
        if path == "/api/v0/nodes":
            return self.answer(200, {"data": {"result": {"result": list(NODES.values())}}})
        if path == "/api/v0/actors":
            return self.answer(200, {"data": {"result": {"result": []}}})
        if path == "/api/component_activities":
            state = "ACTIVE" if asked("has-a-driver") else "INACTIVE"
            return self.answer(
                200, {"driver": {"is_active": state, "reason": "a driver" if state == "ACTIVE" else None}}
            )
        parts = path.strip("/").split("/")[2:]
        if path.startswith("/api/jobs"):
            return self.jobs(parts, body)
        if path == "/api/serve/applications/":
            return self.answer(200, SERVE) if self.command == "GET" else self.serve_put(body)
        return self.answer(404, "no such path")

    def jobs(self, parts, body):
        if self.command == "POST" and not parts:
            SUBMITS.append(body)
            (HERE / "fake-submits.json").write_text(json.dumps(SUBMITS))
            job_id = body["submission_id"]
            if job_id in JOBS:
                return self.answer(500, f"ValueError: Job with submission_id {job_id} already exists.")
            if asked("refuses"):
                return self.answer(400, "ValueError: bad spec")
            JOBS[job_id] = {"status": "PENDING", "driver_exit_code": None, "error_type": None, "message": ""}
            threading.Thread(target=run_job, args=(body,), daemon=True).start()
            if asked("loses-answers"):
                (HERE / "fake-loses-answers").unlink()
                self.close_connection = True
                return None
            return self.answer(200, {"submission_id": job_id})
        if not parts or parts[0] not in JOBS:
            return self.answer(404, "no such job")
        if len(parts) == 2:
            JOBS[parts[0]]["stopping"] = True
            if parts[0] in PROCESSES and not asked("ignores-stops"):
                os.killpg(PROCESSES[parts[0]].pid, signal.SIGTERM)
            return self.answer(200, {"stopped": True})
        return self.answer(200, JOBS[parts[0]])

    def serve_put(self, body):
        PUTS.append(body)
        (HERE / "fake-serve-puts.new").write_text(json.dumps(PUTS))
        (HERE / "fake-serve-puts.new").rename(HERE / "fake-serve-puts.json")
        if asked("serve-fails"):
            return self.answer(500, "Internal server error")
        if asked("serve-refuses"):
            env = next(iter(body["applications"][0]["runtime_env"]["env_vars"].values()))
            return self.answer(
                400,
                "1 validation error for ServeDeploySchema\napplications.0.deployments.0.num_replicas\n"
                f"  Input should be a valid integer [type=int_parsing, input_value={env!r}, "
                "input_type=str]\n    For further information visit https://errors.pydantic.dev/x",
            )
        if not SERVE["proxies"]:
            ip = OPTIONS["node-ip-address"]
            http = ThreadingHTTPServer((ip, body["http_options"]["port"]), Proxy)
            http.daemon_threads = True
            threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
            SERVE["proxies"] = {"n": {"node_instance_id": OPTIONS["node-name"], "status": "HEALTHY"}}
            SERVE.update(http_options=body["http_options"], grpc_options=body["grpc_options"])
        SERVE["applications"] = {a["name"]: serve_application(a) for a in body["applications"]}
        return self.answer(200, "")

    do_GET = do_POST = do_PUT = serve


def main() -> None:
    LOGS.mkdir(parents=True, exist_ok=True)
    latest = LOGS.parent.parent / "session_latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(LOGS.parent)
    (LOGS / "raylet.out").write_text("raylet says hello\n")
    print("fake ray starts", sys.argv[1:], flush=True)
    (HERE / "fake-environ.json").write_text(json.dumps(dict(os.environ)))
    raylet = HERE / "raylet"
    if not raylet.exists():
        raylet.symlink_to("/bin/sh")
    child = subprocess.Popen([str(raylet), "-c", "read x", "raylet", "--node_id=abc123"], stdin=subprocess.PIPE)
    signal.signal(signal.SIGTERM, lambda *_: (child.kill(), os._exit(0)))
    ip = OPTIONS["node-ip-address"]
    me = {"node_id": f"ray-{os.getpid()}", "node_name": OPTIONS["node-name"], "is_head_node": "head" in OPTIONS,
          "state": "ALIVE", "state_message": None, "resources_total": {"CPU": 1.0}}  # fmt: skip
    if "head" in OPTIONS:
        NODES[me["node_id"]] = me
        time.sleep(0.2)
        for port in (OPTIONS["port"], OPTIONS["dashboard-port"]):
            http = ThreadingHTTPServer((ip, int(port)), Handler)
            http.daemon_threads = True
            threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    else:
        request = urllib.request.Request(f"http://{OPTIONS['address']}/join", data=json.dumps(me).encode())
        urllib.request.urlopen(request, timeout=5)
    while not asked("dies"):
        time.sleep(0.05)
    print("SomeError: fake ray was asked to die", flush=True)
    child.kill()
    os._exit(7)


main()
