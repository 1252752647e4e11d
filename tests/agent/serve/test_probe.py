"""Probes by HTTP: of a head against a stand-in for Ray, and without an agent."""

from __future__ import annotations

import json
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agent.constants import Constants
from agent.serve.probe import Prober
from tests.agent.control_plane import ControlPlane
from tests.agent.serve.support import (
    SECRET,
    app,
    application_says,
    give,
    probe,
    refused,
)


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
    assert "this head now has version sv_2" in ended["result"]["message"]


def test_without_probes_serves_own_status_decides(start: Any, plane: ControlPlane) -> None:
    start()
    give(plane, "sv_1", config={"grpc_options": {"grpc_servicer_functions": ["m:add"]}})
    answer = plane.do("serve_probe", **(probe("http://127.0.0.1:9") | {"probes": []}))["result"]
    assert answer["healthy"] is True
    assert "Serve's status only" in answer["message"]


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
    """What is said of the only request, which fails: at the second poll Serve has given it up."""
    args = probe(f"https://{host}:{endpoint.server_address[1]}", method="POST", body="ping", **how)
    given_up = iter([False, True])
    prober = Prober(args, "the token", Constants(), lambda: ("sv_1", True, next(given_up), ""), list)
    result = prober.run()
    assert result["healthy"] is False
    return str(result["applications"]["default"]["message"])


def test_a_probe_that_can_not_be_sent_is_a_failed_one(endpoint: Endpoint) -> None:
    for headers in ({"X-A": "1\n2"}, {"X-A": "\u20ac"}, {"X:A": "1"}):
        assert "the request failed: " in send_once(endpoint, headers=headers)
    assert "Error" in send_once(endpoint, path="/\u00e4")
    assert endpoint.seen == []


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
    assert "another head's gate" in send_once(endpoint, path="/problem")
