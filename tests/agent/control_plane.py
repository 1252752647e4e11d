"""A small control plane for the agent's tests: the protocol of docs/agent-protocol.md with a bucket, in memory,
standard library only, with knobs for what goes wrong."""

from __future__ import annotations

import itertools
import json
import secrets
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ControlPlane:
    """``protocol``: what this control plane speaks. All attributes may be changed while it runs."""

    def __init__(self, protocol: int = 1) -> None:
        self.protocol = protocol
        self.changed = threading.Condition()
        self.nodes: dict[str, dict[str, Any]] = {}
        """By id: config, bootstrap, token, boot_id, ip, gone, reports."""
        self.listed: dict[str, dict[str, Any]] = {}
        """NodeBrief of workers, by id: what heads are told."""
        self.desired: dict[str, int] | None = None
        self.facts: list[dict[str, Any]] = []
        """Each once, with node_id and seen (monotonic)."""
        self.repeated_facts = 0
        self.commands: dict[str, dict[str, Any]] = {}
        self.results: list[tuple[str, dict[str, Any]]] = []
        self.bucket: dict[str, bytes] = {}
        self.puts: list[tuple[str, int]] = []
        self.gets: list[str] = []
        self.follow = False
        self.interval_s = 0.5
        self.on_fact: Callable[[dict[str, Any]], None] = lambda fact: None
        # knobs
        self.groups: list[dict[str, Any]] | None = None
        """Told to the head with each report's answer, as in ``ReportAnswer``."""
        self.down = False
        """Every connection is cut before it is heard."""
        self.failing = 0
        """So many calls are answered 503."""
        self.lose_answers = 0
        """So many calls are carried out, and their answer is lost."""
        self.slow_s = 0.0
        self.bucket_down = False
        self._seq = itertools.count(1)
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.plane = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    # -- what a test does ---------------------------------------------------------------------------------------

    def add_node(self, node_id: str, role: str = "head", group: str = "head", **config: Any) -> str:
        """Returns the bootstrap token."""
        answer = {
            "node_id": node_id, "cluster_id": "cl_1", "cluster_name": "test", "role": role, "group": group,
            "resources": {"CPU": 1}, "labels": {}, "ray_token": "0" * 64, "head_generation": 1, "groups": [],
            "desired": {}, "deadman_s": 600, "maximum_uptime_at": None, "report_interval_s": self.interval_s,
            "log_prefix": f"logs/cl_1/{node_id}",
        } | config  # fmt: skip
        bootstrap = secrets.token_hex(32)
        self.nodes[node_id] = {"config": answer, "bootstrap": bootstrap, "token": None, "boot_id": None, "gone": False,
                               "authenticated": False, "reports": [], "ip": "", "gcs_address": ""}  # fmt: skip
        return bootstrap

    def command(self, kind: str, _id: str | None = None, **args: Any) -> str:
        command_id = _id or f"cmd-{next(self._seq)}"
        with self.changed:
            self.commands[command_id] = {"id": command_id, "kind": kind, "args": args, "result": None}
            self.changed.notify_all()
        return command_id

    def wait(self, what: Callable[[], Any], timeout_s: float = 30.0, why: str = "") -> Any:
        """Until ``what()`` is true; its value. Raises AssertionError with ``why``."""
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while not (value := what()):
                left = deadline - time.monotonic()
                assert left > 0, (
                    f"not within {timeout_s} s: {why}; facts: {[(f['kind'], f['data']) for f in self.facts]}"
                )
                self.changed.wait(min(left, 0.5))
            return value

    def result(self, command_id: str, timeout_s: float = 60.0) -> dict[str, Any]:
        return self.wait(lambda: self.commands[command_id]["result"], timeout_s, f"result of {command_id}")

    def do(self, kind: str, timeout_s: float = 60.0, **args: Any) -> dict[str, Any]:
        return self.result(self.command(kind, **args), timeout_s)

    def fact(self, kind: str, /, timeout_s: float = 30.0, after: int = 0, **data: Any) -> dict[str, Any]:
        """The first fact of this kind (from index ``after`` on) whose data has these values."""

        def find() -> dict[str, Any] | None:
            for fact in self.facts[after:]:
                if fact["kind"] == kind and all(fact["data"].get(k) == v for k, v in data.items()):
                    return fact
            return None

        return self.wait(find, timeout_s, f"fact {kind} {data}")

    def objects(self) -> dict[str, bytes]:
        """What is in the bucket now; agents put more into it meanwhile."""
        with self.changed:
            return dict(self.bucket)

    def log(self, node_id: str, stream: str) -> bytes:
        prefix = f"logs/cl_1/{node_id}/{stream}/"
        parts = sorted((k, v) for k, v in self.objects().items() if k.startswith(prefix))
        text = b""
        for key, data in parts:
            assert int(key.removeprefix(prefix)) == len(text), f"chunks of {stream} do not meet"
            text += data
        return text


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    plane: ControlPlane

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # agents are killed in the middle of a call


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        plane = self.server.plane
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if plane.down:
            self.close_connection = True
            return
        time.sleep(plane.slow_s)
        path = urllib.parse.urlsplit(self.path)
        if path.path.startswith("/bucket/"):
            self._bucket(urllib.parse.unquote(path.path.removeprefix("/bucket/")), raw)
            return
        with plane.changed:
            if plane.failing > 0:
                plane.failing -= 1
                self._answer(503, {"code": "unavailable", "detail": "down for a test"})
                return
        status, body = self._agent(path.path.removeprefix("/agent/v1"), urllib.parse.parse_qs(path.query), raw)
        with plane.changed:
            plane.changed.notify_all()
            if plane.lose_answers > 0:
                plane.lose_answers -= 1
                self.close_connection = True
                return
        self._answer(status, body)

    do_GET = do_POST = do_PUT = _serve

    def _answer(self, status: int, body: Any) -> None:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True

    def _bucket(self, key: str, raw: bytes) -> None:
        plane = self.server.plane
        if plane.bucket_down:
            return self._answer(500, None)
        if self.command == "PUT":
            with plane.changed:
                plane.bucket[key] = raw
                plane.puts.append((key, len(raw)))
                plane.changed.notify_all()
            return self._answer(200, None)
        plane.gets.append(key)
        return self._answer(200, plane.bucket[key]) if key in plane.bucket else self._answer(404, None)

    def _agent(self, path: str, query: dict[str, list[str]], raw: bytes) -> tuple[int, Any]:
        plane = self.server.plane
        body = json.loads(raw) if raw else {}
        if path == "/register":
            node = plane.nodes.get(body["node_id"])
            if node is None or body["bootstrap_token"] != node["bootstrap"]:
                return 401, {"code": "unauthenticated", "detail": "wrong bootstrap token"}
            if node["gone"]:
                return 410, {"code": "gone", "detail": "ended"}
            if node["authenticated"] and body["boot_id"] != node["boot_id"]:
                return 403, {"code": "permission_denied", "detail": "registration is closed"}
            node |= {"token": secrets.token_hex(16), "boot_id": body["boot_id"], "ip": body["ip"], "register": body}
            return 200, node["config"] | {"node_token": node["token"]}
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        node_id = next((i for i, n in plane.nodes.items() if n["token"] == token), None)
        if node_id is None:
            return 401, {"code": "unauthenticated", "detail": "unknown node token"}
        node = plane.nodes[node_id]
        if node["gone"]:
            return 410, {"code": "gone", "detail": "ended by the test"}
        node["authenticated"] = True
        if path == "/report":
            return 200, self._report(node_id, node, body)
        if path == "/head":
            return self._head(float(query["wait"][0]))
        if path == "/commands":
            known = query.get("known", [""])[0].split(",")
            return 200, self._commands(float(query["wait"][0]), known, token)
        if path == "/logs/sign":
            prefix = node["config"]["log_prefix"]
            keys = [f"{prefix}/{i['stream']}/{i['offset']:020d}" for i in body["items"]]
            return 200, {"urls": [f"{plane.url}/bucket/{urllib.parse.quote(k)}?signature=x" for k in keys]}
        if path.startswith("/commands/") and path.endswith("/result"):
            command_id = path.split("/")[2]
            with plane.changed:
                plane.results.append((command_id, body))
                if plane.commands[command_id]["result"] is None:
                    plane.commands[command_id]["result"] = body
            return 204, None
        return 404, {"code": "not_found", "detail": path}

    def _report(self, node_id: str, node: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        plane = self.server.plane
        fresh = []
        with plane.changed:
            node["reports"].append(body | {"seen": time.monotonic()})
            node["gcs_address"] = body.get("gcs_address") or node["gcs_address"]
            known = {(f["node_id"], f["id"]) for f in plane.facts}
            for fact in body["facts"]:
                if (node_id, fact["id"]) in known:
                    plane.repeated_facts += 1
                else:
                    fresh.append(fact | {"node_id": node_id, "seen": time.monotonic()})
            plane.facts += fresh
        for fact in fresh:
            plane.on_fact(fact)
        answer: dict[str, Any] = {"interval_s": plane.interval_s, "acked": [f["id"] for f in body["facts"]]}
        if plane.protocol >= 1:
            answer["follow"] = plane.follow
        if node["config"]["role"] == "head":
            answer |= {"nodes": list(plane.listed.values()), "desired": plane.desired, "groups": plane.groups}
        if node["config"]["maximum_uptime_at"]:
            answer["maximum_uptime_at"] = node["config"]["maximum_uptime_at"]
        return answer

    def _head(self, wait_s: float) -> tuple[int, Any]:
        plane = self.server.plane
        deadline = time.monotonic() + wait_s
        with plane.changed:
            while time.monotonic() < deadline:
                for node in plane.nodes.values():
                    if node["config"]["role"] == "head" and node["gcs_address"]:
                        return 200, {"generation": 1, "gcs_address": node["gcs_address"]}
                plane.changed.wait(0.2)
        return 404, {"code": "not_found", "detail": "the head has not told its address yet"}

    def _commands(self, wait_s: float, known: list[str], token: str) -> dict[str, Any]:
        plane = self.server.plane
        deadline = time.monotonic() + wait_s
        with plane.changed:
            while True:
                unfinished = [c for c in plane.commands.values() if c["result"] is None]
                new = any(c["id"] not in known for c in unfinished)
                if (
                    new
                    or time.monotonic() >= deadline
                    or plane.down
                    or all(n["token"] != token for n in plane.nodes.values())
                ):
                    return {"commands": [{k: c[k] for k in ("id", "kind", "args")} for c in unfinished]}
                plane.changed.wait(min(0.5, wait_s))
