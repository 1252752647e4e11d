#!/usr/bin/env python3
"""Stands in for ``ray start --block`` where a test is about the agent and not about Ray: the same command line, the
same HTTP API as far as the agent uses it, real processes for jobs in sessions of their own, a child called
``raylet``. Behaviours are asked for by files in the node's directory (``fake-<what>``)."""

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
HERE = Path(OPTIONS["temp-dir"]).resolve().parent
TOKEN = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
LOGS = Path(OPTIONS["temp-dir"]) / "session_1" / "logs"
NODES: dict[str, dict] = {}
JOBS: dict[str, dict] = {}
PROCESSES: dict[str, subprocess.Popen] = {}
SUBMITS: list[dict] = []


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

    do_GET = do_POST = serve


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
        raylet.symlink_to("/bin/sleep")
    child = subprocess.Popen([str(raylet), "1000"])
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
