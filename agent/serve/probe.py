"""Real requests by which a deploy shows that it is healthy: through the load balancer, back to this very head."""

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
from agent.serve import probe_grpc as serve_probe_grpc
from agent.serve.status import masked, words

VERSION_HEADER = "X-Heliostat-Version"
BACKEND_HEADER = "X-Heliostat-Backend"
GATES_OWN = "urn:heliostat:error:"
"""In every answer that a gate gives by itself. That to our own token comes from a gate of another head."""
BODY_MAX = 65_536
BODY_S = 2.0
"""So much of an answer is read, for so long: a stream that never ends has answered well enough by then."""


class Bad(Exception):
    """Not the answer that was wanted; says why."""


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
    message: str = "not asked yet"
    asked: bool = False

    def said(self) -> dict[str, Any]:
        return {"status": self.status, "ms": round(self.ms, 1), "message": self.message}


class Prober:
    """One ``serve_probe`` command. ``look``: (the version deployed here, healthy, failed, message) as of Serve.
    ``secrets``: of what is deployed here now; they and the token are masked in what an application says."""

    def __init__(
        self,
        args: dict[str, Any],
        token: str,
        constants: Constants,
        look: Callable[[], tuple[str, bool, bool, str]],
        secrets: Callable[[], list[str]],
    ) -> None:
        self._url = str(args["url"])
        self._version = str(args["version_id"])
        self._headers = {BACKEND_HEADER: str(args["cluster_id"]), "Authorization": f"Bearer {token}"}
        self._give_up_s = float(args["give_up_s"])
        self._targets = [Target(str(p["application"]), p) for p in args.get("probes") or []]
        self._constants = constants
        self._look = look
        self._secrets: Callable[[], list[str]] = lambda: [token, *secrets()]

    def run(self) -> dict[str, Any]:
        """The command's result. Requests count only once Serve itself says that this version is healthy: before, during
        an update in place, it is the old replicas that answer."""
        deadline = time.monotonic() + self._give_up_s
        if any(t.probe.get("grpc") for t in self._targets) and (why := serve_probe_grpc.missing()):
            return self._result(False, why)
        while True:
            version, healthy, failed, why = self._look()
            if version != self._version:
                return self._result(False, f"this head has been given version {version or 'none'} meanwhile")
            if failed:
                return self._result(False, f"Serve has given it up: {why}")
            if healthy:
                for target in self._targets:
                    left = deadline - time.monotonic()
                    if target.good < self._constants.serve_probes_good and left > 0:
                        self._try(target, left)
                waiting = [t for t in self._targets if t.good < self._constants.serve_probes_good]
                if not waiting:
                    alone = "" if self._targets else "by Serve's status alone: no application is probed"
                    return self._result(True, alone)
                why = "; ".join(f"application {t.application}: {t.message}" for t in waiting)
            if time.monotonic() >= deadline:
                return self._result(False, f"not healthy within {self._give_up_s:g} s: {why}")
            time.sleep(self._constants.serve_probe_pause_s)

    def _result(self, healthy: bool, message: str) -> dict[str, Any]:
        return {
            "healthy": healthy,
            "message": message,
            "applications": {t.application: t.said() for t in self._targets},
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
            if timeout < allowed and target.asked:
                target.status = before  # cut off by the end of our time: what was seen before says more
                return
            target.message = f"no answer within {timeout:.3g} s"
        except (OSError, http.client.HTTPException, ValueError) as error:  # the last: a header that can't be sent
            target.good, target.message = 0, f"the request failed: {masked(repr(error), self._secrets())[:500]}"
        except Bad as error:
            target.good, target.message = 0, str(error)
        else:
            target.good, target.message = target.good + 1, ""
        target.asked = True
        target.ms = (time.monotonic() - began) * 1000

    def _said(self, text: str) -> str:
        """The beginning of an answer. Masked before it is cut: of a secret that is cut, the rest would stand there."""
        return words(text, self._secrets())[:200]

    def _send(self, target: Target, timeout_s: float) -> None:
        """Over a connection of its own, as a new client. Raises Bad, OSError or HTTPException."""
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
                from_where = f"version {version}" if version else "something that is not this service's proxy"
                raise Bad(f"HTTP {answer.status} came from {from_where}: {self._said(text)}")
            if answer.headers.get_content_type() == "application/problem+json" and (not text or GATES_OWN in text):
                raise Bad(f"HTTP {answer.status} came from a gate that is not this head's, or not open yet")
            expected = [int(s) for s in probe.get("expected_status") or []]
            if expected and answer.status not in expected:
                wanted = " or ".join(map(str, expected))
                raise Bad(f"HTTP {answer.status} instead of {wanted}: {self._said(text)}")
            if not expected and answer.status >= 500:
                raise Bad(f"HTTP {answer.status}: {self._said(text)}")
        finally:
            connection.close()

    def _call(self, target: Target, timeout_s: float) -> None:
        """The same by gRPC. Raises Bad or OSError."""
        parts = urllib.parse.urlsplit(self._url)
        context = _tls(parts.hostname or "") if parts.scheme == "https" else None
        answer = serve_probe_grpc.ask(parts, self._headers, timeout_s, context)
        target.status = answer.number
        said = f"gRPC {answer.code}"
        if answer.version != self._version:
            from_where = f"version {answer.version}" if answer.version else "something that is not this service's proxy"
            raise Bad(f"{said} came from {from_where}: {self._said(answer.details)}")
        if answer.code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise Bad(f"{said} came from a gate that is not this head's, or not open yet")
        if answer.code != "OK":
            raise Bad(f"{said}: {self._said(answer.details)}")
        if not answer.body:
            raise Bad("Serve's gRPC proxy knows no application yet")


def _connection(parts: urllib.parse.SplitResult, timeout_s: float) -> http.client.HTTPConnection:
    """No proxy of the environment's: the load balancer is on this network."""
    host = parts.hostname or ""
    if parts.scheme != "https":
        return http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
    return http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=_tls(host))


def _tls(host: str) -> ssl.SSLContext:
    """For an address instead of a name the certificate is not checked: none is made out to it but the endpoint's own,
    generated one, and the token that is sent opens this head's gate alone. A name's certificate is checked as ever."""
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
    """The body, or as much of it as came until ``deadline``: who streams has answered. Raises when it breaks off."""
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
