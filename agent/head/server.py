"""The agent's own small HTTP server on the head's address: packages for this cluster's nodes, and the node
provider of Ray's autoscaler, which runs in a process of Ray's. It answers from memory and disk, so it works
while the control plane is unavailable.

A package's name is the hash of its content, so only who has the content knows it. Everything else needs the token in
the 0600 file that the provider reads.
"""

from __future__ import annotations

import hmac
import json
import logging
import shutil
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from agent.packages import SHA256, Packages
from agent.ray_node.autoscaler import Scaling

log = logging.getLogger("agent.head.server")
BODY_MAX = 2**20


class Server:
    """Listens from construction on. Raises OSError when the port is taken."""

    def __init__(
        self, ip: str, port: int, token: str, packages: Packages, scaling: Scaling | None,
        before_terminate: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        class Handler(_Handler):
            pass

        Handler.token, Handler.packages, Handler.scaling = token, packages, scaling
        Handler.before_terminate = staticmethod(before_terminate)
        self._http = _Http((ip, port), Handler)
        self.address = f"{ip}:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.2,), name="server", daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("the connection from %s broke", client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    token: str
    packages: Packages
    scaling: Scaling | None
    before_terminate: Callable[[], None]

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def do_GET(self) -> None:
        name = self.path.removeprefix("/packages/").removesuffix(".zip")
        if self.path.startswith("/packages/") and SHA256.fullmatch(name):
            return self._package(name)
        return self._provider(None)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if length > BODY_MAX:
            return self._answer(413, {"detail": "body too large"})
        try:
            body = json.loads(self.rfile.read(length) or b"{}")
        except ValueError:
            return self._answer(400, {"detail": "body is not JSON"})
        return self._provider(body)

    def _package(self, sha256: str) -> None:
        try:
            source = self.packages.path(sha256).open("rb")
        except FileNotFoundError:
            return self._answer(404, {"detail": "no such package on this head"})
        with source:
            size = source.seek(0, 2)
            source.seek(0)
            self.send_response(200)
            self.send_header("Content-Type", "application/zip")
            self.send_header("Content-Length", str(size))
            self.end_headers()
            if self.command != "HEAD":
                shutil.copyfileobj(source, self.wfile, 2**18)
        return None

    def _provider(self, body: dict[str, Any] | None) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            return self._answer(401, {"detail": "wrong token"})
        if self.scaling is None:
            return self._answer(404, {"detail": "this cluster has no worker groups"})
        if body is None and self.path == "/nodes":
            return self._answer(200, {"nodes": self.scaling.listed()})
        if body is not None and self.path == "/create":
            self.scaling.create(str(body["group"]), int(body["count"]), str(body.get("request") or ""))
            return self._answer(200, {})
        if body is not None and self.path == "/terminate":
            self.before_terminate()
            self.scaling.terminate([str(i) for i in body["ids"]])
            return self._answer(200, {})
        return self._answer(404, {"detail": "no such path"})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
