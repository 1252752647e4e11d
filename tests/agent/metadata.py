"""The metadata services of AWS and Google Cloud, as far as the agent asks them: one server is both."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Metadata:
    """Turn what it says at any time."""

    def __init__(self) -> None:
        self.aws: dict[str, dict[str, str]] = {}
        """By path below ``meta-data/``; 404 for all others."""
        self.gcp = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.token = "t1"
        self.asked: list[str] = []
        self.changed = threading.Condition()
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.metadata = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def say(self, name: str, value: str) -> None:
        """On Google Cloud; who waits for it hears it."""
        with self.changed:
            self.gcp[name] = value
            self.changed.notify_all()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    metadata: Metadata

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # an agent ended while it waited


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, status: int, text: str, **headers: str) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:
        asked = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        if self.path != "/latest/api/token" or asked is None or not 1 <= int(asked) <= 21600:
            return self._answer(400, "")
        return self._answer(200, self.server.metadata.token)

    def do_GET(self) -> None:
        m, url = self.server.metadata, urlsplit(self.path)
        m.asked.append(self.path)
        if url.path.startswith("/latest/meta-data/"):
            if self.headers.get("X-aws-ec2-metadata-token") != m.token:
                return self._answer(401, "")
            found = m.aws.get(url.path.removeprefix("/latest/meta-data/"))
            return self._answer(404, "") if found is None else self._answer(200, json.dumps(found))
        if self.headers.get("Metadata-Flavor") != "Google":
            return self._answer(403, "")
        name = url.path.removeprefix("/computeMetadata/v1/instance/")
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        if name not in m.gcp:
            return self._answer(404, "")
        if query.get("wait_for_change") == "true":
            until = time.monotonic() + float(query["timeout_sec"])
            with m.changed:
                while f"etag-{m.gcp[name]}" == query["last_etag"] and (left := until - time.monotonic()) > 0:
                    m.changed.wait(left)
        return self._answer(200, m.gcp[name], ETag=f"etag-{m.gcp[name]}")
