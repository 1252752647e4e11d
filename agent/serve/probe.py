"""Probes: real requests that show whether a deploy is healthy, through the load balancer and back to this head."""

from __future__ import annotations

import http.client
import ipaddress
import ssl
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agent.constants import Constants
from agent.serve import probe_grpc
from agent.serve.status import mask, summarize_message

VERSION_HEADER = "X-Heliostat-Version"
BACKEND_HEADER = "X-Heliostat-Backend"
GATE_ERROR_TYPE = "urn:heliostat:error:"
"""In every answer that a gate gives itself. In an answer to this agent's token it means the gate of another head."""
BODY_MAX = 65_536
BODY_S = 2.0
"""A probe reads this much of an answer, for this long: an endless stream has answered by then."""


class UnexpectedAnswer(Exception):
    """Says what is wrong with an answer."""


@dataclass
class Target:
    application: str
    probe: dict[str, Any] = field(repr=False)
    """As in the command: ``path method body headers expected_status timeout_s``, or ``grpc timeout_s``."""
    good: int = 0
    """In a row."""
    status: int | None = None
    """HTTP's, or gRPC's."""
    ms: float = 0
    message: str = "not probed yet"
    probed: bool = False

    def result(self) -> dict[str, Any]:
        return {"status": self.status, "ms": round(self.ms, 1), "message": self.message}


