"""HTTP to the API: outbound only, keep-alive, one connection per thread."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import ssl
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any


class Unavailable(Exception):
    """The API did not answer, or answered 5xx or 429: repeat the call later."""


class Refused(Exception):
    """4xx: the API would refuse the same call again."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.code = str(problem.get("code") or "")
        text = " ".join(str(problem.get(k) or "") for k in ("detail", "remedy")).strip()
        super().__init__(f"HTTP {status} {self.code}: {text}"[:500])


class Gone(Exception):
    """410: this node has been ended or replaced."""


class Backoff:
    """Waiting times that double up to a cap, each with jitter (half of it is random)."""

    def __init__(self, base_s: float, cap_s: float) -> None:
        self._base, self._cap = base_s, cap_s
        self._failures = 0

    def next(self) -> float:
        delay = min(self._cap, self._base * 2.0 ** min(self._failures, 20))
        self._failures += 1
        return delay * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._failures = 0


class Http:
    """One keep-alive connection per thread to one origin. Every call through it is repeatable, so a call on a
    connection that the server has closed is repeated once on a new one."""

    def __init__(self, url: str, context: ssl.SSLContext | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        self._https = parts.scheme == "https"
        if self._https and context is None:
            context = ssl.create_default_context()
        self._context = context
        self._host, self._port = parts.hostname or "", parts.port
        self.path = parts.path.rstrip("/")
        self._local = threading.local()

    def request(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout_s: float
    ) -> tuple[int, bytes]:
        """Status and body. Raises OSError or http.client.HTTPException."""
        status, data, _ = self.ask(method, path, body, headers, timeout_s)
        return status, data

    def ask(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout_s: float
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        """``request`` with the answer's headers."""
        for attempt in (0, 1):
            connection, reused = self._connection(timeout_s)
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                return response.status, response.read(), response.headers
            except (http.client.HTTPException, OSError) as error:
                self.close()
                if attempt == 0 and reused and not isinstance(error, TimeoutError):
                    continue
                raise
        raise AssertionError  # both attempts return or raise

    def _connection(self, timeout_s: float) -> tuple[http.client.HTTPConnection, bool]:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is not None and connection.sock is not None:
            connection.sock.settimeout(timeout_s)
            return connection, True
        if self._https:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=self._context)
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        self._local.connection = connection
        return connection, False

    def close(self) -> None:
        """Of this thread."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.close()
            self._local.connection = None


class Channel:
    """Calls below ``<api>/agent/v1`` with this node's token. ``ca_file``: the only trusted CA, if set."""

    def __init__(self, api_url: str, ca_file: Path | None = None) -> None:
        self._http = Http(api_url, ssl.create_default_context(cafile=ca_file) if ca_file else None)
        self.token = ""
        self.last_contact = time.monotonic()
        """Time of the API's last successful answer to an authenticated call."""

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = 10.0) -> Any:
        """The answer's JSON (None for 204). Raises Unavailable, Refused, Gone."""
        headers = {"Accept": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        try:
            status, raw = self._http.request(method, f"{self._http.path}/agent/v1{path}", data, headers, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"{method} {path}: {error!r}") from None
        if status >= 500 or status == 429:
            raise Unavailable(f"{method} {path}: HTTP {status}")
        try:
            answer = json.loads(raw) if raw else None
        except ValueError:
            raise Unavailable(f"{method} {path}: HTTP {status} without JSON") from None  # a proxy's page, not the API's
        if status == 410:
            raise Gone(str((answer or {}).get("detail") or "the control plane has ended this node"))
        if status >= 400:
            raise Refused(status, answer if isinstance(answer, dict) else {})
        if status >= 300:
            raise Unavailable(f"{method} {path}: HTTP {status}; the API's address must not redirect")
        if self.token:
            self.last_contact = time.monotonic()
        return answer

    def close(self) -> None:
        self._http.close()