class Prober:
    """One ``serve_probe`` command. ``health``: (the version deployed here, healthy, failed, message) as of Serve.
    ``secrets``: of the current deploy; they and the token are masked in an application's answers."""

    def __init__(
        self,
        args: dict[str, Any],
        token: str,
        constants: Constants,
        health: Callable[[], tuple[str, bool, bool, str]],
        secrets: Callable[[], list[str]],
    ) -> None:
        self._url = str(args["url"])
        self._version = str(args["version_id"])
        self._headers = {BACKEND_HEADER: str(args["cluster_id"]), "Authorization": f"Bearer {token}"}
        self._give_up_s = float(args["give_up_s"])
        self._targets = [Target(str(p["application"]), p) for p in args.get("probes") or []]
        self._constants = constants
        self._health = health
        self._secrets: Callable[[], list[str]] = lambda: [token, *secrets()]

    def run(self) -> dict[str, Any]:
        """The command's result. Requests count only once Serve calls this version healthy: before, during an in-place
        update, the old replicas answer."""
        deadline = time.monotonic() + self._give_up_s
        if any(t.probe.get("grpc") for t in self._targets) and (reason := probe_grpc.unavailable()):
            return self._result(False, reason)
        while True:
            version, healthy, failed, reason = self._health()
            if version != self._version:
                return self._result(False, f"this head now has version {version or 'none'}")
            if failed:
                return self._result(False, f"Serve has given the version up: {reason}")
            if healthy:
                for target in self._targets:
                    left = deadline - time.monotonic()
                    if target.good < self._constants.serve_probes_good and left > 0:
                        self._try(target, left)
                waiting = [t for t in self._targets if t.good < self._constants.serve_probes_good]
                if not waiting:
                    message = "" if self._targets else "by Serve's status only: the service has no probes"
                    return self._result(True, message)
                reason = "; ".join(f"application {t.application}: {t.message}" for t in waiting)
            if time.monotonic() >= deadline:
                return self._result(False, f"not healthy within {self._give_up_s:g} s: {reason}")
            time.sleep(self._constants.serve_probe_pause_s)

    def _result(self, healthy: bool, message: str) -> dict[str, Any]:
        return {
            "healthy": healthy,
            "message": message,
            "applications": {t.application: t.result() for t in self._targets},
        }

    def _try(self, target: Target, left_s: float) -> None:
        probe = target.probe
        allowed = float(probe.get("timeout_s") or 10)
        timeout = min(allowed, left_s)
        began = time.monotonic()
        before, target.status = target.status, None
        try:
            (self._call if target.probe.get("grpc") else self._send)(target, timeout)
        except TimeoutError:
            target.good = 0
            if timeout < allowed and target.probed:
                target.status = before  # cut off by the deadline: the result before says more
                return
            target.message = f"no answer within {timeout:.3g} s"
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an invalid header
            target.good, target.message = 0, f"the request failed: {mask(repr(error), self._secrets())[:500]}"
        except UnexpectedAnswer as error:
            target.good, target.message = 0, str(error)
        else:
            target.good, target.message = target.good + 1, ""
        target.probed = True
        target.ms = (time.monotonic() - began) * 1000

    def _excerpt(self, text: str) -> str:
        """The beginning of an answer. Masked before the cut, which could leave a part of a secret."""
        return summarize_message(text, self._secrets())[:200]

    def _send(self, target: Target, timeout_s: float) -> None:
        """Over a connection of its own, as a new client. Raises UnexpectedAnswer, OSError or HTTPException."""
        probe, parts = target.probe, urllib.parse.urlsplit(self._url)
        connection = _connection(parts, timeout_s)
        try:
            body = str(probe["body"]).encode() if probe.get("body") is not None else None
            headers = {str(k): str(v) for k, v in (probe.get("headers") or {}).items()} | self._headers
            path = parts.path.rstrip("/") + (str(probe.get("path") or "") or "/")
            connection.request(str(probe.get("method") or "GET"), path, body, headers)
            answer = connection.getresponse()
            target.status = answer.status
            text = _read(answer, connection, time.monotonic() + BODY_S)
            version = answer.headers.get(VERSION_HEADER)
            if version != self._version:
                from_where = f"version {version}" if version else "another server than this service's proxy"
                raise UnexpectedAnswer(f"HTTP {answer.status} came from {from_where}: {self._excerpt(text)}")
            is_problem = answer.headers.get_content_type() == "application/problem+json"
            if is_problem and (not text or GATE_ERROR_TYPE in text):
                raise UnexpectedAnswer(
                    f"HTTP {answer.status} came from another head's gate, or this head's gate is not open yet"
                )
            expected = [int(s) for s in probe.get("expected_status") or []]
            if expected and answer.status not in expected:
                statuses = " or ".join(map(str, expected))
                raise UnexpectedAnswer(f"HTTP {answer.status} instead of {statuses}: {self._excerpt(text)}")
            if not expected and answer.status >= 500:
                raise UnexpectedAnswer(f"HTTP {answer.status}: {self._excerpt(text)}")
        finally:
            connection.close()

    def _call(self, target: Target, timeout_s: float) -> None:
        """The same by gRPC. Raises UnexpectedAnswer or OSError."""
        parts = urllib.parse.urlsplit(self._url)
        context = _tls(parts.hostname or "") if parts.scheme == "https" else None
        answer = probe_grpc.ask(parts, self._headers, timeout_s, context)
        target.status = answer.number
        status = f"gRPC {answer.code}"
        if answer.version != self._version:
            from_where = f"version {answer.version}" if answer.version else "another server than this service's proxy"
            raise UnexpectedAnswer(f"{status} came from {from_where}: {self._excerpt(answer.details)}")
        if answer.code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise UnexpectedAnswer(f"{status} came from another head's gate, or this head's gate is not open yet")
        if answer.code != "OK":
            raise UnexpectedAnswer(f"{status}: {self._excerpt(answer.details)}")
        if not answer.body:
            raise UnexpectedAnswer("Serve's gRPC proxy has no application yet")


def _connection(parts: urllib.parse.SplitResult, timeout_s: float) -> http.client.HTTPConnection:
    """Without the environment's proxy: the load balancer is on this network."""
    host = parts.hostname or ""
    if parts.scheme != "https":
        return http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
    return http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=_tls(host))


def _tls(host: str) -> ssl.SSLContext:
    """The certificate of an IP address is not checked: only the endpoint's own, generated one can have it as its name,
    and the probe's token opens only this head's gate. A host name's certificate is checked as usual."""
    context = ssl.create_default_context()
    if _is_address(host):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


def _read(answer: http.client.HTTPResponse, connection: http.client.HTTPConnection, deadline: float) -> str:
    """The body, or its part until ``deadline``: a stream has answered by then. Raises when it breaks off."""
    found = b""
    while len(found) < BODY_MAX and (left := deadline - time.monotonic()) > 0:
        if connection.sock is not None:
            connection.sock.settimeout(left)
        try:
            piece = answer.read1(BODY_MAX)
        except TimeoutError:
            break
        if not piece:
            if answer.length:
                raise http.client.IncompleteRead(found, answer.length)
            break
        found += piece
    return found.decode(errors="replace")
